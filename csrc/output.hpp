// A file that is written: reserved on disk, filled from shards and from memory, made durable.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "shard.hpp"

namespace olmfast {

class Output {
 public:
  // Create (or empty) the file and reserve `n_bytes` on its disk. Throws FileError, at once if the disk is full.
  Output(std::string path, uint64_t n_bytes);

  const std::string& path() const { return path_; }

  // Both throw std::out_of_range outside the file, and FileError.
  void write(uint64_t offset, const void* from, uint64_t n_bytes);
  // Bytes of a shard, moved inside the kernel where the file systems allow it (copy_file_range, else sendfile),
  // else through a buffer. Returns the name of what was used.
  const char* copy(uint64_t offset, const Shard& shard, uint64_t source_offset, uint64_t n_bytes);

  // Wait until all bytes are on the disk, and close.
  void finish();

  // For tests: 0 tries copy_file_range first, 1 begins with sendfile, 2 with a buffer.
  int first_method = 0;

 private:
  void check_range(uint64_t offset, uint64_t n_bytes) const;
  void start_writeback(uint64_t offset, uint64_t n_bytes);
  uint64_t copy_in_kernel(int from, uint64_t offset, uint64_t source_offset, uint64_t n_bytes, bool send);
  uint64_t copy_by_buffer(const Shard& shard, int from, uint64_t offset, uint64_t source_offset, uint64_t n_bytes);
  [[noreturn]] void fail(const char* what, int code) const;

  std::string path_;
  uint64_t size_;
  Descriptor file_;
  const Shard* source_shard_ = nullptr;  // of `source_`: the last one copied from
  std::unique_ptr<Descriptor> source_;
};

// Make a folder's own entries (files created in it or renamed into it) durable.
void sync_folder(const std::string& path);

}  // namespace olmfast
