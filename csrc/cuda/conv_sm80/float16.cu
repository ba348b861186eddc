// The convolution for sm_80 and newer in fp16: launch.cu launches it.
#include "kernel.cuh"

namespace vovnet_fast {
namespace conv_sm80 {

Kernel float16_kernel(int pixels, int block_out) { return kernel_for<float16>(pixels, block_out); }

}  // namespace conv_sm80
}  // namespace vovnet_fast
