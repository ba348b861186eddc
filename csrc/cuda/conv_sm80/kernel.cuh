// The kernel of the convolution for sm_80 and newer.
//
// Eight warps share a tile: each holds a quarter of its pixels by half of its output channels, in
// fp32. A step multiplies one tap of a chunk of input channels; what the steps after it need is
// under way meanwhile.
#pragma once

#include "../vectors.cuh"
#include "device.cuh"
#include "layout.h"

namespace vovnet_fast {
namespace conv_sm80 {

using cuda::load;
using cuda::Raw;
using cuda::store;
using cuda::store_word;

// How many mma.sync a warp's share of a tile is, down and across.
template <int PIXELS>
constexpr int kDown = PIXELS / kWarpsDown / kBlockRows;
template <int N>
constexpr int kAcross = N / kWarpsAcross / kBlockColumns;

// Blocks that a processor should have room for.
template <int PIXELS, int N>
constexpr int kBlocks = PIXELS * N <= 128 * 128 ? 2 : 1;

// The sums of a thread, of its warp's share of a tile.
template <int PIXELS, int N>
struct Sums {
  float of[kDown<PIXELS>][kAcross<N>][4] = {};
};

// A step of the loop.
struct Step {
  int chunk = 0, tap = 0;

  VF_DEVICE void advance(int taps) {
    if (++tap == taps) {
      tap = 0;
      ++chunk;
    }
  }
  VF_DEVICE int units(const Problem& p) const {
    return chunk + 1 < p.chunks ? kUnits : p.last_units;
  }
};

// Which taps a tile has: all of the filter.
struct AllTaps {
  static VF_DEVICE Tile tile_at(const Problem& p, int block_out, int index) {
    return conv_sm80::tile_at(p, block_out, index);
  }
  static VF_DEVICE int count(const Problem& p, const Tile&) { return p.taps; }
  static VF_DEVICE int filter_tap(const Tile&, int tap) { return tap; }
  static VF_DEVICE int rows(const Problem& p, const Tile&, int tap) { return tap_rows(p, tap); }
  // The pixel `index` of a tile, which is in its line `line`.
  static VF_DEVICE Pixel output(const Tile& tile, int line, int index, int tile_w) {
    return {tile.h + line, tile.w + index - line * tile_w};
  }
};

// A place in a ring, that steps go round.
struct Ring {
  int stage = 0;

  VF_DEVICE void advance(int stages) { stage = stage + 1 == stages ? 0 : stage + 1; }
};

// ---- Fetching ----------------------------------------------------------------------------------
// A thread has the same unit of every row that it fetches. Units that no product takes are left
// out; those beyond the last channel, of the last step, become zeros.

VF_DEVICE bool taken(int unit, int units) { return unit / kStepUnits * kStepUnits < units; }

VF_DEVICE void fetch_strip(const Problem& p, const Tile& tile, const Step& step, int stage) {
  const int unit = threadIdx.x % kUnits, units = step.units(p);
  const char* from = p.x + tile.n * p.x_pitch.n + (step.chunk * kUnits + unit) * kUnitBytes;
  const uint32_t to = strip_at(p, stage);
#pragma unroll 2
  for (int first = 0; first < p.strip_rows; first += kThreads / kUnits) {
    const int row = first + threadIdx.x / kUnits;
    const Pixel pixel = strip_pixel(p, tile, row);
    const bool inside = unit < units &&
                        static_cast<unsigned>(pixel.h) < static_cast<unsigned>(p.height) &&
                        static_cast<unsigned>(pixel.w) < static_cast<unsigned>(p.width);
    const char* at = inside ? from + pixel.h * p.x_pitch.h + pixel.w * p.x_pitch.w : p.x;
    copy_unit(to + unit_at(row, unit), at, inside, row < p.strip_rows && taken(unit, units));
  }
}

template <int N>
VF_DEVICE void fetch_weights(const Problem& p, const Tile& tile, const Step& step, int filter_tap,
                             int stage) {
  const int unit = threadIdx.x % kUnits, units = step.units(p);
  const int rows = p.c_out - tile.first;
  const char* from = p.weight + tile.first * p.filter_bytes +
                     static_cast<int64_t>(filter_tap) * p.tap_bytes +
                     (step.chunk * kUnits + unit) * kUnitBytes;
  const uint32_t to = weights_at(p, N, stage);
#pragma unroll
  for (int first = 0; first < N; first += kThreads / kUnits) {
    const int row = first + threadIdx.x / kUnits;
    const bool wanted = row < N && taken(unit, units);
    const bool inside = wanted && unit < units && row < rows;
    copy_unit(to + unit_at(row, unit), inside ? from + row * p.filter_bytes : p.weight, inside,
              wanted);
  }
}

// All of a step, as one group. Past the last step the group is empty.
template <class Taps, int N>
VF_DEVICE void fetch(const Problem& p, const Tile& tile, Step& step, Ring& strips, Ring& weights) {
  if (step.chunk < p.chunks) {
    if (step.tap == 0) {
      fetch_strip(p, tile, step, strips.stage);
      strips.advance(p.strip_stages);
    }
    fetch_weights<N>(p, tile, step, Taps::filter_tap(tile, step.tap), weights.stage);
    weights.advance(p.stages);
    step.advance(Taps::count(p, tile));
  }
  commit_copies();
}

// ---- Products ----------------------------------------------------------------------------------

template <class T, int N>
VF_DEVICE void prepare(uint32_t (&words)[N]) {
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < N; ++i) words[i] = rounded(words[i]);
  }
}

