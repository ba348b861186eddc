// The Hopper convolution in bf16: launch.cu launches it.
#include "kernels.cuh"

namespace vovnet_fast {
namespace conv_sm90 {

Kernel bfloat16_kernel(int block_out, int blocks) {
  return kernel_for<__nv_bfloat16>(block_out, blocks);
}

}  // namespace conv_sm90
}  // namespace vovnet_fast
