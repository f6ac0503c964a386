// One safetensors file: its checked header, and a read-only map of it that is made when bytes are first wanted.
#pragma once

#include <sys/stat.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>

#include "header.hpp"

namespace olmfast {

// Becomes Python's OSError(code, what, file).
struct FileError : std::runtime_error {
  FileError(int code, const std::string& what, std::string file);
  int code;
  std::string file;
};

// The text the system has for an errno value.
std::string system_text(int code);

// An open file descriptor, closed at the end of its life.
class Descriptor {
 public:
  // Errors name the file `called`, if that is not empty.
  Descriptor(const std::string& path, int flags, unsigned mode = 0, const std::string& called = {});
  ~Descriptor();
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int get() const { return fd_; }
  void close(const std::string& path);  // with its errors

 private:
  int fd_;
};

class Mapping {
 public:
  Mapping(const std::string& path, int fd, uint64_t n_bytes);
  ~Mapping();
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  const char* data() const { return data_; }
  uint64_t size() const { return size_; }

 private:
  const char* data_;
  uint64_t size_;
};

enum class Advice {
  prefetch,  // start reading from disk, and return at once
  load,      // read from disk and enter the pages into this process's map before returning
  release,   // take the pages out of this process; they may stay in the page cache
  drop,      // out of this process and, where nobody else uses them, out of the page cache
};

// Whether pages are taken out of this process once they have been copied; they may stay in the page cache. None are
// then entered before they are copied.
void release_copied(bool on);
bool releases_copied();
// Take the pages that bytes of a map were read from out of this process. Neighbours that go too are mapped again when
// they are read.
void release_pages(const Mapping& map, uint64_t begin, uint64_t n_bytes);

class Shard {
 public:
  // Reads and checks the header. Throws FormatError or FileError.
  explicit Shard(std::string path);

  const std::string& path() const { return path_; }
  uint64_t size() const { return size_; }
  int64_t modified_ns() const { return opened_.modified_ns; }
  uint64_t data_start() const { return data_start_; }
  const Header& header() const { return header_; }

  // The whole file, mapped read-only at the first call. Throws FileError if the file is no longer the same.
  std::shared_ptr<const Mapping> mapping() const;
  // Undo `mapping`; who still holds it keeps it alive.
  void unmap();
  bool is_mapped() const;

  // Throws std::out_of_range unless [offset, offset + n_bytes) lies in the file.
  void check_range(uint64_t offset, uint64_t n_bytes) const;
  // Throws FileError if the file was replaced, changed, truncated or removed since it was opened.
  void check_unchanged() const;
  // Throws the FileError that explains why reading at `offset` failed.
  [[noreturn]] void explain_fault(uint64_t offset) const;
  // Open the file again for reading. Throws FileError if it is no longer the same.
  std::unique_ptr<Descriptor> open_again() const;

  void advise(uint64_t offset, uint64_t n_bytes, Advice advice) const;
  // `<tensor>: ` for the tensor whose bytes lie at `offset`, or nothing.
  std::string label(uint64_t offset) const;

 private:
  struct Identity {
    uint64_t device, inode, size;
    int64_t modified_ns;
  };
  static Identity identify(const struct stat& status);
  std::string difference(const Identity& now) const;  // empty if there is none

  std::string path_;    // as it was given, for messages
  std::string place_;   // absolute: the process may change its folder
  uint64_t size_ = 0, data_start_ = 0;
  Identity opened_{};
  Header header_;
  mutable std::mutex mutex_;
  mutable std::shared_ptr<const Mapping> mapping_;
};

}  // namespace olmfast
