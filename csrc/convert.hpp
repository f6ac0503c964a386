// Moving elements from one place to another, converted on the way.
#pragma once

#include <cstddef>
#include <cstdint>

namespace olmfast {

enum class Kind : uint8_t {
  bytes1, bytes2, bytes4, bytes8,  // moved as they are
  bf16, f16, f32, f64,
};

inline size_t width(Kind kind) {
  switch (kind) {
    case Kind::bytes1: return 1;
    case Kind::bytes2: case Kind::bf16: case Kind::f16: return 2;
    case Kind::bytes4: case Kind::f32: return 4;
    default: return 8;
  }
}

inline bool is_float(Kind kind) { return kind >= Kind::bf16; }

// `n` elements, both sides contiguous. Neither side need be aligned.
using ConvertRow = void (*)(const char* from, char* to, size_t n);
// A matrix, contiguous rows on the source side; the destination's element (r, c) lies at byte
// r * row_stride + c * column_stride.
using ConvertMatrix = void (*)(const char* from, char* to, size_t n_rows, size_t n_columns, size_t row_stride,
                               size_t column_stride);

struct Converter {
  ConvertRow row;
  ConvertRow stream;     // the same past the caches: for more bytes than they hold
  ConvertMatrix tiles;
};

// The converter between two kinds, in the widest instructions that this machine has, unless `portable_only`.
// Both kinds are floats, or they are the same.
//
// Values are rounded once, to nearest, ties to even, as torch does: float64 reaches the 16-bit types through
// float32. NaN stays NaN, infinities and signed zeros stay, what is too large becomes infinity.
Converter converter(Kind from, Kind to, bool portable_only = false);

// For tests: let `converter` behave as on a machine without wide instructions.
void use_portable(bool only);
bool is_portable();

// Put AVX2 rows into `chosen` where this machine has them.
void use_avx2(Kind from, Kind to, Converter& chosen);

}  // namespace olmfast
