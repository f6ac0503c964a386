// Loops over float32 values, a strip at a time, in the widest instructions that this machine has.
//
// Every loop gives the same bits on every processor. NaN stays NaN.
#pragma once

#include <cstddef>
#include <cstdint>

namespace olmfast {

constexpr size_t kStrip = 4096;  // values: a few strips lie in a core's nearest cache

// How many keys are above `high`, at least that, above `low` and at least that.
struct Tally {
  uint64_t above = 0, from_high = 0, over = 0, from_low = 0;
};

struct Loops {
  void (*multiply)(float* x, float factor, size_t n);
  void (*divide)(float* x, float divisor, size_t n);
  void (*subtract)(float* x, const float* y, size_t n);
  void (*add)(float* x, const float* y, size_t n);
  // x = factor * y + x, rounded once.
  void (*add_multiple)(float* x, const float* y, float factor, size_t n);
  // What is not larger in magnitude becomes 0.
  void (*thin)(float* x, float largest, size_t n);
  // What agrees in sign with `sum` (+ where it is 0), as a magnitude, else 0, in `part`; then added to `total`, and the
  // weight of each that is not 0 to `weights`.
  void (*agree)(float* part, const float* sum, float weight, float* total, float* weights, size_t n);
  // x times the sign of `sum`.
  void (*sign)(float* x, const float* sum, size_t n);
  // x / weights, where a weight of less than `least` counts as 1 more.
  void (*divide_by)(float* x, const float* weights, float least, size_t n);
  // Magnitudes as integers; those between `low` and `high` are appended to `between`, which has room for n, and
  // their number is returned.
  size_t (*tally)(const float* x, int32_t low, int32_t high, size_t n, Tally& tally, int32_t* between);
  bool (*finite)(const float* x, size_t n);
};

// Those of this machine, unless `use_portable` of convert.hpp says otherwise.
const Loops& loops();

}  // namespace olmfast
