#include "output.hpp"

#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <system_error>
#include <vector>

namespace olmfast {

namespace {

constexpr uint64_t kStepBytes = 64 << 20;   // copied between two requests to start writing to disk
constexpr uint64_t kBufferBytes = 1 << 20;
constexpr uint64_t kBlockBytes = 4096;      // what is written past the cache begins and ends at a multiple of this
constexpr uint64_t kHugeBytes = 2 << 20;

// Errors by which a kernel or file system says that it cannot do it this way, not that it failed.
bool is_refusal(int code) {
  return code == EXDEV || code == EINVAL || code == ENOSYS || code == EOPNOTSUPP || code == EPERM || code == EBADF ||
         code == ETXTBSY || code == EOVERFLOW;
}

// Runs `work` on a thread of its own that no signal reaches: they are the caller's.
template <class Work>
std::future<void> aside(Work work) {
  sigset_t every, before;
  sigfillset(&every);
  pthread_sigmask(SIG_SETMASK, &every, &before);
  std::future<void> started;
  try {
    started = std::async(std::launch::async, work);
  } catch (const std::system_error&) {  // no more threads can be started
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  if (!started.valid()) work();
  return started;
}

}  // namespace

Stage::Stage(uint64_t n_bytes) : mapped_(n_bytes + kHugeBytes) {
  void* at = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED) throw std::bad_alloc();
  map_ = static_cast<char*>(at);
  data_ = map_ + (kHugeBytes - reinterpret_cast<uintptr_t>(at) % kHugeBytes) % kHugeBytes;
  madvise(data_, n_bytes / kHugeBytes * kHugeBytes, MADV_HUGEPAGE);
}

Stage::~Stage() { munmap(map_, mapped_); }

Output::Output(std::string path, uint64_t n_bytes)
    : path_(std::move(path)), size_(n_bytes), file_(path_, O_RDWR | O_CREAT | O_TRUNC, 0666) {
  if (!n_bytes) return;
  // Not posix_fallocate: where the file system cannot reserve, that one writes every block.
  while (fallocate(file_.get(), 0, 0, static_cast<off_t>(n_bytes)) != 0) {
    if (errno == EINTR) continue;
    if (errno != EOPNOTSUPP && errno != ENOSYS) {
      int code = errno;
      throw FileError(code, "cannot reserve " + std::to_string(n_bytes) + " bytes: " + system_text(code), path_);
    }
    if (ftruncate(file_.get(), static_cast<off_t>(n_bytes)) != 0) fail("cannot be given its size", errno);
    return;
  }
}

void Output::fail(const char* what, int code) const {
  throw FileError(code, std::string(what) + ": " + system_text(code), path_);
}

void Output::check_range(uint64_t offset, uint64_t n_bytes) const {
  if (offset > size_ || n_bytes > size_ - offset) {
    throw std::out_of_range(path_ + ": " + std::to_string(n_bytes) + " bytes at " + std::to_string(offset) +
                            " lie outside the file of " + std::to_string(size_));
  }
}

void Output::start_writeback(uint64_t offset, uint64_t n_bytes) {
  sync_file_range(file_.get(), static_cast<off_t>(offset), static_cast<off_t>(n_bytes), SYNC_FILE_RANGE_WRITE);
}

Output::~Output() {
  if (pending_.valid()) pending_.wait();
}

void Output::write(uint64_t offset, const void* from, uint64_t n_bytes) {
  check_range(offset, n_bytes);
  const auto* at = static_cast<const char*>(from);
  for (uint64_t step; n_bytes; at += step, offset += step, n_bytes -= step) {
    step = std::min(n_bytes, kRoomBytes);
    std::memcpy(room(offset, step), at, step);
  }
}

char* Output::room(uint64_t offset, uint64_t n_bytes) {
  check_range(offset, n_bytes);
  if (n_bytes > kRoomBytes) throw std::out_of_range(path_ + ": there is no room for so many bytes at once");
  if (offset != stage_begin_ + end_) {
    flush();
    stage_begin_ = offset / kBlockBytes * kBlockBytes;
    begin_ = end_ = offset - stage_begin_;
  }
  if (end_ + n_bytes > kBlockBytes + kRoomBytes) send(end_ / kBlockBytes * kBlockBytes);
  auto& stage = stages_[current_];
  if (!stage) stage = std::make_shared<Stage>(kBlockBytes + kRoomBytes);
  char* at = stage->data() + end_;
  end_ += n_bytes;
  return at;
}

// Hand the stage's first `n_bytes` over to be written, and go on in the other one with what is behind them.
void Output::send(uint64_t n_bytes) {
  wait();
  std::shared_ptr<Stage> full = stages_[current_];
  uint64_t begin = std::min(begin_, n_bytes), offset = stage_begin_, rest = end_ - n_bytes;
  current_ = 1 - current_;
  if (!stages_[current_]) stages_[current_] = std::make_shared<Stage>(kBlockBytes + kRoomBytes);
  std::memcpy(stages_[current_]->data(), full->data() + n_bytes, rest);
  begin_ = std::max(begin_, n_bytes) - n_bytes;
  end_ = rest;
  stage_begin_ += n_bytes;
  pending_ = aside([=] { write_out(full->data() + begin, offset + begin, n_bytes - begin); });
}

// Write what has been gathered, and wait for it.
void Output::flush() {
  wait();
  if (end_ > begin_) write_out(stages_[current_]->data() + begin_, stage_begin_ + begin_, end_ - begin_);
  stage_begin_ += end_;
  begin_ = end_ = 0;
}

void Output::wait() {
  if (pending_.valid()) pending_.get();  // throws what the writing threw
}

bool Output::set_direct(bool on) {
  if (on == is_direct_) return true;
  int flags = fcntl(file_.get(), F_GETFL);
  if (flags < 0 || fcntl(file_.get(), F_SETFL, on ? flags | O_DIRECT : flags & ~O_DIRECT) != 0) return false;
  is_direct_ = on;
  return true;
}

// Whole blocks past the cache, what is before and behind them through it. `from` lies in its block as `offset` does.
void Output::write_out(const char* from, uint64_t offset, uint64_t n_bytes) {
  uint64_t end = offset + n_bytes;
  uint64_t first = (offset + kBlockBytes - 1) / kBlockBytes * kBlockBytes, last = end / kBlockBytes * kBlockBytes;
  if (!direct || first >= last) return write_part(from, offset, n_bytes, false);
  write_part(from, offset, first - offset, false);
  write_part(from + (first - offset), first, last - first, true);
  write_part(from + (last - offset), last, end - last, false);
}

void Output::write_part(const char* at, uint64_t offset, uint64_t n_bytes, bool past_cache) {
  while (n_bytes) {
    direct = direct && (!past_cache || set_direct(true));
    past_cache = past_cache && direct;
    if (!past_cache && !set_direct(false)) fail("cannot be written", errno);
    ssize_t done = pwrite(file_.get(), at, n_bytes, static_cast<off_t>(offset));
    if (done < 0 && errno == EINTR) continue;
    if (done < 0 && past_cache && is_refusal(errno)) {
      direct = false;
      continue;
    }
    if (done <= 0) fail("cannot be written", done < 0 ? errno : ENOSPC);
    auto step = static_cast<uint64_t>(done);
    if (past_cache && step % kBlockBytes) past_cache = false;  // a disk that is almost full, say: the rest is told by it
    if (!past_cache && step >= kBufferBytes) start_writeback(offset, step);
    at += step;
    offset += step;
    n_bytes -= step;
  }
}

const char* Output::copy(uint64_t offset, const Shard& shard, uint64_t source_offset, uint64_t n_bytes) {
  static constexpr const char* kMethods[] = {"copy_file_range", "sendfile", "buffer"};
  check_range(offset, n_bytes);
  shard.check_range(source_offset, n_bytes);
  flush();
  if (!set_direct(false)) fail("cannot be written", errno);
  if (source_shard_ != &shard) {
    source_ = shard.open_again();
    source_shard_ = &shard;
  }
  int from = source_->get();
  int method = first_method;
  while (n_bytes) {
    uint64_t step = std::min(n_bytes, kStepBytes);
    uint64_t done = method == 2 ? copy_by_buffer(shard, from, offset, source_offset, step)
                                : copy_in_kernel(from, offset, source_offset, step, method == 1);
    if (done == 0) {
      // Some file systems answer 0 where they cannot: the next way finds out whether the file has really ended.
      if (method == 2) shard.explain_fault(source_offset);
      ++method;
      continue;
    }
    if (done >= kBufferBytes) start_writeback(offset, done);
    offset += done;
    source_offset += done;
    n_bytes -= done;
  }
  shard.check_unchanged();
  return kMethods[method];
}

// Bytes copied; 0 if this way is refused or the source has ended.
uint64_t Output::copy_in_kernel(int from, uint64_t offset, uint64_t source_offset, uint64_t n_bytes, bool send) {
  auto source = static_cast<off_t>(source_offset);
  auto target = static_cast<off_t>(offset);
  while (true) {
    ssize_t done;
    if (send) {
      if (lseek(file_.get(), target, SEEK_SET) < 0) fail("cannot be written", errno);
      done = sendfile(file_.get(), from, &source, n_bytes);
    } else {
      done = copy_file_range(from, &source, file_.get(), &target, n_bytes, 0);
    }
    if (done >= 0) return static_cast<uint64_t>(done);
    if (errno == EINTR) continue;
    if (is_refusal(errno) || errno == EIO) return 0;  // EIO: reading or writing? The buffer will tell
    fail("cannot be written", errno);
  }
}

uint64_t Output::copy_by_buffer(const Shard& shard, int from, uint64_t offset, uint64_t source_offset,
                                uint64_t n_bytes) {
  std::vector<char> buffer(std::min(n_bytes, kBufferBytes));
  while (true) {
    ssize_t got = pread(from, buffer.data(), buffer.size(), static_cast<off_t>(source_offset));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) shard.explain_fault(source_offset);
    write_part(buffer.data(), offset, static_cast<uint64_t>(got), false);
    return static_cast<uint64_t>(got);
  }
}

void Output::finish() {
  flush();
  source_.reset();
  source_shard_ = nullptr;
  while (fsync(file_.get()) != 0) {
    if (errno != EINTR) fail("cannot be made durable", errno);
  }
  file_.close(path_);
}

void sync_folder(const std::string& path) {
  Descriptor folder(path, O_RDONLY | O_DIRECTORY);
  if (fsync(folder.get()) != 0 && errno != EINVAL) {
    throw FileError(errno, "cannot be made durable: " + system_text(errno), path);
  }
}

}  // namespace olmfast
