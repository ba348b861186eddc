// From the arguments of the convolution for sm_80 and newer to what its kernel is told, on the
// host.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "layout.h"
#include "params.h"

namespace vovnet_fast {
namespace conv_sm80 {

namespace detail {

inline void require(bool held, const std::string& what) {
  if (!held) throw std::invalid_argument("conv_sm80: " + what);
}

inline bool aligned(const void* data) {
  return reinterpret_cast<uintptr_t>(data) % kUnitBytes == 0;
}

// Whether every pixel starts at a multiple of 16 bytes.
inline bool aligned(const View& view, int64_t n, int64_t height, int64_t width, int64_t unit) {
  const auto fits = [&](int64_t size, int64_t stride) { return size == 1 || stride % unit == 0; };
  return view.data == nullptr || (aligned(view.data) && fits(n, view.stride_n) &&
                                  fits(height, view.stride_h) && fits(width, view.stride_w));
}

inline bool has_tiles(int pixels, int block_out) {
  switch (block_out) {
#define VF_CASE(channels, wide) \
  case channels:                \
    return pixels == 128 || (wide && pixels == 256);
    VF_CONV_SM80_TILES(VF_CASE)
#undef VF_CASE
    default:
      return false;
  }
}

// `tiles`: whether there are tiles as these arguments want them.
//
// Raises: the kernel cannot take these arguments.
inline void check(const ConvSm80Params& params, bool tiles) {
  constexpr int64_t kLimit = int64_t{1} << 30;  // Of sizes and tiles, which are counted in 32 bits.
  const int64_t unit = params.dtype == kFloat32 ? 4 : 8;
  require(
      params.dtype == kFloat16 || params.dtype == kBFloat16 || params.dtype == kFloat32,
      "dtype code " + std::to_string(params.dtype) + " is none of fp16 (0), bf16 (1), fp32 (2)");
  require(params.kernel == 3 || (params.kernel == 1 && params.stride == 1),
          "a kernel of 1 has stride 1, got " + std::to_string(params.stride));
  for (const int64_t channels : {params.c_in, params.c_out, params.add_c, params.mask_c}) {
    require(channels % unit == 0, "numbers of channels must be multiples of " +
                                      std::to_string(unit) + ", got " + std::to_string(channels));
  }
  require(params.n < kLimit && params.height < kLimit && params.width < kLimit &&
              params.c_in * params.kernel * params.kernel < kLimit && params.c_out < kLimit,
          "sizes must be less than 2^30: cut the images into tiles");
  const int64_t h = params.out_height, w = params.out_width;
  require(
      aligned(params.weight) && aligned(params.x, params.n, params.height, params.width, unit) &&
          aligned(params.out, params.n, h, w, unit) && aligned(params.add, params.n, h, w, unit) &&
          aligned(params.mask, params.n, h, w, unit),
      "addresses and strides must be multiples of 16 bytes (copy the tensor, or take another "
      "engine)");
  require(params.tile_w % 8 == 0 && tiles, "no tiles of " + std::to_string(params.tile_h) + " x " +
                                               std::to_string(params.tile_w) + " pixels by " +
                                               std::to_string(params.block_out) + " channels");
}

// The stride of an axis of size 1 says nothing: it may be anything.
inline Pitches pitches(const View& view, int64_t n, int64_t height, int64_t width, int64_t bytes) {
  return {n == 1 ? 0 : view.stride_n * bytes, height == 1 ? 0 : view.stride_h * bytes,
          width == 1 ? 0 : view.stride_w * bytes};
}

}  // namespace detail

// What a kernel is told that has such tiles, or not. Nothing may be empty.
//
// Raises: it cannot take these arguments.
inline Problem plan(const ConvSm80Params& params, bool tiles) {
  detail::check(params, tiles);
  const int64_t bytes = params.dtype == kFloat32 ? 4 : 2;
  Problem p;
  p.x = static_cast<const char*>(params.x.data);
  p.weight = static_cast<const char*>(params.weight);
  p.out = static_cast<char*>(params.out.data);
  p.add = params.add_c == 0 ? nullptr : static_cast<const char*>(params.add.data);
  p.mask = params.mask_c == 0 ? nullptr : static_cast<const char*>(params.mask.data);
  p.scale = static_cast<const float*>(params.scale);
  p.shift = static_cast<const float*>(params.shift);
  p.pool_partials = static_cast<float*>(params.pool_partials);
  p.statistics = static_cast<float*>(params.statistics);
  const auto pitches = [&](const View& view) {
    return detail::pitches(view, params.n, params.out_height, params.out_width, bytes);
  };
  p.x_pitch = detail::pitches(params.x, params.n, params.height, params.width, bytes);
  p.out_pitch = pitches(params.out);
  p.add_pitch = pitches(params.add);
  p.mask_pitch = pitches(params.mask);
  p.height = static_cast<int32_t>(params.height);
  p.width = static_cast<int32_t>(params.width);
  p.out_height = static_cast<int32_t>(params.out_height);
  p.out_width = static_cast<int32_t>(params.out_width);
  p.c_out = static_cast<int32_t>(params.c_out);
  p.relu = params.relu;
  p.add_c = static_cast<int32_t>(params.add_c);
  p.mask_c = static_cast<int32_t>(params.mask_c);
  p.kernel = params.kernel;
  p.stride = params.stride;
  p.pad = params.kernel / 2;
  p.taps = p.kernel * p.kernel;
  p.tap_bytes = static_cast<int32_t>(params.c_in * bytes);
  p.filter_bytes = static_cast<int64_t>(p.taps) * p.tap_bytes;
  p.tile_h = params.tile_h;
  p.tile_w = params.tile_w;
  p.pitch = (p.tile_w - 1) * p.stride + p.kernel;
  p.even = (p.pitch + 1) / 2;
  p.strip_rows = ((p.tile_h - 1) * p.stride + p.kernel) * p.pitch;
  p.pitch_magic = magic(p.pitch);
  p.tile_magic = magic(p.tile_w);
  p.kernel_magic = magic(p.kernel);
  p.down = static_cast<int32_t>(ceil_div(params.out_height, params.tile_h));
  p.across = static_cast<int32_t>(ceil_div(params.out_width, params.tile_w));
  p.groups = static_cast<int32_t>(ceil_div(params.c_out, params.block_out));
  const int64_t units = params.c_in * bytes / kUnitBytes;
  p.chunks = static_cast<int32_t>(ceil_div(units, kUnits));
  p.last_units = static_cast<int32_t>(units - (p.chunks - 1) * static_cast<int64_t>(kUnits));
  p.stages = params.stages;
  p.strip_stages = p.taps == 1 ? p.stages : kStripStages;
  // Factors are less than 2^30 each, and so is the product of the first two: 64 bits hold it all.
  const int64_t of_image = static_cast<int64_t>(p.down) * p.across;
  const int64_t limit = int64_t{1} << 30;
  detail::require(
      of_image < limit && of_image * params.n < limit && of_image * params.n * p.groups < limit,
      "more than 2^30 tiles: split the batch");
  return p;
}

// The same of the kernels of kernel.cuh with all taps.
inline Problem plan(const ConvSm80Params& params) {
  return plan(params, detail::has_tiles(params.tile_h * params.tile_w, params.block_out));
}

// Blocks of the grid.
inline int tiles_of(const Problem& p, int64_t n) {
  return static_cast<int>(static_cast<int64_t>(p.down) * p.across * p.groups * n);
}

}  // namespace conv_sm80
}  // namespace vovnet_fast
