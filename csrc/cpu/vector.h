// Vectors of the numbers that are computed with, as wide as the registers of the instruction set.
//
// A span says how many channels from a pointer on are meant: all lanes, or the last few of a row.
// Lanes beyond those are zero when loaded, and are not stored.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "../dtypes.h"

// For lambdas in loops.
#define VF_LAMBDA __attribute__((always_inline))

namespace vovnet_fast {
inline namespace VF_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class Number>
struct VectorTypes;

template <>
struct VectorTypes<float> {
  static constexpr int lanes = kVectorBytes / 4;
  typedef float Vector __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Integers __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));
  typedef uint16_t Halves __attribute__((vector_size(lanes * 2)));
  typedef uint8_t Bytes __attribute__((vector_size(lanes)));
};

template <>
struct VectorTypes<double> {
  static constexpr int lanes = kVectorBytes / 8;
  typedef double Vector __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Integers __attribute__((vector_size(kVectorBytes)));
  typedef float Floats __attribute__((vector_size(lanes * 4)));
  typedef uint8_t Bytes __attribute__((vector_size(lanes)));
};

template <class T>
using Vector = typename VectorTypes<High<T>>::Vector;
template <class T>
using Integers = typename VectorTypes<High<T>>::Integers;
template <class T>
constexpr int kLanes = VectorTypes<High<T>>::lanes;

// Lanes of four bytes by what they hold: float, or int32_t.
template <class Number>
struct VectorOfType {
  using type = Vector<Number>;
};
template <>
struct VectorOfType<int32_t> {
  using type = Integers<float>;
};
template <class Number>
using VectorOf = typename VectorOfType<Number>::type;

// All lanes.
struct Full {};

// The first `count` lanes.
struct Part {
  int count;
};

// ---- Integers of other widths ------------------------------------------------------------------
//
// As many as float has lanes. Where there are instructions for it they are named: GCC converts
// vectors half by half. (Masked by ones, because the other forms make it warn of what they leave
// undefined.)

VF_HD VectorTypes<float>::Bits widen_halves(const void* from) {
#if defined(__AVX512F__)
  const __m256i halves = _mm256_loadu_si256(static_cast<const __m256i*>(from));
  return (VectorTypes<float>::Bits)_mm512_maskz_cvtepu16_epi32(0xffff, halves);
#elif defined(__AVX2__)
  const __m128i halves = _mm_loadu_si128(static_cast<const __m128i*>(from));
  return (VectorTypes<float>::Bits)_mm256_cvtepu16_epi32(halves);
#else
  VectorTypes<float>::Halves halves;
  memcpy(&halves, from, sizeof halves);
  return __builtin_convertvector(halves, VectorTypes<float>::Bits);
#endif
}

// They must fit.
VF_HD void narrow_halves(void* to, VectorTypes<float>::Bits bits) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(static_cast<__m256i*>(to),
                      _mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)bits));
#elif defined(__AVX2__)
  const __m256i both = (__m256i)bits;
  _mm_storeu_si128(static_cast<__m128i*>(to), _mm_packus_epi32(_mm256_castsi256_si128(both),
                                                               _mm256_extracti128_si256(both, 1)));
#else
  const auto halves = __builtin_convertvector(bits, VectorTypes<float>::Halves);
  memcpy(to, &halves, sizeof halves);
#endif
}

template <class Number>
VF_HD Integers<Number> widen_bytes(const uint8_t* from) {
#if defined(__AVX512F__)
  if constexpr (kLanes<Number> == 16) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return (Integers<Number>)_mm512_maskz_cvtepu8_epi32(0xffff, bytes);
  }
#elif defined(__AVX2__)
  if constexpr (kLanes<Number> == 8) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    return (Integers<Number>)_mm256_cvtepu8_epi32(bytes);
  }
#endif
  typename VectorTypes<Number>::Bytes bytes;
  memcpy(&bytes, from, sizeof bytes);
  return __builtin_convertvector(bytes, Integers<Number>);
}

// They must fit.
template <class Number>
VF_HD void narrow_bytes(uint8_t* to, Integers<Number> y) {
#if defined(__AVX512F__)
  if constexpr (kLanes<Number> == 16) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                     _mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)y));
    return;
  }
#elif defined(__AVX2__)
  if constexpr (kLanes<Number> == 8) {
    const __m256i both = (__m256i)y;
    const __m128i halves =
        _mm_packus_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(halves, halves));
    return;
  }
#endif
  const auto bytes = __builtin_convertvector(y, typename VectorTypes<Number>::Bytes);
  memcpy(to, &bytes, sizeof bytes);
}

// ---- All lanes ---------------------------------------------------------------------------------

VF_HD Vector<float> load(const float* from, Full) {
  Vector<float> y;
  memcpy(&y, from, sizeof y);
  return y;
}

VF_HD Vector<double> load(const double* from, Full) {
  Vector<double> y;
  memcpy(&y, from, sizeof y);
  return y;
}

VF_HD Vector<float> load(const bfloat16* from, Full) {
  return (Vector<float>)(widen_halves(from) << 16);
}

#if !defined(__F16C__) && !defined(__aarch64__)
// Not inline: they are long, and many loops would have them.
inline __attribute__((noinline)) Vector<float> widen_lanes(const float16* from) {
  Vector<float> y;
  for (int i = 0; i < kLanes<float>; ++i) y[i] = widen(from[i]);
  return y;
}

inline __attribute__((noinline)) void narrow_lanes(float16* to, Vector<float> y) {
  for (int i = 0; i < kLanes<float>; ++i) to[i] = narrow<float16>(y[i]);
}
#endif