// One step: `strip` and `weights` are where they begin, rows[i] of the strip is that of the lane's
// pixel of block i.
template <class T, int PIXELS, int N>
VF_DEVICE void multiply(Sums<PIXELS, N>& sums, const int (&rows)[kDown<PIXELS>], int tap_row,
                        uint32_t strip, uint32_t weights, int units) {
  constexpr int DOWN = kDown<PIXELS>, ACROSS = kAcross<N>;
  const int unit = pixel_unit_of(threadIdx.x % kWarp);
  uint32_t from[DOWN];
#pragma unroll
  for (int i = 0; i < DOWN; ++i) from[i] = strip + unit_at(rows[i] + tap_row, unit);
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    if (k * kStepUnits >= units) break;
    const uint32_t along = k * kStepUnits * kUnitBytes;  // Flips a bit: of the unit's place.
    uint32_t a[DOWN][4];
#pragma unroll
    for (int i = 0; i < DOWN; ++i) {
      load_matrices(a[i], from[i] ^ along);
      prepare<T>(a[i]);
    }
#pragma unroll
    for (int j = 0; j + 1 < ACROSS; j += 2) {
      uint32_t b[4];
      load_matrices(b, (weights + j * kBlockColumns * kRowBytes) ^ along);
      prepare<T>(b);
#pragma unroll
      for (int i = 0; i < DOWN; ++i) {
        multiply_add<T>(sums.of[i][j], a[i], b[0], b[1]);
        multiply_add<T>(sums.of[i][j + 1], a[i], b[2], b[3]);
      }
    }
    if constexpr (ACROSS % 2 == 1) {
      uint32_t b[2];
      load_matrices(b, (weights + (ACROSS - 1) * kBlockColumns * kRowBytes) ^ along);
      prepare<T>(b);
#pragma unroll
      for (int i = 0; i < DOWN; ++i) multiply_add<T>(sums.of[i][ACROSS - 1], a[i], b[0], b[1]);
    }
  }
}

// ---- What is stored ----------------------------------------------------------------------------

// What a warp computes of a tile, and which of its pixels are there, by bits: 2 * i + half.
struct Share {
  Tile tile;
  int warp_down, warp_across;
  unsigned inside;
};

// Where the sums of a thread are in the tile: sum 2 * half + k of block i is that of this pixel.
template <int PIXELS>
VF_DEVICE int pixel_index(int warp_down, int i, int half) {
  return warp_down * (PIXELS / kWarpsDown) + i * kBlockRows + half * 8 + threadIdx.x % kWarp / 4;
}

