// The machine of kernel.h that is a Hopper GPU: each function is one instruction of sm_90a.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "../../dtypes.h"
#include "layout.h"
#include "wgmma.cuh"

namespace vovnet_fast {
namespace conv_sm90 {

// Registers of a thread that fetches and of one that multiplies. They start with what the launch
// bounds leave to each, 168: 40 + 2 * 232 = 3 * 168.
constexpr int kFetchRegisters = 40;
constexpr int kMultiplyRegisters = 232;

class Sm90 {
 public:
  // shared: an address in the window of shared memory that starts an atom.
  __device__ __forceinline__ Sm90(uint32_t shared, char* generic, const CUtensorMap* x,
                                  const CUtensorMap* weight)
      : shared_(shared), generic_(generic), x_(x), weight_(weight) {}

  __device__ __forceinline__ int thread() const { return threadIdx.x; }
  __device__ __forceinline__ int thread_again() const {
    int found;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(found));
    return found;
  }
  // A value that is the same in all threads of a warp, so that the compiler knows, too.
  __device__ __forceinline__ int uniform(int value) const {
    return __shfl_sync(0xffffffffu, value, 0);
  }
  __device__ __forceinline__ int cluster() const {
    int found;
    asm("mov.u32 %0, %%clusterid.x;" : "=r"(found));
    return found;
  }
  __device__ __forceinline__ int clusters() const {
    int found;
    asm("mov.u32 %0, %%nclusterid.x;" : "=r"(found));
    return found;
  }
  __device__ __forceinline__ int rank() const {
    int found;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(found));
    return found;
  }
  __device__ __forceinline__ void synchronise() { __syncthreads(); }
  __device__ __forceinline__ void synchronise_cluster() {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
  }
  // `count` of those that multiply: all of them, which are group 0, or a warpgroup, which is 1
  // or 2.
  __device__ __forceinline__ void synchronise_consumers(int group = 0,
                                                        int count = kConsumers * kWarpgroup) {
    asm volatile("bar.sync %0, %1;" ::"r"(1 + group), "r"(count) : "memory");
  }
  __device__ __forceinline__ void shrink_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kFetchRegisters));
  }
  __device__ __forceinline__ void grow_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kMultiplyRegisters));
  }
  __device__ __forceinline__ float* floats(uint32_t offset) const {
    return reinterpret_cast<float*>(generic_ + offset);
  }

  // ---- Barriers in shared memory

  __device__ __forceinline__ void initialise(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_ + barrier), "r"(arrivals)
                 : "memory");
  }
  // Lets the bulk copies, too, see barriers as they were initialised.
  __device__ __forceinline__ void publish_barriers() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
  // Wait for the end of the phase that has this parity.
  __device__ __forceinline__ void wait(uint32_t barrier, uint32_t parity) {
    uint32_t done;
    do {
      asm volatile(
          "{\n.reg .pred p;\n"
          "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
          "selp.u32 %0, 1, 0, p;\n}\n"
          : "=r"(done)
          : "r"(shared_ + barrier), "r"(parity)
          : "memory");
    } while (done == 0);
  }
  // The same, for what CTAs of the cluster have arrived at.
  __device__ __forceinline__ void wait_free(uint32_t barrier, uint32_t parity) {
    uint32_t done;
    do {
      asm volatile(
          "{\n.reg .pred p;\n"
          "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
          "selp.u32 %0, 1, 0, p;\n}\n"
          : "=r"(done)
          : "r"(shared_ + barrier), "r"(parity)
          : "memory");
    } while (done == 0);
  }
  __device__ __forceinline__ void expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_ + barrier),
                 "r"(bytes)
                 : "memory");
  }
  // Once for a warp, at the barriers of `count` CTAs, lane i at that of the CTA with rank `to`: it
  // has written, or read, what they wait for.
  __device__ __forceinline__ void arrive(uint32_t barrier, int count, int to) {
    __syncwarp();
    const int lane = threadIdx.x % kWarp;
    if (count == 1) {
      if (lane == 0) arrive_here(barrier);
    } else if (lane < count) {
      asm volatile(
          "{\n.reg .b32 there;\n"
          "mapa.shared::cluster.u32 there, %0, %1;\n"
          "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];\n}\n" ::"r"(shared_ +
                                                                                       barrier),
          "r"(to)
          : "memory");
    }
  }
  // The same for what products have read, which all of its threads waited for: of that nothing is
  // to be released to the cluster, for which a thread would fence all memory.
  __device__ __forceinline__ void free(uint32_t barrier, int count, int to) {
    __syncwarp();
    const int lane = threadIdx.x % kWarp;
    if (count == 1) {
      if (lane == 0) arrive_here(barrier);
    } else if (lane < count) {
      asm volatile(
          "{\n.reg .b32 there;\n"
          "mapa.shared::cluster.u32 there, %0, %1;\n"
          "mbarrier.arrive.shared::cluster.b64 _, [there];\n}\n" ::"r"(shared_ + barrier),
          "r"(to)
          : "memory");
    }
  }

  // ---- Bulk copies

  // To the same place in all CTAs of the mask, whose barriers at `full` get the bytes as well.

  __device__ __forceinline__ void copy_strip(uint32_t to, uint32_t full, int c, int w, int h, int n,
                                             int count, int mask) {
    if (count > 1) {
      asm volatile(
          "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
          ".multicast::cluster [%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(shared_ + to),
          "l"(x_), "r"(shared_ + full), "r"(c), "r"(w), "r"(h), "r"(n),
          "h"(static_cast<uint16_t>(mask))
          : "memory");
      return;
    }
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared_ + to),
        "l"(x_), "r"(shared_ + full), "r"(c), "r"(w), "r"(h), "r"(n)
        : "memory");
  }
  __device__ __forceinline__ void copy_weights(uint32_t to, uint32_t full, int c, int tap,
                                               int first, int count, int mask) {
    if (count > 1) {
      asm volatile(
          "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
          ".multicast::cluster [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(shared_ + to),
          "l"(weight_), "r"(shared_ + full), "r"(c), "r"(tap), "r"(first),
          "h"(static_cast<uint16_t>(mask))
          : "memory");
      return;
    }
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(shared_ + to),
        "l"(weight_), "r"(shared_ + full), "r"(c), "r"(tap), "r"(first)
        : "memory");
  }

  // ---- Products

  __device__ __forceinline__ uint64_t operand(uint32_t offset) const {
    return descriptor(shared_ + offset);
  }
  __device__ __forceinline__ void begin_products() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
  }
  template <class T, int N>
  __device__ __forceinline__ void multiply_add(float (&sums)[N / 2], uint64_t a, uint64_t b,
                                               bool add) {
    Wgmma<T, N>::run(sums, a, b, add);
  }
  __device__ __forceinline__ void commit_products() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  }
  // Wait for all but the last PENDING groups.
  template <int PENDING>
  __device__ __forceinline__ void wait_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
  }

  // ---- Epilogue

  // Of the shared memory of the CTA with this rank.
  __device__ __forceinline__ void load_shared(int rank, uint32_t offset, float (&numbers)[4]) {
    asm volatile(
        "{\n.reg .b32 there;\n"
        "mapa.shared::cluster.u32 there, %4, %5;\n"
        "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [there];\n}\n"
        : "=f"(numbers[0]), "=f"(numbers[1]), "=f"(numbers[2]), "=f"(numbers[3])
        : "r"(shared_ + offset), "r"(rank)
        : "memory");
  }
  template <class V>
  __device__ __forceinline__ V shuffle_xor(V value, int lanes) {
    return __shfl_xor_sync(0xffffffffu, value, lanes);
  }
  template <class T>
  __device__ __forceinline__ uint32_t narrow_pair(float a, float b) {
    const T pair[2] = {narrow<T>(a), narrow<T>(b)};
    uint32_t word;
    memcpy(&word, pair, sizeof word);
    return word;
  }
  // Of e4m3, the first in the low byte. What is beyond 448 becomes that.
  __device__ __forceinline__ uint32_t narrow_e4m3(float a, float b) {
    uint16_t pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(b), "f"(a));
    return pair;
  }
  __device__ __forceinline__ void widen_e4m3(uint32_t pair, float& a, float& b) {
    uint32_t halves;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(static_cast<uint16_t>(pair)));
    __half found[2];
    memcpy(found, &halves, sizeof found);
    a = __half2float(found[0]), b = __half2float(found[1]);
  }
  __device__ __forceinline__ uint32_t low_halves(uint32_t a, uint32_t b) {
    return __byte_perm(a, b, 0x5410);
  }
  __device__ __forceinline__ uint32_t high_halves(uint32_t a, uint32_t b) {
    return __byte_perm(a, b, 0x7632);
  }
  // Sums that were waited for are read after that.
  template <int COUNT>
  __device__ __forceinline__ void settle(float (&sums)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(sums[i])::"memory");
  }
  template <class T>
  __device__ __forceinline__ void load(const T* from, uint32_t (&words)[4]) {
    const uint4 found = *reinterpret_cast<const uint4*>(from);
    words[0] = found.x, words[1] = found.y, words[2] = found.z, words[3] = found.w;
  }
  template <class T>
  __device__ __forceinline__ void store(T* to, const uint32_t (&words)[4]) {
    *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
  }
  __device__ __forceinline__ void store_words(uint8_t* to, const uint32_t (&words)[2]) {
    *reinterpret_cast<uint2*>(to) = make_uint2(words[0], words[1]);
  }
  __device__ __forceinline__ void store_pair(float* to, float a, float b) {
    *reinterpret_cast<float2*>(to) = make_float2(a, b);
  }

 private:
  __device__ __forceinline__ void arrive_here(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_ + barrier) : "memory");
  }

  uint32_t shared_;
  char* generic_;
  const CUtensorMap* x_;
  const CUtensorMap* weight_;
};

}  // namespace conv_sm90
}  // namespace vovnet_fast
