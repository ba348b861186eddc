// Arguments of every op: one plain struct an op, the same for the CPU and the CUDA half.
//
// Activations are [N, H, W, C] views with channel stride 1, usually slots of a concat buffer.
// Strides are in ELEMENTS, not bytes; sizes and strides are 64-bit. "High" stands for the dtype of
// sums and of vectors over the channels: fp32, and fp64 where activations are fp64. What is called
// packed is contiguous. Vectors and partials in high precision are packed.
//
// Functions do nothing where the output has no elements, and never write outside it.
#pragma once

#include <cstdint>

namespace vovnet_fast {

// Pixels of an image whose sums, or statistics, `epilogue` puts into one partial.
constexpr int64_t kTilePixels = 256;

// Rows of the statistics of a part, and of what a batch norm is made of.
constexpr int64_t kStatisticsRows = 3;  // count, sum, sum of squared deviations from the mean
constexpr int64_t kNormRows = 6;        // mean, rstd, scale, shift, unbiased variance, count

enum DType : int32_t { kFloat16 = 0, kBFloat16 = 1, kFloat32 = 2, kFloat64 = 3 };
enum IntegerKind : int32_t { kUnsignedBytes = 0, kSignedBytes = 1, kWords = 2 };
enum GateKind : int32_t { kHardSigmoid = 0, kSigmoid = 1 };

// A [N, H, W, C] view with channel stride 1. Its sizes are those of the op. Null data: absent.
struct View {
  void* data;
  int64_t stride_n, stride_h, stride_w;  // in elements; 0 where an axis is expanded
};

// A packed array of any floating dtype. Null data: absent.
struct Array {
  const void* data;
  int32_t dtype;
};

// out = relu(z * scale + shift); or out = z, with the statistics of z.
struct EpilogueParams {
  View z, out;  // [N, H, W, C]; out may be z
  int64_t n, height, width, c;
  const void* scale;    // [C] high, or null together with shift
  const void* shift;    // [C] high
  void* pool_partials;  // [N, T, C] high, T = ceil(H * W / kTilePixels), or null: sums of what is
                        // stored, before it is rounded
  void* statistics;     // [N, T, 3, C] high, or null; only without scale
  int32_t relu;         // only with scale
  int32_t dtype;        // of z and out
};

// out = relu(conv(x, weight) * scale + shift), padded by kernel / 2. The CPU half only.
// Without scale and shift: out = mask(conv(x, weight) + add), which is the gradient of an input.
struct ConvParams {
  View x;               // [N, H, W, C_in]
  View out;             // [N, H', W', C_out], H' = (H - 1) / stride + 1
  View add;             // [N, H', W', add_c], added to the first channels, or absent; may be out
  View mask;            // [N, H', W', mask_c], activations of the last channels, or absent
  const void* taps;     // [3, 3, C_in] packed, dtype: x goes through this depthwise convolution
                        // first, padded by one, which has the stride; only with a kernel of 1,
                        // without add, mask and pool_partials; or null
  const void* tiles;    // the weight as conv_pack leaves it for the same engine
  const void* scale;    // [C_out] fp32, or null together with shift
  const void* shift;    // [C_out] fp32
  void* pool_partials;  // [N, T, C_out] fp32, T from conv_parts, or null: sums of what is stored,
                        // before it is rounded; only with scale
  int64_t n, height, width, out_height, out_width, c_in, c_out, add_c, mask_c;
  int32_t kernel, stride, relu, dtype;  // kernel: 1 or 3, stride: 1 or 2; relu: only with scale
};

// out = a convolution's weight times scale, rounded once, in tiles as an engine multiplies them.
// Transposed: that of the gradient of its input, as PackParams says. The CPU half only.
struct ConvPackParams {
  Array weight;                                    // any dtype; not packed, its strides are below
  Array scale;                                     // [C_out], any dtype, or absent for 1
  void* out;                                       // conv_pack_bytes bytes, aligned to 64
  int64_t c_out, kernel, c_in;                     // of weight
  int64_t stride_o, stride_h, stride_w, stride_i;  // of weight
  int32_t transposed, dtype;                       // dtype: what is rounded to
};

// out = gradient of the weight of a convolution, padded by kernel / 2. The CPU half only.
struct ConvWeightGradParams {
  View x;          // [N, H, W, C_in]
  View g;          // [N, H', W', C_out], H' = (H - 1) / stride + 1
  void* partials;  // [parts, C_out, K, K, C_in] fp32, scratch; not used where parts is 1
  void* out;       // [C_out, K, K, C_in] packed, fp32
  int64_t n, height, width, out_height, out_width, c_in, c_out;
  int64_t parts;                  // of all pixels, from conv_weight_grad_parts
  int32_t kernel, stride, dtype;  // kernel: 1 or 3, stride: 1 or 2
};

// Gradients of a convolution's weight and scale, from those of their product. The CPU half only.
struct ConvWeightGradFinishParams {
  const void*
      products;       // [C_out, K, K, C_in] packed, fp32, as ConvWeightGradParams has them in out
  Array weight;       // any dtype; not packed, its strides are below
  const void* scale;  // [C_out] fp32, or null together with dscale, as if it were one
  void* dweight;      // fp32, with the strides of weight
  void* dscale;       // [C_out] fp32
  int64_t c_out, kernel, c_in;
  int64_t stride_o, stride_h, stride_w,
      stride_i;  // of weight, no two of whose numbers share memory
};

// out = a convolution by a weight as its module has it, padded by kernel / 2. The CPU half only.
struct ConvUnpackedParams {
  View x;               // [N, H, W, C_in]
  View out;             // [N, H', W', C_out], H' = (H - 1) / stride + 1
  View add, mask;       // absent, or as ConvParams has them
  Array weight;         // [C_out, K, K, C_in], any dtype; not packed, its strides are below
  const void* scale;    // [C_out] fp32, or null together with shift
  const void* shift;    // [C_out] fp32
  void* pool_partials;  // [N, C_out] fp32, or null: sums of what is stored, before it is rounded;
                        // only with scale
  int64_t n, height, width, out_height, out_width, c_in, c_out, add_c, mask_c;
  int64_t stride_o, stride_h, stride_w, stride_i;  // of weight
  int32_t kernel, stride, relu, dtype;
};

// out = mask(the gradient of the input of that convolution + add). The CPU half only.
struct ConvUnpackedInputGradParams {
  View g;             // [N, H', W', C_out], H' = (H - 1) / stride + 1
  View out;           // [N, H, W, C_in]
  View add;           // [N, H, W, add_c], added to the first channels, or absent; may be out
  View mask;          // [N, H, W, mask_c], activations of the last channels, or absent
  Array weight;       // [C_out, K, K, C_in], any dtype; not packed, its strides are below
  const void* scale;  // [C_out] fp32: g is multiplied by it; or null
  int64_t n, height, width, out_height, out_width, c_in, c_out, add_c, mask_c;
  int64_t stride_o, stride_h, stride_w, stride_i;  // of weight
  int32_t kernel, stride, dtype;
};

// Gradients of its weight times scale: of both, and of the shift. The CPU half only.
struct ConvUnpackedWeightGradParams {
  View x;        // [N, H, W, C_in]
  View g;        // [N, H', W', C_out], H' = (H - 1) / stride + 1
  Array weight;  // [C_out, K, K, C_in], any dtype, its strides are below; read where there is a
                 // scale
  const void* scale;  // [C_out] fp32, or null
  void* dweight;      // fp32, with the strides of weight
  void* dscale;       // [C_out] fp32, or null together with scale
  void* dshift;       // [C_out] fp32: sums of g
  int64_t n, height, width, out_height, out_width, c_in, c_out;
  int64_t stride_o, stride_h, stride_w,
      stride_i;  // of weight, no two of whose numbers share memory
  int32_t kernel, stride, dtype;
};

// out = mask(z + add): after another library's input gradient.
struct AccumulateParams {
  View z, out;  // [N, H, W, C]; out may be z
  View add;     // [N, H, W, add_c], added to the first channels, or absent; may be out
  View mask;    // [N, H, W, mask_c], activations of the last channels, or absent
  int64_t n, height, width, c, add_c, mask_c;
  int32_t dtype;
};

// out = depthwise 3x3 convolution of x, padded by one.
struct DepthwiseParams {
  View x;              // [N, H, W, C]
  View out;            // [N, H', W', C], H' = (H - 1) / stride + 1
  const void* weight;  // [3, 3, C] packed, dtype
  int64_t n, height, width, out_height, out_width, c;
  int32_t stride, dtype;  // stride: 1 or 2
};

// out = mask(transposed depthwise(g, weight) + add).
struct DepthwiseInputGradParams {
  View g;                                              // [N, H', W', C]
  View out;                                            // [N, H, W, C]
  View add, mask;                                      // as out, or absent; add may be out
  const void* weight;                                  // [3, 3, C] packed, dtype
  int64_t n, height, width, out_height, out_width, c;  // height, width: of out
  int32_t stride, dtype;
};

// out = gradient of the weight of a depthwise 3x3 convolution.
struct DepthwiseWeightGradParams {
  View x;          // [N, H, W, C]
  View g;          // [N, H', W', C]
  void* partials;  // [N, parts, 3, 3, C] high, scratch
  void* out;       // [3, 3, C] high
  int64_t n, height, width, out_height, out_width, c;
  int64_t parts;  // of an image, from reduction_parts
  int32_t stride, dtype;
};

// out = gate(fc_weight @ mean + fc_bias), mean = sum of partials / num_pixels.
struct GatesParams {
  const void* partials;  // [N, tiles, C] dtype
  void* mean;            // [N, C] dtype, written
  void* out;             // [N, C] dtype, written
  Array fc_weight;       // [C, C], output channels first, any dtype
  Array fc_bias;         // [C], any dtype
  int64_t n, tiles, c, num_pixels;
  int32_t kind;   // GateKind
  int32_t dtype;  // fp32 or fp64
};

// out = z * gates + identity.
struct ApplyGatesParams {
  View z, out;        // [N, H, W, C]; out may be z or identity
  View identity;      // [N, H, W, C], or absent
  const void* gates;  // [N, C] high, or null
  int64_t n, height, width, c;
  int32_t dtype;
};

// out = sum over the pixels of dout * y.
struct GateSumsParams {
  View dout, y;    // [N, H, W, C]
  void* partials;  // [N, parts, C] high, scratch
  void* out;       // [N, C] high
  int64_t n, height, width, c;
  int64_t parts;  // of an image, from reduction_parts
  int32_t dtype;
};

// Backward of GatesParams.
struct GatesBackwardParams {
  const void* dgates;  // [N, C] dtype
  const void* gates;   // [N, C] dtype
  const void* mean;    // [N, C] dtype
  Array fc_weight;     // [C, C], any dtype
  void* dpixel;        // [N, C] dtype: gradient of the mean / num_pixels
  void* dfc_weight;    // [C, C] dtype; zeros without images
  void* dfc_bias;      // [C] dtype; zeros without images
  int64_t n, c, num_pixels;
  int32_t kind;   // GateKind
  int32_t dtype;  // fp32 or fp64
};

// out = mask(dout * gates + dpixel), masked by y.
struct ApplyGatesBackwardParams {
  View dout, y, out;   // [N, H, W, C]; out may be dout or y
  const void* gates;   // [N, C] high, or null together with dpixel
  const void* dpixel;  // [N, C] high
  int64_t n, height, width, c;
  int32_t dtype;
};

// 3x3 max pool with stride 2.
struct MaxPoolParams {
  View x;           // [N, H, W, C]
  View out;         // [N, H', W', C]
  uint8_t* argmax;  // [N, H', W', C] packed, or null: 3 * row + column in the window
  int64_t n, height, width, out_height, out_width, c;
  int32_t pad;  // 0 (ceil mode: the last window may reach over the far side) or 1
  int32_t dtype;
};

// out = gradient of the input of MaxPoolParams.
struct MaxPoolBackwardParams {
  View dout;                                           // [N, H', W', C]
  View out;                                            // [N, H, W, C]
  const uint8_t* argmax;                               // [N, H', W', C] packed
  int64_t n, height, width, out_height, out_width, c;  // height, width: of out
  int32_t pad, dtype;
};

// out = statistics of all parts together; parts whose count is 0 are ignored.
struct BatchNormMergeParams {
  const void* partials;  // [parts, 3, C] dtype
  void* scratch;         // [groups, 3, C] fp64, or null where groups is 0
  void* out;             // [3, C] dtype
  int64_t parts, c;
  int64_t groups;  // merged first, from merge_groups; 0: all parts at once
  int32_t dtype;   // fp32 or fp64
};

// out = what a batch norm is made of (kNormRows), from the statistics of all parts.
struct BatchNormFinishParams {
  const void* partials;  // [parts, 3, C] dtype
  void* scratch;         // as in BatchNormMergeParams
  void* out;             // [6, C] dtype
  Array gamma, beta;     // [C], any dtype, or absent for 1 and 0
  double eps;
  int64_t parts, c, groups;
  int32_t dtype;  // fp32 or fp64
};

// out = sums over images and pixels of g and of g * normalised z.
struct BatchNormSumsParams {
  View g, z;         // [N, H, W, C]
  const void* norm;  // [6, C] high
  void* partials;    // [N, parts, 2, C] high, scratch
  void* out;         // [2, C] high
  int64_t n, height, width, c;
  int64_t parts;  // of an image, from reduction_parts
  int32_t dtype;
};

// out = gradient of the input of a batch norm with the batch's statistics.
struct BatchNormInputGradParams {
  View g, z, out;    // [N, H, W, C]; out may be g or z
  const void* norm;  // [6, C] high
  const void* sums;  // [2, C] high
  Array gamma;       // [C], any dtype, or absent for 1
  int64_t n, height, width, c;
  int32_t dtype;
};

// out = sums over images and pixels of g: the gradient of a shift.
struct ChannelSumsParams {
  View g;          // [N, H, W, C]
  void* partials;  // [N, parts, C] high, scratch
  void* out;       // [C] high
  int64_t n, height, width, c;
  int64_t parts;  // of an image, from reduction_parts
  int32_t dtype;
};

// out = weight * scale, rounded once. pack: [C_out, K, K, C_in]; pack_transposed:
// out[i, h, w, o] = weight[o, K-1-h, K-1-w, i] * scale[o], [C_in, K, K, C_out].
struct PackParams {
  Array weight;  // any dtype; not packed, its strides are below
  Array scale;   // [C_out], any dtype, or absent for 1
  void* out;     // packed, dtype
  int64_t c_out, kernel, c_in;
  int64_t stride_o, stride_h, stride_w, stride_i;  // of weight
  int32_t dtype;                                   // of out; the product is in its high precision
};

// Backward of pack: with P the gradient of weight * scale,
// dweight = scale * P, dscale = sum over (tap, input channel) of weight * P.
struct PackBackwardParams {
  Array products;     // P as [C_out, K, K, C_in] of any dtype, its strides are below
  Array weight;       // [C_out, K, K, C_in] packed, any dtype; absent without a scale
  const void* scale;  // [C_out] dtype, or null for 1
  void* dweight;      // [C_out, K, K, C_in] packed, dtype
  void* dscale;       // [C_out] dtype, or null without a scale
  int64_t c_out, kernel, c_in;
  int64_t stride_o, stride_h, stride_w, stride_i;  // of products
  int32_t dtype;                                   // fp32 or fp64
};

// ---- Eight bits: vovnet_fast/arithmetic says what is summed and rounded. The CPU half only. ----
//
// "Steps" are what activations are counted in: [N, H, W, C] views of unsigned bytes up to `levels`.
// Vectors over the channels are packed.

// out = images in steps, signed: clamp(x * factor, -limit, limit), rounded.
struct Int8ImageParams {
  View x;  // [N, H, W, C] fp32, with channel stride x_stride_c
  int64_t x_stride_c;
  void* out;  // [N, H, W, C] packed, of `kind`
  int64_t n, height, width, c;
  double factor;  // an fp32 number
  int32_t limit;
  int32_t kind;  // kSignedBytes or kWords
};

// With acc = conv(x, weight) + bias, padded by kernel / 2:
// out = clamp(acc * multiplier, 0, levels), rounded; feature = max(acc * unit, 0).
struct Int8ConvParams {
  View x;                  // [N, H, W, C_in] of `kind`
  View out;                // [N, H', W', C_out] steps, H' = (H - 1) / stride + 1, or absent
  View feature;            // [N, H', W', C_out] fp32, or absent
  const void* tiles;       // the weight as int8_conv_pack leaves it for the same engine
  const void* bias;        // [C_out] int32
  const void* multiplier;  // [C_out] fp32
  const void* unit;        // [C_out] fp32
  void* pool_partials;     // [N, T, C_out] int32, T from int8_conv_parts, or null: sums of out
  int64_t n, height, width, out_height, out_width, c_in, c_out;
  int32_t kind;                    // kUnsignedBytes, or what an engine for words takes: images
  int32_t kernel, stride, levels;  // kernel: 1 or 3, stride: 1 or 2
};

// out = a convolution's weight in tiles as an engine multiplies them.
struct Int8ConvPackParams {
  const void* weight;  // [C_out, K, K, C_in] packed, int8, or int16 where kind is kWords
  void* out;           // int8_conv_pack_bytes bytes, aligned to 64
  int64_t c_out, kernel, c_in;
  int32_t kind;  // kSignedBytes or kWords
};

// out = depthwise 3x3 convolution of x, padded by one:
// clamp(acc * multiplier, -zero, levels - zero), rounded, + zero.
struct Int8DepthwiseParams {
  View x;                  // [N, H, W, C] steps
  View out;                // [N, H', W', C] steps, H' = (H - 1) / stride + 1
  const void* weight;      // [3, 3, C] int8
  const void* multiplier;  // [C] fp32
  const void* zero;        // [C] uint8
  int64_t n, height, width, out_height, out_width, c;
  int32_t stride, levels;  // stride: 1 or 2
};

// 3x3 max pool with stride 2.
struct Int8MaxPoolParams {
  View x;    // [N, H, W, C] steps
  View out;  // [N, H', W', C] steps
  int64_t n, height, width, out_height, out_width, c;
  int32_t pad;  // as in MaxPoolParams
};

// mean = round(sum of partials * mean_factor), acc = fc_weight @ mean + fc_bias,
// out = clamp(acc * multiplier, 0, most), rounded; or what a table has at such an index.
struct Int8GatesParams {
  const void* partials;    // [N, tiles, C] int32
  void* mean;              // [N, C] int16, written
  void* out;               // [N, C] int32, written
  const void* fc_weight;   // [C, C] int16, output channels first
  const void* fc_bias;     // [C] int32
  const void* multiplier;  // [C] fp32
  const void* table;       // [most + 1] int32, or null
  int64_t n, tiles, c;
  double mean_factor;  // an fp32 number
  int32_t most;
};

// With acc = z * gate + identity * identity_gate: out = clamp(acc * rescale, 0, levels), rounded;
// feature = acc * step.
struct Int8ApplyGatesParams {
  View z;             // [N, H, W, C] steps
  View identity;      // [N, H, W, C] steps, or absent
  View out;           // [N, H, W, C] steps, or absent
  View feature;       // [N, H, W, C] fp32, or absent
  const void* gates;  // [N, C] int32, or null for `gate` throughout
  int64_t n, height, width, c;
  double rescale, step;                 // fp32 numbers
  int32_t gate, identity_gate, levels;  // both gates: below 2^15
};

}  // namespace vovnet_fast
