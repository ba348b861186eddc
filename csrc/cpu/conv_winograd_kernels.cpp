// Winograd's convolution (conv_winograd.h) in fp32, divided by conv_winograd_run.h.
//
// Activations of 16 bits are widened as they are transformed, and outputs rounded once: in between
// all is fp32.
#if defined(__AVX2__) || defined(__aarch64__)

#include "conv_winograd_run.h"

namespace vovnet_fast {
inline namespace VF_ISA {

namespace {

using conv::kTileBytes;
using conv::kTileChannels;
using winograd::Division;
using winograd::Tile;

constexpr int64_t kLanesOfTile = kTileChannels / kLanes<float>;

// Values of a polynomial at the points (`input`), and the polynomial that has them (`output`), in
// one direction of a tile. `weight` is the matrix that does the same to three taps.
template <int kSide>
struct Points;

template <>
struct Points<2> {
  static constexpr int count = 4;
  static constexpr double weight[count][3] = {{1, 0, 0}, {.5, .5, .5}, {.5, -.5, .5}, {0, 0, 1}};

  static VF_HD void input(const Vector<float>* x, Vector<float>* y) {
    y[0] = x[0] - x[2];
    y[1] = x[1] + x[2];
    y[2] = x[2] - x[1];
    y[3] = x[3] - x[1];
  }

  static VF_HD void output(const Vector<float>* x, Vector<float>* y) {
    y[0] = x[0] + (x[1] + x[2]);
    y[1] = (x[1] - x[2]) + x[3];
  }
};

template <>
struct Points<4> {
  static constexpr int count = 6;
  static constexpr double a = 0.625, b = 1.5, aa = a * a, bb = b * b;
  // The points' distances from each other, multiplied.
  static constexpr double zero = aa * bb, near = 2 * aa * (aa - bb), far = 2 * bb * (bb - aa);
  static constexpr double weight[count][3] = {
      {1 / zero, 0, 0},
      {1 / near, a / near, aa / near},
      {1 / near, -a / near, aa / near},
      {1 / far, b / far, bb / far},
      {1 / far, -b / far, bb / far},
      {0, 0, 1},
  };

  static VF_HD Vector<float> add(Vector<float> x, double times, Vector<float> y) {
    return multiply_add(same(static_cast<float>(times)), y, x);
  }

  static VF_HD void input(const Vector<float>* x, Vector<float>* y) {
    const auto even_a = add(x[4], -bb, x[2]), odd_a = add(x[3], -bb, x[1]);
    const auto even_b = add(x[4], -aa, x[2]), odd_b = add(x[3], -aa, x[1]);
    y[0] = add(add(x[4], -(aa + bb), x[2]), aa * bb, x[0]);
    y[1] = add(even_a, a, odd_a);
    y[2] = add(even_a, -a, odd_a);
    y[3] = add(even_b, b, odd_b);
    y[4] = add(even_b, -b, odd_b);
    y[5] = add(add(x[5], -(aa + bb), x[3]), aa * bb, x[1]);
  }

  static VF_HD void output(const Vector<float>* x, Vector<float>* y) {
    const auto even_a = x[1] + x[2], odd_a = x[1] - x[2];
    const auto even_b = x[3] + x[4], odd_b = x[3] - x[4];
    y[0] = x[0] + (even_a + even_b);
    y[1] = add(odd_b * same(static_cast<float>(b)), a, odd_a);
    y[2] = add(even_b * same(static_cast<float>(bb)), aa, even_a);
    y[3] = add(add(x[5], bb * b, odd_b), aa * a, odd_a);
  }
};

// Channels of a span of one tile's input, from `x`, that of its first output's pixel.
template <int kSide, class T, class Span>
VF_HD void transform_input(const ConvParams& p, const T* x, Tile tile, Span span, char* to,
                           int64_t step) {
  constexpr int kCount = Points<kSide>::count;
  const auto once = [](const Vector<float>* from, Vector<float>* values)
                        VF_LAMBDA { Points<kSide>::input(from, values); };
  const auto write = [&](int i, const Vector<float>* row) VF_LAMBDA {
    char* at = to + i * kCount * step;
#pragma GCC unroll 6
    for (int j = 0; j < kCount; ++j) store(reinterpret_cast<float*>(at + j * step), row[j], Full{});
  };
  const T* first = x - p.x.stride_h - p.x.stride_w;
  if (winograd::inside<kSide>(p, tile)) {
    const auto read = [&](const T* from) VF_LAMBDA { return load(from, span); };
    return winograd::in_both<Vector<float>, kCount, kCount>(once, first, p.x.stride_h, p.x.stride_w,
                                                            read, write);
  }
  Vector<float> padded[kCount][kCount] = {};
  winograd::for_inside<kSide>(p, tile, [&](int64_t i, int64_t j, int64_t, int64_t) VF_LAMBDA {
    padded[i][j] = load(first + i * p.x.stride_h + j * p.x.stride_w, span);
  });
  winograd::in_both<Vector<float>, kCount, kCount>(
      once, &padded[0][0], kCount, 1, [](const Vector<float>* from) VF_LAMBDA { return *from; },
      write);
}

// The outputs of a tile for the channels of a span, from `channel` on.
template <int kSide, class T, class Span>
VF_HD void transform_output(const ConvParams& p, const float* sums, int64_t step, Tile tile,
                            int64_t channel, Span span) {
  constexpr int kCount = Points<kSide>::count;
  const auto scale = load(static_cast<const float*>(p.scale) + channel, span);
  const auto shift = load(static_cast<const float*>(p.shift) + channel, span);
  const bool relued = p.relu != 0;
  T* out = static_cast<T*>(p.out.data) + tile.image * p.out.stride_n + tile.h * p.out.stride_h +
           tile.w * p.out.stride_w + channel;
  const auto once = [](const Vector<float>* from, Vector<float>* to)
                        VF_LAMBDA { Points<kSide>::output(from, to); };
  const int64_t rows = least<int64_t>(kSide, p.out_height - tile.h);
  const int64_t columns = least<int64_t>(kSide, p.out_width - tile.w);
  winograd::in_both<Vector<float>, kCount, kSide>(
      once, sums, kCount * step, step,
      [](const float* from) VF_LAMBDA { return load(from, Full{}); },
      [&](int i, const Vector<float>* row) VF_LAMBDA {
        if (i >= rows) return;
        T* to = out + i * p.out.stride_h;
#pragma GCC unroll 4
        for (int j = 0; j < kSide; ++j, to += p.out.stride_w) {
          if (j >= columns) continue;
          auto y = scale_shift(row[j], scale, shift);
          if (relued) y = relu(y);
          store(to, y, span);
        }
      });
}

// See winograd::run_task.
template <int kTileSide, class T>
struct Form {
  static constexpr int kSide = kTileSide;
  using Engine = conv::Registers<conv::Fp32>;

  // Tiles magnify the error of sums: these are shorter than other convolutions'.
  static constexpr int64_t kChunksAtOnce = 4;

  const ConvParams& p;

  void inputs(const Division& d, int64_t first, int64_t count, char* to) const {
    const auto* x = static_cast<const T*>(p.x.data);
    for (int64_t chunk = 0; chunk < d.chunks; ++chunk) {
      for (int64_t i = 0; i < count; ++i) {
        const Tile tile = winograd::tile_at<kSide>(d, first + i);
        const T* from =
            x + tile.image * p.x.stride_n + tile.h * p.x.stride_h + tile.w * p.x.stride_w;
        char* tile_to = to + (chunk * d.size + i) * conv::kChunkBytes;
        for (int64_t k = 0; k < kTileChannels; k += kLanes<float>, tile_to += kVectorBytes) {
          const int64_t c = chunk * kTileChannels + k, left = p.c_in - c;
          if (left >= kLanes<float>) {
            transform_input<kSide>(p, from + c, tile, Full{}, tile_to, d.input_step);
          } else {
            const Part part{static_cast<int>(left > 0 ? left : 0)};
            transform_input<kSide>(p, from + (left > 0 ? c : 0), tile, part, tile_to, d.input_step);
          }
        }
      }
    }
  }

  void outputs(const Division& d, int64_t first, int64_t count, int64_t out_tile, int64_t out_tiles,
               const char* sums) const {
    const int64_t step = d.sum_step / static_cast<int64_t>(sizeof(float));
    for (int64_t i = 0; i < count; ++i) {
      const Tile tile = winograd::tile_at<kSide>(d, first + i);
      const auto* from = reinterpret_cast<const float*>(sums + i * out_tiles * conv::kChunkBytes);
      for (int64_t v = 0; v < out_tiles * kLanesOfTile; ++v, from += kLanes<float>) {
        const int64_t channel = out_tile * kTileChannels + v * kLanes<float>;
        const int64_t left = p.c_out - channel;
        if (left >= kLanes<float>) {
          transform_output<kSide, T>(p, from, step, tile, channel, Full{});
        } else if (left > 0) {
          const Part part{static_cast<int>(left)};
          transform_output<kSide, T>(p, from, step, tile, channel, part);
        }
      }
    }
  }
};

template <int kSide, class T>
void run(const ConvParams& p, int threads) {
  winograd::run(Form<kSide, T>{p}, p, static_cast<const char*>(p.tiles), threads);
}

template <int kSide, class T, class Weight>
void pack(const ConvPackParams& p, int threads) {
  constexpr int kCount = Points<kSide>::count;
  const conv::WeightRows<T, Weight> weight(p);
  const bool transposed = p.transposed != 0;
  const int64_t all_inputs = transposed ? p.c_out : p.c_in;
  const int64_t all_outputs = transposed ? p.c_in : p.c_out;
  const int64_t chunks = ceil_div(all_inputs, kTileChannels);
  const int64_t tiles = ceil_div(all_outputs, kTileChannels);
  const int64_t elements = tiles * chunks * kCount * kCount * kTileBytes;
  parallel(tiles * chunks, elements, threads, [&](int64_t index) {
    const int64_t tile = index / chunks, chunk = index % chunks;
    const int64_t outputs = least(kTileChannels, all_outputs - tile * kTileChannels);
    const int64_t inputs = least(kTileChannels, all_inputs - chunk * kTileChannels);
    float taps[9][kTileChannels][kTileChannels] = {};  // [tap][output][input]
    for (int tap = 0; tap < 9; ++tap) {
      for (int64_t o = 0; o < outputs; ++o) {
        const int64_t output = tile * kTileChannels + o;
        for (int64_t k = 0; k < inputs; ++k) {
          const int64_t input = chunk * kTileChannels + k;
          taps[tap][o][k] = widen(transposed ? weight.one(input, 8 - tap, output)
                                             : weight.one(output, tap, input));
        }
      }
    }
    for (int point = 0; point < kCount * kCount; ++point) {
      const double *down = Points<kSide>::weight[point / kCount],
                   *right = Points<kSide>::weight[point % kCount];
      char* to = static_cast<char*>(p.out) + (point * tiles * chunks + index) * kTileBytes;
      auto* values = reinterpret_cast<float*>(to);
      for (int64_t o = 0; o < kTileChannels; ++o) {
        double sums[kTileChannels] = {};
        for (int tap = 0; tap < 9; ++tap) {
          const double factor = down[tap / 3] * right[tap % 3];
          for (int k = 0; k < kTileChannels; ++k) sums[k] += factor * taps[tap][o][k];
        }
        for (int k = 0; k < kTileChannels; ++k) {
          values[k * kTileChannels + o] = static_cast<float>(sums[k]);
        }
      }
    }
  });
}

}  // namespace

void conv_winograd(const ConvParams& p, int64_t side, int threads) {
  with_float(p.dtype, [&](auto number) {
    using T = decltype(number);
    side == 2 ? run<2, T>(p, threads) : run<4, T>(p, threads);
  });
}

void conv_winograd_pack(const ConvPackParams& p, int64_t side, int threads) {
  with_float(p.dtype, [&](auto number) {
    with_dtype(p.weight.dtype, [&](auto weight) {
      using T = decltype(number);
      using Weight = decltype(weight);
      side == 2 ? pack<2, T, Weight>(p, threads) : pack<4, T, Weight>(p, threads);
    });
  });
}

}  // namespace VF_ISA
}  // namespace vovnet_fast

#endif
