#include "shard.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <system_error>

#include "guard.hpp"

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif

namespace olmfast {

namespace {

constexpr uint64_t kPrefetchBytes = 1 << 20;
constexpr uint64_t kFaultBytes = 2 << 20;  // mapped at a fault at the most, around the page that is wanted

std::atomic<bool> releases{false};

void read_fully(const std::string& path, int fd, void* out, uint64_t n_bytes, uint64_t offset) {
  auto* to = static_cast<char*>(out);
  while (n_bytes) {
    ssize_t got = pread(fd, to, n_bytes, static_cast<off_t>(offset));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) throw FileError(errno, "cannot be read: " + system_text(errno), path);
    if (got == 0) throw FileError(EIO, "ended while its header was read", path);
    to += got;
    offset += static_cast<uint64_t>(got);
    n_bytes -= static_cast<uint64_t>(got);
  }
}

}  // namespace

void release_copied(bool on) { releases = on; }

bool releases_copied() { return releases; }

void release_pages(const Mapping& map, uint64_t begin, uint64_t n_bytes) {
  auto page = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  uint64_t end = std::min(begin + n_bytes + kFaultBytes, map.size());
  begin = (begin > kFaultBytes ? begin - kFaultBytes : 0) / page * page;
  madvise(const_cast<char*>(map.data()) + begin, end - begin, MADV_DONTNEED);
}

FileError::FileError(int number, const std::string& what, std::string name)
    : std::runtime_error(what), code(number), file(std::move(name)) {}

std::string system_text(int code) { return std::generic_category().message(code); }

Descriptor::Descriptor(const std::string& path, int flags, unsigned mode, const std::string& called)
    : fd_(::open(path.c_str(), flags | O_CLOEXEC, mode)) {
  if (fd_ < 0) throw FileError(errno, "cannot be opened: " + system_text(errno), called.empty() ? path : called);
}

Descriptor::~Descriptor() {
  if (fd_ >= 0) ::close(fd_);
}

void Descriptor::close(const std::string& path) {
  int fd = fd_;
  fd_ = -1;
  if (fd >= 0 && ::close(fd) != 0) throw FileError(errno, "cannot be closed: " + system_text(errno), path);
}

Mapping::Mapping(const std::string& path, int fd, uint64_t n_bytes) : size_(n_bytes) {
  void* at = mmap(nullptr, n_bytes, PROT_READ, MAP_SHARED | MAP_NORESERVE, fd, 0);
  if (at == MAP_FAILED) throw FileError(errno, "cannot be mapped: " + system_text(errno), path);
  data_ = static_cast<const char*>(at);
}

Mapping::~Mapping() { munmap(const_cast<char*>(data_), size_); }

Shard::Shard(std::string path) : path_(std::move(path)), place_(std::filesystem::absolute(path_)) {
  Descriptor file(path_, O_RDONLY | O_NONBLOCK);  // a pipe is refused below, not waited for
  struct stat status;
  if (fstat(file.get(), &status) != 0) throw FileError(errno, "cannot be read: " + system_text(errno), path_);
  if (!S_ISREG(status.st_mode)) throw FileError(EINVAL, "is no regular file", path_);
  opened_ = identify(status);
  size_ = opened_.size;
  if (size_ < kLengthBytes) {
    throw FormatError(path_ + ": " + std::to_string(size_) +
                      " bytes are too few for a safetensors file; download it again");
  }
  unsigned char first[kLengthBytes];
  read_fully(path_, file.get(), first, sizeof first, 0);
  uint64_t length = header_length(path_, first, size_);
  std::string text(length, '\0');
  read_fully(path_, file.get(), text.data(), length, kLengthBytes);
  header_ = parse_header(path_, text, size_);
  data_start_ = kLengthBytes + length;
}

