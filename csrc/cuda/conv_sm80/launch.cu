// A convolution for sm_80 and newer: strips of pixels that nine taps share, and tiles with exactly
// C_out channels.
//
// What a tile takes from L2 for every 32 input channels of a 3x3 layer in halves: one strip of
// (tile_h + 2) * (tile_w + 2) pixels and nine taps of weights, 64 bytes a row. A kernel that
// fetches the pixels of every tap takes nine times the pixels. In FLOP a byte:
//
//     pixels    channels    here    fetching every tap
//     16 x 16      64        164       51
//     16 x 16     112        194       78
//      8 x 16     128        111       64
//      8 x 16     224        118       81
//
// A warp of 32 pixels by N / 2 channels reads (32 + N / 2) * 32 bytes of shared memory for N * 256
// multiply-adds. On sm_80, which makes 1024 of them a cycle, the eight warps ask for 96 bytes a
// cycle with N = 128, of the 128 that there are, and for all 128 with N = 64; which is why a warp
// of a wide tile has 64 pixels: 96 again. All of this is arithmetic: nothing was measured yet.
//
// params.h has the arguments, plan.h makes of them what the kernel is told, layout.h says where
// everything lies, kernel.cuh what a thread does, device.cuh the instructions that it does it with.
// float16.cu, bfloat16.cu and float32.cu compile the kernels of a dtype. image.cuh has the first
// layer, input_grad.cuh the input gradient with stride 2.
#include "../common.cuh"
#include "grid.cuh"
#include "image.cuh"
#include "kernel.cuh"
#include "launch.h"
#include "plan.h"

namespace vovnet_fast {
namespace cuda {
namespace {

conv_sm80::Kernel kernel_of(const ConvSm80Params& params) {
  const int pixels = params.tile_h * params.tile_w;
  switch (params.dtype) {
    case kFloat16:
      return conv_sm80::float16_kernel(pixels, params.block_out);
    case kFloat32:
      return conv_sm80::float32_kernel(pixels, params.block_out);
#if VF_EVERY_DTYPE
    case kBFloat16:
      return conv_sm80::bfloat16_kernel(pixels, params.block_out);
#endif
    default:
      unknown_dtype("conv_sm80", params.dtype, "fp16 (0), bf16 (1), fp32 (2)");
  }
}

}  // namespace

void conv_sm80(const ConvSm80Params& params, void* stream) {
  const char* name = "conv_sm80";
  if (params.n == 0 || params.out_height == 0 || params.out_width == 0 || params.c_out == 0) return;
  const bool image = conv_sm80::of_image(params);
  const conv_sm80::Problem p = image ? conv_sm80::image_plan(params) : conv_sm80::plan(params);
  check_device(name, params.out.data);
  conv_sm80::launch(name, image ? conv_sm80::image_kernel_of(params.dtype) : kernel_of(params),
                    conv_sm80::tiles_of(p, params.n), conv_sm80::shared_bytes(p, params.block_out),
                    stream, p);
}

}  // namespace cuda
}  // namespace vovnet_fast
