// Merges of tensors straight from their files: read, converted, combined in float32 and rounded, in one pass.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "convert.hpp"
#include "shard.hpp"
#include "strips.hpp"

namespace olmfast {

// Consecutive values in a file, or in the program's memory if there is no shard, and what is done to them first.
struct Operand {
  std::shared_ptr<const Shard> shard;
  uint64_t place = 0;            // of the first value: an offset in the file, or an address
  Kind kind = Kind::f32;
  Kind rounded = Kind::f32;      // bf16, f16: they are rounded to it
  float weight = 1;
  // Of a task vector. What is not larger in magnitude than `largest` is dropped; of the first `n_first` values, what is
  // not larger than `largest_first`. Negative: nothing is dropped.
  bool from_base = false;        // the base is subtracted
  uint64_t n_first = 0;
  float largest_first = -1, largest = -1;
  float scale = 1;               // times this, before the weight
};

// Where `n` values go: rounded to `rounded`, and then to `kind`.
struct Target {
  uint64_t n = 0;
  uintptr_t address = 0;
  uint64_t capacity = 0;         // bytes
  Kind kind = Kind::f32;
  Kind rounded = Kind::f32;
};

// How task vectors are added up.
struct Adding {
  bool signs = false;            // only what has the sign of the sum
  bool normalize = false;        // divided by the weights of what counts, or by `divisor` where all of it does
  float divisor = 1;
  float least = 0;               // a divisor of less than this counts as 1 more
  float scale = 1;
};

// (weight_0 * operand_0, then for each other: weight_i * operand_i + sum, rounded once) / divisor.
void combine(const std::vector<Operand>& operands, float divisor, const Target& target);

// base + scale * sum_i weight_i * scale_i * thinned(operand_i - base), by the rules of `adding`.
void combine_task_vectors(const Operand& base, const std::vector<Operand>& operands, const Adding& adding,
                          const Target& target);

// Weights of task vectors row by row.
struct RowWeights {
  uintptr_t address = 0;         // of float32 (operands, n_rows)
  uint64_t n_rows = 0;
  uint64_t row = 1;              // values in a row
  uint64_t first = 0;            // where in the tensor the first value of the target lies
};

// moving + sum_i weight_i[row] * (operand_i - base, if there is one), each product and sum rounded.
void combine_by_row(const Operand& moving, const Operand* base, const std::vector<Operand>& operands,
                    const RowWeights& weights, const Target& target);

// The magnitudes of operand - base (if there is one), as integers, counted; those between `low` and `high`.
struct Counted {
  Tally tally;
  std::vector<int32_t> between;
};
Counted count_magnitudes(const Operand& operand, const Operand* base, uint64_t n, int32_t low, int32_t high);

// Whether none of them is NaN or infinite.
bool all_finite(uintptr_t address, uint64_t n, Kind kind);

// All throw std::invalid_argument and std::out_of_range for what does not fit, and FileError for files that changed.

}  // namespace olmfast
