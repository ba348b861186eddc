// The kernel of a depthwise 3x3 with the 1x1 that follows it.
//
// Fetching, products and what is stored are those of ../conv_sm80/kernel.cuh. A step makes the
// pixels of a chunk of channels with the taps, and multiplies those of the chunk before, which
// takes one barrier; what the steps after it need is under way meanwhile.
#pragma once

#include "../conv_sm80/kernel.cuh"
#include "device.cuh"
#include "layout.h"

namespace vovnet_fast {
namespace depthwise_conv {

using conv_sm80::Share;
using conv_sm80::Step;
using conv_sm80::Sums;
using conv_sm80::Tile;
using conv_sm80::unit_at;

// ---- Fetching ----------------------------------------------------------------------------------

VF_DEVICE void fetch_taps(const Problem& p, const Step& step, uint32_t to) {
  const int unit = threadIdx.x % kUnits, row = threadIdx.x / kUnits, units = step.units(p);
  const bool wanted = row < kTaps && conv_sm80::taken(unit, units), inside = wanted && unit < units;
  const char* from = p.depthwise + static_cast<int64_t>(row) * p.tap_bytes +
                     (step.chunk * kUnits + unit) * conv_sm80::kUnitBytes;
  conv_sm80::copy_unit(to + unit_at(row, unit), inside ? from : p.depthwise, inside, wanted);
}

// The place before one of a ring.
VF_DEVICE int before(const Problem& p, int stage) { return stage == 0 ? p.stages - 1 : stage - 1; }

// Strip and taps of a chunk, into `stage`, and the weights of the chunk before, as one group: they
// are wanted in the same step.
template <int N>
VF_DEVICE void fetch(const Problem& p, const Tile& tile, int chunk, int stage) {
  if (chunk < p.chunks) {
    const Step step = {chunk, 0};
    conv_sm80::fetch_strip(p, tile, step, stage);
    fetch_taps(p, step, taps_at(p, N, stage));
  }
  if (chunk > 0 && chunk <= p.chunks) {
    conv_sm80::fetch_weights<N>(p, tile, {chunk - 1, 0}, 0, before(p, stage));
  }
  conv_sm80::commit_copies();
}

// ---- The depthwise convolution -----------------------------------------------------------------

// Makes a run of pixels in one unit of their channels. Neighbours among the threads have neighbours
// in a line, or units of the same pixel: of any eight of them in a row neither what they load nor
// what they store lies in the same banks. A line of the strip is loaded once for all pixels of the
// run that have it in their windows.
template <class T, int STRIDE>
VF_DEVICE void depthwise(const Problem& p, uint32_t strip, uint32_t taps, uint32_t to, int units) {
  constexpr int V = cuda::kVector<T>, LINES = (kRun - 1) * STRIDE + 3;
  const int unit = threadIdx.x % kUnits;
  if (!conv_sm80::taken(unit, units)) return;
  const int index = threadIdx.x / kUnits, run = conv_sm80::divide(index, p.tile_magic);
  const int line = run * kRun, column = index - run * p.tile_w;
  const int first = run_row(p, line, column);
  float sums[kRun][V] = {};
#pragma unroll 1  // All columns at once would take too many registers.
  for (int tap = 0; tap < 3; ++tap) {
    const int row = first + conv_sm80::tap_rows(p, tap);
    float weight[3][V];
#pragma unroll
    for (int i = 0; i < LINES; ++i) {
      if (i < 3) {  // Not before: they would take registers.
        const uint4 word = shared_unit(taps + unit_at(3 * i + tap, unit));
        cuda::unpack(weight[i], cuda::raw_of<T, V>(word));
      }
      float x[V];
      cuda::unpack(x, cuda::raw_of<T, V>(shared_unit(strip + unit_at(row + i * p.pitch, unit))));
#pragma unroll
      for (int j = 0; j < kRun; ++j) {
        const int of_window = i - j * STRIDE;
        if (of_window < 0 || of_window >= 3) continue;
#pragma unroll
        for (int k = 0; k < V; ++k) sums[j][k] += x[k] * weight[of_window][k];
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kRun; ++j) {
    T rounded[V];
#pragma unroll
    for (int k = 0; k < V; ++k) rounded[k] = narrow<T>(sums[j][k]);
    uint4 word;
    memcpy(&word, rounded, sizeof word);
    put_shared_unit(to + unit_at((line + j) * p.tile_w + column, unit), word);
  }
}

// ---- The kernel --------------------------------------------------------------------------------

// A thread of a tile of kPixels by N.
template <class T, int N>
__global__ void __launch_bounds__(kThreads, conv_sm80::kBlocks<kPixels, N>)
    kernel(const Problem p) {
  constexpr int DOWN = conv_sm80::kDown<kPixels>;
  const int lane = threadIdx.x % conv_sm80::kWarp, warp = threadIdx.x / conv_sm80::kWarp;
  Share share = {conv_sm80::tile_at(p, N, blockIdx.x), warp / conv_sm80::kWarpsAcross,
                 warp % conv_sm80::kWarpsAcross, 0};
  int rows[DOWN];
#pragma unroll
  for (int i = 0; i < DOWN; ++i) {
    rows[i] = share.warp_down * (kPixels / conv_sm80::kWarpsDown) + i * conv_sm80::kBlockRows +
              conv_sm80::pixel_of(lane);
  }
  const uint32_t channels =
      unit_at(share.warp_across * conv_sm80::kAcross<N> * conv_sm80::kBlockColumns +
                  conv_sm80::channel_of(lane),
              conv_sm80::channel_unit_of(lane));

  Sums<kPixels, N> sums;
#pragma unroll 1
  for (int i = 0; i < p.stages - 1; ++i) fetch<N>(p, share.tile, i, i);
  int stage = 0;
#pragma unroll 1
  for (int chunk = 0; chunk <= p.chunks; ++chunk) {
    // What this step reads was committed stages - 1 groups ago.
    if (p.stages == kMaxStages) {
      conv_sm80::wait_copies<kMaxStages - 2>();
    } else {
      conv_sm80::wait_copies<kMinStages - 2>();
    }
    // All have what everyone fetched, and the pixels that everyone made; and are done with the step
    // before, whose places are taken.
    __syncthreads();
    fetch<N>(p, share.tile, chunk + p.stages - 1, before(p, stage));
    if (chunk < p.chunks) {
      const uint32_t strip = conv_sm80::strip_at(p, stage), taps = taps_at(p, N, stage);
      const uint32_t to = pixels_at(p, N, chunk);
      const int units = Step{chunk, 0}.units(p);
      if (p.stride == 1) {
        depthwise<T, 1>(p, strip, taps, to, units);
      } else {
        depthwise<T, 2>(p, strip, taps, to, units);
      }
    }
    if (chunk > 0) {
      conv_sm80::multiply<T, kPixels, N>(sums, rows, 0, pixels_at(p, N, chunk - 1),
                                         conv_sm80::weights_at(p, N, before(p, stage)) + channels,
                                         Step{chunk - 1, 0}.units(p));
    }
    stage = stage + 1 == p.stages ? 0 : stage + 1;
  }
  // Behind the last barrier nobody reads strips: sums may take their place.
  share.inside = conv_sm80::pixels_inside<conv_sm80::AllTaps, kPixels>(p, share);
  if (p.scale != nullptr) conv_sm80::scale_and_shift<kPixels, N>(p, share, sums);
  if (p.pool_partials != nullptr || p.statistics != nullptr) {
    conv_sm80::store_partials<kPixels, N>(p, share, sums);
  }
  conv_sm80::store_tile<T, conv_sm80::AllTaps, kPixels, N>(p, share, sums);
}

using Kernel = void (*)(Problem);

// The kernel of tiles that plan() has checked.
Kernel float16_kernel(int block_out);
Kernel bfloat16_kernel(int block_out);
Kernel float32_kernel(int block_out);

template <class T>
Kernel kernel_for(int block_out) {
  switch (block_out) {
#define VF_CASE(channels) \
  case channels:          \
    return kernel<T, channels>;
    VF_DEPTHWISE_CONV_TILES(VF_CASE)
#undef VF_CASE
  }
  return nullptr;
}

}  // namespace depthwise_conv
}  // namespace vovnet_fast
