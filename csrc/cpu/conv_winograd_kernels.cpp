// Winograd's convolution (conv_winograd.h).
//
// A task has some tiles, counted through over all images, and all output channels, or, where tiles
// are few, some. It transforms its input into memory of its own, in chunks of 16 channels,
// [point][C_in / 16][tile][16]; multiplies it, point by point, by the packed weight,
// [point][C_out / 16][C_in / 16][16][16], into [C_out / 32][point][tile][32]; and transforms that
// into outputs. Products are those of conv_registers.h, with tiles for pixels. Where the input of a
// task stays in a core's L2 cache, products for 32 output channels are made and transformed at a
// time; where it does not, a point's input is read once, for all output channels of the task.
//
// Activations of 16 bits are widened as they are transformed, and outputs rounded once: in between
// all is fp32.
//
// How a number is computed does not depend on where tiles are divided.
#if defined(__AVX2__) || defined(__aarch64__)

#include "conv_registers.h"

namespace vovnet_fast {
inline namespace VF_ISA {

namespace {

using conv::Block;
using conv::kChunkBytes;
using conv::kTileBytes;
using conv::kTileChannels;

constexpr int64_t kLanesOfTile = kTileChannels / kLanes<float>;

// Input of a task that stays in the L2 cache beside what it is multiplied by, and tiles that pay
// for reading a weight, whatever becomes of their input.
constexpr int64_t kInputBytes = 896 << 10;
constexpr int64_t kEnoughTiles = 56;

// Chunks of channels whose products are summed before the sum is added to others. Tiles magnify
// the error of these sums: they are shorter than other convolutions'.
constexpr int64_t kChunksAtOnce = 4;

// Lines between points, so that those of a tile do not all lie in the same set of a cache.
constexpr int64_t kSkew = 64;

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

using Engine = conv::Registers<conv::Fp32>;

struct Division {
  int64_t rows, columns;         // of tiles in an image
  int64_t tiles, size, tasks;    // in all images, in a task, and how many of these
  int64_t chunks, out_tiles;     // of 16 channels
  int64_t parts;                 // of output channels, in tasks of their own
  int64_t at_once;               // 16s of output channels
  int64_t input_step, sum_step;  // bytes from a point to the next one
};

template <int kSide>
Division divide(const ConvParams& p, int threads) {
  constexpr int64_t kPoints = Points<kSide>::count * Points<kSide>::count;
  Division d{};
  d.rows = ceil_div(p.out_height, kSide);
  d.columns = ceil_div(p.out_width, kSide);
  d.tiles = p.n * d.rows * d.columns;
  d.chunks = ceil_div(p.c_in, kTileChannels);
  d.out_tiles = ceil_div(p.c_out, kTileChannels);
  const int64_t bytes = kPoints * d.chunks * kChunkBytes;
  const int64_t most = kInputBytes / bytes > kEnoughTiles ? kInputBytes / bytes : kEnoughTiles;
  const int64_t fewest = ceil_div(d.tiles, most);
  if (fewest < threads && d.tiles < threads * kEnoughTiles / 2) {
    d.tasks = fewest;
    d.parts = least(ceil_div(d.out_tiles, int64_t{conv::kMostTiles}), ceil_div(threads, fewest));
  } else {
    d.tasks = ceil_div(fewest, threads) * threads;
    d.parts = 1;
  }
  d.size = ceil_div(d.tiles, d.tasks);
  d.tasks = ceil_div(d.tiles, d.size);
  const bool fits = d.size * bytes <= kInputBytes;
  d.at_once = fits ? conv::kMostTiles : ceil_div(d.out_tiles, d.parts) + conv::kMostTiles;
  d.input_step = d.chunks * d.size * kChunkBytes + kSkew;
  d.sum_step = d.size * conv::kMostTiles * kChunkBytes + kSkew;
  return d;
}

struct Tile {
  int64_t image, h, w;  // of its first output
};

template <int kSide>
VF_HD Tile tile_at(const Division& d, int64_t index) {
  const int64_t row = index / d.columns;
  return {row / d.rows, row % d.rows * kSide, index % d.columns * kSide};
}

// The transform in both directions, from vectors that lie `down` and `right` numbers apart.
// `write(i, row)` takes a row of what becomes of them.
template <int kFrom, int kTo, class Once, class T, class Span, class Write>
VF_HD void in_both(Once once, const T* x, int64_t down, int64_t right, Span span, Write write) {
  Vector<float> half[kTo][kFrom];
#pragma GCC unroll 1
  for (int j = 0; j < kFrom; ++j, x += right) {
    Vector<float> from[kFrom], to[kTo];
#pragma GCC unroll 6
    for (int i = 0; i < kFrom; ++i) from[i] = load(x + i * down, span);
    once(from, to);
#pragma GCC unroll 6
    for (int i = 0; i < kTo; ++i) half[i][j] = to[i];
  }
#pragma GCC unroll 1
  for (int i = 0; i < kTo; ++i) {
    Vector<float> to[kTo];
    once(half[i], to);
    write(i, to);
  }
}

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
  if (tile.h > 0 && tile.w > 0 && tile.h + kSide < p.height && tile.w + kSide < p.width) {
    return in_both<kCount, kCount>(once, first, p.x.stride_h, p.x.stride_w, span, write);
  }
  Vector<float> padded[kCount][kCount] = {};
  for (int64_t h = tile.h - 1; h < least<int64_t>(tile.h + kSide + 1, p.height); ++h) {
    for (int64_t w = tile.w - 1; w < least<int64_t>(tile.w + kSide + 1, p.width); ++w) {
      const int64_t i = h - tile.h + 1, j = w - tile.w + 1;
      if (h >= 0 && w >= 0) padded[i][j] = load(first + i * p.x.stride_h + j * p.x.stride_w, span);
    }
  }
  in_both<kCount, kCount>(once, reinterpret_cast<const float*>(padded), kCount * kLanes<float>,
                          kLanes<float>, Full{}, write);
}

template <int kSide, class T>
void transform_inputs(const ConvParams& p, const Division& d, int64_t first, int64_t count,
                      char* to) {
  const auto* x = static_cast<const T*>(p.x.data);
  for (int64_t chunk = 0; chunk < d.chunks; ++chunk) {
    for (int64_t i = 0; i < count; ++i) {
      const Tile tile = tile_at<kSide>(d, first + i);
      const T* from = x + tile.image * p.x.stride_n + tile.h * p.x.stride_h + tile.w * p.x.stride_w;
      char* tile_to = to + (chunk * d.size + i) * kChunkBytes;
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
  in_both<kCount, kSide>(once, sums, kCount * step, step, Full{},
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

// Those of all tiles of a task for up to 32 output channels.
template <int kSide, class T>
void transform_outputs(const ConvParams& p, const Division& d, int64_t first, int64_t count,
                       int64_t out_tile, int64_t out_tiles, const char* sums) {
  const int64_t step = d.sum_step / static_cast<int64_t>(sizeof(float));
  for (int64_t i = 0; i < count; ++i) {
    const Tile tile = tile_at<kSide>(d, first + i);
    const auto* from = reinterpret_cast<const float*>(sums + i * out_tiles * kChunkBytes);
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

// Products at one point, of all tiles of a task by up to 32 output channels.
void multiply(const Division& d, const char* input, const char* weight, int64_t count, int tiles,
              char* sums) {
  const int64_t offsets[] = {0}, size = Engine::block_pixels(count);
  Block block{
      nullptr, kChunkBytes, d.size * kChunkBytes, offsets, nullptr, d.chunks * kTileBytes, 0, 1,
      0,       tiles,       conv::kUnits};
  for (int64_t i = 0; i < count; i += size) {
    block.pixels = static_cast<int>(least(size, count - i));
    auto* to = reinterpret_cast<float*>(sums + i * tiles * kChunkBytes);
    for (int64_t chunk = 0; chunk < d.chunks; chunk += kChunksAtOnce) {
      block.input = input + i * kChunkBytes + chunk * block.chunk_step;
      block.weight = weight + chunk * kTileBytes;
      block.chunks = least(kChunksAtOnce, d.chunks - chunk);
      Engine::multiply(block, to, chunk > 0);
    }
  }
}

template <int kSide, class T>
void run_task(const ConvParams& p, const Division& d, int64_t first, int64_t count,
              int64_t first_tile, int64_t last_tile, char* inputs, char* sums) {
  constexpr int64_t kPoints = Points<kSide>::count * Points<kSide>::count;
  constexpr int64_t kStep = conv::kMostTiles;
  const auto* weights = static_cast<const char*>(p.tiles);
  const int64_t group_bytes = kPoints * d.sum_step;
  transform_inputs<kSide, T>(p, d, first, count, inputs);
  for (int64_t begin = first_tile; begin < last_tile; begin += d.at_once) {
    const int64_t end = least(begin + d.at_once, last_tile);
    for (int64_t point = 0; point < kPoints; ++point) {
      for (int64_t tile = begin; tile < end; tile += kStep) {
        multiply(d, inputs + point * d.input_step,
                 weights + (point * d.out_tiles + tile) * d.chunks * kTileBytes, count,
                 static_cast<int>(least(kStep, end - tile)),
                 sums + (tile - begin) / kStep * group_bytes + point * d.sum_step);
      }
    }
    for (int64_t tile = begin; tile < end; tile += kStep) {
      transform_outputs<kSide, T>(p, d, first, count, tile, least(kStep, end - tile),
                                  sums + (tile - begin) / kStep * group_bytes);
    }
  }
}

template <int kSide, class T>
void run(const ConvParams& p, int threads) {
  constexpr int64_t kPoints = Points<kSide>::count * Points<kSide>::count;
  constexpr int64_t kStep = conv::kMostTiles;
  const Division d = divide<kSide>(p, threads);
  const int64_t input_bytes = kPoints * d.input_step;
  const int64_t groups = ceil_div(least(d.at_once, d.out_tiles), kStep);
  Tasks tasks(d.tasks * d.parts);
  Failure failed;
  on_threads(threads, [&](int, int) {
    static thread_local conv::Workspace workspace;
    char* inputs = workspace.get(input_bytes + groups * kPoints * d.sum_step);
    if (inputs == nullptr) return failed.set();
    for (int64_t i = 0; tasks.next(&i);) {
      const int64_t first = i / d.parts * d.size, part = i % d.parts;
      // Parts begin where 32 channels do.
      const int64_t all = ceil_div(d.out_tiles, kStep);
      run_task<kSide, T>(p, d, first, least(d.size, d.tiles - first), all * part / d.parts * kStep,
                         least(all * (part + 1) / d.parts * kStep, d.out_tiles), inputs,
                         inputs + input_bytes);
    }
  });
  if (failed) throw std::bad_alloc();
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
