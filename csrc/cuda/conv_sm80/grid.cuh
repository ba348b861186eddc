// Launches of blocks of kThreads threads with dynamic shared memory.
#pragma once

#include <string>

#include "../launch.cuh"
#include "layout.h"

namespace vovnet_fast {
namespace conv_sm80 {

// Raises: the device has not so much shared memory, or the launch failed.
template <class Params>
void launch(const char* name, void (*kernel)(Params), int grid, uint32_t bytes, void* stream,
            const Params& params) {
#ifdef VF_CUDA_ON_CPU
  (void)stream;
  cuda_on_cpu::run(name, grid, kThreads, [&] { kernel(params); }, bytes);
#else
  cuda::check(
      name,
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           static_cast<int>(bytes)),
      "this device has no " + std::to_string(bytes) + " bytes of shared memory for a block");
  kernel<<<grid, kThreads, bytes, static_cast<cudaStream_t>(stream)>>>(params);
  cuda::check(name, cudaGetLastError(), "cannot launch " + std::to_string(grid) + " blocks");
#endif
}

}  // namespace conv_sm80
}  // namespace vovnet_fast
