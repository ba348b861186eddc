// Convolutions in fp32 of pixels that lie one constant step apart, straight from where they lie or
// from rows that a thread has just filled: no chunks of channels are made, and sums leave the
// registers as outputs.
//
//   1x1              from where pixels lie. Of 64 channels a quarter of the time went otherwise
//   1x1 behind 3x3   of a depthwise layer: some pixels of the 3x3 are made, which stay in L1
//   3x3 of images    of few channels: the taps of a row lie in a row of the padded image
//
// For AVX2 and AVX-512. Outputs are summed in the order in which those of other blocks are
// (conv_registers.h).
#pragma once

#include "conv_registers.h"

namespace vovnet_fast {
inline namespace VF_ISA {
namespace conv {

#if defined(__AVX2__)
constexpr bool kDirectBlocks = true;
#else
constexpr bool kDirectBlocks = false;
#endif

// Whether a block's pixels that lie so many numbers apart stay in an L1 cache while their channels
// are multiplied: of lines a multiple of 4 KiB apart it has room for 8 or 12, and blocks of AVX-512
// have 14 pixels.
VF_HD bool stay_near(int64_t step) {
  return kMostPixels <= 8 || step % (4096 / static_cast<int64_t>(sizeof(float))) != 0;
}

// What of a depthwise layer is made at a time: half an L1 cache, beside a tile of weights.
constexpr int64_t kFilledBytes = 16 << 10;

// Pixels that lie `step` numbers apart, of which the inputs lie in `runs` of so many, one
// `run_step` behind the other.
struct DirectInput {
  const float* x;
  int64_t step;
  int64_t runs, run_step;
};

// One block: pixels, and the output channels of some tiles.
template <class T>
struct DirectBlock {
  DirectInput in;
  const float* weight;  // [inputs of all runs][16]: the tiles of chunks lie in a row
  int64_t tile_step;    // numbers from one of 16 output channels to the next
  int64_t inputs;       // of a run
  float* kept;          // sums up to here, [pixel][channel]; null where all inputs are there
  bool first, last;
  T* out;
  int64_t out_step;
  int64_t channels;  // of those of the tiles
  const float *scale, *shift;
  bool relued;
  float* pool;  // or null
};

// Outputs of a vector of channels, from the sums of each pixel.
template <int kPixels, class T, class Span, class SumOf>
VF_HD void finish_direct(const DirectBlock<T>& b, int64_t c, Span span, SumOf sum_of) {
  const auto scale = load(b.scale + c, span), shift = load(b.shift + c, span);
  Vector<float> total{};
  T* to = b.out + c;
#pragma GCC unroll 16
  for (int i = 0; i < kPixels; ++i, to += b.out_step) {
    auto y = scale_shift(sum_of(i), scale, shift);
    if (b.relued) y = relu(y);
    total += y;
    store(to, y, span);
  }
  if (b.pool != nullptr) store(b.pool + c, load(b.pool + c, span) + total, span);
}

// Addresses are a base and up to 5 steps, which x86 needs two registers for: one and three of them.
template <int kPixels>
constexpr int kPerBase = kPixels <= 6 ? 6 : 5;

template <int kPixels, int kTiles, class T>
void multiply_direct(const DirectBlock<T>& b) {
  constexpr int kPerTile = 16 / kLanes<float>, kVectors = kTiles * kPerTile;
  constexpr int kChannels = kTiles * kTileChannels;
  constexpr int kEach = kPerBase<kPixels>, kBases = (kPixels + kEach - 1) / kEach;
  Vector<float> sum[kPixels][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kPixels; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[i][v] = Vector<float>{};
  }
  const float *run = b.in.x, *rows = b.weight;
  const int64_t step = b.in.step, tile_step = b.tile_step;
  for (int64_t r = 0; r < b.in.runs; ++r, run += b.in.run_step) {
    const float* x[kBases];
#pragma GCC unroll 4
    for (int i = 0; i < kBases; ++i) x[i] = run + i * kEach * step;
#pragma GCC unroll 4
    for (int64_t k = 0; k < b.inputs; ++k, rows += kTileChannels) {
      Vector<float> row[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        row[v] = load(rows + v / kPerTile * tile_step + v % kPerTile * kLanes<float>, Full{});
      }
#pragma GCC unroll 16
      for (int i = 0; i < kPixels; ++i) {
        const auto pixel = same(x[i / kEach][i % kEach * step + k]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sum[i][v] = multiply_add(pixel, row[v], sum[i][v]);
      }
    }
  }
  if (b.kept != nullptr) {
#pragma GCC unroll 16
    for (int i = 0; i < kPixels; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        float* to = b.kept + i * kChannels + v * kLanes<float>;
        if (!b.first) sum[i][v] = sum[i][v] + load(to, Full{});
        if (!b.last) store(to, sum[i][v], Full{});
      }
    }
    if (!b.last) return;
  }
  if (b.channels == kChannels) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      finish_direct<kPixels>(b, v * kLanes<float>, Full{},
                             [&](int i) VF_LAMBDA { return sum[i][v]; });
    }
    return;
  }
  float sums[kPixels][kChannels];  // So that all others stay in registers.
#pragma GCC unroll 16
  for (int i = 0; i < kPixels; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(&sums[i][v * kLanes<float>], sum[i][v], Full{});
  }
  for_channels<float>(b.channels, [&](int64_t c, auto span) VF_LAMBDA {
    finish_direct<kPixels>(b, c, span, [&](int i) VF_LAMBDA { return load(&sums[i][c], Full{}); });
  });
}

template <int kTiles, class T, int... kCounts>
VF_HD void multiply_direct_some(int pixels, const DirectBlock<T>& b,
                                std::integer_sequence<int, kCounts...>) {
  using Multiply = void (*)(const DirectBlock<T>&);
  static constexpr Multiply kBySize[] = {multiply_direct<kCounts + 1, kTiles, T>...};
  kBySize[pixels - 1](b);
}

// Outputs of a task's tiles, from `out` on: of `length` pixels whose inputs and outputs lie a step
// apart.
template <class Engine, class T>
VF_HD void run_pixels(const ConvParams& p, const Plan& plan, const Task& task, DirectInput in,
                      int64_t length, T* out, float* kept, float* pool) {
  constexpr std::make_integer_sequence<int, kMostPixels> kCounts;
  const int64_t size = Engine::block_pixels(length), group = chunks_at_once<Engine>(plan);
  const bool complete = group == plan.chunks;
  DirectBlock<T> b{};
  b.in = in;
  b.tile_step = tile_step(plan) / static_cast<int64_t>(sizeof(float));
  b.out_step = p.out.stride_w;
  b.relued = p.relu != 0;
  for (int64_t tile = task.first_tile; tile < task.last_tile; tile += kMostTiles) {
    const int64_t tiles = least<int64_t>(kMostTiles, task.last_tile - tile);
    const int64_t channel = tile * kTileChannels;
    b.channels = least(tiles * kTileChannels, p.c_out - channel);
    b.scale = static_cast<const float*>(p.scale) + channel;
    b.shift = static_cast<const float*>(p.shift) + channel;
    b.pool = pool == nullptr ? nullptr : pool + channel;
    for (int64_t chunk = 0; chunk < plan.chunks; chunk += group) {
      const int64_t first = chunk * kTileChannels;
      b.inputs = least(group * kTileChannels, plan.channels - first);
      b.first = chunk == 0;
      b.last = first + b.inputs == plan.channels;
      b.inputs /= in.runs;
      b.weight = static_cast<const float*>(p.tiles) + tile * b.tile_step + first * kTileChannels;
      for (int64_t i = 0; i < length; i += size) {
        b.in.x = in.x + i * in.step + first;
        b.out = out + i * b.out_step + channel;
        b.kept = complete ? nullptr : kept + i * tiles * kTileChannels;
        const int pixels = static_cast<int>(least(size, length - i));
        if (tiles == kMostTiles) {
          multiply_direct_some<kMostTiles>(pixels, b, kCounts);
        } else {
          multiply_direct_some<1>(pixels, b, kCounts);
        }
      }
    }
  }
}

template <class T>
VF_HD T* output_row(const ConvParams& p, const Task& task, int64_t row) {
  return static_cast<T*>(p.out.data) + task.image * p.out.stride_n +
         (task.row + row) * p.out.stride_h;
}

// A 1x1, from where its pixels lie.
template <class Engine>
VF_HD void run_pointwise(const ConvParams& p, const Plan& plan, const Task& task, float* kept,
                         float* pool) {
  const auto* x =
      static_cast<const float*>(p.x.data) + task.image * p.x.stride_n + task.row * p.x.stride_h;
  run_pixels<Engine>(p, plan, task, {x, p.x.stride_w, 1, 0}, task.rows * p.width,
                     output_row<float>(p, task, 0), kept, pool);
}

// A depthwise layer: some pixels of its 3x3, and their outputs, and so on.
template <class Engine, class T>
VF_HD void run_depthwise(const ConvParams& p, const Plan& plan, const Task& task, float* filled,
                         float* kept) {
  const auto in = depthwise_input<T>(p, task.image);
  const int64_t step = plan.chunks * kTileChannels;  // So that all begin on a cache line.
  const int64_t fit = kFilledBytes / (step * static_cast<int64_t>(sizeof(float)));
  // Whole blocks, and of two of them the depthwise outputs that are made at once.
  constexpr int64_t kTwo = 2 * kMostPixels;
  const int64_t most = fit < kTwo ? kMostPixels : fit / kTwo * kTwo;
  // Outputs of several rows lie in a row only where rows have nothing between them.
  const bool together = p.out.stride_h == p.out_width * p.out.stride_w;
  const int64_t length = task.rows * p.out_width;
  for (int64_t first = 0; first < length;) {
    const int64_t row = first / p.out_width, column = first % p.out_width;
    const int64_t count = least(most, together ? length - first : p.out_width - column);
    for (int64_t i = 0; i < count;) {
      const Pixel o{task.row + (first + i) / p.out_width, (first + i) % p.out_width};
      const int64_t some = least(count - i, p.out_width - o.w);
      float* to = filled + i * step;
      depthwise_row<T>(in, o, some, [&](int64_t j, int64_t c, auto y, auto span) VF_LAMBDA {
        store(to + j * step + c, rounded<T>(y), span);
      });
      i += some;
    }
    run_pixels<Engine>(p, plan, task, {filled, step, 1, 0}, count,
                       output_row<T>(p, task, row) + column * p.out.stride_w, kept, nullptr);
    first += count;
  }
}

// Rows of an image of few channels, all columns that windows reach and zeros where it has none.
template <class T>
VF_HD void pad_rows(const ConvParams& p, const Task& task, int64_t pitch, float* to) {
  const int64_t columns = pitch / p.c_in, pad = p.kernel / 2;
  const int64_t inside = least(columns - pad, p.width);
  const T* image = static_cast<const T*>(p.x.data) + task.image * p.x.stride_n;
  const int64_t first = task.row * p.stride - pad;
  const int64_t last = first + (task.rows - 1) * p.stride + p.kernel;
  for (int64_t h = first; h < last; ++h, to += pitch) {
    if (h < 0 || h >= p.height) {
      zero(to, pitch);
      continue;
    }
    const T* x = image + h * p.x.stride_h;
    zero(to, pad * p.c_in);
    float* next = to + pad * p.c_in;
    // Pixels that lie side by side are one long one.
    const bool dense = p.x.stride_w == p.c_in;
    const int64_t pixels = dense ? 1 : inside, channels = dense ? inside * p.c_in : p.c_in;
    for (int64_t w = 0; w < pixels; ++w, x += p.x.stride_w, next += channels) {
      for_channels<T>(channels, [&](int64_t c, auto span)
                                    VF_LAMBDA { store(next + c, load(x + c, span), span); });
    }
    zero(next, (columns - pad - inside) * p.c_in);
  }
}

// A 3x3 of an image of few channels, which is padded first.
template <class Engine, class T>
VF_HD void run_image(const ConvParams& p, const Plan& plan, const Task& task, float* padded,
                     float* kept, float* pool) {
  const int64_t pitch = ((p.out_width - 1) * p.stride + p.kernel) * p.c_in;
  pad_rows<T>(p, task, pitch, padded);
  for (int64_t row = 0; row < task.rows; ++row) {
    run_pixels<Engine>(p, plan, task,
                       {padded + row * p.stride * pitch, p.stride * p.c_in, p.kernel, pitch},
                       p.out_width, output_row<T>(p, task, row), kept, pool);
  }
}

// A task, in place of `multiply`, where it is one of these. `filled` has room for what is gathered.
template <class Engine, class T>
VF_HD bool run_direct(const ConvParams& p, const Plan& plan, const Task& task, float* filled,
                      float* kept, float* pool) {
  if (p.scale == nullptr) return false;
  if (p.taps != nullptr) {
    run_depthwise<Engine, T>(p, plan, task, filled, kept);
    return true;
  }
  if (plan.unfolded) {
    run_image<Engine, T>(p, plan, task, filled, kept, pool);
    return true;
  }
  if constexpr (std::is_same_v<T, float>) {
    if (p.kernel == 1 && p.stride == 1 && stay_near(p.x.stride_w) &&
        p.x.stride_h == p.width * p.x.stride_w && p.out.stride_h == p.width * p.out.stride_w) {
      run_pointwise<Engine>(p, plan, task, kept, pool);
      return true;
    }
  }
  return false;
}

}  // namespace conv
}  // namespace VF_ISA
}  // namespace vovnet_fast
