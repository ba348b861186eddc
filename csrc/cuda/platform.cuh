// What kernels are compiled for: CUDA, or the host, where ../cuda_on_cpu runs their grids.
#pragma once

#ifdef VF_CUDA_ON_CPU
#include "../cuda_on_cpu/cuda_on_cpu.h"
#else
#include <cuda_runtime.h>

// An array that the threads of a block share.
#define VF_SHARED(type, name, count) __shared__ type name[count]
#define VF_CHECK_ALIGNED(pointer, bytes)
#endif

#define VF_DEVICE __device__ __forceinline__

namespace vovnet_fast {
namespace cuda {

constexpr int kThreads = 256;
constexpr int kBlocksPerProcessor = 2;  // At least: a thread then has at most 128 registers.

#define VF_KERNEL __global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)

}  // namespace cuda
}  // namespace vovnet_fast
