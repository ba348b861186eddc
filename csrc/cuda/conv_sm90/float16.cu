// The Hopper convolution in fp16: launch.cu launches it.
#include "kernels.cuh"

namespace vovnet_fast {
namespace conv_sm90 {

Kernel float16_kernel(int block_out, int blocks) { return kernel_for<__half>(block_out, blocks); }

}  // namespace conv_sm90
}  // namespace vovnet_fast