Shard::Identity Shard::identify(const struct stat& status) {
  return {static_cast<uint64_t>(status.st_dev), static_cast<uint64_t>(status.st_ino),
          static_cast<uint64_t>(status.st_size),
          static_cast<int64_t>(status.st_mtim.tv_sec) * 1'000'000'000 + status.st_mtim.tv_nsec};
}

std::string Shard::difference(const Identity& now) const {
  if (now.device != opened_.device || now.inode != opened_.inode) return "was replaced while in use";
  if (now.size < opened_.size) {
    return "shrank from " + std::to_string(opened_.size) + " to " + std::to_string(now.size) +
           " bytes while in use";
  }
  if (now.size != opened_.size || now.modified_ns != opened_.modified_ns) return "was changed while in use";
  return {};
}

void Shard::check_unchanged() const {
  struct stat status;
  if (stat(place_.c_str(), &status) != 0) {
    throw FileError(errno, "is no longer there: " + system_text(errno), path_);
  }
  std::string what = difference(identify(status));
  if (!what.empty()) throw FileError(EIO, what, path_);
}

void Shard::explain_fault(uint64_t offset) const {
  std::string where = label(offset);
  try {
    check_unchanged();
  } catch (const FileError& error) {
    throw FileError(error.code, where + error.what(), path_);
  }
  throw FileError(EIO, where + "could not be read from its disk", path_);
}

std::unique_ptr<Descriptor> Shard::open_again() const {
  auto file = std::make_unique<Descriptor>(place_, O_RDONLY, 0, path_);
  struct stat status;
  if (fstat(file->get(), &status) != 0) throw FileError(errno, "cannot be read: " + system_text(errno), path_);
  std::string what = difference(identify(status));
  if (!what.empty()) throw FileError(EIO, what, path_);
  return file;
}

std::shared_ptr<const Mapping> Shard::mapping() const {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!mapping_) {
    auto file = open_again();
    mapping_ = std::make_shared<const Mapping>(path_, file->get(), size_);
    install_guard();
  }
  return mapping_;
}

void Shard::unmap() {
  std::lock_guard<std::mutex> lock(mutex_);
  mapping_.reset();
}

bool Shard::is_mapped() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return mapping_ != nullptr;
}

void Shard::check_range(uint64_t offset, uint64_t n_bytes) const {
  if (offset > size_ || n_bytes > size_ - offset) {
    throw std::out_of_range(path_ + ": bytes " + std::to_string(offset) + " to " + std::to_string(offset) + " + " +
                            std::to_string(n_bytes) + " lie outside the file of " + std::to_string(size_));
  }
}

std::string Shard::label(uint64_t offset) const {
  const auto& tensors = header_.tensors;
  if (offset < data_start_) return {};
  uint64_t at = offset - data_start_;
  auto found = std::upper_bound(tensors.begin(), tensors.end(), at,
                                [](uint64_t place, const Entry& entry) { return place < entry.end; });
  return found == tensors.end() ? std::string() : found->name + ": ";
}

void Shard::advise(uint64_t offset, uint64_t n_bytes, Advice advice) const {
  check_range(offset, n_bytes);
  if (!n_bytes) return;
  if (advice == Advice::load && releases) advice = Advice::prefetch;
  auto map = mapping();
  auto page = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  uint64_t begin = offset / page * page, end = offset + n_bytes;
  if (advice == Advice::release || advice == Advice::drop) {  // keep pages that are shared with neighbours
    begin = (offset + page - 1) / page * page;
    end = end == size_ ? end : end / page * page;
    if (begin >= end) return;
  }
  char* at = const_cast<char*>(map->data()) + begin;
  int how = advice == Advice::prefetch ? MADV_WILLNEED
            : advice == Advice::load   ? MADV_POPULATE_READ
                                       : MADV_DONTNEED;
  if (advice == Advice::prefetch) {  // the kernel starts no more than a few MiB per request
    for (uint64_t n = end - begin, step; n; n -= step, at += step) {
      step = std::min<uint64_t>(n, kPrefetchBytes);
      madvise(at, step, how);
    }
    return;
  }
  int result = madvise(at, end - begin, how);
  if (result != 0 && advice == Advice::load) {
    if (errno == EFAULT || errno == EHWPOISON) explain_fault(offset);
    madvise(at, end - begin, MADV_WILLNEED);  // a kernel before 5.14: the copy itself will fault the pages in
  }
  if (advice == Advice::drop) {
    posix_fadvise(open_again()->get(), static_cast<off_t>(begin), static_cast<off_t>(end - begin),
                  POSIX_FADV_DONTNEED);
  }
}

}  // namespace olmfast
