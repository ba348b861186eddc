// Vectors of channels: what a thread loads and stores at once, in 16 bytes.
#pragma once

#include <cstdint>
#include <cstring>

#include "../dtypes.h"
#include "platform.cuh"

namespace vovnet_fast {
namespace cuda {

// Elements of a vector of 16 bytes. fp64 is for tests of gradients: one form is enough for it.
template <class T>
constexpr int kVector = 16 / sizeof(T);
template <>
inline constexpr int kVector<double> = 1;

// V elements as they are in memory. Loads of several are issued before the first is widened.
template <class T, int V>
struct alignas(V * sizeof(T)) Raw {
  T element[V];
};

// A word that is loaded and stored at once.
template <size_t Bytes>
struct WordOf;
template <>
struct WordOf<16> {
  using type = uint4;
};
template <>
struct WordOf<8> {
  using type = uint2;
};
template <>
struct WordOf<4> {
  using type = uint32_t;
};
template <>
struct WordOf<2> {
  using type = uint16_t;
};
template <>
struct WordOf<1> {
  using type = uint8_t;
};
template <class T, int V>
using Word = typename WordOf<sizeof(Raw<T, V>)>::type;

// For loads that depend on conditions: a word is chosen as one. The elements of a vector would be
// chosen one by one, and halves then take twice the registers.
template <int V, class T>
VF_DEVICE Word<T, V> load_word(const T* from) {
  VF_CHECK_ALIGNED(from, sizeof(Raw<T, V>));
  return *reinterpret_cast<const Word<T, V>*>(from);
}

template <class T, int V>
VF_DEVICE Raw<T, V> raw_of(const Word<T, V>& word) {
  Raw<T, V> raw;
  memcpy(&raw, &word, sizeof raw);
  return raw;
}

template <int V, class T>
VF_DEVICE Raw<T, V> load(const T* from) {
  return raw_of<T, V>(load_word<V>(from));
}

#ifdef VF_CUDA_ON_CPU

template <class Word>
void store_word(Word* to, Word word) {
  *to = word;
}

#else

// Assignments would be split: the compiler remembers what a word was put together from.
VF_DEVICE void store_word(uint4* to, uint4 word) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(word.x), "r"(word.y),
               "r"(word.z), "r"(word.w)
               : "memory");
}

VF_DEVICE void store_word(uint2* to, uint2 word) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(word.x), "r"(word.y) : "memory");
}

VF_DEVICE void store_word(uint32_t* to, uint32_t word) {
  asm volatile("st.global.b32 [%0], %1;" ::"l"(to), "r"(word) : "memory");
}

#endif

template <class T, int V>
VF_DEVICE void store(T* to, const Raw<T, V>& raw) {
  VF_CHECK_ALIGNED(to, sizeof raw);
  if constexpr (V > 1) {
    Word<T, V> word;
    memcpy(&word, &raw, sizeof raw);
    store_word(reinterpret_cast<Word<T, V>*>(to), word);
  } else {
    *to = raw.element[0];
  }
}

// Zeros: what stands for a pixel that is not there.
template <class T, int V>
VF_DEVICE Raw<T, V> zeros() {
  Raw<T, V> raw;
#pragma unroll
  for (int i = 0; i < V; ++i) raw.element[i] = narrow<T>(High<T>(0));
  return raw;
}

template <class T, int V>
VF_DEVICE void unpack(High<T> (&y)[V], const Raw<T, V>& raw) {
#pragma unroll
  for (int i = 0; i < V; ++i) y[i] = widen(raw.element[i]);
}

template <class T, int V>
VF_DEVICE void store_narrow(T* to, const High<T> (&y)[V]) {
  Raw<T, V> raw;
#pragma unroll
  for (int i = 0; i < V; ++i) raw.element[i] = narrow<T>(y[i]);
  store(to, raw);
}

// V numbers of a vector over the channels, which may lie anywhere: a row of [6, C] starts at any
// multiple of C.
template <int V, class Number>
VF_DEVICE void load_row(Number (&y)[V], const Number* from) {
  constexpr int kEach = 16 / sizeof(Number);
  if constexpr (V % kEach == 0) {
    if (reinterpret_cast<uintptr_t>(from) % 16 == 0) {
#pragma unroll
      for (int i = 0; i < V; i += kEach) {
        const Raw<Number, kEach> raw = load<kEach>(from + i);
#pragma unroll
        for (int j = 0; j < kEach; ++j) y[i + j] = raw.element[j];
      }
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < V; ++i) y[i] = from[i];
}

}  // namespace cuda
}  // namespace vovnet_fast
