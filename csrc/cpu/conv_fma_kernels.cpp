// Convolution in fp32, and by fp32 in half precision.
#if defined(__AVX2__) || defined(__aarch64__)

#include "conv_direct.h"

namespace vovnet_fast {
inline namespace VF_ISA {

namespace {

struct Fma : conv::Registers<conv::Fp32> {
  template <class T, class Span>
  static VF_HD void store(T* to, Vector<float> y, Span span) {
    VF_ISA::store(to, y, span);
  }

  static constexpr bool kAlone = conv::kDirectBlocks;
  template <class T>
  static bool alone(const ConvParams& p, const conv::Plan& plan, const conv::Task& task,
                    char* gathered, float* kept, float* pool) {
    auto* filled = reinterpret_cast<float*>(gathered);
    return conv::run_direct<Fma, T>(p, plan, task, filled, kept, pool);
  }
};

}  // namespace

void conv_fma(const ConvParams& p, int threads) {
  with_float(p.dtype, [&](auto number) { conv::run<Fma, decltype(number)>(p, threads); });
}

void conv_pack_fma(const ConvPackParams& p, int threads) {
  with_float(p.dtype, [&](auto number) { conv::pack<float, decltype(number)>(p, threads); });
}

}  // namespace VF_ISA
}  // namespace vovnet_fast

#endif
