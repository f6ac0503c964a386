// Rows in AVX2, eight elements at a time by way of float32; the same values as convert.cpp, bit for bit.

#include "convert.hpp"

#if defined(__x86_64__)

#include <immintrin.h>

#include <cstdint>

#define AVX2 __attribute__((target("avx2,f16c")))
#define AVX2_INLINE AVX2 inline __attribute__((always_inline))

namespace olmfast {

namespace {

constexpr size_t kStep = 32;        // elements a turn; a whole number of 32-byte stores for every kind
constexpr size_t kAlignment = 32;
constexpr size_t kAhead = 1024;     // bytes

template <bool streams>
AVX2_INLINE void put(char* at, __m256i value) {
  if constexpr (streams) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(at), value);
  } else {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), value);
  }
}

AVX2_INLINE __m128i low_half(const char* at) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at)); }

template <Kind kind>
AVX2_INLINE __m256 load8(const char* at) {
  if constexpr (kind == Kind::bf16) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(low_half(at)), 16));
  } else if constexpr (kind == Kind::f16) {
    return _mm256_cvtph_ps(low_half(at));
  } else if constexpr (kind == Kind::f32) {
    return _mm256_loadu_ps(reinterpret_cast<const float*>(at));
  } else {
    const auto* doubles = reinterpret_cast<const double*>(at);
    return _mm256_set_m128(_mm256_cvtpd_ps(_mm256_loadu_pd(doubles + 4)),
                           _mm256_cvtpd_ps(_mm256_loadu_pd(doubles)));
  }
}

// The upper halves, rounded to nearest even; a NaN keeps its upper half and becomes quiet.
AVX2_INLINE __m256i bf16_of(__m256 value) {
  __m256i all = _mm256_castps_si256(value);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(all, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(all, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
  __m256i nan = _mm256_or_si256(all, _mm256_set1_epi32(0x400000));
  __m256 is_nan = _mm256_cmp_ps(value, value, _CMP_UNORD_Q);
  __m256 chosen = _mm256_blendv_ps(_mm256_castsi256_ps(rounded), _mm256_castsi256_ps(nan), is_nan);
  return _mm256_srli_epi32(_mm256_castps_si256(chosen), 16);
}

template <Kind kind, bool streams>
AVX2_INLINE void store16(char* at, __m256 first, __m256 second) {
  if constexpr (kind == Kind::bf16) {
    __m256i packed = _mm256_packus_epi32(bf16_of(first), bf16_of(second));
    put<streams>(at, _mm256_permute4x64_epi64(packed, 0xD8));
  } else if constexpr (kind == Kind::f16) {
    put<streams>(at, _mm256_set_m128i(_mm256_cvtps_ph(second, _MM_FROUND_TO_NEAREST_INT),
                                      _mm256_cvtps_ph(first, _MM_FROUND_TO_NEAREST_INT)));
  } else if constexpr (kind == Kind::f32) {
    put<streams>(at, _mm256_castps_si256(first));
    put<streams>(at + 32, _mm256_castps_si256(second));
  } else {
    put<streams>(at, _mm256_castpd_si256(_mm256_cvtps_pd(_mm256_castps256_ps128(first))));
    put<streams>(at + 32, _mm256_castpd_si256(_mm256_cvtps_pd(_mm256_extractf128_ps(first, 1))));
    put<streams>(at + 64, _mm256_castpd_si256(_mm256_cvtps_pd(_mm256_castps256_ps128(second))));
    put<streams>(at + 96, _mm256_castpd_si256(_mm256_cvtps_pd(_mm256_extractf128_ps(second, 1))));
  }
}

template <Kind from, Kind to, bool streams>
AVX2_INLINE void step(const char* source, char* target) {
  if constexpr (from == to) {
    for (size_t i = 0; i < kStep * 2; i += 32) {
      put<streams>(target + i, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + i)));
    }
  } else {
    for (size_t i = 0; i < kStep; i += 16) {
      const size_t f = from == Kind::f64 ? 8 : from == Kind::f32 ? 4 : 2;
      const size_t t = to == Kind::f64 ? 8 : to == Kind::f32 ? 4 : 2;
      store16<to, streams>(target + i * t, load8<from>(source + i * f), load8<from>(source + (i + 8) * f));
    }
  }
}

// `rest` moves the elements before the first aligned store and after the last whole step.
template <Kind from, Kind to, bool streams>
AVX2 void row(const char* source, char* target, size_t n) {
  static const ConvertRow rest = converter(from, to, true).row;
  const size_t f = width(from), t = width(to);
  if constexpr (streams) {
    size_t before = (kAlignment - reinterpret_cast<uintptr_t>(target) % kAlignment) % kAlignment / t;
    before = before < n ? before : n;
    rest(source, target, before);
    source += before * f, target += before * t, n -= before;
    if (reinterpret_cast<uintptr_t>(target) % kAlignment) return rest(source, target, n);  // not even by element
  }
  for (; n >= kStep; n -= kStep, source += kStep * f, target += kStep * t) {
    if constexpr (streams) _mm_prefetch(source + kAhead, _MM_HINT_T0);
    step<from, to, streams>(source, target);
  }
  rest(source, target, n);
  if constexpr (streams) _mm_sfence();
}

template <Kind from, Kind to>
void choose(Converter& chosen) {
  chosen.row = row<from, to, false>;
  chosen.stream = row<from, to, true>;
}

template <Kind from>
void choose_to(Kind to, Converter& chosen) {
  if (to == from) return;
  switch (to) {
    case Kind::bf16: return choose<from, Kind::bf16>(chosen);
    case Kind::f16: return choose<from, Kind::f16>(chosen);
    case Kind::f32: return choose<from, Kind::f32>(chosen);
    default: return choose<from, Kind::f64>(chosen);
  }
}

// Bytes past the caches; without a stream, memcpy is what to use.
template <Kind pairs>
void stream_bytes(const char* source, char* target, size_t n) {
  row<pairs, pairs, true>(source, target, n);
}

void stream1(const char* source, char* target, size_t n) {
  // As 16-bit elements, and the odd byte behind them.
  stream_bytes<Kind::bytes2>(source, target, n / 2);
  if (n % 2) target[n - 1] = source[n - 1];
}
void stream2(const char* source, char* target, size_t n) { stream1(source, target, n * 2); }
void stream4(const char* source, char* target, size_t n) { stream1(source, target, n * 4); }
void stream8(const char* source, char* target, size_t n) { stream1(source, target, n * 8); }

}  // namespace

void use_avx2(Kind from, Kind to, Converter& chosen) {
  static const bool have = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
  if (!have) return;
  if (from == to) {
    const size_t w = width(from);
    chosen.stream = w == 1 ? stream1 : w == 2 ? stream2 : w == 4 ? stream4 : stream8;
    return;
  }
  switch (from) {
    case Kind::bf16: return choose_to<Kind::bf16>(to, chosen);
    case Kind::f16: return choose_to<Kind::f16>(to, chosen);
    case Kind::f32: return choose_to<Kind::f32>(to, chosen);
    default: return choose_to<Kind::f64>(to, chosen);
  }
}

}  // namespace olmfast

#else

namespace olmfast {
void use_avx2(Kind, Kind, Converter&) {}
}  // namespace olmfast

#endif
