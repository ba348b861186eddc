// check(params): what the fields of each struct of params.h must hold, as the comments there say.
#pragma once

#include "checks.h"
#include "conv_sm80_conditions.h"
#include "cpu/conv_engines.h"
#include "depthwise_conv_conditions.h"
#include "int8_conditions.h"

namespace vovnet_fast {
namespace checks {

// Of the sums of an image: with no parts there is nothing to divide its pixels by.
inline void parts(int64_t parts, int64_t height, int64_t width) {
  if (parts < 1 && height > 0 && width > 0) {
    refuse("parts", "at least 1 where images have pixels", std::to_string(parts));
  }
}

inline void high_dtype(int32_t dtype) { choice("dtype", dtype, {kFloat32, kFloat64}); }

inline void tensors(const EpilogueParams& p) {
  const int64_t bytes = bytes_of("dtype", p.dtype), high = high_bytes(bytes);
  const int64_t pixels = count("z", {p.height, p.width}), tiles = ceil_div(pixels, kTilePixels);
  choice("relu", p.relu, {0, 1});
  together("scale", p.scale, "shift", p.shift);
  if (p.scale == nullptr && p.pool_partials != nullptr) {
    refuse("pool_partials", "None where scale is", "an address");
  }
  if (p.scale != nullptr && p.statistics != nullptr) {
    refuse("statistics", "None where scale is given", "an address");
  }
  view("z", p.z, bytes, input(p));
  view("out", p.out, bytes, input(p));
  packed("scale", p.scale, high, {p.c}, kOptional);
  packed("shift", p.shift, high, {p.c}, kOptional);
  packed("pool_partials", p.pool_partials, high, {p.n, tiles, p.c}, kOptional);
  packed("statistics", p.statistics, high, {p.n, tiles, kStatisticsRows, p.c}, kOptional);
}

// What is added to a gradient's first channels, and what masks its last ones.
template <class Params>
void accumulated(const Params& p, int64_t bytes, const Image& out) {
  if (p.add_c > out.c) refuse("add_c", "at most the channels of out", std::to_string(p.add_c));
  if (p.mask_c > out.c) refuse("mask_c", "at most the channels of out", std::to_string(p.mask_c));
  view("add", p.add, bytes, {out.n, out.height, out.width, p.add_c}, kOptional);
  view("mask", p.mask, bytes, {out.n, out.height, out.width, p.mask_c}, kOptional);
}

// What becomes of a convolution's sums: the epilogue of a layer, or that of a gradient.
template <class Params>
void epilogue(const Params& p, int64_t bytes) {
  const Image out{p.n, p.out_height, p.out_width, p.c_out};
  choice("relu", p.relu, {0, 1});
  view("out", p.out, bytes, out);
  together("scale", p.scale, "shift", p.shift);
  if (p.scale == nullptr && (p.pool_partials != nullptr || p.relu != 0)) {
    refuse("pool_partials and relu", "None and 0 where scale is None", "others");
  }
  if (p.scale != nullptr && (p.add.data != nullptr || p.mask.data != nullptr)) {
    refuse("add and mask", "None where scale is given", "an address");
  }
  accumulated(p, bytes, out);
  packed("scale", p.scale, 4, {p.c_out}, kOptional);
  packed("shift", p.shift, 4, {p.c_out}, kOptional);
}

inline void tensors(const ConvParams& p) {
  const int64_t bytes = bytes_of("dtype", p.dtype);
  choice("kernel", p.kernel, {1, 3});
  strided_output(p);
  if (p.c_in < 1) refuse("c_in", "at least 1", std::to_string(p.c_in));
  view("x", p.x, bytes, {p.n, p.height, p.width, p.c_in});
  packed("tiles", p.tiles, bytes, {p.c_out, p.kernel, p.kernel, p.c_in}, false, kTilesAlignment);
  packed("taps", p.taps, bytes, {3, 3, p.c_in}, kOptional);
  if (p.taps != nullptr) {
    if (p.kernel != 1) refuse("kernel", "1 where taps are given", std::to_string(p.kernel));
    if (p.add.data != nullptr || p.mask.data != nullptr || p.pool_partials != nullptr) {
      refuse("add, mask and pool_partials", "None where taps are given", "an address");
    }
  }
  epilogue(p, bytes);
  packed("pool_partials", p.pool_partials, 4, {p.n, p.out_height, p.out_width, p.c_out}, kOptional);
}

template <class Params>
void filter(const char* name, const Array& array, const Params& p) {
  strided(name, array.data, bytes_of(name, array.dtype), {p.c_out, p.kernel, p.kernel, p.c_in},
          {p.stride_o, p.stride_h, p.stride_w, p.stride_i});
}

inline void tensors(const ConvPackParams& p) {
  const int64_t bytes = bytes_of("dtype", p.dtype);
  choice("kernel", p.kernel, {1, 3});
  choice("transposed", p.transposed, {0, 1});
  filter("weight", p.weight, p);
  array("scale", p.scale, {p.c_out}, kOptional);
  packed("out", p.out, bytes, {p.c_out, p.kernel, p.kernel, p.c_in}, false, kTilesAlignment);
}

inline void tensors(const ConvWeightGradParams& p) {
  const int64_t bytes = bytes_of("dtype", p.dtype);
  choice("kernel", p.kernel, {1, 3});
  strided_output(p);
  count("out", {p.c_out, p.kernel, p.kernel, p.c_in});
  view("x", p.x, bytes, {p.n, p.height, p.width, p.c_in});
  view("g", p.g, bytes, {p.n, p.out_height, p.out_width, p.c_out});
  same("parts", p.parts,
       cpu::conv_weight_grad_parts(p.n, p.out_height, p.out_width, p.c_in, p.c_out, p.kernel,
                                   p.stride));
  packed("partials", p.partials, 4, {p.parts, p.c_out, p.kernel, p.kernel, p.c_in}, p.parts == 1);
  packed("out", p.out, 4, {p.c_out, p.kernel, p.kernel, p.c_in});
}

inline void tensors(const ConvWeightGradFinishParams& p) {
  choice("kernel", p.kernel, {1, 3});
  packed("products", p.products, 4, {p.c_out, p.kernel, p.kernel, p.c_in});
  filter("weight", p.weight, p);
  filter("dweight", Array{p.dweight, kFloat32}, p);
  together("scale", p.scale, "dscale", p.dscale);
  packed("scale", p.scale, 4, {p.c_out}, kOptional);
  packed("dscale", p.dscale, 4, {p.c_out}, kOptional);
}

template <class Params>
void unpacked(const Params& p) {
  choice("kernel", p.kernel, {1, 3});
  strided_output(p);
  if (p.c_in < 1) refuse("c_in", "at least 1", std::to_string(p.c_in));
  filter("weight", p.weight, p);
}

inline void tensors(const ConvUnpackedParams& p) {
  const int64_t bytes = bytes_of("dtype", p.dtype);
  unpacked(p);
  view("x", p.x, bytes, {p.n, p.height, p.width, p.c_in});
  epilogue(p, bytes);
  packed("pool_partials", p.pool_partials, 4, {p.n, p.c_out}, kOptional);
}

inline void tensors(const ConvUnpackedInputGradParams& p) {
  const int64_t bytes = bytes_of("dtype", p.dtype);
  const Image out{p.n, p.height, p.width, p.c_in};
  unpacked(p);
  view("g", p.g, bytes, {p.n, p.out_height, p.out_width, p.c_out});
  view("out", p.out, bytes, out);
  accumulated(p, bytes, out);
  packed("scale", p.scale, 4, {p.c_out}, kOptional);
}

inline void tensors(const ConvUnpackedWeightGradParams& p) {
  const int64_t bytes = bytes_of("dtype", p.dtype);
  unpacked(p);
  view("x", p.x, bytes, {p.n, p.height, p.width, p.c_in});
  view("g", p.g, bytes, {p.n, p.out_height, p.out_width, p.c_out});
  filter("dweight", Array{p.dweight, kFloat32}, p);
  together("scale", p.scale, "dscale", p.dscale);
  packed("scale", p.scale, 4, {p.c_out}, kOptional);
  packed("dscale", p.dscale, 4, {p.c_out}, kOptional);
  packed("dshift", p.dshift, 4, {p.c_out});
}

inline void tensors(const AccumulateParams& p) {
  const int64_t bytes = bytes_of("dtype", p.dtype);
  if (p.add_c > p.c) refuse("add_c", "at most c", std::to_string(p.add_c));
  if (p.mask_c > p.c) refuse("mask_c", "at most c", std::to_string(p.mask_c));
  view("z", p.z, bytes, input(p));
  view("out", p.out, bytes, input(p));
  view("add", p.add, bytes, {p.n, p.height, p.width, p.add_c}, kOptional);
  view("mask", p.mask, bytes, {p.n, p.height, p.width, p.mask_c}, kOptional);
}

inline void tensors(const DepthwiseParams& p) {
  const int64_t bytes = bytes_of("dtype", p.dtype);
  strided_output(p);
  view("x", p.x, bytes, input(p));
  view("out", p.out, bytes, output(p));
  packed("weight", p.weight, bytes, {3, 3, p.c});
}

inline void tensors(const DepthwiseInputGradParams& p) {
  const int64_t bytes = bytes_of("dtype", p.dtype);
  strided_output(p);
  view("g", p.g, bytes, output(p));
  view("out", p.out, bytes, input(p));
  view("add", p.add, bytes, input(p), kOptional);
  view("mask", p.mask, bytes, input(p), kOptional);
  packed("weight", p.weight, bytes, {3, 3, p.c});
}

inline void tensors(const DepthwiseWeightGradParams& p) {
  const int64_t bytes = bytes_of("dtype", p.dtype), high = high_bytes(bytes);
  strided_output(p);
  parts(p.parts, p.out_height, p.out_width);
  view("x", p.x, bytes, input(p));
  view("g", p.g, bytes, output(p));
  packed("partials", p.partials, high, {p.n, p.parts, 3, 3, p.c});
  packed("out", p.out, high, {3, 3, p.c});
}

inline void tensors(const GatesParams& p) {
  high_dtype(p.dtype);
  choice("kind", p.kind, {kHardSigmoid, kSigmoid});
  if (p.num_pixels < 1 && p.n > 0) {
    refuse("num_pixels", "at least 1 where there are images", std::to_string(p.num_pixels));
  }
  const int64_t bytes = bytes_of("dtype", p.dtype);
  count("out", {p.n, p.c, p.c});  // products
  packed("partials", p.partials, bytes, {p.n, p.tiles, p.c});
  packed("mean", p.mean, bytes, {p.n, p.c});
  packed("out", p.out, bytes, {p.n, p.c});
  array("fc_weight", p.fc_weight, {p.c, p.c});
  array("fc_bias", p.fc_bias, {p.c});
}

inline void tensors(const ApplyGatesParams& p) {
  const int64_t bytes = bytes_of("dtype", p.dtype);
  view("z", p.z, bytes, input(p));
  view("out", p.out, bytes, input(p));
  view("identity", p.identity, bytes, input(p), kOptional);
  packed("gates", p.gates, high_bytes(bytes), {p.n, p.c}, kOptional);
}

inline void tensors(const GateSumsParams& p) {
  const int64_t bytes = bytes_of("dtype", p.dtype), high = high_bytes(bytes);
  parts(p.parts, p.height, p.width);
  view("dout", p.dout, bytes, input(p));
  view("y", p.y, bytes, input(p));
  packed("partials", p.partials, high, {p.n, p.parts, p.c});
  packed("out", p.out, high, {p.n, p.c});
}

inline void tensors(const GatesBackwardParams& p) {
  high_dtype(p.dtype);
  choice("kind", p.kind, {kHardSigmoid, kSigmoid});
  if (p.num_pixels < 1 && p.n > 0) {
    refuse("num_pixels", "at least 1 where there are images", std::to_string(p.num_pixels));
  }
  const int64_t bytes = bytes_of("dtype", p.dtype);
  count("dfc_weight", {p.n, p.c, p.c});  // products
  packed("dgates", p.dgates, bytes, {p.n, p.c});
  packed("gates", p.gates, bytes, {p.n, p.c});
  packed("mean", p.mean, bytes, {p.n, p.c});
  array("fc_weight", p.fc_weight, {p.c, p.c});
  packed("dpixel", p.dpixel, bytes, {p.n, p.c});
  packed("dfc_weight", p.dfc_weight, bytes, {p.c, p.c});
  packed("dfc_bias", p.dfc_bias, bytes, {p.c});
}

inline void tensors(const ApplyGatesBackwardParams& p) {
  const int64_t bytes = bytes_of("dtype", p.dtype), high = high_bytes(bytes);
  view("dout", p.dout, bytes, input(p));
  view("y", p.y, bytes, input(p));
  view("out", p.out, bytes, input(p));
  if (count("gates", {p.n, p.c}) > 0) together("gates", p.gates, "dpixel", p.dpixel);
  packed("gates", p.gates, high, {p.n, p.c}, kOptional);
  packed("dpixel", p.dpixel, high, {p.n, p.c}, kOptional);
}

inline void tensors(const MaxPoolParams& p) {
  const int64_t bytes = bytes_of("dtype", p.dtype);
  pooled_output(p);
  view("x", p.x, bytes, input(p));
  view("out", p.out, bytes, output(p));
  packed("argmax", p.argmax, 1, {p.n, p.out_height, p.out_width, p.c}, kOptional);
}

inline void tensors(const MaxPoolBackwardParams& p) {
  const int64_t bytes = bytes_of("dtype", p.dtype);
  pooled_output(p);
  view("dout", p.dout, bytes, output(p));
  view("out", p.out, bytes, input(p));
  packed("argmax", p.argmax, 1, {p.n, p.out_height, p.out_width, p.c});
}

template <class Params>
void merging(const Params& p, int64_t rows) {
  high_dtype(p.dtype);
  const int64_t bytes = bytes_of("dtype", p.dtype);
  packed("partials", p.partials, bytes, {p.parts, kStatisticsRows, p.c});
  packed("scratch", p.scratch, 8, {p.groups, kStatisticsRows, p.c});
  packed("out", p.out, bytes, {rows, p.c});
}

inline void tensors(const BatchNormMergeParams& p) { merging(p, kStatisticsRows); }

inline void tensors(const BatchNormFinishParams& p) {
  merging(p, kNormRows);
  array("gamma", p.gamma, {p.c}, kOptional);
  array("beta", p.beta, {p.c}, kOptional);
}

inline void tensors(const BatchNormSumsParams& p) {
  const int64_t bytes = bytes_of("dtype", p.dtype), high = high_bytes(bytes);
  parts(p.parts, p.height, p.width);
  view("g", p.g, bytes, input(p));
  view("z", p.z, bytes, input(p));
  packed("norm", p.norm, high, {kNormRows, p.c});
  packed("partials", p.partials, high, {p.n, p.parts, 2, p.c});
  packed("out", p.out, high, {2, p.c});
}

inline void tensors(const BatchNormInputGradParams& p) {
  const int64_t bytes = bytes_of("dtype", p.dtype), high = high_bytes(bytes);
  view("g", p.g, bytes, input(p));
  view("z", p.z, bytes, input(p));
  view("out", p.out, bytes, input(p));
  packed("norm", p.norm, high, {kNormRows, p.c});
  packed("sums", p.sums, high, {2, p.c});
  array("gamma", p.gamma, {p.c}, kOptional);
}

inline void tensors(const ChannelSumsParams& p) {
  const int64_t bytes = bytes_of("dtype", p.dtype), high = high_bytes(bytes);
  parts(p.parts, p.height, p.width);
  view("g", p.g, bytes, input(p));
  packed("partials", p.partials, high, {p.n, p.parts, p.c});
  packed("out", p.out, high, {p.c});
}

inline void tensors(const PackParams& p) {
  filter("weight", p.weight, p);
  array("scale", p.scale, {p.c_out}, kOptional);
  packed("out", p.out, bytes_of("dtype", p.dtype), {p.c_out, p.kernel, p.kernel, p.c_in});
}

inline void tensors(const PackBackwardParams& p) {
  high_dtype(p.dtype);
  const int64_t bytes = bytes_of("dtype", p.dtype);
  filter("products", p.products, p);
  if (count("scale", {p.c_out}) > 0) together("scale", p.scale, "dscale", p.dscale);
  // Of a filter without taps there is no memory, but of its scale there is.
  if (p.scale != nullptr) array("weight", p.weight, {p.c_out, p.kernel, p.kernel, p.c_in});
  packed("scale", p.scale, bytes, {p.c_out}, kOptional);
  packed("dweight", p.dweight, bytes, {p.c_out, p.kernel, p.kernel, p.c_in});
  packed("dscale", p.dscale, bytes, {p.c_out}, kOptional);
}

// Addresses and tiles are the matter of conv_sm90/plan.h. Returns how many rows of partial sums an
// image has.
template <class Params>
int64_t sm90_tiles(const Params& p) {
  for (const int32_t size : {p.tile_h, p.tile_w, p.block_out}) {
    if (size < 1 || size > 256) {
      refuse("tile_h, tile_w and block_out", "from 1 to 256", std::to_string(size));
    }
  }
  for (const int32_t size : {p.cluster_pixels, p.cluster_channels, p.parts}) {
    if (size < 1 || size > 8) {
      refuse("cluster_pixels, cluster_channels and parts", "from 1 to 8", std::to_string(size));
    }
  }
  return count("out", {ceil_div(p.height, static_cast<int64_t>(p.tile_h)),
                       ceil_div(p.width, static_cast<int64_t>(p.tile_w)), int64_t{p.parts}});
}

inline void tensors(const ConvSm90Params& p) {
  choice("dtype", p.dtype, {kFloat16, kBFloat16});
  choice("kernel", p.kernel, {1, 3});
  choice("relu", p.relu, {0, 1});
  const int64_t bytes = bytes_of("dtype", p.dtype), tiles = sm90_tiles(p);
  together("scale", p.scale, "shift", p.shift);
  if (p.scale == nullptr && (p.pool_partials != nullptr || p.relu != 0)) {
    refuse("pool_partials and relu", "None and 0 where scale is None", "others");
  }
  if (p.scale != nullptr && (p.add.data != nullptr || p.mask.data != nullptr)) {
    refuse("add and mask", "None where scale is given", "an address");
  }
  if (p.add_c > p.c_out) refuse("add_c", "at most c_out", std::to_string(p.add_c));
  if (p.mask_c > p.c_out) refuse("mask_c", "at most c_out", std::to_string(p.mask_c));
  if (p.add.data == nullptr) same("add_c without add", p.add_c, 0);
  if (p.mask.data == nullptr) same("mask_c without mask", p.mask_c, 0);
  view("x", p.x, bytes, {p.n, p.height, p.width, p.c_in});
  view("out", p.out, bytes, {p.n, p.height, p.width, p.c_out});
  view("add", p.add, bytes, {p.n, p.height, p.width, p.add_c}, kOptional);
  view("mask", p.mask, bytes, {p.n, p.height, p.width, p.mask_c}, kOptional);
  packed("weight", p.weight, bytes, {p.c_out, p.kernel, p.kernel, p.c_in});
  packed("scale", p.scale, 4, {p.c_out}, kOptional);
  packed("shift", p.shift, 4, {p.c_out}, kOptional);
  packed("pool_partials", p.pool_partials, 4, {p.n, tiles, p.c_out}, kOptional);
}

inline void tensors(const ConvSm90Fp8Params& p) {
  choice("kernel", p.kernel, {1, 3});
  const int64_t tiles = sm90_tiles(p);
  const Image out{p.n, p.height, p.width, p.c_out};
  if (count("out", {out.n, out.height, out.width, out.c}) > 0) an_output(p.out, p.feature);
  if (p.out.data == nullptr && p.pool_partials != nullptr) {
    refuse("pool_partials", "None where out is", "an address");
  }
  view("x", p.x, 1, {p.n, p.height, p.width, p.c_in});
  view("out", p.out, 1, out, kOptional);
  view("feature", p.feature, 4, out, kOptional);
  packed("weight", p.weight, 1, {p.c_out, p.kernel, p.kernel, p.c_in});
  packed("bias", p.bias, 4, {p.c_out});
  packed("multiplier", p.multiplier, 4, {p.c_out});
  packed("unit", p.unit, 4, {p.c_out});
  packed("pool_partials", p.pool_partials, 4, {p.n, tiles, p.c_out}, kOptional);
}

}  // namespace checks

// Throws, as checks.h says.
template <class Params>
void check(Params& params) {
  checks::extents(params);
  checks::tensors(params);
}

}  // namespace vovnet_fast
