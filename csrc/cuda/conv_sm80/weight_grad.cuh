// The kernel of the weight gradient of the convolution for sm_80 and newer, and what it is told.
//
// A block sums, over its part of the pixels, the products of a tile of output channels of g by a
// tile of input channels of x, for all taps. A step is 64 pixels, 32 in fp32: those of g, and the
// strip of x with its halo, which all taps read. Both lie as [pixels, channels], and are transposed
// as they are loaded: pixels are what is summed over. Halves are transposed by ldmatrix.trans, fp32
// is loaded word by word. Parts are added up in order by another kernel.
//
// Shared memory holds rows of 128 bytes, channels of a pixel. Of halves unit u lies at place
// u ^ (row % 8): the same unit of any eight rows in a row lies in different banks. Of fp32 it lies
// at place u ^ (row % 4 * 2): so do two neighbours, of which a warp reads the 8 words, of any four.
// Further channels are another plane of rows. Columns of a strip with stride 2 lie as layout.h
// says.
//
// The first layer has three input channels. There x is no strip but patches (image.cuh), and their
// 27 numbers are the input channels of a filter of one tap.
#pragma once

#include <stdexcept>
#include <string>

#include "../vectors.cuh"
#include "device.cuh"
#include "layout.h"
#include "patches.cuh"
#include "weight_grad_params.h"

