#include "output.hpp"

#include <fcntl.h>
#include <sys/sendfile.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <vector>

namespace olmfast {

namespace {

constexpr uint64_t kStepBytes = 64 << 20;   // copied between two requests to start writing to disk
constexpr uint64_t kBufferBytes = 1 << 20;

// Errors by which a kernel or file system says that it cannot do it this way, not that it failed.
bool is_refusal(int code) {
  return code == EXDEV || code == EINVAL || code == ENOSYS || code == EOPNOTSUPP || code == EPERM || code == EBADF ||
         code == ETXTBSY || code == EOVERFLOW;
}

}  // namespace

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

void Output::write(uint64_t offset, const void* from, uint64_t n_bytes) {
  check_range(offset, n_bytes);
  const auto* at = static_cast<const char*>(from);
  while (n_bytes) {
    ssize_t done = pwrite(file_.get(), at, std::min(n_bytes, kStepBytes), static_cast<off_t>(offset));
    if (done < 0 && errno == EINTR) continue;
    if (done <= 0) fail("cannot be written", done < 0 ? errno : ENOSPC);
    auto step = static_cast<uint64_t>(done);
    if (step >= kBufferBytes) start_writeback(offset, step);
    at += step;
    offset += step;
    n_bytes -= step;
  }
}

const char* Output::copy(uint64_t offset, const Shard& shard, uint64_t source_offset, uint64_t n_bytes) {
  static constexpr const char* kMethods[] = {"copy_file_range", "sendfile", "buffer"};
  check_range(offset, n_bytes);
  shard.check_range(source_offset, n_bytes);
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
    write(offset, buffer.data(), static_cast<uint64_t>(got));
    return static_cast<uint64_t>(got);
  }
}

void Output::finish() {
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
