// The kernel of the weight gradient of the convolution for sm_80 and newer, and what it is told.
//
// A block sums, over its part of the pixels, the products of a tile of output channels of g by a
// tile of input channels of x, for all taps. A step is 64 pixels: those of g, and the strip of x
// with its halo, which all taps read. Both lie as [pixels, channels], and are transposed as they
// are loaded (ldmatrix.trans): pixels are what is summed over. Parts are added up in order by
// another kernel.
//
// Shared memory holds rows of 128 bytes, 64 channels of a pixel, whose unit u lies at place
// u ^ (row % 8): the same unit of any eight rows in a row lies in different banks. Channels beyond
// 64 are another plane of rows. Columns of a strip with stride 2 lie as layout.h says.
#pragma once

#include <stdexcept>
#include <string>

#include "../vectors.cuh"
#include "device.cuh"
#include "layout.h"
#include "weight_grad_params.h"

namespace vovnet_fast {
namespace conv_sm80 {

constexpr int kStepPixels = 64;
constexpr int kPlaneUnits = 8;  // of 16 bytes, of a row
constexpr int kPlaneBytes = kPlaneUnits * kUnitBytes;
constexpr int kBlockPixels = 16;  // that one mma.sync sums over

// What a block's warps have, two down the output channels by four across the input channels: DOWN
// blocks of 16 output channels each, and PAIRS of 8 input channels.
template <int KERNEL>
constexpr int kGradDown = KERNEL == 3 ? 2 : 4;
template <int KERNEL>
constexpr int kGradPairs = KERNEL == 3 ? 1 : 2;
constexpr int kGradWarpsDown = 2, kGradWarpsAcross = 4;
constexpr VF_HD int grad_block_out(int kernel) {
  return kGradWarpsDown * 16 * (kernel == 3 ? 2 : 4);
}
constexpr VF_HD int grad_block_in(int kernel) {
  return kGradWarpsAcross * 16 * (kernel == 3 ? 1 : 2);
}

// All that the kernel is told.
struct GradProblem {
  const char* x;
  const char* g;
  float* out;  // [parts, C_out, K, K, C_in]
  Pitches x_pitch, g_pitch;
  int64_t part_elements;
  int32_t height, width, out_height, out_width, c_in, c_out;
  int32_t stride, pad;
  int32_t tile_h, tile_w, strip_rows, pitch, even;
  uint32_t pitch_magic, tile_magic;
  int32_t down, across;         // steps of an image
  int32_t steps, parts;         // all steps, and into how many parts they are divided
  int32_t outputs, inputs;      // tiles of channels
  int32_t stages, stage_bytes;  // of g, then of x
};

// Raises: the kernel cannot take these arguments. Nothing may be empty.
inline GradProblem plan(const ConvSm80WeightGradParams& params) {
  const auto require = [](bool held, const std::string& what) {
    if (!held) throw std::invalid_argument("conv_sm80_weight_grad: " + what);
  };
  constexpr int64_t kLimit = int64_t{1} << 30;
  const auto aligned = [&](const View& view, int64_t height, int64_t width) {
    const auto fits = [](int64_t size, int64_t stride) { return size == 1 || stride % 8 == 0; };
    return reinterpret_cast<uintptr_t>(view.data) % kUnitBytes == 0 &&
           fits(params.n, view.stride_n) && fits(height, view.stride_h) &&
           fits(width, view.stride_w);
  };
  require(params.kernel == 3 || params.stride == 1,
          "a kernel of 1 has stride 1, got " + std::to_string(params.stride));
  require(params.c_in % 8 == 0 && params.c_out % 8 == 0,
          "numbers of channels must be multiples of 8, got " + std::to_string(params.c_in) +
              " and " + std::to_string(params.c_out));
  require(aligned(params.x, params.height, params.width) &&
              aligned(params.g, params.out_height, params.out_width),
          "addresses and strides must be multiples of 16 bytes (copy the tensor, or take another "
          "engine)");
  require(params.tile_w % kBlockPixels == 0 && params.tile_h * params.tile_w == kStepPixels,
          "no steps of " + std::to_string(params.tile_h) + " x " + std::to_string(params.tile_w) +
              " pixels");
  require(params.n < kLimit && params.height < kLimit && params.width < kLimit &&
              params.c_in < kLimit && params.c_out < kLimit,
          "sizes must be less than 2^30: cut the images into tiles");
  const auto pitches = [&](const View& view, int64_t height, int64_t width) {
    return Pitches{params.n == 1 ? 0 : view.stride_n * 2, height == 1 ? 0 : view.stride_h * 2,
                   width == 1 ? 0 : view.stride_w * 2};
  };
  GradProblem p;
  p.x = static_cast<const char*>(params.x.data);
  p.g = static_cast<const char*>(params.g.data);
  p.out = static_cast<float*>(params.parts == 1 ? params.out : params.partials);
  p.x_pitch = pitches(params.x, params.height, params.width);
  p.g_pitch = pitches(params.g, params.out_height, params.out_width);
  p.part_elements = params.c_out * params.kernel * params.kernel * params.c_in;
  p.height = static_cast<int32_t>(params.height);
  p.width = static_cast<int32_t>(params.width);
  p.out_height = static_cast<int32_t>(params.out_height);
  p.out_width = static_cast<int32_t>(params.out_width);
  p.c_in = static_cast<int32_t>(params.c_in);
  p.c_out = static_cast<int32_t>(params.c_out);
  p.stride = params.stride;
  p.pad = params.kernel / 2;
  p.tile_h = params.tile_h;
  p.tile_w = params.tile_w;
  p.pitch = (p.tile_w - 1) * p.stride + params.kernel;
  p.even = (p.pitch + 1) / 2;
  p.strip_rows = ((p.tile_h - 1) * p.stride + params.kernel) * p.pitch;
  p.pitch_magic = magic(p.pitch);
  p.tile_magic = magic(p.tile_w);
  const int64_t down = ceil_div(params.out_height, params.tile_h);
  const int64_t across = ceil_div(params.out_width, params.tile_w);
  p.outputs = static_cast<int32_t>(ceil_div(params.c_out, grad_block_out(params.kernel)));
  p.inputs = static_cast<int32_t>(ceil_div(params.c_in, grad_block_in(params.kernel)));
  const int64_t tiles = static_cast<int64_t>(p.outputs) * p.inputs;
  require(down * across < kLimit && down * across * params.n < kLimit && tiles < kLimit &&
              params.parts < kLimit && tiles * params.parts < kLimit,
          "more than 2^30 steps or blocks: split the batch");
  p.down = static_cast<int32_t>(down);
  p.across = static_cast<int32_t>(across);
  p.steps = static_cast<int32_t>(down * across * params.n);
  p.parts = static_cast<int32_t>(params.parts);
  require(p.parts <= p.steps, "there are " + std::to_string(p.steps) + " steps, for " +
                                  std::to_string(p.parts) + " parts");
  p.stages = params.stages;
  p.stage_bytes = kStepPixels * grad_block_out(params.kernel) * 2 +
                  p.strip_rows * grad_block_in(params.kernel) * 2;
  return p;
}

VF_HD uint32_t plane_unit_at(int rows, int row, int unit) {
  return static_cast<uint32_t>(unit / kPlaneUnits * rows * kPlaneBytes + row * kPlaneBytes +
                               ((unit % kPlaneUnits) ^ (row % kPlaneUnits)) * kUnitBytes);
}

template <int KERNEL>
VF_DEVICE void fetch_step(const GradProblem& p, int index, int first_out, int first_in,
                          uint32_t to) {
  constexpr int kOut = grad_block_out(KERNEL), kIn = grad_block_in(KERNEL);
  constexpr int kOutUnits = kOut / 8, kInUnits = kIn / 8;
  const int n = index / (p.down * p.across), of_image = index % (p.down * p.across);
  const int h = of_image / p.across * p.tile_h, w = of_image % p.across * p.tile_w;
  {
    const int unit = threadIdx.x % kOutUnits;
    const char* from = p.g + n * p.g_pitch.n + (first_out + unit * 8) * 2;
    const bool channels = first_out + unit * 8 < p.c_out;
#pragma unroll
    for (int first = 0; first < kStepPixels; first += kThreads / kOutUnits) {
      const int row = first + threadIdx.x / kOutUnits;
      const int line = divide(row, p.tile_magic), column = row - line * p.tile_w;
      const bool inside = channels && h + line < p.out_height && w + column < p.out_width;
      const char* at = inside ? from + (h + line) * p.g_pitch.h + (w + column) * p.g_pitch.w : p.g;
      copy_unit(to + plane_unit_at(kStepPixels, row, unit), at, inside, true);
    }
  }
  const int unit = threadIdx.x % kInUnits;
  const char* from = p.x + n * p.x_pitch.n + (first_in + unit * 8) * 2;
  const bool channels = first_in + unit * 8 < p.c_in;
  to += kStepPixels * kOut * 2;
#pragma unroll 2
  for (int first = 0; first < p.strip_rows; first += kThreads / kInUnits) {
    const int row = first + threadIdx.x / kInUnits;
    const int line = divide(row, p.pitch_magic), place = row - line * p.pitch;
    const int column =
        p.stride == 1 ? place : (place < p.even ? 2 * place : 2 * (place - p.even) + 1);
    const int at_h = h * p.stride + line - p.pad, at_w = w * p.stride + column - p.pad;
    const bool inside = channels && static_cast<unsigned>(at_h) < static_cast<unsigned>(p.height) &&
                        static_cast<unsigned>(at_w) < static_cast<unsigned>(p.width);
    const char* at = inside ? from + at_h * p.x_pitch.h + at_w * p.x_pitch.w : p.x;
    copy_unit(to + plane_unit_at(p.strip_rows, row, unit), at, inside, row < p.strip_rows);
  }
}

// A thread of a part of a tile of channels.
template <class T, int KERNEL>
__global__ void __launch_bounds__(kThreads, 1) weight_grad_kernel(const GradProblem p) {
  constexpr int kDown = kGradDown<KERNEL>, kPairs = kGradPairs<KERNEL>, kTaps = KERNEL * KERNEL;
  constexpr int kOut = grad_block_out(KERNEL), kIn = grad_block_in(KERNEL);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int warp_down = warp / kGradWarpsAcross, warp_across = warp % kGradWarpsAcross;
  const int part = blockIdx.x / (p.outputs * p.inputs);
  const int tile = blockIdx.x % (p.outputs * p.inputs);
  const int first_out = tile / p.inputs * kOut, first_in = tile % p.inputs * kIn;
  const int begin = static_cast<int>(static_cast<int64_t>(p.steps) * part / p.parts);
  const int end = static_cast<int>(static_cast<int64_t>(p.steps) * (part + 1) / p.parts);

  float sums[kTaps][kDown][2 * kPairs][4] = {};
  int fetched = 0;
#pragma unroll 1
  for (; fetched < p.stages - 1; ++fetched) {
    if (begin + fetched < end) {
      fetch_step<KERNEL>(p, begin + fetched, first_out, first_in,
                         static_cast<uint32_t>(fetched * p.stage_bytes));
    }
    commit_copies();
  }
  int stage = 0;
#pragma unroll 1
  for (int step = begin; step < end; ++step) {
    if (p.stages == 3) {
      wait_copies<1>();
    } else {
      wait_copies<0>();
    }
    // All have what everyone fetched, and are done with the step before, whose place is taken.
    __syncthreads();
    const int last = stage == 0 ? p.stages - 1 : stage - 1;
    if (step + p.stages - 1 < end) {
      fetch_step<KERNEL>(p, step + p.stages - 1, first_out, first_in,
                         static_cast<uint32_t>(last * p.stage_bytes));
    }
    commit_copies();
    const uint32_t of_g = static_cast<uint32_t>(stage * p.stage_bytes);
    const uint32_t of_x = of_g + kStepPixels * kOut * 2;
#pragma unroll 1
    for (int block = 0; block < kStepPixels / kBlockPixels; ++block) {
      uint32_t a[kDown][4];
#pragma unroll
      for (int i = 0; i < kDown; ++i) {
        const int row = block * kBlockPixels + (lane & 7) + (lane >> 4) * 8;
        const int unit = (warp_down * kDown + i) * 2 + (lane >> 3 & 1);
        load_transposed(a[i], of_g + plane_unit_at(kStepPixels, row, unit));
      }
      const int line = divide(block * kBlockPixels, p.tile_magic);
      const int first = line * p.stride * p.pitch + block * kBlockPixels - line * p.tile_w +
                        (lane & 7) + (lane >> 3 & 1) * 8;
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) {
        const int column = tap % KERNEL;
        const int row = first + tap / KERNEL * p.pitch +
                        (p.stride == 1 ? column : (column & 1) * p.even + (column >> 1));
#pragma unroll
        for (int j = 0; j < kPairs; ++j) {
          const int unit = (warp_across * kPairs + j) * 2 + (lane >> 4);
          uint32_t b[4];
          load_transposed(b, of_x + plane_unit_at(p.strip_rows, row, unit));
#pragma unroll
          for (int i = 0; i < kDown; ++i) {
            multiply_add<T>(sums[tap][i][2 * j], a[i], b[0], b[1]);
            multiply_add<T>(sums[tap][i][2 * j + 1], a[i], b[2], b[3]);
          }
        }
      }
    }
    stage = stage + 1 == p.stages ? 0 : stage + 1;
  }

  float* out = p.out + part * p.part_elements;
#pragma unroll
  for (int i = 0; i < 2 * kDown; ++i) {
    const int output = first_out + (warp_down * kDown + i / 2) * 16 + i % 2 * 8 + lane / 4;
    if (output >= p.c_out) continue;
#pragma unroll
    for (int j = 0; j < 2 * kPairs; ++j) {
      const int input = first_in + (warp_across * kPairs * 2 + j) * 8 + lane % 4 * 2;
      if (input >= p.c_in) continue;
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) {
        const float* sum = &sums[tap][i / 2][j][i % 2 * 2];
        const cuda::Raw<float, 2> pair = {{sum[0], sum[1]}};
        cuda::store(out + (static_cast<int64_t>(output) * kTaps + tap) * p.c_in + input, pair);
      }
    }
  }
}

}  // namespace conv_sm80
}  // namespace vovnet_fast
