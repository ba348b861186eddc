// Weight gradients of convolutions in fp32, and by fp32 in half precision.
#ifdef __AVX2__

#include <utility>

#include "conv_weight_grad_run.h"
#include "fma.h"

namespace vovnet_fast {
inline namespace VF_ISA {

namespace {

using conv::GradTask;
using conv::kChunkBytes;
using conv::Strip;

// The largest outer product whose sums fit into the registers, beside a pixel's channels.
#ifdef __AVX512F__
constexpr int kMostRows = 12, kMostChunks = 2;
#else
constexpr int kMostRows = 6, kMostChunks = 1;
#endif
constexpr int kPerChunk = 16 / kLanes<float>;

// Pixels of both operands, from the first one of some images on, and where their sums go.
struct Block {
  const char* x;  // distances in bytes
  int64_t pixel_step, chunk_step, row_step, image_step;
  const float* g;  // pixel after pixel
  int64_t g_step;
  int64_t images, rows, columns;
  float* out;  // [output channel][x's channel]
  int64_t out_step, channels;
  bool add;
};

// All sums are in registers, which takes the loops over them unrolled.
template <int kRows, int kChunks>
void multiply_block(const Block& block) {
  constexpr int kVectors = kChunks * kPerChunk;
  Vector<float> sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    __builtin_prefetch(block.out + i * block.out_step);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[i][v] = Vector<float>{};
  }
  const float* g = block.g;
  const char* image = block.x;
  for (int64_t n = 0; n < block.images; ++n, image += block.image_step) {
    const char* row = image;
    for (int64_t h = 0; h < block.rows; ++h, row += block.row_step) {
      const char* x = row;
      for (int64_t w = 0; w < block.columns; ++w, x += block.pixel_step, g += block.g_step) {
        Vector<float> pixel[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          const char* chunk = x + v / kPerChunk * block.chunk_step;
          pixel[v] =
              load(reinterpret_cast<const float*>(chunk) + v % kPerChunk * kLanes<float>, Full{});
        }
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i) {
          const auto gradient = same(g[i]);
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) {
            sum[i][v] = multiply_add(gradient, pixel[v], sum[i][v]);
          }
        }
      }
    }
  }
  const auto put = [&](float* to, Vector<float> y, auto span)
                       VF_LAMBDA { store(to, block.add ? y + load(to, span) : y, span); };
  const bool full = block.channels >= kChunks * 16;
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      float* to = block.out + i * block.out_step + v * kLanes<float>;
      const int64_t left = block.channels - v * kLanes<float>;
      if (full || left >= kLanes<float>) {
        put(to, sum[i][v], Full{});
      } else if (left > 0) {
        put(to, sum[i][v], Part{static_cast<int>(left)});
      }
    }
  }
}

// A tile's channels of pixels that lie `stride` elements apart.
template <class T, int kRows>
void gather_tile(const T* from, int64_t stride, int64_t pixels, float* to) {
  for (int64_t i = 0; i < pixels; ++i, from += stride, to += kRows) {
    if constexpr (sizeof(T) == sizeof(float)) {
      memcpy(to, from, kRows * sizeof(float));
    } else {
      T all[kLanes<T>] = {};
      memcpy(all, from, kRows * sizeof(T));
      const Vector<float> wide = load(all, Full{});
      memcpy(to, &wide, kRows * sizeof(float));
    }
  }
}

template <int kChunks, int... kCounts>
VF_HD void multiply_rows(int64_t rows, const Block& block, std::integer_sequence<int, kCounts...>) {
  using Multiply = void (*)(const Block&);
  static constexpr Multiply kBySize[] = {multiply_block<kCounts + 1, kChunks>...};
  kBySize[rows - 1](block);
}

template <class T, int... kCounts>
VF_HD void gather_rows(int64_t rows, const T* from, int64_t stride, int64_t pixels, float* to,
                       std::integer_sequence<int, kCounts...>) {
  using Gather = void (*)(const T*, int64_t, int64_t, float*);
  static constexpr Gather kBySize[] = {gather_tile<T, kCounts + 1>...};
  kBySize[rows - 1](from, stride, pixels, to);
}

