// The Hopper convolution in bf16: conv_sm90.cu launches it.
#include "conv_sm90_kernels.cuh"

namespace vovnet_fast {
namespace conv_sm90 {

Kernel bfloat16_kernel(int block_out, int blocks) {
  return kernel_for<__nv_bfloat16>(block_out, blocks);
}

}  // namespace conv_sm90
}  // namespace vovnet_fast