// Of block j, by the tile: sum 2 * half + k is that of channel k from here.
template <int N>
VF_DEVICE int column_of(int warp_across, int j) {
  return (warp_across * kAcross<N> + j) * kBlockColumns + threadIdx.x % 4 * 2;
}

template <class Taps, int PIXELS>
VF_DEVICE unsigned pixels_inside(const Problem& p, const Share& share) {
  unsigned found = 0;
#pragma unroll
  for (int bit = 0; bit < 2 * kDown<PIXELS>; ++bit) {
    const int index = pixel_index<PIXELS>(share.warp_down, bit / 2, bit % 2);
    const Pixel at = Taps::output(share.tile, divide(index, p.tile_magic), index, p.tile_w);
    if (at.h < p.out_height && at.w < p.out_width) found |= 1u << bit;
  }
  return found;
}

// Where pixel `index` of a tile is in a view, in bytes.
template <class Taps>
VF_DEVICE int64_t offset(const Problem& p, const Tile& tile, int index, const Pitches& pitch) {
  const Pixel at = Taps::output(tile, divide(index, p.tile_magic), index, p.tile_w);
  return tile.n * pitch.n + at.h * pitch.h + at.w * pitch.w;
}

template <int PIXELS, int N>
VF_DEVICE void scale_and_shift(const Problem& p, const Share& share, Sums<PIXELS, N>& sums) {
#pragma unroll
  for (int j = 0; j < kAcross<N>; ++j) {
    const int channel = share.tile.first + column_of<N>(share.warp_across, j);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const bool there = channel < p.c_out;
      const float scale = there ? p.scale[channel + k] : 0.f;
      const float shift = there ? p.shift[channel + k] : 0.f;
#pragma unroll
      for (int i = 0; i < 2 * kDown<PIXELS>; ++i) {
        float& sum = sums.of[i / 2][j][i % 2 * 2 + k];
        sum = scale_shift(sum, scale, shift);
        if (p.relu) sum = relu(sum);
      }
    }
  }
}

template <class T, class Taps, int PIXELS, int N>
VF_DEVICE void add_and_mask(const Problem& p, const Share& share, Sums<PIXELS, N>& sums) {
  const int unmasked = p.c_out - p.mask_c;
#pragma unroll
  for (int i = 0; i < 2 * kDown<PIXELS>; ++i) {
    if ((share.inside >> i & 1) == 0) continue;
    const int index = pixel_index<PIXELS>(share.warp_down, i / 2, i % 2);
    const int64_t to_add = offset<Taps>(p, share.tile, index, p.add_pitch);
    const int64_t to_mask = offset<Taps>(p, share.tile, index, p.mask_pitch);
#pragma unroll
    for (int j = 0; j < kAcross<N>; ++j) {
      const int channel = share.tile.first + column_of<N>(share.warp_across, j);
      float* y = &sums.of[i / 2][j][i % 2 * 2];
      if (channel < p.add_c) {
        const auto raw = load<2>(reinterpret_cast<const T*>(p.add + to_add) + channel);
#pragma unroll
        for (int k = 0; k < 2; ++k) y[k] += widen(raw.element[k]);
      }
      if (channel >= unmasked && channel < p.c_out) {
        const auto raw =
            load<2>(reinterpret_cast<const T*>(p.mask + to_mask) + (channel - unmasked));
#pragma unroll
        for (int k = 0; k < 2; ++k) y[k] = relu_gradient(y[k], widen(raw.element[k]));
      }
    }
  }
}

// Adds up, in order, what the warps left of a channel.
template <int N>
VF_DEVICE float over_warps(int set, int channel) {
  float sum = 0;
#pragma unroll
  for (int warp = 0; warp < kWarpsDown; ++warp) {
    sum += shared_float(sums_at(N, set, warp) + channel * 4);
  }
  return sum;
}