constexpr std::make_integer_sequence<int, kMostRows> kCounts;

// As many rows, with one chunk or two.
VF_HD void multiply_tile(int64_t rows, const Block& block) {
  if (kMostChunks == 1 || block.channels <= 16) {
    multiply_rows<1>(rows, block, kCounts);
  } else {
    multiply_rows<kMostChunks>(rows, block, kCounts);
  }
}

// Output channels in tiles of nearly one size, rather than a small one at the end.
struct Tiles {
  int64_t c_out, count;

  explicit VF_HD Tiles(int64_t c_out) : c_out(c_out), count(ceil_div(c_out, kMostRows)) {}
  VF_HD int64_t first(int64_t tile) const { return tile * c_out / count; }
  VF_HD int64_t size(int64_t tile) const { return first(tile + 1) - first(tile); }
};

// Chunks that are gathered before they are multiplied: they stay in an L2 cache, beside g.
VF_HD int64_t chunks_at_once(const conv::Plan& plan) {
  constexpr int64_t kAtOnce = 8;
  return plan.unfolded ? plan.chunks : least(plan.chunks, kAtOnce);
}

template <class T>
void gather_input(const ConvParams& input, const conv::PixelPlan& plan, const Strip& strip,
                  char* to) {
  for (int64_t i = 0; i < strip.images; ++i) {
    conv::gather<T, float>(input, plan.input, strip.image + i, strip.row, strip.rows,
                           to + i * plan.image_pixels * kChunkBytes);
  }
}

template <class T>
void gather_gradient(const ConvWeightGradParams& p, const GradTask& task, const Strip& strip,
                     float* to) {
  constexpr int64_t kGroup = 8;  // So many streams to read.
  const Tiles tiles(p.c_out);
  const int64_t pixels = strip.images * strip.rows * p.out_width;
  const int64_t from = tiles.first(task.first_tile);
  for (int64_t row = 0; row < strip.images * strip.rows; ++row) {
    const Pixel first{strip.row + row % strip.rows, 0};
    const T* g = at<const T>(p.g, strip.image + row / strip.rows, first);
    for (int64_t w = 0; w < p.out_width; w += kGroup) {
      const int64_t count = least(kGroup, p.out_width - w), before = row * p.out_width + w;
      for (int64_t tile = task.first_tile; tile < task.last_tile; ++tile) {
        const int64_t channel = tiles.first(tile), size = tiles.size(tile);
        gather_rows<T>(size, g + w * p.g.stride_w + channel, p.g.stride_w, count,
                       to + (channel - from) * pixels + before * size, kCounts);
      }
    }
  }
}

// Gathered pixels of a strip.
struct Gathered {
  const char* x;
  const float* g;
  int64_t pixels;  // of g
};

// The tiles of a task with a chunk of some columns, at the taps that lie in one plane.
void multiply_plane(const conv::Plan& input, const GradTask& task, int64_t plane,
                    const Tiles& tiles, const Gathered& from, int64_t column, Block block) {
  const int64_t first_row = plane / input.planes, first_column = plane % input.planes;
  const char* x = block.x + (plane * input.plane_pixels + column) * kChunkBytes;
  float* out = block.out;
  for (int64_t tile = task.first_tile; tile < task.last_tile; ++tile) {
    const int64_t channel = tiles.first(tile), size = tiles.size(tile);
    block.g_step = size;
    block.g = from.g + (channel - tiles.first(task.first_tile)) * from.pixels + column * size;
    for (int64_t h = first_row; h < input.kernel; h += input.stride) {
      for (int64_t w = first_column; w < input.kernel; w += input.stride) {
        block.x = x + (h / input.stride * input.width + w / input.stride) * kChunkBytes;
        block.out = out + channel * block.out_step + (h * input.kernel + w) * input.channels;
        multiply_tile(size, block);
      }
    }
  }
}

