// wgmma.mma_async, both operands in shared memory, K-major: m64nNk16 for fp16 and bf16, m64nNk32
// for e4m3.
//
// Wgmma<T, N>::run adds the product of two operands, which are given by their descriptors, to the
// N / 2 sums that a thread of the warpgroup holds; without `add` it puts it in their place.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "epilogue_e4m3.h"

namespace vovnet_fast {
namespace conv_sm90 {

template <class T, int N>
struct Wgmma;

// PTX wants every sum by name: of 8 * i sums the names, and the variables that they stand for.
#define VF_NAMES_1 "%0, %1, %2, %3, %4, %5, %6, %7"
#define VF_NAMES_2 VF_NAMES_1 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define VF_NAMES_3 VF_NAMES_2 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define VF_NAMES_4 VF_NAMES_3 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define VF_NAMES_5 VF_NAMES_4 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define VF_NAMES_6 VF_NAMES_5 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define VF_NAMES_7 VF_NAMES_6 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define VF_NAMES_8 VF_NAMES_7 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define VF_NAMES_9 VF_NAMES_8 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define VF_NAMES_10 VF_NAMES_9 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define VF_NAMES_11 VF_NAMES_10 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define VF_NAMES_12 VF_NAMES_11 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define VF_NAMES_13 VF_NAMES_12 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define VF_NAMES_14 VF_NAMES_13 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define VF_NAMES_15 VF_NAMES_14 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define VF_NAMES_16 VF_NAMES_15 ", %120, %121, %122, %123, %124, %125, %126, %127"

#define VF_EIGHT(i)                                                                           \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define VF_SUMS_1 VF_EIGHT(0)
#define VF_SUMS_2 VF_SUMS_1, VF_EIGHT(8)
#define VF_SUMS_3 VF_SUMS_2, VF_EIGHT(16)
#define VF_SUMS_4 VF_SUMS_3, VF_EIGHT(24)
#define VF_SUMS_5 VF_SUMS_4, VF_EIGHT(32)
#define VF_SUMS_6 VF_SUMS_5, VF_EIGHT(40)
#define VF_SUMS_7 VF_SUMS_6, VF_EIGHT(48)
#define VF_SUMS_8 VF_SUMS_7, VF_EIGHT(56)
#define VF_SUMS_9 VF_SUMS_8, VF_EIGHT(64)
#define VF_SUMS_10 VF_SUMS_9, VF_EIGHT(72)
#define VF_SUMS_11 VF_SUMS_10, VF_EIGHT(80)
#define VF_SUMS_12 VF_SUMS_11, VF_EIGHT(88)
#define VF_SUMS_13 VF_SUMS_12, VF_EIGHT(96)
#define VF_SUMS_14 VF_SUMS_13, VF_EIGHT(104)
#define VF_SUMS_15 VF_SUMS_14, VF_EIGHT(112)
#define VF_SUMS_16 VF_SUMS_15, VF_EIGHT(120)

// AS_IS: that neither operand is transposed, for which types of one byte have no argument. EIGHTS:
// N / 16. A, B, ADD: the numbers of the operands that follow the N / 2 sums.
#define VF_WGMMA_OF(T, TYPE, DEPTH, AS_IS, N, EIGHTS, A, B, ADD)                                \
  template <>                                                                                   \
  struct Wgmma<T, N> {                                                                          \
    static __device__ __forceinline__ void run(float (&d)[N / 2], uint64_t a, uint64_t b,       \
                                               bool add) {                                      \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #ADD                                    \
                   ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k" DEPTH ".f32." TYPE "." TYPE \
                   " {" VF_NAMES_##EIGHTS "}, %" #A ", %" #B ", p, 1, 1" AS_IS ";\n}\n"         \
                   : VF_SUMS_##EIGHTS                                                           \
                   : "l"(a), "l"(b), "r"(static_cast<int>(add)));                               \
    }                                                                                           \
  };
#define VF_WGMMA(...)                                             \
  VF_WGMMA_OF(__half, "f16", "16", ", 0, 0", __VA_ARGS__)         \
  VF_WGMMA_OF(__nv_bfloat16, "bf16", "16", ", 0, 0", __VA_ARGS__) \
  VF_WGMMA_OF(Float8, "e4m3", "32", "", __VA_ARGS__)

VF_WGMMA(64, 4, 32, 33, 34)
VF_WGMMA(80, 5, 40, 41, 42)
VF_WGMMA(96, 6, 48, 49, 50)
VF_WGMMA(112, 7, 56, 57, 58)
VF_WGMMA(128, 8, 64, 65, 66)
VF_WGMMA(160, 10, 80, 81, 82)
VF_WGMMA(192, 12, 96, 97, 98)
VF_WGMMA(224, 14, 112, 113, 114)
VF_WGMMA(256, 16, 128, 129, 130)

}  // namespace conv_sm90
}  // namespace vovnet_fast
