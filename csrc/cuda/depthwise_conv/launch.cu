// A depthwise 3x3 convolution with the 1x1 that follows it, for sm_80 and newer: what is between
// them never leaves shared memory.
//
// A layer of C channels in halves, stride 1, moves in bytes a pixel, with maps beyond the caches:
//
//     depthwise into memory, then the 1x1     8 C
//     here                                    4 C
//
// A tile reads its strip once for the nine taps: (8 + 2) * (16 + 2) pixels for 8 * 16, mostly out
// of L2, where neighbours have left their shares of it. For every 32 channels of its 128 pixels a
// block has 36864 multiply-adds of fp32 to make, 576 cycles of a processor of sm_80, and 128 * N
// * 32 on tensor cores, 512 cycles with N = 128; moving 4 C bytes a pixel takes it 1600 of A100's.
// All of this is arithmetic: nothing was measured yet.
//
// Blocks of other output channels of the same pixels make the depthwise part again: tiles are as
// wide as a layer of a published network is.
//
// params.h has the arguments, plan.h makes of them what the kernel is told, layout.h says where
// everything lies, kernel.cuh what a thread does. float16.cu, bfloat16.cu and float32.cu compile
// the kernels of a dtype.
#include "../common.cuh"
#include "kernel.cuh"
#include "launch.h"
#include "plan.h"

namespace vovnet_fast {
namespace cuda {
namespace {

depthwise_conv::Kernel kernel_of(const DepthwiseConvParams& params) {
  switch (params.dtype) {
    case kFloat16:
      return depthwise_conv::float16_kernel(params.block_out);
    case kFloat32:
      return depthwise_conv::float32_kernel(params.block_out);
#if VF_EVERY_DTYPE
    case kBFloat16:
      return depthwise_conv::bfloat16_kernel(params.block_out);
#endif
    default:
      unknown_dtype("depthwise_conv", params.dtype, "fp16 (0), bf16 (1), fp32 (2)");
  }
}

}  // namespace

void depthwise_conv(const DepthwiseConvParams& params, void* stream) {
  namespace own = vovnet_fast::depthwise_conv;
  const char* name = "depthwise_conv";
  if (params.n == 0 || params.out_height == 0 || params.out_width == 0 || params.c_out == 0) return;
  const own::Problem p = own::plan(params);
  check_device(name, params.out.data);
  const own::Kernel kernel = kernel_of(params);
  const uint32_t bytes = own::shared_bytes(p, params.block_out);
  const int grid = conv_sm80::tiles_of(p, params.n);
#ifdef VF_CUDA_ON_CPU
  (void)stream;
  cuda_on_cpu::run(name, grid, own::kThreads, [&] { kernel(p); }, bytes);
#else
  check(name,
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(bytes)),
        "this device has no " + std::to_string(bytes) + " bytes of shared memory for a block");
  kernel<<<grid, own::kThreads, bytes, static_cast<cudaStream_t>(stream)>>>(p);
  check(name, cudaGetLastError(), "cannot launch " + std::to_string(grid) + " blocks");
#endif
}

}  // namespace cuda
}  // namespace vovnet_fast
