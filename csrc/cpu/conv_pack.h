// Weights, packed in tiles (conv_plan.h).
#pragma once

#include "conv_gather.h"

namespace vovnet_fast {
inline namespace VF_ISA {
namespace conv {

// A weight as an engine sees it: of a transposed one, channels are exchanged and taps reversed.
template <class Packed, class T, class Weight>
class Filter {
 public:
  explicit VF_HD Filter(const ConvPackParams& p)
      : p_(p),
        outputs(p.transposed != 0 ? p.c_in : p.c_out),
        inputs(p.transposed != 0 ? p.c_out : p.c_in),
        output_step_(p.transposed != 0 ? p.stride_i : p.stride_o),
        input_step_(p.transposed != 0 ? p.stride_o : p.stride_i) {}

  // `count` input channels of one tap, from (output, input) on.
  VF_HD void read(int64_t output, int64_t tap, int64_t input, int64_t count, Packed* to) const {
    const int64_t from = p_.transposed != 0 ? p_.kernel * p_.kernel - 1 - tap : tap;
    const auto* weight = static_cast<const Weight*>(p_.weight.data) + output * output_step_ +
                         input * input_step_ + from / p_.kernel * p_.stride_h +
                         from % p_.kernel * p_.stride_w;
    if (p_.scale.data == nullptr) {
      for (int64_t k = 0; k < count; ++k) to[k] = rounded(weight[k * input_step_], 1);
    } else if (p_.transposed != 0) {
      for (int64_t k = 0; k < count; ++k) {
        to[k] = rounded(weight[k * input_step_], element_or(p_.scale, input + k, High<T>(1)));
      }
    } else {
      const High<T> scale = element_or(p_.scale, output, High<T>(1));
      for (int64_t k = 0; k < count; ++k) to[k] = rounded(weight[k * input_step_], scale);
    }
  }

 private:
  static VF_HD Packed rounded(Weight weight, High<T> scale) {
    return convert<Packed>(narrow<T>(static_cast<High<T>>(widen(weight)) * scale));
  }

  const ConvPackParams& p_;

 public:
  const int64_t outputs, inputs;

 private:
  const int64_t output_step_, input_step_;
};

// A tile is the transpose of 16 chunks, one of each output channel, in units of four bytes: a
// channel in fp32, two in bf16, four in int8. All taps of a chunk are packed before the next one:
// where they lie side by side in memory, as nn.Conv2d has them, it is read once.
template <class Packed, class Filter>
void pack_filter(const Filter& filter, int64_t kernel, void* out, int threads) {
  constexpr int64_t kChunk = kChunkBytes / static_cast<int64_t>(sizeof(Packed));
  constexpr int kSide = 16;
  const Plan plan = divide({1, 1, filter.inputs, filter.outputs, kernel, 1}, kChunk);
  const int64_t bytes = plan.tiles * tile_step(plan), all = taps(plan);
  parallel(plan.tiles * plan.chunks, bytes, threads, [&](int64_t i) {
    const int64_t first = i / plan.chunks * kTileChannels, chunk = i % plan.chunks * kChunk;
    const int64_t outputs = least(kTileChannels, filter.outputs - first);
    char* to = static_cast<char*>(out) + i * all * kTileBytes;
    for (int64_t tap = 0; tap < all; ++tap, to += kTileBytes) {
      Packed chunks[kSide][kChunk] = {};
      for (int64_t o = 0; o < outputs; ++o) {
        if (plan.unfolded) {
          for (int64_t c = chunk; c < least(chunk + kChunk, plan.channels); ++c) {
            filter.read(first + o, c / filter.inputs, c % filter.inputs, 1, &chunks[o][c - chunk]);
          }
        } else {
          filter.read(first + o, tap, chunk, least(kChunk, plan.channels - chunk), chunks[o]);
        }
      }
      uint32_t units[kSide][kSide], tile[kSide][kSide];
      memcpy(units, chunks, sizeof units);
      for (int k = 0; k < kSide; ++k) {
        for (int o = 0; o < kSide; ++o) tile[k][o] = units[o][k];
      }
      memcpy(to, tile, kTileBytes);
    }
  });
}

template <class Packed, class T>
void pack(const ConvPackParams& p, int threads) {
  with_dtype(p.weight.dtype, [&](auto weight) {
    pack_filter<Packed>(Filter<Packed, T, decltype(weight)>(p), p.kernel, p.out, threads);
  });
}

}  // namespace conv
}  // namespace VF_ISA
}  // namespace vovnet_fast