// All that a task has of a strip; `first`: there is nothing to add to.
void multiply_strip(const conv::PixelPlan& plan, const GradTask& task, const Tiles& tiles,
                    const Strip& strip, int64_t width, const Gathered& from, float* out,
                    bool first) {
  const conv::Plan& input = plan.input;
  // Only a strip of one row can have more columns than a block takes.
  const int64_t blocks = plan.rows > 1 ? 1 : ceil_div(width, conv::kStripPixels);
  const int64_t columns = ceil_div(width, blocks);
  Block block{};
  block.pixel_step = kChunkBytes;
  block.chunk_step = input.pixels * kChunkBytes;
  block.row_step = input.width * kChunkBytes;
  block.image_step = plan.image_pixels * kChunkBytes;
  block.images = strip.images;
  block.rows = strip.rows;
  block.out_step = conv::taps(input) * input.channels;
  for (int64_t chunk = task.first_chunk; chunk < task.last_chunk; chunk += kMostChunks) {
    const int64_t last = least<int64_t>(chunk + kMostChunks, task.last_chunk);
    block.x = from.x + (chunk - task.first_chunk) * block.chunk_step;
    block.out = out + chunk * 16;
    block.channels = least(last * 16, input.channels) - chunk * 16;
    for (int64_t plane = 0; plane < input.planes * input.planes; ++plane) {
      for (int64_t column = 0; column < width; column += columns) {
        block.columns = least(columns, width - column);
        block.add = !first || column > 0;
        multiply_plane(input, task, plane, tiles, from, column, block);
      }
    }
  }
}

template <class T>
void run_task(const ConvWeightGradParams& p, const conv::PixelPlan& whole, const GradTask& task,
              char* memory, float* out) {
  const Tiles tiles(p.c_out);
  const int64_t group = chunks_at_once(whole.input);
  auto* gradient = reinterpret_cast<float*>(memory + group * whole.input.pixels * kChunkBytes);
  for (int64_t i = task.first_strip; i < task.last_strip; ++i) {
    const Strip strip = conv::strip_of(p, whole, i);
    gather_gradient<T>(p, task, strip, gradient);
    const Gathered from{memory, gradient, strip.images * strip.rows * p.out_width};
    GradTask some = task;
    for (; some.first_chunk < task.last_chunk; some.first_chunk = some.last_chunk) {
      some.last_chunk = least(some.first_chunk + group, task.last_chunk);
      conv::PixelPlan plan = whole;
      plan.input.chunks = some.last_chunk - some.first_chunk;
      const auto input = conv::input_of<T>(p, plan.input, 16, some.first_chunk, plan.input.chunks);
      gather_input<T>(input, plan, strip, memory);
      multiply_strip(plan, some, tiles, strip, p.out_width, from, out, i == task.first_strip);
    }
  }
}

// What they take for a pixel; see conv_weight_grad_plan.h.
constexpr conv::Cycles kCycles{8, 8, 6};

// Whether pixels lie one constant step apart.
VF_HD bool in_a_row(const View& view, int64_t n, int64_t height, int64_t width) {
  return (height == 1 || view.stride_h == width * view.stride_w) &&
         (n == 1 || view.stride_n == height * width * view.stride_w);
}

// Pixels of a strip that are read where they lie. Of 64 channels, x and g of 64 fill an L1 cache of
// 32 KiB; with AVX-512 128 were as fast or faster on a Xeon, whose L1 has 48 (no other was timed).
constexpr int64_t kDirectPixels = kMostChunks == 1 ? 64 : 128;

// Whether pixels are multiplied where they lie. Gathering takes nearly half as long as multiplying
// where a layer has 64 channels, and a twelfth where it has 350: from there on it is faster than
// reading a pixel's few numbers of a tile from so many lines, which an L1 cache has no room for.
VF_HD bool read_directly(const ConvWeightGradParams& p) {
  const int64_t chunks = p.c_in / 16, tiles = Tiles(p.c_out).count;
  const bool narrow =
      8 * (kCycles.chunk * chunks + kCycles.tile * tiles) > kCycles.product * chunks * tiles;
  return p.kernel == 1 && p.stride == 1 && narrow &&
         p.c_in % 16 == 0 &&  // Chunks end where pixels do.
         in_a_row(p.x, p.n, p.height, p.width) && in_a_row(p.g, p.n, p.height, p.width);
}

