// Convolutions in eight bits: packed weights, and what becomes of the sums.
#pragma once

#include "conv_pack.h"
#include "conv_store.h"
#include "integers.h"

namespace vovnet_fast {
inline namespace VF_ISA {
namespace conv {

// A weight as an engine sees it; see Filter.
template <class Packed, class Weight>
struct IntegerFilter {
  const Weight* weight;
  int64_t outputs, taps, inputs;

  VF_HD void read(int64_t output, int64_t tap, int64_t input, int64_t count, Packed* to) const {
    const Weight* from = weight + (output * taps + tap) * inputs + input;
    for (int64_t k = 0; k < count; ++k) to[k] = from[k];
  }
};

template <class Packed, class Filter>
void pack_filter(const Filter& filter, int64_t kernel, void* out, int threads) {
  constexpr int64_t kChunk = kChunkBytes / static_cast<int64_t>(sizeof(Packed));
  const Plan plan = divide({1, 1, filter.inputs, filter.outputs, kernel, 1}, kChunk);
  const int64_t bytes = plan.tiles * tile_step(plan), all = taps(plan);
  parallel(plan.tiles * plan.chunks, bytes, threads, [&](int64_t i) {
    const int64_t first = i / plan.chunks * kTileChannels, chunk = i % plan.chunks * kChunk;
    const int64_t outputs = least(kTileChannels, filter.outputs - first);
    char* to = static_cast<char*>(out) + i * all * kTileBytes;
    for (int64_t tap = 0; tap < all; ++tap, to += kTileBytes) {
      alignas(64) Packed chunks[kSide][kChunk] = {};
      for (int64_t o = 0; o < outputs; ++o) {
        if (plan.unfolded) {
          for (int64_t c = chunk; c < least(chunk + kChunk, plan.channels); ++c) {
            filter.read(first + o, c / filter.inputs, c % filter.inputs, 1, &chunks[o][c - chunk]);
          }
        } else {
          filter.read(first + o, tap, chunk, least(kChunk, plan.channels - chunk), chunks[o]);
        }
      }
      transpose(chunks, to);
    }
  });
}

template <class Packed>
void pack(const Int8ConvPackParams& p, int threads) {
  const auto pack_as = [&](auto type) {
    using Weight = decltype(type);
    const IntegerFilter<Packed, Weight> filter{static_cast<const Weight*>(p.weight), p.c_out,
                                               p.kernel * p.kernel, p.c_in};
    pack_filter<Packed>(filter, p.kernel, p.out, threads);
  };
  if constexpr (sizeof(Packed) > 1) {
    if (p.kind == kWords) return pack_as(int16_t{});
  }
  pack_as(int8_t{});
}

// Rows of an image of the output, from one on.
struct ByteRows {
  uint8_t* out;
  float* feature;
};

template <class T>
VF_HD ByteRows rows_of(const Int8ConvParams& p, const Task& task) {
  const auto offset = [&](const View& view) VF_LAMBDA {
    return task.image * view.stride_n + task.row * view.stride_h;
  };
  ByteRows rows{};
  if (p.out.data != nullptr) rows.out = static_cast<uint8_t*>(p.out.data) + offset(p.out);
  if (p.feature.data != nullptr) {
    rows.feature = static_cast<float*>(p.feature.data) + offset(p.feature);
  }
  return rows;
}

// Steps of the sums of a block, and their sums for the pool.
template <int kVectors, class Each>
VF_HD void store_steps(const Int8ConvParams& p, const Plan& plan, const int32_t* sums, Range range,
                       uint8_t* out, int64_t channel, const Ints (&bias)[kVectors],
                       Ints (&total)[kVectors], Each each) {
  Floats multiplier[kVectors] = {};
  each([&](int v, auto span) VF_LAMBDA {
    multiplier[v] =
        load(static_cast<const float*>(p.multiplier) + channel + v * kLanes<float>, span);
  });
  const Floats low{}, high = broadcast<float>(static_cast<float>(p.levels));
  for_range(p, plan, range, [&](int i, Pixel at) VF_LAMBDA {
    uint8_t* to = out + offset(p.out, at) + channel;
    const int32_t* from = sums + i * kVectors * kLanes<float>;
    each([&](int v, auto span) VF_LAMBDA {
      const Ints acc = load(from + v * kLanes<float>, Full{}) + bias[v];
      const Ints steps = requantized(acc, multiplier[v], low, high);
      total[v] += steps;
      store_bytes<float>(to + v * kLanes<float>, steps, span);
    });
  });
}

// The same where all lanes of two vectors are meant: two pixels at a time.
template <bool kPool>
void store_pairs(const Int8ConvParams& p, const Plan& plan, const int32_t* sums, Range range,
                 uint8_t* out, int64_t channel, const Ints (&bias)[2], Ints (&total)[2]) {
  constexpr int kRow = 2 * kLanes<float>;
  const float* factors = static_cast<const float*>(p.multiplier) + channel;
  const Floats multiplier[2] = {load(factors, Full{}), load(factors + kLanes<float>, Full{})};
  const Floats high = broadcast<float>(static_cast<float>(p.levels));
  const auto steps_of = [&](const int32_t* from, Ints(&steps)[2]) VF_LAMBDA {
    for (int v = 0; v < 2; ++v) {
      const Ints acc = load(from + v * kLanes<float>, Full{}) + bias[v];
      // What is negative becomes 0 when it is stored, which saturates.
      steps[v] = to_nearest(at_most(to_floats(acc) * multiplier[v], high));
      if constexpr (kPool) total[v] += steps[v] > 0 ? steps[v] : Ints{};
    }
  };
  for_runs(p, plan, range, [&](int first, int pixels, Pixel at) VF_LAMBDA {
    const int32_t* from = sums + first * kRow;
    uint8_t* to[2] = {out + offset(p.out, at) + channel, nullptr};
    Ints steps[2][2];
    for (; pixels > 1; pixels -= 2, from += 2 * kRow, to[0] += 2 * p.out.stride_w) {
      steps_of(from, steps[0]);
      steps_of(from + kRow, steps[1]);
      to[1] = to[0] + p.out.stride_w;
      store_two(to, steps[0], steps[1]);
    }
    if (pixels == 1) {
      steps_of(from, steps[0]);
      to[1] = to[0];
      store_two(to, steps[0], steps[0]);
    }
  });
}

// What they stand for, as a feature.
template <int kVectors, class Each>
VF_HD void store_values(const Int8ConvParams& p, const Plan& plan, const int32_t* sums, Range range,
                        float* feature, int64_t channel, const Ints (&bias)[kVectors], Each each) {
  Floats unit[kVectors] = {};
  each([&](int v, auto span) VF_LAMBDA {
    unit[v] = load(static_cast<const float*>(p.unit) + channel + v * kLanes<float>, span);
  });
  for_range(p, plan, range, [&](int i, Pixel at) VF_LAMBDA {
    float* to = feature + offset(p.feature, at) + channel;
    const int32_t* from = sums + i * kVectors * kLanes<float>;
    each([&](int v, auto span) VF_LAMBDA {
      const Ints acc = load(from + v * kLanes<float>, Full{}) + bias[v];
      store(to + v * kLanes<float>, relu(to_floats(acc) * unit[v]), span);
    });
  });
}

// Sums of a block, [pixel][kTiles * 16], into the slot from `channel` on.
template <class Engine, class T, int kTiles>
VF_HD void store_block(const Int8ConvParams& p, const Plan& plan, const int32_t* sums, Range range,
                       const ByteRows& rows, int64_t channel, int32_t* pool) {
  constexpr int kChannels = kTiles * kTileChannels, kVectors = kChannels / kLanes<float>;
  const int64_t channels = least<int64_t>(kChannels, p.c_out - channel);
  const auto store_with = [&](auto whole, auto each) VF_LAMBDA {
    Ints bias[kVectors] = {}, total[kVectors] = {};
    each([&](int v, auto span) VF_LAMBDA {
      bias[v] = load(static_cast<const int32_t*>(p.bias) + channel + v * kLanes<float>, span);
    });
    if (rows.feature != nullptr) {
      store_values(p, plan, sums, range, rows.feature, channel, bias, each);
    }
    if (rows.out == nullptr) return;
    // One condition in the other: of a product of both, of which one is this lambda's, Clang
    // compiles what is never called.
    if constexpr (kVectors != 2) {
      store_steps(p, plan, sums, range, rows.out, channel, bias, total, each);
    } else if constexpr (whole.value == 1) {
      (pool == nullptr ? store_pairs<false> : store_pairs<true>)(p, plan, sums, range, rows.out,
                                                                 channel, bias, total);
    } else {
      store_steps(p, plan, sums, range, rows.out, channel, bias, total, each);
    }
    if (pool == nullptr) return;
    each([&](int v, auto span) VF_LAMBDA {
      int32_t* to = pool + channel + v * kLanes<float>;
      store(to, load(to, span) + total[v], span);
    });
  };
  if (channels < kChannels) {
    store_with(Fixed<0>{}, [&](auto body) VF_LAMBDA { for_vectors<kVectors>(channels, body); });
  } else {
    store_with(Fixed<1>{}, [&](auto body) VF_LAMBDA {
      for (int v = 0; v < kVectors; ++v) body(v, Full{});
    });
  }
}

}  // namespace conv
}  // namespace VF_ISA
}  // namespace vovnet_fast
