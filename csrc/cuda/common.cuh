// What all kernels share: vectors of 16 bytes, who does which pixels and channels, launches.
//
// A thread takes a vector of channels, `V` of them, of one pixel after the other. A block is X
// threads along the channels by Y along the pixels. Where a view does not allow vectors (alignment,
// strides), and for the channels that are left over when whole vectors are taken, V is 1. So
// every kernel has two forms, and none of them needs to test how long a vector is.
//
//     platform.cuh   CUDA or the host; threads of a block
//     vectors.cuh    vectors in memory and in registers
//     views.cuh      elements of views, whether vectors fit, pixels
//     tiling.cuh     shares of blocks, jobs of threads
//     launch.cuh     dtypes, devices, launches
#pragma once

#include "launch.cuh"
#include "platform.cuh"
#include "tiling.cuh"
#include "vectors.cuh"
#include "views.cuh"
