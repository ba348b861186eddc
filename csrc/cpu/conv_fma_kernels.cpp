// Convolution in fp32, and by fp32 in half precision.
#if defined(__AVX2__) || defined(__aarch64__)

#include "conv_registers.h"

namespace vovnet_fast {
inline namespace VF_ISA {

namespace {

struct Fma : conv::Registers<conv::Fp32> {
  template <class T, class Span>
  static VF_HD void store(T* to, Vector<float> y, Span span) {
    VF_ISA::store(to, y, span);
  }
};

}  // namespace

void conv_fma(const ConvParams& p, int threads) {
  switch (p.dtype) {
    case kFloat16:
      return conv::run<Fma, float16>(p, threads);
    case kBFloat16:
      return conv::run<Fma, bfloat16>(p, threads);
    case kFloat32:
      return conv::run<Fma, float>(p, threads);
    default:
      cpu::refuse_dtype(p.dtype);
  }
}

void conv_pack_fma(const ConvPackParams& p, int threads) {
  switch (p.dtype) {
    case kFloat16:
      return conv::pack<float, float16>(p, threads);
    case kBFloat16:
      return conv::pack<float, bfloat16>(p, threads);
    case kFloat32:
      return conv::pack<float, float>(p, threads);
    default:
      cpu::refuse_dtype(p.dtype);
  }
}

}  // namespace VF_ISA
}  // namespace vovnet_fast

#endif
