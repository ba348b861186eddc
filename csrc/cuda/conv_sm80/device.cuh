// What the convolution for sm_80 and newer does beside arithmetic: each function is one
// instruction, or on the host what ../../cuda_on_cpu/warps.h makes of it.
//
// Shared memory is addressed in bytes from its start.
#pragma once

#include <cstdint>

#include "../../dtypes.h"
#include "../platform.cuh"

#ifdef VF_CUDA_ON_CPU
#include "../../cuda_on_cpu/warps.h"
#endif

namespace vovnet_fast {
namespace conv_sm80 {

#ifdef VF_CUDA_ON_CPU

namespace on_cpu = cuda_on_cpu;

inline void copy_unit(uint32_t to, const char* from, bool inside, bool wanted) {
  on_cpu::copy_async(to, from, inside, wanted);
}
inline void commit_copies() { on_cpu::commit_copies(); }
template <int PENDING>
void wait_copies() {
  on_cpu::wait_copies(PENDING);
}
template <int N>
void load_matrices(uint32_t (&words)[N], uint32_t from) {
  on_cpu::load_matrices(VF_PLACE, words, N, from);
}
inline void load_transposed(uint32_t (&words)[4], uint32_t from) {
  on_cpu::load_transposed(VF_PLACE, words, from);
}
template <class T>
void multiply_add(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  on_cpu::multiply_add<T>(VF_PLACE, sums, a, b0, b1);
}
inline uint32_t rounded(uint32_t word) { return on_cpu::to_tf32(word); }
inline float shared_float(uint32_t from) { return on_cpu::load_shared(from); }
inline void put_shared_float(uint32_t to, float value) { on_cpu::store_shared(to, value); }
inline uint32_t shared_word(uint32_t from) { return on_cpu::load_word(from); }
inline void put_shared_unit(uint32_t to, const uint32_t (&words)[4]) {
  on_cpu::store_unit(to, words);
}

#else

__device__ __forceinline__ char* shared_memory() {
  extern __shared__ __align__(128) char shared[];
  return shared;
}

__device__ __forceinline__ uint32_t shared_window(uint32_t offset) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory())) + offset;
}

// Fetches 16 bytes, or zeros where there are none inside the image; unless they are not wanted.
__device__ __forceinline__ void copy_unit(uint32_t to, const char* from, bool inside, bool wanted) {
  if (wanted) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_window(to)),
                 "l"(__cvta_generic_to_global(from)), "r"(inside ? 16 : 0)
                 : "memory");
  }
}
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits for all but the last PENDING groups of this thread.
template <int PENDING>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

__device__ __forceinline__ void load_matrices(uint32_t (&words)[4], uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(shared_window(from))
               : "memory");
}
__device__ __forceinline__ void load_matrices(uint32_t (&words)[2], uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(words[0]), "=r"(words[1])
               : "r"(shared_window(from))
               : "memory");
}

// The same of halves, each matrix transposed.
__device__ __forceinline__ void load_transposed(uint32_t (&words)[4], uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(shared_window(from))
               : "memory");
}

#define VF_MULTIPLY_ADD(T, SHAPE, TYPE)                                                     \
  __device__ __forceinline__ void multiply_add_of(T, float (&d)[4], const uint32_t (&a)[4], \
                                                  uint32_t b0, uint32_t b1) {               \
    asm("mma.sync.aligned." SHAPE ".row.col.f32." TYPE "." TYPE                             \
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"              \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                    \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                    \
  }
VF_MULTIPLY_ADD(__half, "m16n8k16", "f16")
VF_MULTIPLY_ADD(__nv_bfloat16, "m16n8k16", "bf16")
VF_MULTIPLY_ADD(float, "m16n8k8", "tf32")
#undef VF_MULTIPLY_ADD

template <class T>
__device__ __forceinline__ void multiply_add(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
  multiply_add_of(T(), sums, a, b0, b1);
}

// The bits of an fp32 number rounded to TF32.
__device__ __forceinline__ uint32_t rounded(uint32_t word) {
  uint32_t found;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(found) : "f"(__uint_as_float(word)));
  return found;
}

__device__ __forceinline__ float shared_float(uint32_t from) {
  return *reinterpret_cast<const float*>(shared_memory() + from);
}
__device__ __forceinline__ void put_shared_float(uint32_t to, float value) {
  *reinterpret_cast<float*>(shared_memory() + to) = value;
}
__device__ __forceinline__ uint32_t shared_word(uint32_t from) {
  return *reinterpret_cast<const uint32_t*>(shared_memory() + from);
}
__device__ __forceinline__ void put_shared_unit(uint32_t to, const uint32_t (&words)[4]) {
  *reinterpret_cast<uint4*>(shared_memory() + to) = uint4{words[0], words[1], words[2], words[3]};
}

#endif

}  // namespace conv_sm80
}  // namespace vovnet_fast
