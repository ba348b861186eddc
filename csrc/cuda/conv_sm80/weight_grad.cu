// The weight gradient of the convolution for sm_80 and newer. In FLOP a byte that a step fetches,
// in halves, with 64 channels by 64 and nine taps: 64 * 64 * 9 * 64 * 2 for 64 pixels of g and a
// strip of 108 of x, 128 bytes each, 214; in fp32, whose steps have 32 pixels and strips of 60,
// 100. (Arithmetic: nothing was measured yet.)
#include "../reduce.cuh"
#include "../vectors.cuh"
#include "grid.cuh"
#include "launch.h"
#include "weight_grad.cuh"

namespace vovnet_fast {
namespace cuda {
namespace {

using GradKernel = void (*)(conv_sm80::GradProblem);

template <class T>
GradKernel kernel_of(int form) {
  return form == 3   ? conv_sm80::weight_grad_kernel<T, 3>
         : form == 1 ? conv_sm80::weight_grad_kernel<T, 1>
                     : conv_sm80::weight_grad_kernel<T, conv_sm80::kPatches>;
}

GradKernel kernel_of(const char* name, int32_t dtype, int form) {
  switch (dtype) {
    case kFloat16:
      return kernel_of<float16>(form);
    case kFloat32:
      return kernel_of<float>(form);
#if VF_EVERY_DTYPE
    case kBFloat16:
      return kernel_of<bfloat16>(form);
#endif
    default:
      unknown_dtype(name, dtype, "fp16 (0), bf16 (1), fp32 (2)");
  }
}

}  // namespace

void conv_sm80_weight_grad(const ConvSm80WeightGradParams& params, void* stream) {
  const char* name = "conv_sm80_weight_grad";
  if (params.c_out == 0 || params.c_in == 0) return;
  const conv_sm80::GradProblem p = conv_sm80::plan(params);
  check_device(name, params.out);
  const GradKernel kernel = kernel_of(name, params.dtype, conv_sm80::form_of(params));
  conv_sm80::launch(name, kernel, p.outputs * p.inputs * p.parts,
                    static_cast<uint32_t>(p.stages * p.stage_bytes), stream, p);
  if (params.parts > 1) {
    sum_rows<float>(name, params.partials, 1, params.parts, p.part_elements, 1, params.out, stream);
  }
}

}  // namespace cuda
}  // namespace vovnet_fast
