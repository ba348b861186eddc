// Winograd's convolution in eight bits (int8_conv_winograd.h) by VNNI (vpdpwssd): pairs of
// products, and their sums, at once.
#include "int8_conv_winograd.h"

namespace vovnet_fast {
inline namespace VF_ISA {

namespace {

struct SummedPairs {
  using Packed = int16_t;
  using Sum = int32_t;
  static constexpr bool kTrim = false;
  static VF_HD Ints multiply(Floats pixel, Floats weights, Ints sums) {
#ifdef __AVX512F__
    return (Ints)_mm512_dpwssd_epi32((__m512i)sums, (__m512i)pixel, (__m512i)weights);
#else
    return (Ints)_mm256_dpwssd_avx_epi32((__m256i)sums, (__m256i)pixel, (__m256i)weights);
#endif
  }
};

}  // namespace

void int8_conv_winograd_vnni(const Int8ConvParams& p, int threads) {
  winograd::run_bytes<SummedPairs>(p, threads);
}

void int8_conv_pack_winograd_vnni(const Int8ConvPackParams& p, int threads) {
  winograd::pack_bytes(p, threads);
}

}  // namespace VF_ISA
}  // namespace vovnet_fast
