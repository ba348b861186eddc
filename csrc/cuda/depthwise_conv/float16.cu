// The depthwise 3x3 with its 1x1 in fp16: launch.cu launches it.
#include "kernel.cuh"

namespace vovnet_fast {
namespace depthwise_conv {

Kernel float16_kernel(int block_out) { return kernel_for<float16>(block_out); }

}  // namespace depthwise_conv
}  // namespace vovnet_fast
