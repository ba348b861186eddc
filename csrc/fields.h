// Names and fields of the structs of params.h, for whoever must look at all of them.
#pragma once

#include "cuda/conv_sm80/image_grad_params.h"
#include "cuda/conv_sm80/input_grad_params.h"
#include "cuda/conv_sm80/params.h"
#include "cuda/conv_sm80/weight_grad_params.h"
#include "cuda/conv_sm90/params.h"
#include "cuda/depthwise_conv/params.h"
#include "params.h"

namespace vovnet_fast {

// kNames is "a, b, c"; visit(params, visitor) calls visitor(params.a, params.b, params.c).
template <class Params>
struct Fields;

// All fields in the order of the struct: another number of them does not compile.
#define VF_FIELDS(Params, ...)                           \
  template <>                                            \
  struct Fields<Params> {                                \
    static constexpr const char* kNames = #__VA_ARGS__;  \
    template <class Visitor>                             \
    static void visit(Params& params, Visitor visitor) { \
      auto& [__VA_ARGS__] = params;                      \
      visitor(__VA_ARGS__);                              \
    }                                                    \
  };

VF_FIELDS(EpilogueParams, z, out, n, height, width, c, scale, shift, pool_partials, statistics,
          relu, dtype)
VF_FIELDS(ConvParams, x, out, add, mask, taps, tiles, scale, shift, pool_partials, n, height, width,
          out_height, out_width, c_in, c_out, add_c, mask_c, kernel, stride, relu, dtype)
VF_FIELDS(ConvPackParams, weight, scale, out, c_out, kernel, c_in, stride_o, stride_h, stride_w,
          stride_i, transposed, dtype)
VF_FIELDS(ConvWeightGradParams, x, g, partials, out, n, height, width, out_height, out_width, c_in,
          c_out, parts, kernel, stride, dtype)
VF_FIELDS(ConvWeightGradFinishParams, products, weight, scale, dweight, dscale, c_out, kernel, c_in,
          stride_o, stride_h, stride_w, stride_i)
VF_FIELDS(ConvUnpackedParams, x, out, add, mask, weight, scale, shift, pool_partials, n, height,
          width, out_height, out_width, c_in, c_out, add_c, mask_c, stride_o, stride_h, stride_w,
          stride_i, kernel, stride, relu, dtype)
VF_FIELDS(ConvUnpackedInputGradParams, g, out, add, mask, weight, scale, n, height, width,
          out_height, out_width, c_in, c_out, add_c, mask_c, stride_o, stride_h, stride_w, stride_i,
          kernel, stride, dtype)
VF_FIELDS(ConvUnpackedWeightGradParams, x, g, weight, scale, dweight, dscale, dshift, n, height,
          width, out_height, out_width, c_in, c_out, stride_o, stride_h, stride_w, stride_i, kernel,
          stride, dtype)
VF_FIELDS(AccumulateParams, z, out, add, mask, n, height, width, c, add_c, mask_c, dtype)
VF_FIELDS(DepthwiseParams, x, out, weight, n, height, width, out_height, out_width, c, stride,
          dtype)
VF_FIELDS(DepthwiseInputGradParams, g, out, add, mask, weight, n, height, width, out_height,
          out_width, c, stride, dtype)
VF_FIELDS(DepthwiseWeightGradParams, x, g, partials, out, n, height, width, out_height, out_width,
          c, parts, stride, dtype)
VF_FIELDS(GatesParams, partials, mean, out, fc_weight, fc_bias, n, tiles, c, num_pixels, kind,
          dtype)
VF_FIELDS(ApplyGatesParams, z, out, identity, gates, n, height, width, c, dtype)
VF_FIELDS(GateSumsParams, dout, y, partials, out, n, height, width, c, parts, dtype)
VF_FIELDS(GatesBackwardParams, dgates, gates, mean, fc_weight, dpixel, dfc_weight, dfc_bias, n, c,
          num_pixels, kind, dtype)
VF_FIELDS(ApplyGatesBackwardParams, dout, y, out, gates, dpixel, n, height, width, c, dtype)
VF_FIELDS(MaxPoolParams, x, out, argmax, n, height, width, out_height, out_width, c, pad, dtype)
VF_FIELDS(MaxPoolBackwardParams, dout, out, argmax, n, height, width, out_height, out_width, c, pad,
          dtype)
VF_FIELDS(BatchNormMergeParams, partials, scratch, out, parts, c, groups, dtype)
VF_FIELDS(BatchNormFinishParams, partials, scratch, out, gamma, beta, eps, parts, c, groups, dtype)
VF_FIELDS(BatchNormSumsParams, g, z, norm, partials, out, n, height, width, c, parts, dtype)
VF_FIELDS(BatchNormInputGradParams, g, z, out, norm, sums, gamma, n, height, width, c, dtype)
VF_FIELDS(ChannelSumsParams, g, partials, out, n, height, width, c, parts, dtype)
VF_FIELDS(PackParams, weight, scale, out, c_out, kernel, c_in, stride_o, stride_h, stride_w,
          stride_i, dtype)
VF_FIELDS(PackBackwardParams, products, weight, scale, dweight, dscale, c_out, kernel, c_in,
          stride_o, stride_h, stride_w, stride_i, dtype)
VF_FIELDS(Int8ImageParams, x, x_stride_c, out, n, height, width, c, factor, limit, kind)
VF_FIELDS(Int8ConvParams, x, out, feature, tiles, bias, multiplier, unit, pool_partials, n, height,
          width, out_height, out_width, c_in, c_out, kind, kernel, stride, levels)
VF_FIELDS(Int8ConvPackParams, weight, out, c_out, kernel, c_in, kind)
VF_FIELDS(Int8DepthwiseParams, x, out, weight, multiplier, zero, n, height, width, out_height,
          out_width, c, stride, levels)
VF_FIELDS(Int8MaxPoolParams, x, out, n, height, width, out_height, out_width, c, pad)
VF_FIELDS(Int8GatesParams, partials, mean, out, fc_weight, fc_bias, multiplier, table, n, tiles, c,
          mean_factor, most)
VF_FIELDS(Int8ApplyGatesParams, z, identity, out, feature, gates, n, height, width, c, rescale,
          step, gate, identity_gate, levels)
VF_FIELDS(ConvSm90Params, x, out, add, mask, weight, scale, shift, pool_partials, n, height, width,
          c_in, c_out, add_c, mask_c, kernel, tile_h, tile_w, block_out, cluster_pixels,
          cluster_channels, parts, turns, relu, dtype)

VF_FIELDS(ConvSm90Fp8Params, x, out, feature, weight, bias, multiplier, unit, pool_partials, n,
          height, width, c_in, c_out, kernel, tile_h, tile_w, block_out, cluster_pixels,
          cluster_channels, parts)
VF_FIELDS(ConvSm80Params, x, out, add, mask, weight, scale, shift, pool_partials, statistics, n,
          height, width, out_height, out_width, c_in, c_out, add_c, mask_c, kernel, stride, tile_h,
          tile_w, block_out, stages, relu, dtype)
VF_FIELDS(ConvSm80ImageGradParams, g, out, add, mask, weight, n, height, width, out_height,
          out_width, c_out, add_c, mask_c, stride, dtype)
VF_FIELDS(ConvSm80InputGradParams, g, out, add, mask, weight, n, height, width, out_height,
          out_width, c_in, c_out, add_c, mask_c, tile_h, tile_w, stages, dtype)
VF_FIELDS(ConvSm80WeightGradParams, x, g, partials, out, n, height, width, out_height, out_width,
          c_in, c_out, parts, kernel, stride, tile_h, tile_w, stages, dtype)
VF_FIELDS(DepthwiseConvParams, x, out, taps, weight, scale, shift, pool_partials, statistics, n,
          height, width, out_height, out_width, c_in, c_out, stride, tile_h, tile_w, block_out,
          stages, relu, dtype)

#undef VF_FIELDS

}  // namespace vovnet_fast
