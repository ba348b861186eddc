// The depthwise 3x3 with its 1x1 in bf16: launch.cu launches it.
#include "../launch.cuh"
#include "kernel.cuh"

#if VF_EVERY_DTYPE

namespace vovnet_fast {
namespace depthwise_conv {

Kernel bfloat16_kernel(int block_out) { return kernel_for<bfloat16>(block_out); }

}  // namespace depthwise_conv
}  // namespace vovnet_fast

#endif
