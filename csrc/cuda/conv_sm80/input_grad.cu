// The input gradient with stride 2 of the convolution for sm_80 and newer: input_grad.cuh says how.
#include "../common.cuh"
#include "grid.cuh"
#include "input_grad.cuh"
#include "launch.h"

namespace vovnet_fast {
namespace cuda {
namespace {

template <class T>
conv_sm80::Kernel kernel_of(int pixels) {
  using conv_sm80::kGradChannels;
  using conv_sm80::ParityTaps;
  return pixels == 256 ? conv_sm80::kernel<T, ParityTaps, 256, kGradChannels>
                       : conv_sm80::kernel<T, ParityTaps, 128, kGradChannels>;
}

conv_sm80::Kernel kernel_of(const char* name, int32_t dtype, int pixels) {
  switch (dtype) {
    case kFloat16:
      return kernel_of<float16>(pixels);
    case kFloat32:
      return kernel_of<float>(pixels);
#if VF_EVERY_DTYPE
    case kBFloat16:
      return kernel_of<bfloat16>(pixels);
#endif
    default:
      unknown_dtype(name, dtype, "fp16 (0), bf16 (1), fp32 (2)");
  }
}

}  // namespace

void conv_sm80_input_grad(const ConvSm80InputGradParams& params, void* stream) {
  const char* name = "conv_sm80_input_grad";
  if (params.n == 0 || params.height == 0 || params.width == 0 || params.c_in == 0) return;
  const conv_sm80::Problem p = conv_sm80::plan(params);
  check_device(name, params.out.data);
  conv_sm80::launch(name, kernel_of(name, params.dtype, params.tile_h * params.tile_w),
                    conv_sm80::tiles_of(p, params.n) * conv_sm80::kParities,
                    conv_sm80::shared_bytes(p, conv_sm80::kGradChannels), stream, p);
}

}  // namespace cuda
}  // namespace vovnet_fast
