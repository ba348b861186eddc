// Weight gradients in bf16 by instructions that multiply pairs: here, of neighbouring pixels.
//
// The sums run over gathered rows with their padding, and over the images of a strip without a
// break: of g the pixels that are not there are zeros. A tap is then a constant number of pixels
// away, and how many pixels are multiplied at once has nothing to do with the width of a row. Both
// pixels of a pair lie in four bytes:
//
//   x  [16 channels][pair][channel]            twice: of pairs from even, and from odd pixels on
//   g  [16 channels][16 pairs][channel][pair]  tiles of 1 KiB
//
// A number that is not finite may reach other taps of its channels, which have it in their padding.
//
// An Engine has
//   Session            what a thread holds while it works
//   multiply(Pairs)    out[i, k] += sum over pixels of g[pixel, i] x[pixel, k], or = without `add`
#pragma once

#include <immintrin.h>

#include "conv_weight_grad_run.h"
#include "transpose.h"

namespace vovnet_fast {
inline namespace VF_ISA {
namespace conv {

constexpr int64_t kPairChannels = 32;  // of a chunk, and of what is multiplied at once
constexpr int64_t kStepPixels = 32;    // that are multiplied at once
constexpr int64_t kPairStripPixels = 384;
constexpr int64_t kBehind = 2 * kStepPixels;  // Zeros behind a strip: the last pixels and pairs.

// What is multiplied: up to 32 channels of both operands. Distances are in bytes.
struct Pairs {
  const char *x, *g;
  int64_t x_step, g_step;  // to the next 16 channels
  int64_t steps;
  float* out;
  int64_t out_step;
  int rows, columns;  // channels of g, and of x
  bool add;
};

// Channels 0 to 15, and 16 to 31, of two pixels.
struct Interleaved {
  __m512i low, high;

  VF_HD Interleaved(__m512i first, __m512i second) {
    const __m512i halves =
        _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                         37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i others = _mm512_add_epi16(halves, _mm512_set1_epi16(16));
    low = _mm512_permutex2var_epi16(first, halves, second);
    high = _mm512_permutex2var_epi16(first, others, second);
  }
};

VF_HD __m512i load_chunk(const char* from) {
  return _mm512_loadu_si512(reinterpret_cast<const void*>(from));
}

VF_HD void store_chunk(char* to, __m512i chunk) {
  _mm512_storeu_si512(reinterpret_cast<void*>(to), chunk);
}

// Pairs of gathered pixels, `step` bytes apart for the next 16 channels; the odd ones if they are
// asked for. Behind the pixels there is one more.
VF_HD void pair_input(const char* from, int64_t pixels, int64_t step, char* even, char* odd) {
  __m512i first = load_chunk(from);
  for (int64_t i = 0; i < pixels; i += 2, even += kChunkBytes) {
    const __m512i second = load_chunk(from + (i + 1) * kChunkBytes);
    const Interleaved pair(first, second);
    store_chunk(even, pair.low);
    store_chunk(even + step, pair.high);
    first = load_chunk(from + (i + 2) * kChunkBytes);
    if (odd == nullptr) continue;
    const Interleaved between(second, first);
    store_chunk(odd, between.low);
    store_chunk(odd + step, between.high);
    odd += kChunkBytes;
  }
}

// Tiles of gathered pixels, `step` bytes apart for the next 16 channels.
VF_HD void pair_gradient(const char* from, int64_t steps, int64_t step, char* to) {
  for (int64_t i = 0; i < steps; ++i, to += kTileBytes) {
    __m512i low[16], high[16];
#pragma GCC unroll 16
    for (int k = 0; k < 16; ++k, from += 2 * kChunkBytes) {
      const Interleaved pair(load_chunk(from), load_chunk(from + kChunkBytes));
      low[k] = pair.low;
      high[k] = pair.high;
    }
    transpose(low, to);
    transpose(high, to + step);
  }
}

// What a thread has of a strip.
class PairStrip {
 public:
  PairStrip(const ConvWeightGradParams& p, const PixelPlan& plan, char* memory)
      : p_(p),
        plan_(plan),
        input_(plan.input),
        step_(input_.pixels / 2 * kChunkBytes),
        pixels_(memory),
        even_(pixels_ + chunks_at_once(input_) * input_.pixels * kChunkBytes),
        odd_(input_.kernel == 1 ? nullptr : even_ + 2 * step_),
        gradient_(even_ + (input_.kernel == 1 ? 2 : 4) * step_),
        whole_(plan) {
    memset(pixels_, 0, static_cast<size_t>(even_ - pixels_));
    whole_.input.chunks = chunks_at_once(input_);
  }

  // Unfolded, all chunks of a pixel are gathered at once.
  static int64_t chunks_at_once(const Plan& input) { return input.unfolded ? input.chunks : 1; }

  // Bytes of memory, for `tiles` tiles of 32 output channels.
  static int64_t bytes(const PixelPlan& plan, int64_t tiles) {
    const Plan& input = plan.input;
    const int64_t gathered = chunks_at_once(input) * input.pixels * kChunkBytes;
    const int64_t paired = (input.kernel == 1 ? 2 : 4) * (input.pixels / 2) * kChunkBytes;
    return gathered + paired + tiles * 2 * most_steps(plan) * kTileBytes;
  }

  void gather_gradient(const Strip& strip, int64_t first_tile, int64_t last_tile) {
    const int64_t row = strip.rows * input_.width;
    steps_ = ceil_div((strip.images - 1) * input_.plane_pixels + row - input_.extra, kStepPixels);
    ConvParams gradient{};
    gradient.height = p_.out_height;
    gradient.width = p_.out_width;
    gradient.kernel = gradient.stride = 1;
    Plan rows = divide({p_.out_height, input_.width, kPairChannels, 1, 1, 1}, kPairChannels);
    rows.width = input_.width;
    char* to = gradient_;
    for (int64_t tile = first_tile; tile < last_tile; ++tile, to += 2 * steps_ * kTileBytes) {
      const int64_t channel = tile * kPairChannels;
      gradient.c_in = least(kPairChannels, p_.c_out - channel);
      gradient.x = p_.g;
      gradient.x.data = static_cast<bfloat16*>(p_.g.data) + channel;
      for (int64_t i = 0; i < strip.images; ++i) {
        char* image = pixels_ + i * input_.plane_pixels * kChunkBytes;
        gather<bfloat16, bfloat16>(gradient, rows, strip.image + i, strip.row, strip.rows, image);
        const int64_t last = i + 1 < strip.images ? input_.plane_pixels : row + kStepPixels;
        memset(image + row * kChunkBytes, 0, static_cast<size_t>((last - row) * kChunkBytes));
      }
      pair_gradient(pixels_, steps_, steps_ * kTileBytes, to);
    }
  }

  // Some channels of x with some of g, added to what is there or not.
  template <class Engine>
  void multiply(const Strip& strip, const GradTask& task, float* out, bool add) {
    for (int64_t chunk = task.first_chunk; chunk < task.last_chunk; ++chunk) {
      const int64_t at = input_.unfolded ? chunk : 0;
      if (at == 0) gather_input(strip, chunk);
      pair_input(pixels_ + at * input_.pixels * kChunkBytes, input_.pixels - 2, step_, even_, odd_);
      for (int64_t tile = task.first_tile; tile < task.last_tile; ++tile) {
        multiply_taps<Engine>(chunk, tile, (tile - task.first_tile) * 2 * steps_, out, add);
      }
    }
  }

 private:
  static int64_t most_steps(const PixelPlan& plan) {
    return ceil_div(plan.images * plan.input.plane_pixels, kStepPixels);
  }

  void gather_input(const Strip& strip, int64_t chunk) {
    const auto input = input_of<bfloat16>(p_, input_, kPairChannels, chunk, whole_.input.chunks);
    for (int64_t i = 0; i < strip.images; ++i) {
      gather<bfloat16, bfloat16>(input, whole_.input, strip.image + i, strip.row, strip.rows,
                                 pixels_ + i * plan_.image_pixels * kChunkBytes);
    }
  }

  template <class Engine>
  void multiply_taps(int64_t chunk, int64_t tile, int64_t gradient, float* out, bool add) {
    const int64_t row = tile * kPairChannels, column = chunk * kPairChannels;
    Pairs pairs{};
    pairs.g = gradient_ + gradient * kTileBytes;
    pairs.x_step = step_;
    pairs.g_step = steps_ * kTileBytes;
    pairs.steps = steps_;
    pairs.out_step = taps(input_) * input_.channels;
    pairs.rows = static_cast<int>(least(kPairChannels, p_.c_out - row));
    pairs.columns = static_cast<int>(least(kPairChannels, input_.channels - column));
    pairs.add = add;
    for (int64_t tap = 0; tap < taps(input_); ++tap) {
      const int64_t h = tap / input_.kernel, w = tap % input_.kernel, stride = input_.stride;
      const int64_t plane = h % stride * input_.planes + w % stride;
      const int64_t first = plane * input_.plane_pixels + h / stride * input_.width + w / stride;
      pairs.x = (first % 2 == 0 ? even_ : odd_) + first / 2 * kChunkBytes;
      pairs.out = out + row * pairs.out_step + tap * input_.channels + column;
      Engine::multiply(pairs);
    }
  }

  const ConvWeightGradParams& p_;
  const PixelPlan& plan_;
  const Plan& input_;
  const int64_t step_;
  char *const pixels_, *const even_, *const odd_, *const gradient_;
  PixelPlan whole_;
  int64_t steps_ = 0;
};

inline PixelPlan divide_pairs(const Shape& shape, int64_t n, int64_t pixels) {
  PixelPlan plan = divide_pixels(shape, n, kPairChannels, pixels);
  if (plan.input.planes > 1 && plan.images > 1) {  // Its planes do not follow one another.
    plan.images = 1;
    plan.strips = n;
  }
  plan.input.pixels = ceil_div(plan.images * plan.image_pixels, int64_t{2}) * 2 + kBehind;
  return plan;
}

template <class Engine>
void run_weight_grad_pairs(const ConvWeightGradParams& p, int threads) {
  const PixelPlan plan = divide_pairs(
      {p.out_height, p.out_width, p.c_in, p.c_out, p.kernel, p.stride}, p.n, kPairStripPixels);
  const int64_t tiles = ceil_div(p.c_out, kPairChannels);
  const auto ranges =
      divide_outputs(plan.input, tiles, ceil_div(threads, p.parts), Cycles{6, 6, 2});
  const int64_t bytes = PairStrip::bytes(plan, ceil_div(tiles, ranges.tiles) + 1);
  share_weight_grad(p, plan, tiles, ranges, bytes, threads,
                    [&](const GradTask& task, char* memory, float* out) {
                      const typename Engine::Session session;
                      PairStrip pairs(p, plan, memory);
                      for (int64_t i = task.first_strip; i < task.last_strip; ++i) {
                        const Strip strip = strip_of(p, plan, i);
                        pairs.gather_gradient(strip, task.first_tile, task.last_tile);
                        pairs.template multiply<Engine>(strip, task, out, i > task.first_strip);
                      }
                    });
}

}  // namespace conv
}  // namespace VF_ISA
}  // namespace vovnet_fast
