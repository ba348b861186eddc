// From the arguments of the Hopper convolution to what its kernel is told, on the host.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "layout.h"
#include "params.h"

namespace vovnet_fast {
namespace conv_sm90 {

// Bytes of shared memory that a CTA may use on sm_90, less what aligns its base to an atom.
constexpr uint32_t kSharedLimit = 227 * 1024 - kAtomBytes;

// f(channels of a tile, the most blocks of 64 pixels that a warpgroup can hold with them).
#define VF_CONV_SM90_TILES(f) \
  f(64, 2) f(80, 2) f(96, 2) f(112, 2) f(128, 2) f(160, 2) f(192, 2) f(224, 1) f(256, 1)

// The same in e4m3, whose sums are in registers twice; see multiply_e4m3().
#define VF_CONV_SM90_E4M3_TILES(f) \
  f(64, 2) f(80, 2) f(96, 2) f(112, 2) f(128, 2) f(160, 1) f(192, 1)

// CTAs of a cluster, on every GPU of compute capability 9.0.
constexpr int kMaxCluster = 8;

// Weights stay in shared memory if they are no more stages than this, beside so many strips.
constexpr int kMaxResident = 36;
constexpr int kResidentStrips = 3;

// What a bulk copy is told of a tensor: dimension 0 is the innermost, with stride 1.
struct Box {
  const void* data;
  uint32_t element;  // bytes
  int rank;
  uint64_t sizes[4];
  uint64_t strides[3];  // in bytes, of dimensions 1 and up
  uint32_t box[4];      // elements that one copy takes
};

inline int blocks_of(const ConvSm90Params& params) {
  return params.tile_h * params.tile_w / ((params.turns != 0 ? 1 : kConsumers) * kBlockRows);
}

// Of an activation, and of a weight.
inline uint32_t element_bytes(const ConvSm90Params& params) {
  return params.dtype == kE4m3 ? 1 : 2;
}

inline uint32_t chunk_of(const ConvSm90Params& params) { return kRowBytes / element_bytes(params); }

// The strips of the input: [N, H, W, C_in], tile_h + kernel - 1 rows of tile_w pixels.
inline Box strip_box(const ConvSm90Params& params) {
  const View& x = params.x;
  const uint32_t element = element_bytes(params);
  // The stride of an axis of size 1 says nothing: it may be anything, but not for a copy.
  const auto stride = [element](int64_t size, int64_t elements, uint64_t instead) {
    return size > 1 ? static_cast<uint64_t>(elements) * element : instead;
  };
  const uint64_t w = stride(params.width, x.stride_w, params.c_in * element);
  const uint64_t h = stride(params.height, x.stride_h, w * params.width);
  const uint64_t n = stride(params.n, x.stride_n, h * params.height);
  return {x.data,
          element,
          4,
          {static_cast<uint64_t>(params.c_in), static_cast<uint64_t>(params.width),
           static_cast<uint64_t>(params.height), static_cast<uint64_t>(params.n)},
          {w, h, n},
          {chunk_of(params), static_cast<uint32_t>(params.tile_w),
           static_cast<uint32_t>(params.tile_h + params.kernel - 1), 1}};
}

// The weights of one tap: [C_out, K * K, C_in], block_out rows. Channels beyond C_in are outside.
inline Box weight_box(const ConvSm90Params& params) {
  const uint64_t taps = params.kernel * params.kernel;
  const uint32_t element = element_bytes(params);
  const uint64_t row = params.c_in * element;
  return {params.weight,
          element,
          3,
          {static_cast<uint64_t>(params.c_in), taps, static_cast<uint64_t>(params.c_out)},
          {row, row * taps},
          {chunk_of(params), 1, static_cast<uint32_t>(params.block_out)}};
}

namespace detail {

inline void require(bool held, const std::string& what) {
  if (!held) throw std::invalid_argument("conv_sm90: " + what);
}

inline bool aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

// Whether every pixel starts at a multiple of 16 bytes, at a stride that copies can have.
inline bool aligned(const View& view, const ConvSm90Params& params, uint32_t element) {
  const auto fits = [element](int64_t size, int64_t stride) {
    return size == 1 || (stride > 0 && stride % (16 / element) == 0 && stride < int64_t{1} << 38);
  };
  return aligned(view.data) && fits(params.n, view.stride_n) &&
         fits(params.height, view.stride_h) && fits(params.width, view.stride_w);
}

inline std::string words(const ConvSm90Params& params) {
  return std::to_string(params.tile_h) + " x " + std::to_string(params.tile_w) + " pixels by " +
         std::to_string(params.block_out) + " channels" + (params.turns != 0 ? " in turns" : "");
}

inline int most_blocks(int block_out, bool e4m3) {
  switch (block_out) {
#define VF_CASE(channels, blocks) \
  case channels:                  \
    if (!e4m3) return blocks;     \
    break;
    VF_CONV_SM90_TILES(VF_CASE)
#undef VF_CASE
  }
  switch (block_out) {
#define VF_CASE(channels, blocks) \
  case channels:                  \
    if (e4m3) return blocks;      \
    break;
    VF_CONV_SM90_E4M3_TILES(VF_CASE)
#undef VF_CASE
  }
  return 0;
}

// Raises: the kernel cannot take these arguments.
inline void check(const ConvSm90Params& params) {
  constexpr int64_t kLimit = int64_t{1} << 30;  // Of sizes and tiles, which are counted in 32 bits.
  const uint32_t element = element_bytes(params);
  const int64_t vector = 16 / element;
  const std::string multiple = "a multiple of " + std::to_string(vector) + " channels, got ";
  require(params.kernel == 1 || params.kernel == 3,
          "the kernel must be 1 or 3, got " + std::to_string(params.kernel));
  require(params.c_in % vector == 0,
          "the input must have " + multiple + std::to_string(params.c_in));
  require(params.c_out % vector == 0,
          "the output must have " + multiple + std::to_string(params.c_out));
  require(params.height < kLimit && params.width < kLimit && params.c_in < kLimit &&
              params.c_out < kLimit && params.n < kLimit,
          "sizes must be less than 2^30: cut the images into tiles");
  require(params.add_c % 8 == 0 && params.mask_c % 8 == 0,
          "what is added and what masks must have multiples of 8 channels, got " +
              std::to_string(params.add_c) + " and " + std::to_string(params.mask_c));
  const auto absent = [](const View& view) { return view.data == nullptr; };
  require(aligned(params.x, params, element) && aligned(params.weight) &&
              ((element == 1 && absent(params.out)) || aligned(params.out, params, element)) &&
              (params.add_c == 0 || aligned(params.add, params, element)) &&
              (params.mask_c == 0 || aligned(params.mask, params, element)),
          "addresses and strides must be multiples of 16 bytes, and not 0 (copy x, or take "
          "another engine)");
  require(params.cluster_pixels > 0 && params.cluster_channels > 0 &&
              params.cluster_pixels <= kMaxCluster && params.cluster_channels <= kMaxCluster &&
              params.parts > 0 && params.parts <= kMaxCluster &&
              params.cluster_pixels * params.cluster_channels * params.parts <= kMaxCluster &&
              (params.cluster_pixels & (params.cluster_pixels - 1)) == 0,
          "no clusters of " + std::to_string(params.cluster_pixels) + " x " +
              std::to_string(params.cluster_channels) + " tiles in " +
              std::to_string(params.parts) + " parts");
  require(params.parts == 1 || (params.cluster_channels & (params.cluster_channels - 1)) == 0,
          "no parts of " + std::to_string(params.cluster_channels) + " tiles of channels");
  const int64_t terms =
      ceil_div(params.c_in, int64_t{chunk_of(params)}) * params.kernel * params.kernel;
  require(params.parts <= terms && terms * kMaxCluster < int64_t{1} << 31,
          std::to_string(params.parts) + " parts of " + std::to_string(terms) +
              " taps and chunks of input channels");
  const int pixels = params.tile_h * params.tile_w;
  require(params.tile_h > 0 && params.tile_w > 0 && params.tile_w % kAtomRows == 0 &&
              params.tile_w <= 256 && (pixels == 128 || pixels == 256) &&
              blocks_of(params) <= most_blocks(params.block_out, params.dtype == kE4m3),
          "no tiles of " + detail::words(params));
  require(params.turns == 0 || params.dtype != kE4m3, "no turns in e4m3");
  require(params.parts == 1 || params.turns == 0, "no parts of tiles of " + detail::words(params));
  const int blocks = blocks_of(params);
  require(params.parts == 1 || (params.dtype == kE4m3 ? has_parts_e4m3(params.block_out, blocks)
                                                      : has_parts(params.block_out, blocks)),
          "no parts of tiles of " + detail::words(params));
  require((params.kernel == 1 || strip_box(params).box[2] <= 256), "tile_h is at most 254");
}

inline Pitch pitch(const View& view) { return {view.stride_n, view.stride_h, view.stride_w}; }

// The deepest rings that shared memory has room for; of strips as few as hide their latency, as
// each is read for `kernel` taps.
inline void choose_stages(Problem& p) {
  // All tiles of a CTA have the same weights, if there is one group: then they may stay.
  p.w_stages = p.chunks * p.kernel * p.kernel;
  p.x_stages = kResidentStrips;
  // A part has one tile or few, and not the same number of taps as another.
  p.resident = p.groups == 1 && p.parts == 1 && p.w_stages <= kMaxResident &&
               shared_bytes(p) <= kSharedLimit;
  if (!p.resident) p.x_stages = p.w_stages = 2;
  const auto grow = [&p](int32_t& stages, int limit) {
    if (stages >= limit) return false;
    ++stages;
    if (shared_bytes(p) <= kSharedLimit) return true;
    --stages;
    return false;
  };
  if (p.resident) {
    while (grow(p.x_stages, kMaxStages)) continue;
    return;
  }
  if (p.kernel == 1) {
    while (p.w_stages < kMaxStages && grow(p.w_stages, kMaxStages)) {
      if (!grow(p.x_stages, kMaxStages)) {
        --p.w_stages;
        break;
      }
    }
    return;
  }
  while (grow(p.w_stages, 4)) continue;
  grow(p.x_stages, 3);
  while (grow(p.w_stages, kMaxStages)) continue;
}

inline Problem plan_any(const ConvSm90Params& params) {
  check(params);
  Problem p = {};
  p.scale = static_cast<const float*>(params.scale);
  p.shift = static_cast<const float*>(params.shift);
  p.pool_partials = static_cast<float*>(params.pool_partials);
  p.out = params.out.data;
  p.add = params.add.data;
  p.mask = params.mask.data;
  p.out_pitch = pitch(params.out);
  p.add_pitch = pitch(params.add);
  p.mask_pitch = pitch(params.mask);
  p.add_c = static_cast<int32_t>(params.add_c);
  p.mask_c = static_cast<int32_t>(params.mask_c);
  p.height = static_cast<int32_t>(params.height);
  p.width = static_cast<int32_t>(params.width);
  p.c_out = static_cast<int32_t>(params.c_out);
  p.kernel = params.kernel;
  p.relu = params.relu;
  p.tile_h = params.tile_h;
  p.tile_w = params.tile_w;
  p.block_out = params.block_out;
  p.down = static_cast<int32_t>(ceil_div(params.height, params.tile_h));
  p.across = static_cast<int32_t>(ceil_div(params.width, params.tile_w));
  p.cluster_pixels = params.cluster_pixels;
  p.cluster_channels = params.cluster_channels;
  p.parts = params.parts;
  p.turns = params.turns;
  while (1 << p.cluster_shift < p.cluster_pixels) ++p.cluster_shift;
  while (1 << p.part_shift < cluster_tiles(p)) ++p.part_shift;
  p.strip_sharers = strip_sharers(p.cluster_pixels, p.cluster_channels);
  p.weight_sharers = weight_sharers(p.cluster_pixels);
  p.groups = static_cast<int32_t>(
      ceil_div(params.c_out, int64_t{params.block_out} * params.cluster_channels));
  p.in_bytes = static_cast<int32_t>(params.c_in * element_bytes(params));
  p.chunk = static_cast<int32_t>(chunk_of(params));
  p.chunks = static_cast<int32_t>(ceil_div(params.c_in, int64_t{p.chunk}));
  // Factors are less than 2^30 each, and so is the product of the first two: 64 bits hold it all.
  const int64_t of_image = static_cast<int64_t>(p.down) * p.across;
  const int64_t limit = int64_t{1} << 30;
  require(of_image < limit && of_image * params.n < limit && of_image * params.n * p.groups < limit,
          "more than 2^30 tiles: split the batch");
  p.rectangles = static_cast<int32_t>(of_image * params.n);
  p.tiles = static_cast<int32_t>(ceil_div(p.rectangles, p.cluster_pixels) * p.groups);
  choose_stages(p);
  require(shared_bytes(p) <= kSharedLimit,
          "tiles of " + words(params) + " take more shared memory than there is");
  return p;
}

}  // namespace detail

// What the kernel is told. Nothing may be empty.
//
// Raises: it cannot take these arguments.
inline Problem plan(const ConvSm90Params& params) {
  detail::require(
      params.dtype == kFloat16 || params.dtype == kBFloat16,
      "dtype code " + std::to_string(params.dtype) + " is neither fp16 (0) nor bf16 (1)");
  return detail::plan_any(params);
}

// The same layer without what only e4m3 has: to plan by, and to copy by.
inline ConvSm90Params common(const ConvSm90Fp8Params& params) {
  ConvSm90Params found = {};
  found.x = params.x;
  found.out = params.out;
  found.weight = params.weight;
  found.scale = params.multiplier;
  found.shift = params.bias;
  found.pool_partials = params.pool_partials;
  found.n = params.n;
  found.height = params.height;
  found.width = params.width;
  found.c_in = params.c_in;
  found.c_out = params.c_out;
  found.kernel = params.kernel;
  found.tile_h = params.tile_h;
  found.tile_w = params.tile_w;
  found.block_out = params.block_out;
  found.cluster_pixels = params.cluster_pixels;
  found.cluster_channels = params.cluster_channels;
  found.parts = params.parts;
  found.relu = 1;
  found.dtype = kE4m3;
  return found;
}

inline Problem plan(const ConvSm90Fp8Params& params) {
  const ConvSm90Params like = common(params);
  const bool feature = params.feature.data != nullptr;
  detail::require(params.out.data != nullptr || feature, "there is nowhere to write to");
  detail::require(params.out.data != nullptr || params.pool_partials == nullptr,
                  "pool partials are sums of out, which is absent");
  detail::require(!feature || detail::aligned(params.feature, like, sizeof(float)),
                  "the feature must have addresses and strides that are multiples of 16 bytes");
  Problem p = detail::plan_any(like);
  p.feature = static_cast<float*>(params.feature.data);
  p.unit = static_cast<const float*>(params.unit);
  p.feature_pitch = detail::pitch(params.feature);
  return p;
}

}  // namespace conv_sm90
}  // namespace vovnet_fast
