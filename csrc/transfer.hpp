// Copies from mapped shards to memory of the program, checked, guarded and spread over threads.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
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

}  // namespace olmfast
