// The depthwise 3x3 with its 1x1 in fp32, multiplied as TF32: launch.cu launches it.
#include "kernel.cuh"

namespace vovnet_fast {
namespace depthwise_conv {

Kernel float32_kernel(int block_out) { return kernel_for<float>(block_out); }

}  // namespace depthwise_conv
}  // namespace vovnet_fast
