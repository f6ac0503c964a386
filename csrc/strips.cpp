#include "strips.hpp"

#include <algorithm>
#include <cmath>

#include "element.hpp"

namespace olmfast {

namespace {

// a * b + c, rounded once. Without an instruction for it: the product is exact in float64, and a sum that is inexact
// there is made odd, so that rounding it once more, to float32, gives what rounding once would have given.
template <bool has_instruction>
OLMFAST_INLINE float multiply_add(float a, float b, float c) {
  if constexpr (has_instruction) {
    return __builtin_fmaf(a, b, c);
  } else {
    const double product = static_cast<double>(a) * b, other = c, sum = product + other;
    const double back = sum - product;
    const double error = (product - (sum - back)) + (other - back);
    const auto all = bits<int64_t>(sum);
    const int64_t towards = (error > 0) == (sum > 0) ? 1 : -1;
    const bool inexact = error > 0 || error < 0;  // neither if it is NaN
    return static_cast<float>(bits<double>(inexact && !(all & 1) ? all + towards : all));
  }
}

OLMFAST_INLINE float sign_of(float value) { return bits<float>((bits<uint32_t>(value) & 0x80000000u) | 0x3F800000u); }

OLMFAST_INLINE int32_t key_of(float value) { return bits<int32_t>(value) & 0x7FFFFFFF; }

constexpr size_t kBlock = 64;  // keys that are looked at together

template <bool fma>
struct Bodies {
  static OLMFAST_INLINE void multiply(float* x, float factor, size_t n) {
    for (size_t i = 0; i < n; ++i) x[i] *= factor;
  }
  static OLMFAST_INLINE void divide(float* x, float divisor, size_t n) {
    for (size_t i = 0; i < n; ++i) x[i] /= divisor;
  }
  static OLMFAST_INLINE void subtract(float* __restrict x, const float* __restrict y, size_t n) {
    for (size_t i = 0; i < n; ++i) x[i] -= y[i];
  }
  static OLMFAST_INLINE void add(float* __restrict x, const float* __restrict y, size_t n) {
    for (size_t i = 0; i < n; ++i) x[i] += y[i];
  }
  static OLMFAST_INLINE void add_multiple(float* __restrict x, const float* __restrict y, float factor, size_t n) {
    for (size_t i = 0; i < n; ++i) x[i] = multiply_add<fma>(y[i], factor, x[i]);
  }
  static OLMFAST_INLINE void thin(float* x, float largest, size_t n) {
    for (size_t i = 0; i < n; ++i) x[i] = std::fabs(x[i]) <= largest ? 0.0f : x[i];
  }
  static OLMFAST_INLINE void agree(float* __restrict part, const float* __restrict sum, float weight,
                                   float* __restrict total, float* __restrict weights, size_t n) {
    for (size_t i = 0; i < n; ++i) {
      float value = part[i] * sign_of(sum[i]);
      value = value < 0 ? 0.0f : value;
      total[i] += value;
      weights[i] += value > 0 ? weight : 0.0f;
    }
  }
  static OLMFAST_INLINE void sign(float* __restrict x, const float* __restrict sum, size_t n) {
    for (size_t i = 0; i < n; ++i) x[i] *= sign_of(sum[i]);
  }
  static OLMFAST_INLINE void divide_by(float* __restrict x, const float* __restrict weights, float least, size_t n) {
    for (size_t i = 0; i < n; ++i) x[i] /= weights[i] + (std::fabs(weights[i]) < least ? 1.0f : 0.0f);
  }
  static OLMFAST_INLINE size_t tally(const float* x, int32_t low, int32_t high, size_t n, Tally& tally,
                                     int32_t* between) {
    size_t found = 0;
    for (size_t begin = 0; begin < n; begin += kBlock) {
      const size_t m = std::min(kBlock, n - begin);
      int32_t above = 0, from_high = 0, over = 0, from_low = 0;
      for (size_t i = 0; i < m; ++i) {
        const int32_t key = key_of(x[begin + i]);
        above += key > high;
        from_high += key >= high;
        over += key > low;
        from_low += key >= low;
      }
      tally.above += above, tally.from_high += from_high, tally.over += over, tally.from_low += from_low;
      if (over <= from_high) continue;  // low == high: fewer
      for (size_t i = 0; i < m; ++i) {
        const int32_t key = key_of(x[begin + i]);
        between[found] = key;
        found += (key > low) & (key < high);
      }
    }
    return found;
  }
  static OLMFAST_INLINE bool finite(const float* x, size_t n) {
    int32_t largest = 0;
    for (size_t i = 0; i < n; ++i) largest = std::max(largest, key_of(x[i]));
    return largest < 0x7F800000;
  }
};

// The bodies compiled for one kind of processor.
#define OLMFAST_LOOPS(name, attributes, fma)                                                                      \
  struct name {                                                                                                   \
    using B = Bodies<fma>;                                                                                        \
    attributes static void multiply(float* x, float f, size_t n) { B::multiply(x, f, n); }                        \
    attributes static void divide(float* x, float d, size_t n) { B::divide(x, d, n); }                            \
    attributes static void subtract(float* x, const float* y, size_t n) { B::subtract(x, y, n); }                 \
    attributes static void add(float* x, const float* y, size_t n) { B::add(x, y, n); }                           \
    attributes static void add_multiple(float* x, const float* y, float f, size_t n) { B::add_multiple(x, y, f, n); } \
    attributes static void thin(float* x, float largest, size_t n) { B::thin(x, largest, n); }                    \
    attributes static void agree(float* p, const float* s, float w, float* t, float* ws, size_t n) {              \
      B::agree(p, s, w, t, ws, n);                                                                                \
    }                                                                                                             \
    attributes static void sign(float* x, const float* s, size_t n) { B::sign(x, s, n); }                         \
    attributes static void divide_by(float* x, const float* w, float l, size_t n) { B::divide_by(x, w, l, n); }   \
    attributes static size_t tally(const float* x, int32_t l, int32_t h, size_t n, Tally& t, int32_t* b) {        \
      return B::tally(x, l, h, n, t, b);                                                                          \
    }                                                                                                             \
    attributes static bool finite(const float* x, size_t n) { return B::finite(x, n); }                           \
    static constexpr Loops all = {multiply, divide, subtract, add,   add_multiple, thin,                          \
                                  agree,    sign,   divide_by, tally, finite};                                    \
  };

#if defined(__FP_FAST_FMAF)
OLMFAST_LOOPS(Portable, , true)
#else
OLMFAST_LOOPS(Portable, , false)
#endif

#if defined(__x86_64__)
OLMFAST_LOOPS(Avx2, __attribute__((target("avx2,fma"))), true)
#endif

}  // namespace

const Loops& loops() {
#if defined(__x86_64__)
  static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && !is_portable()) return Avx2::all;
#endif
  return Portable::all;
}

}  // namespace olmfast
