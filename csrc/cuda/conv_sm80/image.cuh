// The first layer: a 3x3 convolution of images of three channels, on patches (patches.cuh).
//
// A block gathers the patches of its tile and its filters, and multiplies all of them at once: one
// row of shared memory in halves, two in fp32. There is nothing to be under way meanwhile; blocks
// that share a processor hide each other's waits.
#pragma once

#include "kernel.cuh"
#include "patches.cuh"
#include "plan.h"

namespace vovnet_fast {
namespace conv_sm80 {

constexpr int kImageTile = 128;  // Pixels of a tile,
constexpr int kImageOut = 64;    // and its output channels.

template <class T>
constexpr int kPatchChunks = kPatchChannels * sizeof(T) / kRowBytes;

inline bool of_image(const ConvSm80Params& params) {
  return params.kernel == 3 && params.c_in == kImageChannels;
}

// What the kernel is told. Nothing may be empty. Addresses and strides of the image may be any.
//
// Raises: it cannot take these arguments.
inline Problem image_plan(const ConvSm80Params& params) {
  detail::require(params.add.data == nullptr && params.mask.data == nullptr,
                  "nothing is added to a convolution of images, and nothing masks it");
  detail::require(params.block_out == kImageOut && params.tile_h * params.tile_w == kImageTile,
                  "images have tiles of 128 pixels by 64 channels, got " +
                      std::to_string(params.tile_h) + " x " + std::to_string(params.tile_w) +
                      " by " + std::to_string(params.block_out));
  // As a layer of one tap with the 32 channels of a patch, of an input that is nowhere.
  ConvSm80Params as = params;
  as.kernel = as.stride = 1;
  as.c_in = kPatchChannels;
  as.height = params.out_height;
  as.width = params.out_width;
  as.x = View{};
  as.weight = nullptr;
  Problem p = plan(as, true);
  p.x = static_cast<const char*>(params.x.data);
  p.x_pitch = detail::pitches(params.x, params.n, params.height, params.width,
                              params.dtype == kFloat32 ? 4 : 2);
  p.weight = static_cast<const char*>(params.weight);
  p.height = static_cast<int32_t>(params.height);
  p.width = static_cast<int32_t>(params.width);
  p.stride = params.stride;
  p.pad = 1;
  p.stages = p.strip_stages = p.chunks;
  detail::require(params.height < int64_t{1} << 30 && params.width < int64_t{1} << 30,
                  "sizes must be less than 2^30: cut the images into tiles");
  return p;
}

// A thread of a tile.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) image_kernel(const Problem p) {
  constexpr int kChunks = kPatchChunks<T>, kRow = kChunks * kUnits;
  constexpr int kDownHere = kDown<kImageTile>;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  Share share = {tile_at(p, kImageOut, blockIdx.x), warp / kWarpsAcross, warp % kWarpsAcross, 0};
  const char* image = p.x + share.tile.n * p.x_pitch.n;

#pragma unroll
  for (int first = 0; first < kImageTile * kRow; first += kThreads) {
    const int index = first + threadIdx.x, unit = index % kUnits;
    const int row = index / kUnits % kImageTile, chunk = index / kUnits / kImageTile;
    const int line = divide(row, p.tile_magic);
    const int h = share.tile.h + line, w = share.tile.w + row - line * p.tile_w;
    uint32_t words[4];
    patch_unit<T>(words, image, p.x_pitch, h * p.stride - p.pad, w * p.stride - p.pad, p.height,
                  p.width, chunk * kUnits + unit, h < p.out_height && w < p.out_width);
    put_shared_unit(strip_at(p, chunk) + unit_at(row, unit), words);
  }
#pragma unroll
  for (int first = 0; first < kImageOut * kRow; first += kThreads) {
    const int index = first + threadIdx.x, unit = index % kUnits;
    const int row = index / kUnits % kImageOut, chunk = index / kUnits / kImageOut;
    const int channel = share.tile.first + row;
    uint32_t words[4];
    filter_unit<T>(words,
                   p.weight + static_cast<int64_t>(channel) * kPatch * static_cast<int>(sizeof(T)),
                   chunk * kUnits + unit, channel < p.c_out);
    put_shared_unit(weights_at(p, kImageOut, chunk) + unit_at(row, unit), words);
  }
  __syncthreads();

  int rows[kDownHere];
#pragma unroll
  for (int i = 0; i < kDownHere; ++i) {
    rows[i] = share.warp_down * (kImageTile / kWarpsDown) + i * kBlockRows + pixel_of(lane);
  }
  const uint32_t channels =
      unit_at(share.warp_across * kAcross<kImageOut> * kBlockColumns + channel_of(lane),
              channel_unit_of(lane));
  Sums<kImageTile, kImageOut> sums;
#pragma unroll
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    multiply<T, kImageTile, kImageOut>(sums, rows, 0, strip_at(p, chunk),
                                       weights_at(p, kImageOut, chunk) + channels, kUnits);
  }
  __syncthreads();  // Sums may take the place of what was multiplied.

  share.inside = pixels_inside<AllTaps, kImageTile>(p, share);
  if (p.scale != nullptr) scale_and_shift<kImageTile, kImageOut>(p, share, sums);
  if (p.pool_partials != nullptr || p.statistics != nullptr) {
    store_partials<kImageTile, kImageOut>(p, share, sums);
  }
  store_tile<T, AllTaps, kImageTile, kImageOut>(p, share, sums);
}

}  // namespace conv_sm80
}  // namespace vovnet_fast
