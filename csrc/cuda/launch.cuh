// Launches: the form of a kernel for a dtype, whether it can be launched, and that.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../dtypes.h"
#include "platform.cuh"

namespace vovnet_fast {
namespace cuda {

template <class T>
struct Type {
  using type = T;
};

[[noreturn]] inline void unknown_dtype(const char* op, int32_t dtype, const char* known) {
  throw std::invalid_argument(std::string(op) + ": no kernel for the dtype with code " +
                              std::to_string(dtype) + ", only for " + known);
}

// 0 leaves out the forms for bf16 and fp64, of which the host's tests under sanitizers run none.
#ifndef VF_EVERY_DTYPE
#define VF_EVERY_DTYPE 1
#endif

// Calls f(Type<T>) with the storage type of a dtype code.
template <class F>
void with_dtype(const char* op, int32_t dtype, F f) {
  switch (dtype) {
    case kFloat16:
      return f(Type<float16>{});
    case kFloat32:
      return f(Type<float>{});
#if VF_EVERY_DTYPE
    case kBFloat16:
      return f(Type<bfloat16>{});
    case kFloat64:
      return f(Type<double>{});
#endif
    default:
      unknown_dtype(op, dtype, "fp16 (0), bf16 (1), fp32 (2), fp64 (3)");
  }
}

// The same for numbers that are in high precision always.
template <class F>
void with_high(const char* op, int32_t dtype, F f) {
  switch (dtype) {
    case kFloat32:
      return f(Type<float>{});
#if VF_EVERY_DTYPE
    case kFloat64:
      return f(Type<double>{});
#endif
    default:
      unknown_dtype(op, dtype, "fp32 (2), fp64 (3)");
  }
}

// Raises: a grid is larger than a device takes.
inline unsigned checked_grid(const char* op, int64_t blocks) {
  if (blocks > 0x7fffffff) {
    throw std::invalid_argument(std::string(op) + ": " + std::to_string(blocks) +
                                " blocks are more than a launch may have: split the batch");
  }
  return static_cast<unsigned>(blocks);
}

#ifdef VF_CUDA_ON_CPU

inline void check_device(const char*, const void*) {}

template <class... Params>
void launch(const char* op, void (*kernel)(Params...), dim3 grid, dim3 block, void*,
            const std::common_type_t<Params>&... params) {
  cuda_on_cpu::run(op, grid, block, [&] { kernel(params...); });
}

#else

inline void check(const char* op, cudaError_t status, const std::string& what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(op) + ": " + what + ": " + cudaGetErrorName(status) + " (" +
                           cudaGetErrorString(status) + ")");
}

// Raises: the current device is not the one where `pointer` lies.
inline void check_device(const char* op, const void* pointer) {
  int device;
  cudaPointerAttributes found;
  check(op, cudaGetDevice(&device), "no current device");
  check(op, cudaPointerGetAttributes(&found, pointer), "cannot tell where the output lies");
  if (found.type != cudaMemoryTypeDevice && found.type != cudaMemoryTypeManaged) {
    throw std::invalid_argument(std::string(op) + ": the output is not in the memory of a GPU");
  }
  if (found.type == cudaMemoryTypeDevice && found.device != device) {
    throw std::invalid_argument(std::string(op) + ": the output is on device " +
                                std::to_string(found.device) + ", the current device is " +
                                std::to_string(device) + ": call it under torch.cuda.device(" +
                                std::to_string(found.device) + ")");
  }
}

inline std::string words(dim3 size) {
  return std::to_string(size.x) + " x " + std::to_string(size.y) + " x " + std::to_string(size.z);
}

// Runs a kernel on a stream, and does not wait for it. Raises: it cannot be launched.
template <class... Params>
void launch(const char* op, void (*kernel)(Params...), dim3 grid, dim3 block, void* stream,
            const std::common_type_t<Params>&... params) {
  kernel<<<grid, block, 0, static_cast<cudaStream_t>(stream)>>>(params...);
  check(op, cudaGetLastError(),
        "cannot launch a grid of " + words(grid) + " blocks of " + words(block) + " threads");
}

#endif

}  // namespace cuda
}  // namespace vovnet_fast
