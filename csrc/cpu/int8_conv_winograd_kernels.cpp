// Winograd's convolution in eight bits (int8_conv_winograd.h) by what every processor with AVX2
// has.
#if defined(__AVX2__)

#include "int8_conv_winograd.h"

namespace vovnet_fast {
inline namespace VF_ISA {

namespace {

struct ShortPairs {
  using Packed = int16_t;
  using Sum = int32_t;
  static constexpr bool kTrim = false;
  static VF_HD Ints multiply(Floats pixel, Floats weights, Ints sums) {
#ifdef __AVX512F__
    const __m512i products = _mm512_madd_epi16((__m512i)pixel, (__m512i)weights);
    return (Ints)_mm512_add_epi32((__m512i)sums, products);
#else
    const __m256i products = _mm256_madd_epi16((__m256i)pixel, (__m256i)weights);
    return (Ints)_mm256_add_epi32((__m256i)sums, products);
#endif
  }
};

}  // namespace

void int8_conv_winograd(const Int8ConvParams& p, int threads) {
  winograd::run_bytes<ShortPairs>(p, threads);
}

void int8_conv_pack_winograd(const Int8ConvPackParams& p, int threads) {
  winograd::pack_bytes(p, threads);
}

}  // namespace VF_ISA
}  // namespace vovnet_fast

#endif
