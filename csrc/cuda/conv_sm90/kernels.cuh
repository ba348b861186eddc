// The kernels of the Hopper convolution, for the files that compile those of one dtype.
#pragma once

#include <cuda.h>

#include "device.cuh"
#include "kernel.h"
#include "plan.h"

namespace vovnet_fast {
namespace conv_sm90 {

using Kernel = void (*)(CUtensorMap, CUtensorMap, Problem);

// The kernel of tiles that plan() has checked. `blocks`: of 64 pixels, of a warpgroup.
Kernel float16_kernel(int block_out, int blocks);
Kernel bfloat16_kernel(int block_out, int blocks);
Kernel e4m3_kernel(int block_out, int blocks);

template <class T, int N, int BLOCKS>
__global__ void __launch_bounds__(kThreads, 1)
    kernel(const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap weight,
           const __grid_constant__ Problem p) {
  extern __shared__ char shared[];
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const uint32_t padding = (kAtomBytes - address % kAtomBytes) % kAtomBytes;
  Sm90 machine(address + padding, shared + padding, &x, &weight);
  run_thread<T, N, BLOCKS>(machine, p);
}

template <class T>
Kernel kernel_for(int block_out, int blocks) {
  switch (block_out) {
#define VF_CASE(channels, most) \
  case channels:                \
    return blocks == 1 ? kernel<T, channels, 1> : kernel<T, channels, most>;
    VF_CONV_SM90_TILES(VF_CASE)
#undef VF_CASE
  }
  return nullptr;
}

}  // namespace conv_sm90
}  // namespace vovnet_fast