namespace vovnet_fast {
namespace conv_sm80 {

constexpr VF_HD int step_pixels(int bytes) { return bytes == 4 ? 32 : 64; }
template <class T>
constexpr int kStepPixels = step_pixels(sizeof(T));
constexpr int kPlaneUnits = 8;  // of 16 bytes, of a row
constexpr int kPlaneBytes = kPlaneUnits * kUnitBytes;
template <class T>
constexpr int kBlockPixels = 32 / sizeof(T);  // that one mma.sync sums over

// What a block's warps have: DOWN blocks of 16 output channels each, by PAIRS of twice 8 input
// channels.
template <int KERNEL>
struct GradForm;
template <>
struct GradForm<3> {
  static constexpr int kWarpsDown = 2, kWarpsAcross = 4, kDown = 2, kPairs = 1, kTaps = 9;
};
template <>
struct GradForm<1> {
  static constexpr int kWarpsDown = 2, kWarpsAcross = 4, kDown = 4, kPairs = 2, kTaps = 1;
};
template <>
struct GradForm<kPatches> {
  static constexpr int kWarpsDown = 4, kWarpsAcross = 2, kDown = 1, kPairs = 1, kTaps = 1;
};
template <int KERNEL>
constexpr int kGradOut = GradForm<KERNEL>::kWarpsDown * GradForm<KERNEL>::kDown * 16;
template <int KERNEL>
constexpr int kGradIn = GradForm<KERNEL>::kWarpsAcross * GradForm<KERNEL>::kPairs * 16;

constexpr int grad_block_out(int form) {
  return form == 3 ? kGradOut<3> : form == 1 ? kGradOut<1> : kGradOut<kPatches>;
}
constexpr int grad_block_in(int form) {
  return form == 3 ? kGradIn<3> : form == 1 ? kGradIn<1> : kGradIn<kPatches>;
}
static_assert(kGradIn<kPatches> == kPatchChannels, "a patch is a row");

// 3, 1 or kPatches.
inline int form_of(const ConvSm80WeightGradParams& params) {
  return params.kernel == 3 && params.c_in == kImageChannels ? kPatches : params.kernel;
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
  const int64_t bytes = params.dtype == kFloat32 ? 4 : 2, unit = kUnitBytes / bytes;
  const auto aligned = [&](const View& view, int64_t height, int64_t width) {
    const auto fits = [&](int64_t size, int64_t stride) { return size == 1 || stride % unit == 0; };
    return reinterpret_cast<uintptr_t>(view.data) % kUnitBytes == 0 &&
           fits(params.n, view.stride_n) && fits(height, view.stride_h) &&
           fits(width, view.stride_w);
  };
  const int form = form_of(params);
  const bool patches = form == kPatches;
  require(params.kernel == 3 || params.stride == 1,
          "a kernel of 1 has stride 1, got " + std::to_string(params.stride));
  require((patches || params.c_in % unit == 0) && params.c_out % unit == 0,
          "numbers of channels must be multiples of " + std::to_string(unit) + ", got " +
              std::to_string(params.c_in) + " and " + std::to_string(params.c_out));
  require((patches || aligned(params.x, params.height, params.width)) &&
              aligned(params.g, params.out_height, params.out_width),
          "addresses and strides must be multiples of 16 bytes (copy the tensor, or take another "
          "engine)");
  require(params.tile_w % (32 / bytes) == 0 &&
              params.tile_h * params.tile_w == step_pixels(static_cast<int>(bytes)),
          "no steps of " + std::to_string(params.tile_h) + " x " + std::to_string(params.tile_w) +
              " pixels");
  require(params.n < kLimit && params.height < kLimit && params.width < kLimit &&
              params.c_in < kLimit && params.c_out < kLimit,
          "sizes must be less than 2^30: cut the images into tiles");
  const auto pitches = [&](const View& view, int64_t height, int64_t width) {
    return Pitches{params.n == 1 ? 0 : view.stride_n * bytes,
                   height == 1 ? 0 : view.stride_h * bytes, width == 1 ? 0 : view.stride_w * bytes};
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
  p.c_in = patches ? kPatch : static_cast<int32_t>(params.c_in);
  p.c_out = static_cast<int32_t>(params.c_out);
  p.stride = params.stride;
  p.pad = params.kernel / 2;
  p.tile_h = params.tile_h;
  p.tile_w = params.tile_w;
  p.pitch = patches ? p.tile_w : (p.tile_w - 1) * p.stride + params.kernel;
  p.even = (p.pitch + 1) / 2;
  p.strip_rows =
      patches ? p.tile_h * p.tile_w : ((p.tile_h - 1) * p.stride + params.kernel) * p.pitch;
  p.pitch_magic = magic(p.pitch);
  p.tile_magic = magic(p.tile_w);
  const int64_t down = ceil_div(params.out_height, params.tile_h);
  const int64_t across = ceil_div(params.out_width, params.tile_w);
  p.outputs = static_cast<int32_t>(ceil_div(p.c_out, grad_block_out(form)));
  p.inputs = static_cast<int32_t>(ceil_div(p.c_in, grad_block_in(form)));
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
  p.stage_bytes = static_cast<int32_t>(
      bytes * (p.tile_h * p.tile_w * grad_block_out(form) + p.strip_rows * grad_block_in(form)));
  return p;
}

// ---- Shared memory -----------------------------------------------------------------------------

template <class T>
VF_HD uint32_t plane_unit_at(int rows, int row, int unit) {
  const int moved = sizeof(T) == 4 ? row % 4 * 2 : row % kPlaneUnits;
  return static_cast<uint32_t>(unit / kPlaneUnits * rows * kPlaneBytes + row * kPlaneBytes +
                               ((unit % kPlaneUnits) ^ moved) * kUnitBytes);
}

// Of x. Patches of halves are half as wide.
template <class T, int KERNEL>
VF_HD uint32_t x_unit_at(int rows, int row, int unit) {
  if (KERNEL == kPatches && sizeof(T) == 2) return unit_at(row, unit);
  return plane_unit_at<T>(rows, row, unit);
}

// Where a step begins.
struct StepPixel {
  int n, h, w;
};

VF_DEVICE StepPixel step_pixel(const GradProblem& p, int index) {
  const int of_image = index % (p.down * p.across);
  return {index / (p.down * p.across), of_image / p.across * p.tile_h,
          of_image % p.across * p.tile_w};
}

template <class T, int KERNEL>
VF_DEVICE void fetch_gradient(const GradProblem& p, const StepPixel& first, int first_out,
                              uint32_t to) {
  constexpr int kOutUnits = kGradOut<KERNEL> * sizeof(T) / kUnitBytes;
  const int unit = threadIdx.x % kOutUnits, channel = first_out + unit * kUnitBytes / sizeof(T);
  const char* from = p.g + first.n * p.g_pitch.n + channel * static_cast<int>(sizeof(T));
#pragma unroll
  for (int row_of = 0; row_of < kStepPixels<T>; row_of += kThreads / kOutUnits) {
    const int row = row_of + threadIdx.x / kOutUnits;
    const int line = divide(row, p.tile_magic), column = row - line * p.tile_w;
    const bool inside =
        channel < p.c_out && first.h + line < p.out_height && first.w + column < p.out_width;
    const char* at =
        inside ? from + (first.h + line) * p.g_pitch.h + (first.w + column) * p.g_pitch.w : p.g;
    copy_unit(to + plane_unit_at<T>(kStepPixels<T>, row, unit), at, inside, true);
  }
}

template <class T, int KERNEL>
VF_DEVICE void fetch_input(const GradProblem& p, const StepPixel& first, int first_in,
                           uint32_t to) {
  constexpr int kInUnits = kGradIn<KERNEL> * sizeof(T) / kUnitBytes;
  const int unit = threadIdx.x % kInUnits;
  if constexpr (KERNEL == kPatches) {
    static_assert(kStepPixels<T> * kInUnits == kThreads, "there is a thread for every unit");
    const int row = threadIdx.x / kInUnits;
    const int line = divide(row, p.tile_magic), column = row - line * p.tile_w;
    const int h = first.h + line, w = first.w + column;
    uint32_t words[4];
    patch_unit<T>(words, p.x + first.n * p.x_pitch.n, p.x_pitch, h * p.stride - p.pad,
                  w * p.stride - p.pad, p.height, p.width, unit,
                  h < p.out_height && w < p.out_width);
    put_shared_unit(to + x_unit_at<T, KERNEL>(kStepPixels<T>, row, unit), words);
    return;
  }
  const int channel = first_in + unit * kUnitBytes / sizeof(T);
  const char* from = p.x + first.n * p.x_pitch.n + channel * static_cast<int>(sizeof(T));
#pragma unroll 2
  for (int row_of = 0; row_of < p.strip_rows; row_of += kThreads / kInUnits) {
    const int row = row_of + threadIdx.x / kInUnits;
    const int line = divide(row, p.pitch_magic), place = row - line * p.pitch;
    const int column =
        p.stride == 1 ? place : (place < p.even ? 2 * place : 2 * (place - p.even) + 1);
    const int at_h = first.h * p.stride + line - p.pad, at_w = first.w * p.stride + column - p.pad;
    const bool inside = channel < p.c_in &&
                        static_cast<unsigned>(at_h) < static_cast<unsigned>(p.height) &&
                        static_cast<unsigned>(at_w) < static_cast<unsigned>(p.width);
    const char* at = inside ? from + at_h * p.x_pitch.h + at_w * p.x_pitch.w : p.x;
    copy_unit(to + x_unit_at<T, KERNEL>(p.strip_rows, row, unit), at, inside, row < p.strip_rows);
  }
}

template <class T, int KERNEL>
VF_DEVICE void fetch_step(const GradProblem& p, int index, int first_out, int first_in,
                          uint32_t to) {
  const StepPixel first = step_pixel(p, index);
  fetch_gradient<T, KERNEL>(p, first, first_out, to);
  fetch_input<T, KERNEL>(p, first, first_in, to + kStepPixels<T> * kGradOut<KERNEL> * sizeof(T));
}

// Of g: 16 output channels from `channel` on by the pixels that one mma.sync sums over.
template <class T>
VF_DEVICE void load_gradient(uint32_t (&words)[4], uint32_t from, int first_row, int channel) {
  const int lane = threadIdx.x % kWarp;
  if constexpr (sizeof(T) == 4) {
    const int at = channel + lane / 4, row = first_row + lane % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      words[i] = rounded(shared_word(
          from + plane_unit_at<T>(kStepPixels<T>, row + i / 2 * 4, (at + i % 2 * 8) / 4) +
          at % 4 * 4));
    }
  } else {
    const int row = first_row + (lane & 7) + (lane >> 4) * 8;
    load_transposed(words,
                    from + plane_unit_at<T>(kStepPixels<T>, row, channel / 8 + (lane >> 3 & 1)));
  }
}

// Of x: 16 input channels, which are two operands, by these pixels.
template <class T, int KERNEL>
VF_DEVICE void load_input(uint32_t (&words)[4], uint32_t from, int rows, int first_row,
                          int channel) {
  const int lane = threadIdx.x % kWarp;
  if constexpr (sizeof(T) == 4) {
    const int at = channel + lane / 4, row = first_row + lane % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      words[i] = rounded(shared_word(
          from + x_unit_at<T, KERNEL>(rows, row + i % 2 * 4, (at + i / 2 * 8) / 4) + at % 4 * 4));
    }
  } else {
    const int row = first_row + (lane & 7) + (lane >> 3 & 1) * 8;
    load_transposed(words, from + x_unit_at<T, KERNEL>(rows, row, channel / 8 + (lane >> 4)));
  }
}

// A thread of a part of a tile of channels.
template <class T, int KERNEL>
__global__ void __launch_bounds__(kThreads, 1) weight_grad_kernel(const GradProblem p) {
  using Form = GradForm<KERNEL>;
  constexpr int kDown = Form::kDown, kPairs = Form::kPairs, kTaps = Form::kTaps;
  constexpr int kOut = kGradOut<KERNEL>, kIn = kGradIn<KERNEL>, kBlock = kBlockPixels<T>;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int warp_down = warp / Form::kWarpsAcross, warp_across = warp % Form::kWarpsAcross;
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
      fetch_step<T, KERNEL>(p, begin + fetched, first_out, first_in,
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
      fetch_step<T, KERNEL>(p, step + p.stages - 1, first_out, first_in,
                            static_cast<uint32_t>(last * p.stage_bytes));
    }
    commit_copies();
    const uint32_t of_g = static_cast<uint32_t>(stage * p.stage_bytes);
    const uint32_t of_x = of_g + kStepPixels<T> * kOut * sizeof(T);
#pragma unroll 1
    for (int block = 0; block < kStepPixels<T> / kBlock; ++block) {
      uint32_t a[kDown][4];
#pragma unroll
      for (int i = 0; i < kDown; ++i) {
        load_gradient<T>(a[i], of_g, block * kBlock, (warp_down * kDown + i) * 16);
      }
      const int line = divide(block * kBlock, p.tile_magic);
      const int column_of = block * kBlock - line * p.tile_w;
      const int first = (KERNEL == kPatches ? line : line * p.stride) * p.pitch + column_of;
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) {
        const int column = tap % 3;
        const int row = kTaps == 1
                            ? first
                            : first + tap / 3 * p.pitch +
                                  (p.stride == 1 ? column : (column & 1) * p.even + (column >> 1));
#pragma unroll
        for (int j = 0; j < kPairs; ++j) {
          uint32_t b[4];
          load_input<T, KERNEL>(b, of_x, p.strip_rows, row, (warp_across * kPairs + j) * 16);
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
        float* to = out + (static_cast<int64_t>(output) * kTaps + tap) * p.c_in + input;
        if constexpr (KERNEL == kPatches) {  // Rows of 27.
          to[0] = sum[0];
          if (input + 1 < p.c_in) to[1] = sum[1];
        } else {
          cuda::store(to, cuda::Raw<float, 2>{{sum[0], sum[1]}});
        }
      }
    }
  }
}

}  // namespace conv_sm80
}  // namespace vovnet_fast
