// Convolution in eight bits by VNNI (vpdpbusd): four products at once, which do not saturate.
#include "conv_registers.h"
#include "int8_conv_store.h"

namespace vovnet_fast {
inline namespace VF_ISA {

namespace {

struct Fours {
  using Packed = uint8_t;
  using Sum = int32_t;
  static constexpr bool kTrim = true;
  static VF_HD Ints multiply(Floats pixel, Floats weights, Ints sums) {
#ifdef __AVX512F__
    return (Ints)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)pixel, (__m512i)weights);
#else
    return (Ints)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)pixel, (__m256i)weights);
#endif
  }
};

}  // namespace

void int8_conv_vnni(const Int8ConvParams& p, int threads) {
  conv::run<conv::Registers<Fours>, uint8_t>(p, threads);
}

void int8_conv_pack_vnni(const Int8ConvPackParams& p, int threads) {
  conv::pack<int8_t>(p, threads);
}

}  // namespace VF_ISA
}  // namespace vovnet_fast