VF_HD Vector<float> load(const float16* from, Full) {
#if defined(__AVX512F__)
  // Masked by ones: the other form makes GCC warn of what it leaves undefined.
  return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#elif defined(__aarch64__)
  float16x4_t halves;
  memcpy(&halves, from, sizeof halves);
  return vcvt_f32_f16(halves);
#else
  return widen_lanes(from);
#endif
}

VF_HD Integers<float> load(const int32_t* from, Full) {
  Integers<float> y;
  memcpy(&y, from, sizeof y);
  return y;
}

VF_HD void store(float* to, Vector<float> y, Full) { memcpy(to, &y, sizeof y); }
VF_HD void store(int32_t* to, Integers<float> y, Full) { memcpy(to, &y, sizeof y); }
VF_HD void store(double* to, Vector<double> y, Full) { memcpy(to, &y, sizeof y); }

// The bits of bf16, in the lower halves.
VF_HD VectorTypes<float>::Bits round_to_bfloat16(Vector<float> y) {
  using Bits = VectorTypes<float>::Bits;
  const Bits bits = (Bits)y;
  const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return y != y ? (bits >> 16) | 0x40u : rounded;
}

VF_HD void store(bfloat16* to, Vector<float> y, Full) { narrow_halves(to, round_to_bfloat16(y)); }

VF_HD void store(float16* to, Vector<float> y, Full) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      _mm512_maskz_cvtps_ph(0xffff, y, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(y, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
  const float16x4_t halves = vcvt_f16_f32(y);
  memcpy(to, &halves, sizeof halves);
#else
  narrow_lanes(to, y);
#endif
}

// Bytes as integers of the width of Number, and back.
template <class Number>
VF_HD Integers<Number> load_bytes(const uint8_t* from, Full) {
  return widen_bytes<Number>(from);
}

template <class Number>
VF_HD void store_bytes(uint8_t* to, Integers<Number> y, Full) {
  narrow_bytes<Number>(to, y);
}

// ---- Some lanes --------------------------------------------------------------------------------

template <class T>
VF_HD Vector<T> load(const T* from, Part part) {
  T all[kLanes<T>] = {};
  for (int i = 0; i < part.count; ++i) all[i] = from[i];
  return load(all, Full{});
}

template <class T>
VF_HD void store(T* to, Vector<T> y, Part part) {
  T all[kLanes<T>];
  store(all, y, Full{});
  for (int i = 0; i < part.count; ++i) to[i] = all[i];
}

VF_HD Integers<float> load(const int32_t* from, Part part) {
  int32_t all[kLanes<float>] = {};
  for (int i = 0; i < part.count; ++i) all[i] = from[i];
  return load(all, Full{});
}

VF_HD void store(int32_t* to, Integers<float> y, Part part) {
  int32_t all[kLanes<float>];
  store(all, y, Full{});
  for (int i = 0; i < part.count; ++i) to[i] = all[i];
}

template <class Number>
VF_HD Integers<Number> load_bytes(const uint8_t* from, Part part) {
  uint8_t all[kLanes<Number>] = {};
  for (int i = 0; i < part.count; ++i) all[i] = from[i];
  return load_bytes<Number>(all, Full{});
}

template <class Number>
VF_HD void store_bytes(uint8_t* to, Integers<Number> y, Part part) {
  uint8_t all[kLanes<Number>];
  store_bytes<Number>(all, y, Full{});
  for (int i = 0; i < part.count; ++i) to[i] = all[i];
}

// ---- Doubles from either -----------------------------------------------------------------------

template <class Span>
VF_HD Vector<double> load_double(const double* from, Span span) {
  return load(from, span);
}

VF_HD Vector<double> load_double(const float* from, Full) {
  VectorTypes<double>::Floats y;
  memcpy(&y, from, sizeof y);
  return __builtin_convertvector(y, Vector<double>);
}

VF_HD Vector<double> load_double(const float* from, Part part) {
  float all[kLanes<double>] = {};
  for (int i = 0; i < part.count; ++i) all[i] = from[i];
  return load_double(all, Full{});
}

template <class Span>
VF_HD void store_double(double* to, Vector<double> y, Span span) {
  store(to, y, span);
}

VF_HD void store_double(float* to, Vector<double> y, Full) {
  const auto rounded = __builtin_convertvector(y, VectorTypes<double>::Floats);
  memcpy(to, &rounded, sizeof rounded);
}

VF_HD void store_double(float* to, Vector<double> y, Part part) {
  for (int i = 0; i < part.count; ++i) to[i] = static_cast<float>(y[i]);
}

// How many channels a span means, of so many lanes of floats.
VF_HD int count_of(Full) { return kLanes<float>; }
VF_HD int count_of(Part part) { return part.count; }

// ---- Loops -------------------------------------------------------------------------------------

// Every lane the same.
template <class T>
VF_HD Vector<T> broadcast(High<T> y) {
  return Vector<T>{} + y;
}

template <class Number>
VF_HD Number sum_of_lanes(Vector<Number> y) {
  Number sum = 0;
  for (int i = 0; i < kLanes<Number>; ++i) sum += y[i];
  return sum;
}

// body(first, span) for all of `count` channels, as many at a time as T has lanes.
template <class T, class Body>
VF_HD void for_channels(int64_t count, Body body) {
  int64_t c = 0;
  for (; c + kLanes<T> <= count; c += kLanes<T>) body(c, Full{});
  if (c < count) body(c, Part{static_cast<int>(count - c)});
}

}  // namespace VF_ISA
}  // namespace vovnet_fast