// Sums over the pixels of the warps, of each channel; or of squared deviations from the mean that
// those of the first set, of `count` pixels, make. After a barrier all can add them up.
template <int PIXELS, int N>
VF_DEVICE void leave_sums(int set, float count, const Share& share, const Sums<PIXELS, N>& sums) {
#pragma unroll
  for (int j = 0; j < kAcross<N>; ++j) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int channel = column_of<N>(share.warp_across, j) + k;
      const float mean = set == 0 ? 0.f : over_warps<N>(0, channel) / count;
      float sum = 0;
#pragma unroll
      for (int i = 0; i < 2 * kDown<PIXELS>; ++i) {
        const float away = sums.of[i / 2][j][i % 2 * 2 + k] - mean;
        if ((share.inside >> i & 1) != 0) sum += set == 0 ? away : away * away;
      }
#pragma unroll
      for (int lanes = 4; lanes < kWarp; lanes *= 2) {
        sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
      }
      if (threadIdx.x % kWarp < 4) {
        put_shared_float(sums_at(N, set, share.warp_down) + channel * 4, sum);
      }
    }
  }
  __syncthreads();
}

template <int PIXELS, int N>
VF_DEVICE void store_partials(const Problem& p, const Share& share, const Sums<PIXELS, N>& sums) {
  static_assert(N <= kThreads, "there is a thread for every channel");
  const int c = threadIdx.x;
  const bool mine = c < N && share.tile.first + c < p.c_out;
  leave_sums<PIXELS, N>(0, 1, share, sums);
  if (p.pool_partials != nullptr) {
    float* to = p.pool_partials + share.tile.partial * p.c_out + share.tile.first;
    if (mine) to[c] = over_warps<N>(0, c);
    return;
  }
  const int count =
      min(p.tile_h, p.out_height - share.tile.h) * min(p.tile_w, p.out_width - share.tile.w);
  leave_sums<PIXELS, N>(1, static_cast<float>(count), share, sums);
  float* to = p.statistics + share.tile.partial * kStatisticsRows * p.c_out + share.tile.first;
  if (!mine) return;
  to[c] = static_cast<float>(count);
  to[p.c_out + c] = over_warps<N>(0, c);
  to[2 * p.c_out + c] = over_warps<N>(1, c);
}

// words[i] of lane q of four goes to words[q] of lane i.
VF_DEVICE void transpose(uint32_t (&words)[4]) {
  const int lane = threadIdx.x % 4;
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool high = (lane & bit) != 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int a = bit == 1 ? 2 * i : i, b = a + bit;
      const uint32_t received = __shfl_xor_sync(0xffffffffu, high ? words[a] : words[b], bit);
      words[a] = high ? received : words[a];
      words[b] = high ? words[b] : received;
    }
  }
}

// Rounds and stores. Of halves 16 bytes at once, for which four lanes swap what they hold of up to
// 8 * 4 adjacent channels.
template <class T, class Taps, int PIXELS, int N>
VF_DEVICE void store_tile(const Problem& p, const Share& share, const Sums<PIXELS, N>& sums) {
  const int channels = p.c_out - share.tile.first;
#pragma unroll
  for (int i = 0; i < 2 * kDown<PIXELS>; ++i) {
    const bool there = (share.inside >> i & 1) != 0;
    const int index = pixel_index<PIXELS>(share.warp_down, i / 2, i % 2);
    char* to =
        p.out + offset<Taps>(p, share.tile, index, p.out_pitch) + share.tile.first * sizeof(T);
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int j = 0; j < kAcross<N>; ++j) {
        const float* y = &sums.of[i / 2][j][i % 2 * 2];
        const Raw<float, 2> pair = {{y[0], y[1]}};
        const int column = column_of<N>(share.warp_across, j);
        if (there && column < channels) store(reinterpret_cast<T*>(to) + column, pair);
      }
    } else {
#pragma unroll
      for (int first = 0; first < kAcross<N>; first += 4) {
        uint32_t words[4] = {};
#pragma unroll
        for (int j = 0; j < 4 && first + j < kAcross<N>; ++j) {
          const float* y = &sums.of[i / 2][first + j][i % 2 * 2];
          const T pair[2] = {narrow<T>(y[0]), narrow<T>(y[1])};
          memcpy(&words[j], pair, sizeof pair);
        }
        transpose(words);
        const int block = first + threadIdx.x % 4;  // Of which this lane now has a pixel.
        const int column = (share.warp_across * kAcross<N> + block) * kBlockColumns;
        if (!there || block >= kAcross<N> || column >= channels) continue;
        T* at = reinterpret_cast<T*>(to) + column;
        VF_CHECK_ALIGNED(at, kUnitBytes);
        store_word(reinterpret_cast<uint4*>(at), uint4{words[0], words[1], words[2], words[3]});
      }
    }
  }
}

