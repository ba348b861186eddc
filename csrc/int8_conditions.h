// What the fields of the ops in eight bits must hold, as params.h says.
#pragma once

#include <utility>

#include "checks.h"

namespace vovnet_fast {
namespace checks {

inline void levels(int32_t levels) {
  if (levels < 1 || levels > 255) refuse("levels", "from 1 to 255", std::to_string(levels));
}

inline void an_output(const View& out, const View& feature) {
  if (out.data == nullptr && feature.data == nullptr) {
    refuse("out or feature", "the address of a tensor", "None or 0 for both");
  }
}

inline void tensors(const Int8ImageParams& p) {
  choice("kind", p.kind, {kSignedBytes, kWords});
  const int64_t bytes = p.kind == kWords ? 2 : 1;
  if (p.limit < 1 || p.limit > (p.kind == kWords ? 32767 : 127)) {
    refuse("limit", "at least 1, and a number of its kind", std::to_string(p.limit));
  }
  strided("x", p.x.data, 4, {p.n, p.height, p.width, p.c},
          {p.x.stride_n, p.x.stride_h, p.x.stride_w, p.x_stride_c});
  packed("out", p.out, bytes, {p.n, p.height, p.width, p.c});
}

inline void tensors(const Int8ConvParams& p) {
  choice("kind", p.kind, {kUnsignedBytes, kSignedBytes, kWords});
  choice("kernel", p.kernel, {1, 3});
  strided_output(p);
  levels(p.levels);
  if (p.c_in < 1) refuse("c_in", "at least 1", std::to_string(p.c_in));
  const int64_t bytes = p.kind == kWords ? 2 : 1;
  const Image out{p.n, p.out_height, p.out_width, p.c_out};
  view("x", p.x, bytes, {p.n, p.height, p.width, p.c_in});
  view("out", p.out, 1, out, kOptional);
  view("feature", p.feature, 4, out, kOptional);
  if (count("out", {out.n, out.height, out.width, out.c}) > 0) an_output(p.out, p.feature);
  if (p.out.data == nullptr && p.pool_partials != nullptr) {
    refuse("pool_partials", "None where out is", "an address");
  }
  packed("tiles", p.tiles, bytes, {p.c_out, p.kernel, p.kernel, p.c_in}, false, kTilesAlignment);
  packed("bias", p.bias, 4, {p.c_out});
  packed("multiplier", p.multiplier, 4, {p.c_out});
  packed("unit", p.unit, 4, {p.c_out});
  packed("pool_partials", p.pool_partials, 4, {out.n, out.height, out.c}, kOptional);
}

inline void tensors(const Int8ConvPackParams& p) {
  choice("kind", p.kind, {kSignedBytes, kWords});
  choice("kernel", p.kernel, {1, 3});
  const int64_t bytes = p.kind == kWords ? 2 : 1;
  packed("weight", p.weight, bytes, {p.c_out, p.kernel, p.kernel, p.c_in});
  packed("out", p.out, 1, {p.c_out, p.kernel, p.kernel, p.c_in}, false, kTilesAlignment);
}

inline void tensors(const Int8DepthwiseParams& p) {
  strided_output(p);
  levels(p.levels);
  view("x", p.x, 1, input(p));
  view("out", p.out, 1, output(p));
  packed("weight", p.weight, 1, {3, 3, p.c});
  packed("multiplier", p.multiplier, 4, {p.c});
  packed("zero", p.zero, 1, {p.c});
}

inline void tensors(const Int8MaxPoolParams& p) {
  pooled_output(p);
  view("x", p.x, 1, input(p));
  view("out", p.out, 1, output(p));
}

inline void tensors(const Int8GatesParams& p) {
  if (p.most < 0) refuse("most", "at least 0", std::to_string(p.most));
  count("out", {p.n, p.c, p.c});  // products
  packed("partials", p.partials, 4, {p.n, p.tiles, p.c});
  packed("mean", p.mean, 2, {p.n, p.c});
  packed("out", p.out, 4, {p.n, p.c});
  packed("fc_weight", p.fc_weight, 2, {p.c, p.c});
  packed("fc_bias", p.fc_bias, 4, {p.c});
  packed("multiplier", p.multiplier, 4, {p.c});
  packed("table", p.table, 4, {p.most + 1}, kOptional);
}

inline void tensors(const Int8ApplyGatesParams& p) {
  levels(p.levels);
  for (const auto& [name, factor] :
       {std::pair{"gate", p.gate}, std::pair{"identity_gate", p.identity_gate}}) {
    if (factor < 0 || factor >= 1 << 15) {
      refuse(name, "at least 0 and below 2^15", std::to_string(factor));
    }
  }
  view("z", p.z, 1, input(p));
  view("identity", p.identity, 1, input(p), kOptional);
  view("out", p.out, 1, input(p), kOptional);
  view("feature", p.feature, 4, input(p), kOptional);
  if (count("out", {p.n, p.height, p.width, p.c}) > 0) an_output(p.out, p.feature);
  packed("gates", p.gates, 4, {p.n, p.c}, kOptional);
}

}  // namespace checks
}  // namespace vovnet_fast
