// The convolution for sm_80 and newer in fp32, multiplied as TF32: launch.cu launches it.
#include "kernel.cuh"

namespace vovnet_fast {
namespace conv_sm80 {

Kernel float32_kernel(int pixels, int block_out) { return kernel_for<float>(pixels, block_out); }

}  // namespace conv_sm80
}  // namespace vovnet_fast
