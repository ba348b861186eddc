// How functions are declared that a thread of the Hopper convolution runs, on any machine.
#pragma once

#ifdef __CUDACC__
#define VF_THREAD __device__ __forceinline__
#define VF_UNROLL _Pragma("unroll")
#define VF_NO_UNROLL _Pragma("unroll 1")
#else
#define VF_THREAD inline
#define VF_UNROLL
#define VF_NO_UNROLL
#endif
