// The convolution for sm_80 and newer in bf16: launch.cu launches it.
#include "../launch.cuh"
#include "kernel.cuh"

#if VF_EVERY_DTYPE

namespace vovnet_fast {
namespace conv_sm80 {

Kernel bfloat16_kernel(int pixels, int block_out) {
  return kernel_for<bfloat16>(pixels, block_out);
}

}  // namespace conv_sm80
}  // namespace vovnet_fast

#endif
