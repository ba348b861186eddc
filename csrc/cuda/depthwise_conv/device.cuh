// Loads and stores of whole units of shared memory, which is addressed in bytes from its start:
// what comes on top of ../conv_sm80/device.cuh.
#pragma once

#include "../conv_sm80/device.cuh"

namespace vovnet_fast {
namespace depthwise_conv {

#ifdef VF_CUDA_ON_CPU

inline uint4 shared_unit(uint32_t from) {
  uint4 unit;
  cuda_on_cpu::load_unit(&unit, from);
  return unit;
}
inline void put_shared_unit(uint32_t to, const uint4& unit) { cuda_on_cpu::store_unit(to, &unit); }

#else

__device__ __forceinline__ uint4 shared_unit(uint32_t from) {
  return *reinterpret_cast<const uint4*>(conv_sm80::shared_memory() + from);
}
__device__ __forceinline__ void put_shared_unit(uint32_t to, const uint4& unit) {
  *reinterpret_cast<uint4*>(conv_sm80::shared_memory() + to) = unit;
}

#endif

}  // namespace depthwise_conv
}  // namespace vovnet_fast
