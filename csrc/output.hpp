// A file that is written: reserved on disk, filled from shards and from memory, made durable.
#pragma once

#include <cstdint>
#include <future>
#include <memory>
#include <string>

#include "shard.hpp"

namespace olmfast {

// Memory that a disk reads from directly: aligned, in huge pages where the system gives them, of size `n_bytes`.
class Stage {
 public:
  explicit Stage(uint64_t n_bytes);
  ~Stage();
  Stage(const Stage&) = delete;
  Stage& operator=(const Stage&) = delete;
  char* data() const { return data_; }

 private:
  char* map_;
  uint64_t mapped_;
  char* data_;
};

// What is written is gathered in a stage and goes to the disk past the page cache (O_DIRECT) where the file system
// allows it: new pages of the cache, and copying into them, cost more than a merge does. Meanwhile the next stage fills.
class Output {
 public:
  // Create (or empty) the file and reserve `n_bytes` on its disk. Throws FileError, at once if the disk is full.
  Output(std::string path, uint64_t n_bytes);

  ~Output();
  const std::string& path() const { return path_; }

  // Bytes that `room` gives at most.
  static constexpr uint64_t kRoomBytes = 4 << 20;

  // These throw std::out_of_range outside the file, and FileError, which may be of an earlier call.
  void write(uint64_t offset, const void* from, uint64_t n_bytes);
  // Memory for the bytes at `offset`, to be filled before the next call. `stage()` keeps it alive.
  char* room(uint64_t offset, uint64_t n_bytes);
  std::shared_ptr<Stage> stage() const { return stages_[current_]; }
  // Bytes of a shard, moved inside the kernel where the file systems allow it (copy_file_range, else sendfile),
  // else through a buffer. Returns the name of what was used.
  const char* copy(uint64_t offset, const Shard& shard, uint64_t source_offset, uint64_t n_bytes);

  // Wait until all bytes are on the disk, and close.
  void finish();

  // For tests: 0 tries copy_file_range first, 1 begins with sendfile, 2 with a buffer.
  int first_method = 0;
  // Whether the page cache is passed by. Tests set it to false, as a file system that refuses does.
  bool direct = true;

 private:
  void check_range(uint64_t offset, uint64_t n_bytes) const;
  void start_writeback(uint64_t offset, uint64_t n_bytes);
  bool set_direct(bool on);
  void write_out(const char* from, uint64_t offset, uint64_t n_bytes);
  void write_part(const char* from, uint64_t offset, uint64_t n_bytes, bool past_cache);
  void send(uint64_t n_bytes);
  void flush();
  void wait();
  uint64_t copy_in_kernel(int from, uint64_t offset, uint64_t source_offset, uint64_t n_bytes, bool send);
  uint64_t copy_by_buffer(const Shard& shard, int from, uint64_t offset, uint64_t source_offset, uint64_t n_bytes);
  [[noreturn]] void fail(const char* what, int code) const;

  std::string path_;
  uint64_t size_;
  Descriptor file_;
  std::shared_ptr<Stage> stages_[2];     // one is filled while the other is written
  int current_ = 0;
  uint64_t stage_begin_ = 0;             // offset of the stage's first byte in the file, a whole number of blocks
  uint64_t begin_ = 0, end_ = 0;         // what it holds, from its first byte
  std::future<void> pending_;            // the other's writing
  bool is_direct_ = false;               // how the file is opened at the moment
  const Shard* source_shard_ = nullptr;  // of `source_`: the last one copied from
  std::unique_ptr<Descriptor> source_;
};

// Make a folder's own entries (files created in it or renamed into it) durable.
void sync_folder(const std::string& path);

}  // namespace olmfast
