// One element of each floating-point kind, read as float32 and written from it. Rounded once, to nearest even.
#pragma once

#include <cstring>

#include "convert.hpp"

#define OLMFAST_INLINE inline __attribute__((always_inline))

namespace olmfast {

template <class To, class From>
OLMFAST_INLINE To bits(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To out;
  std::memcpy(&out, &value, sizeof out);
  return out;
}

template <class T>
OLMFAST_INLINE T load(const char* at) {
  T value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

template <class T>
OLMFAST_INLINE void store(char* at, T value) {
  std::memcpy(at, &value, sizeof value);
}

OLMFAST_INLINE float from_f16(uint16_t half) {
  constexpr uint32_t kExponent = 0x7C00u << 13;
  uint32_t magnitude = (half & 0x7FFFu) << 13;
  uint32_t exponent = magnitude & kExponent;
  uint32_t normal = magnitude + ((127u - 15u) << 23);
  uint32_t special = normal + ((128u - 16u) << 23);  // infinity and NaN
  // A subnormal: as a normal number with one exponent more, minus that number's leading one.
  float subnormal = bits<float>(normal + (1u << 23)) - bits<float>(113u << 23);
  uint32_t out = exponent == kExponent ? special : normal;
  out = exponent == 0 ? bits<uint32_t>(subnormal) : out;
  return bits<float>(out | (static_cast<uint32_t>(half & 0x8000u) << 16));
}

OLMFAST_INLINE uint16_t to_f16(float value) {
  constexpr uint32_t kInfinity = 255u << 23, kTooLarge = (127u + 16u) << 23, kSmallestNormal = 113u << 23;
  constexpr uint32_t kMagic = ((127u - 15u) + (23u - 10u) + 1u) << 23;
  uint32_t all = bits<uint32_t>(value);
  uint32_t sign = all & 0x80000000u;
  uint32_t magnitude = all ^ sign;
  uint32_t special = magnitude > kInfinity ? 0x7E00u : 0x7C00u;
  // The addition rounds a subnormal at the right bit.
  uint32_t subnormal = bits<uint32_t>(bits<float>(magnitude) + bits<float>(kMagic)) - kMagic;
  uint32_t normal = (magnitude + ((15u - 127u) << 23) + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  uint32_t out = magnitude < kSmallestNormal ? subnormal : normal;
  out = magnitude >= kTooLarge ? special : out;
  return static_cast<uint16_t>(out | (sign >> 16));
}

OLMFAST_INLINE uint16_t to_bf16(float value) {
  uint32_t all = bits<uint32_t>(value);
  uint32_t rounded = (all + 0x7FFFu + ((all >> 16) & 1u)) >> 16;
  uint32_t nan = (all >> 16) | 0x40u;
  return static_cast<uint16_t>((all & 0x7FFFFFFFu) > 0x7F800000u ? nan : rounded);
}

template <Kind kind>
struct Element;
template <>
struct Element<Kind::bf16> {
  static constexpr size_t kWidth = 2;
  static OLMFAST_INLINE float read(const char* at) {
    return bits<float>(static_cast<uint32_t>(load<uint16_t>(at)) << 16);
  }
  static OLMFAST_INLINE void write(char* at, float value) { store(at, to_bf16(value)); }
};
template <>
struct Element<Kind::f16> {
  static constexpr size_t kWidth = 2;
  static OLMFAST_INLINE float read(const char* at) { return from_f16(load<uint16_t>(at)); }
  static OLMFAST_INLINE void write(char* at, float value) { store(at, to_f16(value)); }
};
template <>
struct Element<Kind::f32> {
  static constexpr size_t kWidth = 4;
  static OLMFAST_INLINE float read(const char* at) { return load<float>(at); }
  static OLMFAST_INLINE void write(char* at, float value) { store(at, value); }
};
template <>
struct Element<Kind::f64> {
  static constexpr size_t kWidth = 8;
  static OLMFAST_INLINE float read(const char* at) { return static_cast<float>(load<double>(at)); }
  static OLMFAST_INLINE void write(char* at, float value) { store(at, static_cast<double>(value)); }
};

}  // namespace olmfast
