// What the fields of the structs of cuda/conv_sm80 must hold.
#pragma once

#include "checks.h"

namespace vovnet_fast {
namespace checks {

// Alignment and which tiles there are is the matter of conv_sm80/plan.h.
inline void tensors(const ConvSm80Params& p) {
  choice("dtype", p.dtype, {kFloat16, kBFloat16, kFloat32});
  choice("kernel", p.kernel, {1, 3});
  choice("relu", p.relu, {0, 1});
  choice("stages", p.stages, {3, 4});
  strided_output(p);
  const int64_t bytes = bytes_of("dtype", p.dtype);
  const Image out{p.n, p.out_height, p.out_width, p.c_out};
  tiled_layer(p, bytes);
  const bool accumulates = p.add.data != nullptr || p.mask.data != nullptr;
  if (p.scale != nullptr && (accumulates || p.statistics != nullptr)) {
    refuse("add, mask and statistics", "None where scale is given", "an address");
  }
  if (accumulates && p.statistics != nullptr) {
    refuse("statistics", "None where add or mask is given", "an address");
  }
  if (p.add_c > p.c_out) refuse("add_c", "at most c_out", std::to_string(p.add_c));
  if (p.mask_c > p.c_out) refuse("mask_c", "at most c_out", std::to_string(p.mask_c));
  if (p.add.data == nullptr) same("add_c without add", p.add_c, 0);
  if (p.mask.data == nullptr) same("mask_c without mask", p.mask_c, 0);
  view("add", p.add, bytes, {out.n, out.height, out.width, p.add_c}, kOptional);
  view("mask", p.mask, bytes, {out.n, out.height, out.width, p.mask_c}, kOptional);
  packed("weight", p.weight, bytes, {p.c_out, p.kernel, p.kernel, p.c_in});
}

// Alignment is the matter of conv_sm80/weight_grad.cuh.
inline void tensors(const ConvSm80WeightGradParams& p) {
  choice("dtype", p.dtype, {kFloat16, kBFloat16, kFloat32});
  choice("kernel", p.kernel, {1, 3});
  choice("stages", p.stages, {2, 3});
  strided_output(p);
  const int64_t bytes = bytes_of("dtype", p.dtype);
  if (p.parts < 1) refuse("parts", "at least 1", std::to_string(p.parts));
  for (const int64_t size : {p.n, p.height, p.width}) {
    if (size < 1) refuse("n, height and width", "at least 1", std::to_string(size));
  }
  for (const int32_t size : {p.tile_h, p.tile_w}) {
    if (size < 1 || size > 256) refuse("tile_h and tile_w", "from 1 to 256", std::to_string(size));
  }
  count("out", {p.c_out, p.kernel, p.kernel, p.c_in});
  view("x", p.x, bytes, {p.n, p.height, p.width, p.c_in});
  view("g", p.g, bytes, {p.n, p.out_height, p.out_width, p.c_out});
  packed("partials", p.partials, 4, {p.parts, p.c_out, p.kernel, p.kernel, p.c_in}, p.parts == 1);
  packed("out", p.out, 4, {p.c_out, p.kernel, p.kernel, p.c_in});
}

// What is added to the gradient of an input of c channels, and masks it.
template <class Params>
void accumulated(const Params& p, int64_t c, int64_t bytes) {
  if (p.add_c > c) refuse("add_c", "at most " + std::to_string(c), std::to_string(p.add_c));
  if (p.mask_c > c) refuse("mask_c", "at most " + std::to_string(c), std::to_string(p.mask_c));
  if (p.add.data == nullptr) same("add_c without add", p.add_c, 0);
  if (p.mask.data == nullptr) same("mask_c without mask", p.mask_c, 0);
  view("add", p.add, bytes, {p.n, p.height, p.width, p.add_c}, kOptional);
  view("mask", p.mask, bytes, {p.n, p.height, p.width, p.mask_c}, kOptional);
}

// Alignment and tiles are the matter of conv_sm80/input_grad.cuh.
inline void tensors(const ConvSm80InputGradParams& p) {
  choice("dtype", p.dtype, {kFloat16, kBFloat16, kFloat32});
  choice("stages", p.stages, {3, 4});
  same("out_height", p.out_height, strided_size(p.height, 2));
  same("out_width", p.out_width, strided_size(p.width, 2));
  if (p.c_out < 1) refuse("c_out", "at least 1", std::to_string(p.c_out));
  for (const int32_t size : {p.tile_h, p.tile_w}) {
    if (size < 1 || size > 256) refuse("tile_h and tile_w", "from 1 to 256", std::to_string(size));
  }
  const int64_t bytes = bytes_of("dtype", p.dtype);
  accumulated(p, p.c_in, bytes);
  view("g", p.g, bytes, {p.n, p.out_height, p.out_width, p.c_out});
  view("out", p.out, bytes, {p.n, p.height, p.width, p.c_in});
  packed("weight", p.weight, bytes, {p.c_in, 3, 3, p.c_out});
}

// Alignment is the matter of conv_sm80/image.cu.
inline void tensors(const ConvSm80ImageGradParams& p) {
  choice("dtype", p.dtype, {kFloat16, kBFloat16, kFloat32});
  strided_output(p);
  const int64_t bytes = bytes_of("dtype", p.dtype);
  accumulated(p, 3, bytes);
  view("g", p.g, bytes, {p.n, p.out_height, p.out_width, p.c_out});
  view("out", p.out, bytes, {p.n, p.height, p.width, 3});
  packed("weight", p.weight, bytes, {3, 3, 3, p.c_out});
}

}  // namespace checks
}  // namespace vovnet_fast
