// What becomes of the sums of a convolution: the epilogue of a layer, or that of a gradient.
#pragma once

#include "conv_plan.h"

namespace vovnet_fast {
inline namespace VF_ISA {
namespace conv {

// Vectors of a block's channels in registers: scale, shift, and sums for the pool.
template <int kVectors>
struct Epilogue {
  Vector<float> scale[kVectors], shift[kVectors], total[kVectors];
};

// body(vector, span) for the vectors of `channels` channels.
template <int kVectors, class Body>
VF_HD void for_vectors(int64_t channels, Body body) {
  for (int v = 0; v < kVectors; ++v) {
    const int64_t left = channels - v * kLanes<float>;
    if (left >= kLanes<float>) {
      body(v, Full{});
    } else if (left > 0) {
      body(v, Part{static_cast<int>(left)});
    }
  }
}

// Where outputs that are counted through over gathered rows lie.
struct Range {
  int64_t first;
  int pixels;
};

// Rows of an image of the output, from one on, and of what is added to it or masks it. The mask's
// first channel would lie `unmasked` channels before its memory.
template <class T>
struct Rows {
  T* out;
  const T *add, *mask;
  int64_t unmasked;

  VF_HD Rows(const ConvParams& p, int64_t image, int64_t row)
      : out(at(p.out, image, row)),
        add(at(p.add, image, row)),
        mask(at(p.mask, image, row)),
        unmasked(p.mask.data == nullptr ? p.c_out : p.c_out - p.mask_c) {}

 private:
  static VF_HD T* at(const View& view, int64_t image, int64_t row) {
    if (view.data == nullptr) return nullptr;
    return static_cast<T*>(view.data) + image * view.stride_n + row * view.stride_h;
  }
};

template <class T>
VF_HD Rows<T> rows_of(const ConvParams& p, const Task& task) {
  return Rows<T>(p, task.image, task.row);
}

// body(i, pixel) for the pixels of a range that do not lie in the padding.
template <class Params, class Body>
VF_HD void for_range(const Params& p, const Plan& plan, Range range, Body body) {
  Pixel at{range.first / plan.width, range.first % plan.width};
  for (int i = 0; i < range.pixels; ++i) {
    if (at.w < p.out_width) body(i, at);
    if (++at.w == plan.width) at = {at.h + 1, 0};
  }
}

// body(i, pixels, pixel) for the runs of those that lie side by side.
template <class Params, class Body>
VF_HD void for_runs(const Params& p, const Plan& plan, Range range, Body body) {
  Pixel at{range.first / plan.width, range.first % plan.width};
  for (int i = 0; i < range.pixels;) {
    const int left = range.pixels - i;
    const int pixels = static_cast<int>(least<int64_t>(left, p.out_width - at.w));
    if (pixels > 0) body(i, pixels, at);
    i += static_cast<int>(least<int64_t>(left, plan.width - at.w));
    at = {at.h + 1, 0};
  }
}

VF_HD int64_t offset(const View& view, Pixel pixel) {
  return pixel.h * view.stride_h + pixel.w * view.stride_w;
}

// relu(sums * scale + shift), and its sums.
template <class Engine, class T, int kTiles>
void store_layer(const ConvParams& p, const Plan& plan, const float* sums, Range range,
                 const Rows<T>& rows, int64_t channel, float* pool) {
  constexpr int kChannels = kTiles * kTileChannels, kVectors = kChannels / kLanes<float>;
  const int64_t channels = least<int64_t>(kChannels, p.c_out - channel);
  Epilogue<kVectors> e{};
  for_vectors<kVectors>(channels, [&](int v, auto span) VF_LAMBDA {
    const int64_t c = channel + v * kLanes<float>;
    e.scale[v] = load(static_cast<const float*>(p.scale) + c, span);
    e.shift[v] = load(static_cast<const float*>(p.shift) + c, span);
  });
  const auto store_pixels = [&](auto relued, auto each) VF_LAMBDA {
    for_range(p, plan, range, [&](int i, Pixel at) VF_LAMBDA {
      T* to = rows.out + offset(p.out, at) + channel;
      const float* from = sums + i * kChannels;
      each([&](int v, auto span) VF_LAMBDA {
        auto y = scale_shift(load(from + v * kLanes<float>, Full{}), e.scale[v], e.shift[v]);
        if constexpr (relued.value == 1) y = relu(y);
        e.total[v] += y;
        Engine::store(to + v * kLanes<float>, y, span);
      });
    });
  };
  const auto all = [&](auto body) VF_LAMBDA {
    for (int v = 0; v < kVectors; ++v) body(v, Full{});
  };
  const auto some = [&](auto body) VF_LAMBDA { for_vectors<kVectors>(channels, body); };
  if (channels < kChannels) {
    p.relu != 0 ? store_pixels(Fixed<1>{}, some) : store_pixels(Fixed<0>{}, some);
  } else {
    p.relu != 0 ? store_pixels(Fixed<1>{}, all) : store_pixels(Fixed<0>{}, all);
  }
  if (pool == nullptr) return;
  for_vectors<kVectors>(channels, [&](int v, auto span) VF_LAMBDA {
    float* to = pool + channel + v * kLanes<float>;
    store(to, load(to, span) + e.total[v], span);
  });
}

// mask(sums + add): channels below add_c are added to, those from `unmasked` on are masked. Both
// may begin within a vector.
template <class Engine, class T, int kTiles>
void store_gradient(const ConvParams& p, const Plan& plan, const float* sums, Range range,
                    const Rows<T>& rows, int64_t channel) {
  constexpr int kChannels = kTiles * kTileChannels, kVectors = kChannels / kLanes<float>;
  const int64_t channels = least<int64_t>(kChannels, p.c_out - channel);
  const int64_t added = rows.add == nullptr ? 0 : p.add_c;
  for_range(p, plan, range, [&](int i, Pixel at) VF_LAMBDA {
    const int64_t to = offset(p.out, at), add = offset(p.add, at);
    const int64_t mask = offset(p.mask, at) - rows.unmasked;
    for_vectors<kVectors>(channels, [&](int v, auto span) VF_LAMBDA {
      const int64_t c = channel + v * kLanes<float>, end = c + count_of(span);
      auto y = load(sums + i * kChannels + v * kLanes<float>, Full{});
      if (end <= added) {
        y += load(rows.add + add + c, span);
      } else if (c < added) {
        y += load(rows.add + add + c, Part{static_cast<int>(added - c)});
      }
      if (c >= rows.unmasked) {
        y = relu_gradient(y, load(rows.mask + mask + c, span));
      } else if (end > rows.unmasked) {
        auto passes = broadcast<float>(1);
        for (int64_t k = rows.unmasked; k < end; ++k) passes[k - c] = widen(rows.mask[mask + k]);
        y = relu_gradient(y, passes);
      }
      Engine::store(rows.out + to + c, y, span);
    });
  });
}

// Sums of a block, [pixel][kTiles * 16], into the slot from `channel` on.
template <class Engine, class T, int kTiles>
VF_HD void store_block(const ConvParams& p, const Plan& plan, const float* sums, Range range,
                       const Rows<T>& rows, int64_t channel, float* pool) {
  if (p.scale == nullptr) {
    store_gradient<Engine, T, kTiles>(p, plan, sums, range, rows, channel);
  } else {
    store_layer<Engine, T, kTiles>(p, plan, sums, range, rows, channel, pool);
  }
}

}  // namespace conv
}  // namespace VF_ISA
}  // namespace vovnet_fast
