#include "convert.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "element.hpp"

namespace olmfast {

namespace {

template <Kind from, Kind to>
struct Change {
  static constexpr size_t kFrom = Element<from>::kWidth, kTo = Element<to>::kWidth;
  static OLMFAST_INLINE void one(const char* source, char* target) {
    Element<to>::write(target, Element<from>::read(source));
  }
  static OLMFAST_INLINE void row(const char* source, char* target, size_t n) {
    for (size_t i = 0; i < n; ++i) one(source + i * kFrom, target + i * kTo);
  }
};

template <class T>
struct Same {
  static constexpr size_t kFrom = sizeof(T), kTo = sizeof(T);
  static OLMFAST_INLINE void one(const char* source, char* target) { store(target, load<T>(source)); }
  static OLMFAST_INLINE void row(const char* source, char* target, size_t n) {
    std::memcpy(target, source, n * sizeof(T));
  }
};

template <class Move>
void move_row(const char* from, char* to, size_t n) {
  Move::row(from, to, n);
}

// In tiles, so that the lines a column touches stay in the nearest cache for the next one.
template <class Move>
void move_tiles(const char* from, char* to, size_t n_rows, size_t n_columns, size_t row_stride,
                size_t column_stride) {
  constexpr size_t kTile = 64;
  for (size_t column = 0; column < n_columns; column += kTile) {
    size_t last_column = std::min(column + kTile, n_columns);
    for (size_t row = 0; row < n_rows; row += kTile) {
      size_t last_row = std::min(row + kTile, n_rows);
      for (size_t c = column; c < last_column; ++c) {
        for (size_t r = row; r < last_row; ++r) {
          Move::one(from + (r * n_columns + c) * Move::kFrom, to + r * row_stride + c * column_stride);
        }
      }
    }
  }
}

template <class Move>
Converter portable() {
  return {move_row<Move>, move_row<Move>, move_tiles<Move>};
}

template <Kind from>
Converter portable_to(Kind to) {
  switch (to) {
    case Kind::bf16: return portable<Change<from, Kind::bf16>>();
    case Kind::f16: return portable<Change<from, Kind::f16>>();
    case Kind::f32: return portable<Change<from, Kind::f32>>();
    default: return portable<Change<from, Kind::f64>>();
  }
}

std::atomic<bool> always_portable{false};

Converter portable_converter(Kind from, Kind to) {
  if (from == to) {
    switch (width(from)) {
      case 1: return portable<Same<uint8_t>>();
      case 2: return portable<Same<uint16_t>>();
      case 4: return portable<Same<uint32_t>>();
      default: return portable<Same<uint64_t>>();
    }
  }
  switch (from) {
    case Kind::bf16: return portable_to<Kind::bf16>(to);
    case Kind::f16: return portable_to<Kind::f16>(to);
    case Kind::f32: return portable_to<Kind::f32>(to);
    default: return portable_to<Kind::f64>(to);
  }
}

}  // namespace

void use_portable(bool only) { always_portable = only; }

bool is_portable() { return always_portable; }

Converter converter(Kind from, Kind to, bool portable_only) {
  Converter chosen = portable_converter(from, to);
  if (!portable_only && !always_portable) use_avx2(from, to, chosen);
  return chosen;
}

}  // namespace olmfast
