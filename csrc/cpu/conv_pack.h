// Weights, packed in tiles (conv_plan.h).
//
// A weight is read in blocks of a few of its rows, which are its output channels, and 64 of its
// columns, its input channels, with all their taps: wherever its numbers lie side by side, by taps
// as nn.Conv2d has them or by columns as channels_last, runs of at least 256 bytes are read at
// once.
#pragma once

#include <type_traits>

#include "conv_gather.h"
#include "transpose.h"

namespace vovnet_fast {
inline namespace VF_ISA {
namespace conv {

constexpr int64_t kPackColumns = 64;
constexpr int64_t kWideColumns = 256;

// The rows of a weight, multiplied by their scales and rounded to T.
template <class T, class Weight>
class WeightRows {
 public:
  static constexpr int kLane = kLanes<float>;

  explicit VF_HD WeightRows(const ConvPackParams& p) : p_(p) {
    for (int i = 0; i < kLane; ++i) steps_[i] = static_cast<int32_t>(i * p.stride_i);
  }

  VF_HD High<T> scale(int64_t row) const { return element_or(p_.scale, row, High<T>(1)); }

  VF_HD const Weight* at(int64_t row, int64_t tap, int64_t column) const {
    return static_cast<const Weight*>(p_.weight.data) + row * p_.stride_o +
           tap / p_.kernel * p_.stride_h + tap % p_.kernel * p_.stride_w + column * p_.stride_i;
  }

  VF_HD T one(int64_t row, int64_t tap, int64_t column) const {
    return narrow<T>(static_cast<High<T>>(widen(*at(row, tap, column))) * scale(row));
  }

  // The numbers of `count` columns of a tap, `from` on; zeros behind them. Not yet rounded.
  template <bool kDense>
  VF_HD Vector<float> read(const Weight* from, int64_t count, float scale) const {
    if constexpr (sizeof(Weight) <= sizeof(float)) {
      if (count >= kLane) {
        if constexpr (kDense) return load(from, Full{}) * broadcast<float>(scale);
#if defined(__AVX512F__)
        if constexpr (std::is_same<Weight, float>::value) {
          const __m512 found = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), 0xffff,
                                                        (__m512i)steps_, from, sizeof(float));
          return (Vector<float>)found * broadcast<float>(scale);
        }
#endif
      }
    }
    float all[kLane] = {};
    const int64_t step = kDense ? 1 : p_.stride_i;
    for (int64_t k = 0; k < least<int64_t>(count, kLane); ++k) {
      all[k] = static_cast<float>(widen(from[k * step])) * scale;
    }
    return load(all, Full{});
  }

 private:
  const ConvPackParams& p_;
  typename VectorTypes<float>::Integers steps_;
};

// A vector as it is multiplied, rounded to T before.
template <class T>
VF_HD void store_packed(float* to, Vector<float> y) {
  if constexpr (sizeof(T) == sizeof(float)) {
    store(to, y, Full{});
  } else {
    T narrowed[kLanes<float>];
    store(narrowed, y, Full{});
    store(to, load(narrowed, Full{}), Full{});
  }
}

template <class T>
VF_HD void store_packed(bfloat16* to, Vector<float> y) {
  store(to, y, Full{});
}

// Outputs are rows, and the chunks of a tile columns: a tile is the transpose of 16 chunks, one of
// each output, in units of four bytes, a channel in fp32, two in bf16.
template <bool kDense, class Packed, class T, class Weight>
void pack_straight(const ConvPackParams& p, const Plan& plan, int threads) {
  constexpr int64_t kChunk = kChunkBytes / static_cast<int64_t>(sizeof(Packed));
  constexpr int64_t kGroup = kPackColumns / kChunk;  // chunks
  using Rows = WeightRows<T, Weight>;
  const Rows weight(p);
  const int64_t groups = ceil_div(plan.chunks, kGroup), all = taps(plan);
  parallel(plan.tiles * groups, plan.tiles * tile_step(plan), threads, [&](int64_t i) {
    const int64_t first = i / groups * kTileChannels, chunk = i % groups * kGroup;
    const int64_t rows = least(kTileChannels, p.c_out - first);
    const int64_t chunks = least(kGroup, plan.chunks - chunk), column = chunk * kChunk;
    alignas(64) Packed block[kMaxTaps][kGroup][kSide][kChunk];
    for (int64_t o = 0; o < kSide; ++o) {
      const float scale = o < rows ? weight.scale(first + o) : 0;
      for (int64_t tap = 0; tap < all; ++tap) {
        const auto* from = weight.at(first + (o < rows ? o : 0), tap, column);
        for (int64_t c = 0; c < chunks * kChunk; c += Rows::kLane) {
          const int64_t left = o < rows ? p.c_in - column - c : 0;
          store_packed<T>(&block[tap][c / kChunk][o][c % kChunk],
                          weight.template read<kDense>(from + c * p.stride_i, left, scale));
        }
      }
    }
    char* to = static_cast<char*>(p.out) + (i / groups * plan.chunks + chunk) * all * kTileBytes;
    for (int64_t c = 0; c < chunks; ++c) {
      for (int64_t tap = 0; tap < all; ++tap, to += kTileBytes) transpose(block[tap][c], to);
    }
  });
}

// 16 columns of `kRows` rows of a transposed weight, as they lie in a tile.
template <class T>
VF_HD void store_rows(const Vector<float> (&rows)[1], float* to) {
  store_packed<T>(to, rows[0]);
}

template <class T>
VF_HD void store_rows(const Vector<float> (&rows)[2], bfloat16* to) {
  using Bits = VectorTypes<float>::Bits;
  const Bits pairs = round_to_bfloat16(rows[0]) | (round_to_bfloat16(rows[1]) << 16);
  memcpy(to, &pairs, sizeof pairs);
}

// Inputs are rows, and outputs columns, with their taps reversed: as they lie in a row, so they do
// in a tile, in bf16 those of two rows in turn. Blocks are as wide as leaves work for all threads:
// a whole row is read from its beginning to its end, as the processor expects.
template <bool kDense, class Packed, class T, class Weight>
void pack_transposed(const ConvPackParams& p, const Plan& plan, int threads) {
  constexpr int64_t kChunk = kChunkBytes / static_cast<int64_t>(sizeof(Packed));
  constexpr int64_t kRows = kChunk / kSide;
  using Rows = WeightRows<T, Weight>;
  const Rows weight(p);
  const bool wide = plan.chunks >= 4 * threads;
  const int64_t group = (wide ? kWideColumns : kPackColumns) / kTileChannels;  // tiles
  const int64_t groups = ceil_div(plan.tiles, group), all = taps(plan);
  parallel(groups * plan.chunks, plan.tiles * tile_step(plan), threads, [&](int64_t i) {
    const int64_t first = i / plan.chunks * group, chunk = i % plan.chunks;
    const int64_t tiles = least(group, plan.tiles - first), column = first * kTileChannels;
    char* out = static_cast<char*>(p.out) + (first * plan.chunks + chunk) * all * kTileBytes;
    for (int64_t k = 0; k < kSide; ++k) {
      const int64_t row = chunk * kChunk + k * kRows;
      for (int64_t tap = 0; tap < all; ++tap) {
        char* to = out + (all - 1 - tap) * kTileBytes + k * kChunkBytes;
        for (int64_t tile = 0; tile < tiles; ++tile, to += tile_step(plan)) {
          for (int64_t c = tile * kSide; c < (tile + 1) * kSide; c += Rows::kLane) {
            Vector<float> rows[kRows];
            for (int64_t r = 0; r < kRows; ++r) {
              const bool there = row + r < p.c_out && column + c < p.c_in;
              const auto* from = there ? weight.at(row + r, tap, column + c) : nullptr;
              const float scale = there ? weight.scale(row + r) : 0;
              rows[r] = weight.template read<kDense>(from, there ? p.c_in - column - c : 0, scale);
            }
            store_rows<T>(rows, reinterpret_cast<Packed*>(to) + c % kSide * kRows);
          }
        }
      }
    }
  });
}

// Few channels, with all taps as if they were channels.
template <class Packed, class T, class Weight>
void pack_unfolded(const ConvPackParams& p, const Plan& plan) {
  constexpr int64_t kChunk = kChunkBytes / static_cast<int64_t>(sizeof(Packed));
  const WeightRows<T, Weight> weight(p);
  const bool transposed = p.transposed != 0;
  const int64_t inputs = transposed ? p.c_out : p.c_in, outputs = transposed ? p.c_in : p.c_out;
  const int64_t last = p.kernel * p.kernel - 1;
  char* to = static_cast<char*>(p.out);
  for (int64_t i = 0; i < plan.tiles * plan.chunks; ++i, to += kTileBytes) {
    const int64_t first = i / plan.chunks * kTileChannels, chunk = i % plan.chunks * kChunk;
    Packed block[kSide][kChunk] = {};
    for (int64_t o = 0; o < least(kTileChannels, outputs - first); ++o) {
      for (int64_t c = chunk; c < least(chunk + kChunk, plan.channels); ++c) {
        const int64_t tap = c / inputs, input = c % inputs;
        block[o][c - chunk] = convert<Packed>(transposed ? weight.one(input, last - tap, first + o)
                                                         : weight.one(first + o, tap, input));
      }
    }
    transpose(block, to);
  }
}

template <bool kDense, class Packed, class T, class Weight>
void pack_folded(const ConvPackParams& p, const Plan& plan, int threads) {
  if (p.transposed != 0) {
    pack_transposed<kDense, Packed, T, Weight>(p, plan, threads);
  } else {
    pack_straight<kDense, Packed, T, Weight>(p, plan, threads);
  }
}

template <class Packed, class T>
void pack(const ConvPackParams& p, int threads) {
  constexpr int64_t kChunk = kChunkBytes / static_cast<int64_t>(sizeof(Packed));
  const int64_t inputs = p.transposed != 0 ? p.c_out : p.c_in;
  const int64_t outputs = p.transposed != 0 ? p.c_in : p.c_out;
  const Plan plan = divide({1, 1, inputs, outputs, p.kernel, 1}, kChunk);
  with_dtype(p.weight.dtype, [&](auto weight) {
    using Weight = decltype(weight);
    if (plan.unfolded) {
      pack_unfolded<Packed, T, Weight>(p, plan);
    } else if (p.stride_i == 1) {
      pack_folded<true, Packed, T, Weight>(p, plan, threads);
    } else {
      pack_folded<false, Packed, T, Weight>(p, plan, threads);
    }
  });
}

}  // namespace conv
}  // namespace VF_ISA
}  // namespace vovnet_fast
