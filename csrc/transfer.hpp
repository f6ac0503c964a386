// Copies from mapped shards to memory of the program, checked, guarded and spread over threads.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "convert.hpp"
#include "shard.hpp"

namespace olmfast {

// One tensor (or a part of it that is contiguous in the file) and where its elements go.
struct Transfer {
  std::shared_ptr<const Shard> shard;
  uint64_t offset = 0;             // of the first byte, from the start of the file
  Kind from = Kind::bytes1;
  Kind to = Kind::bytes1;
  std::vector<uint64_t> shape;     // row-major in the file
  std::vector<uint64_t> strides;   // of the destination, in elements, one per dimension
  uintptr_t address = 0;           // of the destination's first element
  uint64_t capacity = 0;           // bytes that may be written from `address` on

  uint64_t n_elements() const;
  uint64_t n_bytes() const { return n_elements() * width(from); }

  // Throws std::invalid_argument or std::out_of_range unless source and destination lie within their bounds
  // and no two elements go to the same place.
  void check() const;
};

// Do all of them, in no particular order. The files are checked to be unchanged afterwards, so that values read
// from a file that was truncated inside its last page are not taken for its own. Throws FileError; some
// destinations may then hold part of the new values.
void run_transfers(const std::vector<Transfer>& transfers);

// Groups of transfers into buffers that are used in turns, done by the threads one after another without a pause:
// while one buffer is sent on, they fill those that are free. A group is begun once the one `n_buffers` before it is
// released. Destinations must live until the object is gone; whatever is not begun by then is left out.
class Filling {
 public:
  explicit Filling(size_t n_buffers);
  ~Filling();
  Filling(const Filling&) = delete;
  Filling& operator=(const Filling&) = delete;

  // The transfers of the next group.
  void add(std::vector<Transfer> transfers);

  // Returns when the oldest group that has not been waited for is there. Throws FileError as `run_transfers` does,
  // std::logic_error where there is none or its buffer has not been released.
  void wait();

  // The oldest buffer that has not been released may be overwritten. Throws nothing.
  void release();

  // Leaves out what has not been begun, and returns when nothing is written any more. Throws nothing.
  void close();

 private:
  struct Group;
  void fill();
  void do_pieces();
  bool is_ready() const;  // whether a piece may be begun; under the mutex

  const size_t n_buffers_;
  std::mutex mutex_;
  std::condition_variable begun_, filled_;
  std::deque<std::unique_ptr<Group>> groups_;  // not waited for yet
  std::deque<Group*> queued_;                  // with pieces that are not begun
  size_t n_added_ = 0, n_released_ = 0;
  bool is_over_ = false;
  std::thread thread_;
};

}  // namespace olmfast
