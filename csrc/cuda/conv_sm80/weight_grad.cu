// The weight gradient of the convolution for sm_80 and newer. In FLOP a byte that a step fetches,
// in halves, with 64 channels by 64 and nine taps: 64 * 64 * 9 * 64 * 2 for 64 pixels of g and a
// strip of 108 of x, 128 bytes each, 214. (Arithmetic: nothing was measured yet.)
#include "../reduce.cuh"
#include "../vectors.cuh"
#include "launch.h"
#include "weight_grad.cuh"

namespace vovnet_fast {
namespace cuda {
namespace {

using GradKernel = void (*)(conv_sm80::GradProblem);

template <class T>
GradKernel kernel_of(int kernel) {
  return kernel == 3 ? conv_sm80::weight_grad_kernel<T, 3> : conv_sm80::weight_grad_kernel<T, 1>;
}

GradKernel kernel_of(const char* name, int32_t dtype, int kernel) {
  switch (dtype) {
    case kFloat16:
      return kernel_of<float16>(kernel);
#if VF_EVERY_DTYPE
    case kBFloat16:
      return kernel_of<bfloat16>(kernel);
#endif
    default:
      unknown_dtype(name, dtype, "fp16 (0), bf16 (1)");
  }
}

}  // namespace

void conv_sm80_weight_grad(const ConvSm80WeightGradParams& params, void* stream) {
  const char* name = "conv_sm80_weight_grad";
  if (params.c_out == 0 || params.c_in == 0) return;
  const conv_sm80::GradProblem p = conv_sm80::plan(params);
  check_device(name, params.out);
  const GradKernel kernel = kernel_of(name, params.dtype, params.kernel);
  const int bytes = p.stages * p.stage_bytes, grid = p.outputs * p.inputs * p.parts;
#ifdef VF_CUDA_ON_CPU
  cuda_on_cpu::run(name, grid, conv_sm80::kThreads, [&] { kernel(p); }, bytes);
#else
  check(name, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
        "this device has no " + std::to_string(bytes) + " bytes of shared memory for a block");
  kernel<<<grid, conv_sm80::kThreads, bytes, static_cast<cudaStream_t>(stream)>>>(p);
  check(name, cudaGetLastError(), "cannot launch " + std::to_string(grid) + " blocks");
#endif
  if (params.parts > 1) {
    sum_rows<float>(name, params.partials, 1, params.parts, p.part_elements, 1, params.out, stream);
  }
}

}  // namespace cuda
}  // namespace vovnet_fast
