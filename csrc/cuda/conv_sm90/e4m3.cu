// The Hopper convolution in e4m3: launch.cu launches it.
#include "kernels.cuh"

namespace vovnet_fast {
namespace conv_sm90 {

Kernel e4m3_kernel(int block_out, int blocks) {
  switch (block_out) {
#define VF_CASE(channels, most) \
  case channels:                \
    return blocks == 1 ? kernel<Float8, channels, 1> : kernel<Float8, channels, most>;
    VF_CONV_SM90_E4M3_TILES(VF_CASE)
#undef VF_CASE
  }
  return nullptr;
}

}  // namespace conv_sm90
}  // namespace vovnet_fast