// ---- The kernel --------------------------------------------------------------------------------

// A thread of a tile of PIXELS by N.
template <class T, class Taps, int PIXELS, int N>
__global__ void __launch_bounds__(kThreads, kBlocks<PIXELS, N>) kernel(const Problem p) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  Share share = {Taps::tile_at(p, N, blockIdx.x), warp / kWarpsAcross, warp % kWarpsAcross, 0};

  int rows[kDown<PIXELS>];
#pragma unroll
  for (int i = 0; i < kDown<PIXELS>; ++i) {
    rows[i] =
        first_row(p, share.warp_down * (PIXELS / kWarpsDown) + i * kBlockRows + pixel_of(lane));
  }
  const uint32_t channels = unit_at(
      share.warp_across * kAcross<N> * kBlockColumns + channel_of(lane), channel_unit_of(lane));

  Sums<PIXELS, N> sums;
  Step fetched, step;
  Ring fetched_strips, fetched_weights, weights;
  int strip = p.strip_stages - 1;
#pragma unroll 1
  for (int i = 0; i < p.stages - 1; ++i) {
    fetch<Taps, N>(p, share.tile, fetched, fetched_strips, fetched_weights);
  }
#pragma unroll 1
  for (; step.chunk < p.chunks; step.advance(Taps::count(p, share.tile))) {
    // What this step reads was committed stages - 1 groups ago.
    if (p.stages == kMaxStages) {
      wait_copies<kMaxStages - 2>();
    } else {
      wait_copies<kMinStages - 2>();
    }
    // All have what everyone fetched, and are done with the step before, whose place is taken.
    __syncthreads();
    fetch<Taps, N>(p, share.tile, fetched, fetched_strips, fetched_weights);
    if (step.tap == 0) strip = strip + 1 == p.strip_stages ? 0 : strip + 1;
    multiply<T, PIXELS, N>(sums, rows, Taps::rows(p, share.tile, step.tap), strip_at(p, strip),
                           weights_at(p, N, weights.stage) + channels, step.units(p));
    weights.advance(p.stages);
  }
  __syncthreads();  // Sums may take the place of what was multiplied.

  share.inside = pixels_inside<Taps, PIXELS>(p, share);
  if (p.scale != nullptr) scale_and_shift<PIXELS, N>(p, share, sums);
  if (p.add != nullptr || p.mask != nullptr) add_and_mask<T, Taps, PIXELS, N>(p, share, sums);
  if (p.pool_partials != nullptr || p.statistics != nullptr) {
    store_partials<PIXELS, N>(p, share, sums);
  }
  store_tile<T, Taps, PIXELS, N>(p, share, sums);
}

using Kernel = void (*)(Problem);

// The kernel of tiles that plan() has checked.
Kernel float16_kernel(int pixels, int block_out);
Kernel bfloat16_kernel(int pixels, int block_out);
Kernel float32_kernel(int pixels, int block_out);
Kernel image_kernel_of(int32_t dtype);  // Of images: image.cuh.

template <class T>
Kernel kernel_for(int pixels, int block_out) {
  switch (block_out) {
#define VF_CASE(channels, wide)                                    \
  case channels:                                                   \
    if constexpr (wide) {                                          \
      if (pixels == 256) return kernel<T, AllTaps, 256, channels>; \
    }                                                              \
    return kernel<T, AllTaps, 128, channels>;
    VF_CONV_SM80_TILES(VF_CASE)
#undef VF_CASE
  }
  return nullptr;
}

}  // namespace conv_sm80
}  // namespace vovnet_fast
