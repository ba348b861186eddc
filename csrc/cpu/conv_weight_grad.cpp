// Whose weight gradients run, by instruction set.
#include "conv_weight_grad.h"

#include <stdexcept>

#include "conv_weight_grad_plan.h"
#include "dispatch.h"

namespace vovnet_fast {

#ifdef VF_WITH_AVX2
namespace avx2 {
void conv_weight_grad(const ConvWeightGradParams& params, int threads);
}
#endif
#ifdef VF_WITH_AVX512
namespace avx512 {
void conv_weight_grad(const ConvWeightGradParams& params, int threads);
}
#endif

namespace cpu {

namespace {

using Run = void (*)(const ConvWeightGradParams& params, int threads);

Run find() {
  const std::string now = isa();
#ifdef VF_WITH_AVX2
  if (now == "avx2") return avx2::conv_weight_grad;
#endif
#ifdef VF_WITH_AVX512
  if (now == "avx512") return avx512::conv_weight_grad;
#endif
  return nullptr;
}

}  // namespace

bool has_conv_weight_grad() { return find() != nullptr; }

void conv_weight_grad(const ConvWeightGradParams& params, int threads) {
  const Run run = find();
  if (run == nullptr) {
    throw std::invalid_argument("no weight gradients of convolutions run on instruction set " +
                                isa());
  }
  if (params.dtype == kFloat64) refuse_dtype(params.dtype);
  if (params.c_out == 0 || params.c_in == 0) return;
  run(params, threads);
}

int64_t conv_weight_grad_parts(int64_t n, int64_t out_height, int64_t out_width, int64_t c_in,
                               int64_t c_out, int64_t kernel, int64_t stride) {
  if (n == 0 || out_height == 0 || out_width == 0 || c_in == 0 || c_out == 0) return 1;
  return conv::divide_pixels({out_height, out_width, c_in, c_out, kernel, stride}, n).parts;
}

}  // namespace cpu
}  // namespace vovnet_fast