void run_directly(const ConvWeightGradParams& p, int threads) {
  const Tiles tiles(p.c_out);
  // A strip is some of all pixels, whatever rows and images they are in.
  conv::PixelPlan plan{};
  plan.input.chunks = p.c_in / 16;
  plan.strips = ceil_div(p.n * p.height * p.width, kDirectPixels);
  plan.row_strips = plan.images = plan.rows = 1;
  plan.input.kernel = 1;
  constexpr conv::Cycles kDirectly{1, 1, kCycles.product};
  const auto ranges =
      conv::divide_outputs(plan.input, tiles.count, ceil_div(threads, p.parts), kDirectly);
  const auto run = [&](const GradTask& task, char*, float* out) VF_LAMBDA {
    Block block{};
    block.pixel_step = p.x.stride_w * static_cast<int64_t>(sizeof(float));
    block.chunk_step = kChunkBytes;
    block.g_step = p.g.stride_w;
    block.images = block.rows = 1;
    block.out_step = p.c_in;
    for (int64_t i = task.first_strip; i < task.last_strip; ++i) {
      const int64_t pixel = i * kDirectPixels;
      block.columns = least(kDirectPixels, p.n * p.height * p.width - pixel);
      block.add = i > task.first_strip;
      const auto* g = static_cast<const float*>(p.g.data) + pixel * block.g_step;
      const auto* x = static_cast<const char*>(p.x.data) + pixel * block.pixel_step;
      for (int64_t chunk = task.first_chunk; chunk < task.last_chunk; chunk += kMostChunks) {
        const int64_t last = least<int64_t>(chunk + kMostChunks, task.last_chunk);
        block.x = x + chunk * kChunkBytes;
        block.channels = (last - chunk) * 16;
        for (int64_t tile = task.first_tile; tile < task.last_tile; ++tile) {
          block.g = g + tiles.first(tile);
          block.out = out + tiles.first(tile) * block.out_step + chunk * 16;
          multiply_tile(tiles.size(tile), block);
        }
      }
    }
  };
  conv::share_weight_grad(p, plan, tiles.count, ranges, 1, threads, run);
}

template <class T>
void run_weight_grad(const ConvWeightGradParams& p, int threads) {
  if (sizeof(T) == sizeof(float) && read_directly(p)) return run_directly(p, threads);
  const auto plan =
      conv::divide_pixels({p.out_height, p.out_width, p.c_in, p.c_out, p.kernel, p.stride}, p.n,
                          conv::kFloatChunk, conv::kStripPixels);
  const Tiles tiles(p.c_out);
  const auto ranges =
      conv::divide_outputs(plan.input, tiles.count, ceil_div(threads, p.parts), kCycles);
  const int64_t channels = (ceil_div(tiles.count, ranges.tiles) + 1) * kMostRows;
  const int64_t bytes = chunks_at_once(plan.input) * plan.input.pixels * kChunkBytes +
                        channels * plan.images * plan.rows * p.out_width * 4;
  conv::share_weight_grad(p, plan, tiles.count, ranges, bytes, threads,
                          [&](const GradTask& task, char* memory, float* out) {
                            run_task<T>(p, plan, task, memory, out);
                          });
}

}  // namespace

void conv_weight_grad_fma(const ConvWeightGradParams& p, int threads) {
  with_float(p.dtype, [&](auto number) { run_weight_grad<decltype(number)>(p, threads); });
}

void conv_weight_grad_finish_fma(const ConvWeightGradFinishParams& p, int threads) {
  conv::finish_weight_grad(p, threads);
}

}  // namespace VF_ISA
}  // namespace vovnet_fast

#endif
