// 1x1 convolutions in fp32, from where pixels lie to where outputs do: nothing is gathered, and
// sums leave the registers as outputs. Of 64 channels these were a quarter of the time on a Zen 1.
//
// For AVX2: a block has 6 pixels, whose addresses are a base and multiples of one step. All is
// summed in the order in which other blocks are (conv_registers.h), and so are pool partials.
#pragma once

#include "conv_registers.h"

namespace vovnet_fast {
inline namespace VF_ISA {
namespace conv {

#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr bool kPointwise = true;
#else
constexpr bool kPointwise = false;
#endif

// One block: pixels that lie `step` floats apart, and 16 output channels.
struct PointwiseBlock {
  const float* x;
  int64_t step;
  const float* weight;  // [inputs][16]: the tiles of chunks lie in a row
  int64_t inputs;
  float* kept;  // sums of the channels before, and of these, [pixel][16]; null where all are there
  bool first, last;
  float* out;
  int64_t out_step;
  int64_t channels;  // of 16
  const float *scale, *shift;
  bool relued;
  float* pool;  // or null
};

// Outputs of a vector of channels, from the sums of each pixel.
template <int kPixels, class Span, class SumOf>
VF_HD void finish_pointwise(const PointwiseBlock& b, int64_t c, Span span, SumOf sum_of) {
  const auto scale = load(b.scale + c, span), shift = load(b.shift + c, span);
  Vector<float> total{};
  float* to = b.out + c;
#pragma GCC unroll 16
  for (int i = 0; i < kPixels; ++i, to += b.out_step) {
    auto y = scale_shift(sum_of(i), scale, shift);
    if (b.relued) y = relu(y);
    total += y;
    store(to, y, span);
  }
  if (b.pool != nullptr) store(b.pool + c, load(b.pool + c, span) + total, span);
}

template <int kPixels>
void multiply_pointwise(const PointwiseBlock& b) {
  constexpr int kVectors = 16 / kLanes<float>;
  Vector<float> sum[kPixels][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kPixels; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[i][v] = Vector<float>{};
  }
  const float *x = b.x, *rows = b.weight;
  const int64_t step = b.step;
#pragma GCC unroll 4
  for (int64_t k = 0; k < b.inputs; ++k, ++x, rows += kTileChannels) {
    Vector<float> row[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) row[v] = load(rows + v * kLanes<float>, Full{});
#pragma GCC unroll 16
    for (int i = 0; i < kPixels; ++i) {
      const auto pixel = same(x[i * step]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[i][v] = Fp32::multiply(pixel, row[v], sum[i][v]);
    }
  }
  if (b.kept != nullptr) {
#pragma GCC unroll 16
    for (int i = 0; i < kPixels; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        float* to = b.kept + i * 16 + v * kLanes<float>;
        if (!b.first) sum[i][v] = sum[i][v] + load(to, Full{});
        if (!b.last) store(to, sum[i][v], Full{});
      }
    }
    if (!b.last) return;
  }
  if (b.channels == kTileChannels) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      finish_pointwise<kPixels>(b, v * kLanes<float>, Full{},
                                [&](int i) VF_LAMBDA { return sum[i][v]; });
    }
    return;
  }
  float sums[kPixels][kTileChannels];  // So that all others stay in registers.
#pragma GCC unroll 16
  for (int i = 0; i < kPixels; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(&sums[i][v * kLanes<float>], sum[i][v], Full{});
  }
  for_channels<float>(b.channels, [&](int64_t c, auto span) VF_LAMBDA {
    finish_pointwise<kPixels>(b, c, span,
                              [&](int i) VF_LAMBDA { return load(&sums[i][c], Full{}); });
  });
}

template <int... kCounts>
VF_HD void multiply_pointwise_some(int pixels, const PointwiseBlock& b,
                                   std::integer_sequence<int, kCounts...>) {
  using Multiply = void (*)(const PointwiseBlock&);
  static constexpr Multiply kBySize[] = {multiply_pointwise<kCounts + 1>...};
  kBySize[pixels - 1](b);
}

// Whether a task's pixels lie in a row, and its outputs do.
VF_HD bool is_pointwise(const ConvParams& p) {
  return p.kernel == 1 && p.stride == 1 && p.scale != nullptr &&
         p.x.stride_h == p.width * p.x.stride_w && p.out.stride_h == p.width * p.out.stride_w;
}

// A task, in place of `multiply`.
template <class Engine>
VF_HD void run_pointwise(const ConvParams& p, const Plan& plan, const Task& task, float* kept,
                         float* pool) {
  constexpr std::make_integer_sequence<int, kMostPixels> kCounts;
  const auto* x =
      static_cast<const float*>(p.x.data) + task.image * p.x.stride_n + task.row * p.x.stride_h;
  auto* out =
      static_cast<float*>(p.out.data) + task.image * p.out.stride_n + task.row * p.out.stride_h;
  const int64_t length = task.rows * p.width;
  const int64_t size = Engine::block_pixels(length), group = chunks_at_once<Engine>(plan);
  const bool complete = group == plan.chunks;
  PointwiseBlock b{};
  b.step = p.x.stride_w;
  b.out_step = p.out.stride_w;
  b.relued = p.relu != 0;
  for (int64_t tile = task.first_tile; tile < task.last_tile; ++tile) {
    const int64_t channel = tile * kTileChannels;
    b.channels = least(kTileChannels, p.c_out - channel);
    b.scale = static_cast<const float*>(p.scale) + channel;
    b.shift = static_cast<const float*>(p.shift) + channel;
    b.pool = pool == nullptr ? nullptr : pool + channel;
    for (int64_t chunk = 0; chunk < plan.chunks; chunk += group) {
      const int64_t first = chunk * kTileChannels;
      b.inputs = least(group * kTileChannels, p.c_in - first);
      b.first = chunk == 0;
      b.last = first + b.inputs == p.c_in;
      b.weight = static_cast<const float*>(p.tiles) + channel * plan.chunks * kTileChannels +
                 first * kTileChannels;
      for (int64_t i = 0; i < length; i += size) {
        b.x = x + i * b.step + first;
        b.out = out + i * b.out_step + channel;
        b.kept = complete ? nullptr : kept + i * kTileChannels;
        multiply_pointwise_some(static_cast<int>(least(size, length - i)), b, kCounts);
      }
    }
  }
}

}  // namespace conv
}  // namespace VF_ISA
}  // namespace vovnet_fast
