// How Winograd's convolution (conv_winograd.h) is divided and goes on, whatever it computes in.
//
// A task has some tiles, counted through over all images, and all output channels, or, where tiles
// are few, some. It transforms its input into memory of its own, in chunks of 64 bytes of channels,
// [point][C_in / chunk][tile][chunk]; multiplies it, point by point, by the packed weight,
// [point][C_out / 16][C_in / chunk][1 KiB], into [C_out / 32][point][tile][32]; and transforms that
// into outputs. Products are those of conv_registers.h, with tiles for pixels. Where the input of a
// task stays in a core's L2 cache, products for 32 output channels are made and transformed at a
// time; where it does not, a point's input is read once, for all output channels of the task.
//
// How a number is computed does not depend on where tiles are divided.
#pragma once

#include "conv_registers.h"

namespace vovnet_fast {
inline namespace VF_ISA {
namespace winograd {

using conv::Block;
using conv::kChunkBytes;
using conv::kTileBytes;
using conv::kTileChannels;

// Input of a task that stays in the L2 cache beside what it is multiplied by, and tiles that pay
// for reading a weight, whatever becomes of their input.
constexpr int64_t kInputBytes = 896 << 10;
constexpr int64_t kEnoughTiles = 56;

// Lines between points, so that those of a tile do not all lie in the same set of a cache.
constexpr int64_t kSkew = 64;

// Values of a polynomial that a tile of `side` pixels takes, in both directions.
constexpr int points(int side) { return (side + 2) * (side + 2); }

struct Division {
  int64_t rows, columns;         // of tiles in an image
  int64_t tiles, size, tasks;    // in all images, in a task, and how many of these
  int64_t chunks, out_tiles;     // of input channels, and 16s of output channels
  int64_t parts;                 // of output channels, in tasks of their own
  int64_t at_once;               // 16s of output channels
  int64_t input_step, sum_step;  // bytes from a point to the next one
};

template <int kSide, class Engine, class Params>
VF_HD Division divide(const Params& p, int threads) {
  constexpr int64_t kChunk = kChunkBytes / static_cast<int64_t>(sizeof(typename Engine::Packed));
  Division d{};
  d.rows = ceil_div(p.out_height, kSide);
  d.columns = ceil_div(p.out_width, kSide);
  d.tiles = p.n * d.rows * d.columns;
  d.chunks = ceil_div(p.c_in, kChunk);
  d.out_tiles = ceil_div(p.c_out, kTileChannels);
  const int64_t bytes = points(kSide) * d.chunks * kChunkBytes;
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

// Whether all pixels that a tile is computed from lie in the image.
template <int kSide, class Params>
VF_HD bool inside(const Params& p, Tile tile) {
  return tile.h > 0 && tile.w > 0 && tile.h + kSide < p.height && tile.w + kSide < p.width;
}

// body(i, j, h, w) for those that do: row and column among them, and in the image.
template <int kSide, class Params, class Body>
VF_HD void for_inside(const Params& p, Tile tile, Body body) {
  for (int64_t h = tile.h - 1; h < least<int64_t>(tile.h + kSide + 1, p.height); ++h) {
    for (int64_t w = tile.w - 1; w < least<int64_t>(tile.w + kSide + 1, p.width); ++w) {
      if (h >= 0 && w >= 0) body(h - tile.h + 1, w - tile.w + 1, h, w);
    }
  }
}

// A transform in both directions, of vectors that `read` finds at numbers that lie `down` and
// `right` apart. `write(i, row)` takes a row of what becomes of them.
template <class Numbers, int kFrom, int kTo, class Once, class T, class Read, class Write>
VF_HD void in_both(Once once, const T* x, int64_t down, int64_t right, Read read, Write write) {
  Numbers half[kTo][kFrom];
#pragma GCC unroll 1
  for (int j = 0; j < kFrom; ++j, x += right) {
    Numbers from[kFrom], to[kTo];
#pragma GCC unroll 6
    for (int i = 0; i < kFrom; ++i) from[i] = read(x + i * down);
    once(from, to);
#pragma GCC unroll 6
    for (int i = 0; i < kTo; ++i) half[i][j] = to[i];
  }
#pragma GCC unroll 1
  for (int i = 0; i < kTo; ++i) {
    Numbers to[kTo];
    once(half[i], to);
    write(i, to);
  }
}

// Products at one point, of all tiles of a task by up to 32 output channels; of so many chunks of
// input channels the sums are made before they are added to others.
template <class Engine>
VF_HD void multiply(const Division& d, const char* input, const char* weight, int64_t count,
                    int tiles, int64_t chunks_at_once, char* sums) {
  using Sum = typename Engine::Sum;
  const int64_t offsets[] = {0}, size = Engine::block_pixels(count);
  Block block{};
  block.pixel_step = kChunkBytes;
  block.chunk_step = d.size * kChunkBytes;
  block.offsets = offsets;
  block.weights = weight;
  block.tile_step = d.chunks * kTileBytes;
  block.taps = 1;
  block.tiles = tiles;
  block.last_units = conv::kUnits;
  for (int64_t i = 0; i < count; i += size) {
    block.pixels = static_cast<int>(least(size, count - i));
    auto* to = reinterpret_cast<Sum*>(sums + i * tiles * kChunkBytes);
    for (int64_t chunk = 0; chunk < d.chunks; chunk += chunks_at_once) {
      block.input = input + i * kChunkBytes + chunk * block.chunk_step;
      block.weight = weight + chunk * kTileBytes;
      block.chunks = least(chunks_at_once, d.chunks - chunk);
      Engine::multiply(block, to, chunk > 0);
    }
  }
}

// A task as a Form has it, which is an Engine's, has tiles of kSide, and transforms:
//
//   inputs   (d, first, count, to): `count` tiles from `first` on
//   outputs  (d, first, count, tile, tiles, sums): theirs, of some 16s of output channels
template <class Form>
VF_HD void run_task(const Form& form, const Division& d, const char* weights, int64_t first,
                    int64_t count, int64_t first_tile, int64_t last_tile, char* inputs,
                    char* sums) {
  constexpr int64_t kPoints = points(Form::kSide);
  constexpr int64_t kStep = conv::kMostTiles;
  const int64_t group_bytes = kPoints * d.sum_step;
  form.inputs(d, first, count, inputs);
  for (int64_t begin = first_tile; begin < last_tile; begin += d.at_once) {
    const int64_t end = least(begin + d.at_once, last_tile);
    for (int64_t point = 0; point < kPoints; ++point) {
      for (int64_t tile = begin; tile < end; tile += kStep) {
        multiply<typename Form::Engine>(
            d, inputs + point * d.input_step,
            weights + (point * d.out_tiles + tile) * d.chunks * kTileBytes, count,
            static_cast<int>(least(kStep, end - tile)), Form::kChunksAtOnce,
            sums + (tile - begin) / kStep * group_bytes + point * d.sum_step);
      }
    }
    for (int64_t tile = begin; tile < end; tile += kStep) {
      form.outputs(d, first, count, tile, least(kStep, end - tile),
                   sums + (tile - begin) / kStep * group_bytes);
    }
  }
}

template <class Form, class Params>
VF_HD void run(const Form& form, const Params& p, const char* weights, int threads) {
  constexpr int64_t kPoints = points(Form::kSide);
  constexpr int64_t kStep = conv::kMostTiles;
  const Division d = divide<Form::kSide, typename Form::Engine>(p, threads);
  const int64_t input_bytes = kPoints * d.input_step;
  const int64_t groups = ceil_div(least(d.at_once, d.out_tiles), kStep);
  Tasks tasks(d.tasks * d.parts, threads);
  Failure failed;
  on_threads(threads, [&](int mine, int) {
    static thread_local conv::Workspace workspace;
    char* inputs = workspace.get(input_bytes + groups * kPoints * d.sum_step);
    if (inputs == nullptr) return failed.set();
    for (int64_t i = 0; tasks.next(&mine, &i);) {
      const int64_t first = i / d.parts * d.size, part = i % d.parts;
      // Parts begin where 32 channels do.
      const int64_t all = ceil_div(d.out_tiles, kStep);
      run_task(form, d, weights, first, least(d.size, d.tiles - first),
               all * part / d.parts * kStep, least(all * (part + 1) / d.parts * kStep, d.out_tiles),
               inputs, inputs + input_bytes);
    }
  });
  if (failed) throw std::bad_alloc();
}

}  // namespace winograd
}  // namespace VF_ISA
}  // namespace vovnet_fast
