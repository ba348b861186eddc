// Convolution straight from a slot into a slot: all but the multiplication of a block, which is the
// engine's. conv_plan.h says how the work is divided: by shape alone, so that results do not depend
// on the number of threads.
//
// An Engine has
//   Packed                    what gathered inputs and packed weights are in
//   Sum                       what products are summed in
//   kPixels, kTiles           the largest block: pixels, and tiles of 16 output channels
//   kByRows                   see multiply
//   kDirect                   it can read the pixels of a 1x1 where they lie
//   Session                   what a thread holds while it works
//   block_pixels(pixels)      the size of blocks, at most kPixels, for a strip
//   kSteps                    chunks times taps whose weights stay in its L1 cache; sums of so many
//                             are complete before they are added to others, which keeps them exact
//   multiply(Block, sums, add)  sums, [pixel][channel], added to those that are there or not
//   store(T*, Vector, span)   rounds a vector into the output
//   kAlone                    or nothing; if true, alone<T>(params, plan, task, gathered, sums,
//                             pool) does a task by itself, or returns false
#pragma once

#include <cstdlib>
#include <new>
#include <type_traits>

#include "conv_gather.h"
#include "conv_pack.h"
#include "conv_store.h"

namespace vovnet_fast {
inline namespace VF_ISA {
namespace conv {

constexpr int64_t kWideRow = 7;  // Pixels: below, short blocks cost more than is saved.

// Input and weight of a block. Distances are in bytes.
struct Block {
  const char* input;
  int64_t pixel_step, chunk_step;
  const int64_t* offsets;  // of the taps, from the first one
  const char* weight;
  const char* weights;  // the first tile of all
  int64_t tile_step;
  int64_t chunks;
  int taps, pixels, tiles;
  int last_units;  // of four bytes, that channels of the last chunk fill; the rest are zeros
};

template <class Engine, class = void>
constexpr bool kAlone = false;
template <class Engine>
constexpr bool kAlone<Engine, std::enable_if_t<Engine::kAlone>> = true;

// Memory of a thread, kept for its next convolution.
class Workspace {
 public:
  Workspace() = default;
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() { free(data_); }

  // Null where there is none: a thread must not throw.
  char* get(int64_t bytes) {
    if (bytes > size_) {
      constexpr int64_t kPage = 4096;
      const int64_t size = ceil_div(bytes, kPage) * kPage;
      void* data = aligned_alloc(kPage, size);
      if (data == nullptr) return nullptr;
      memset(data, 0, size);  // Blocks read behind their pixels: numbers that nobody uses.
      free(data_);
      data_ = static_cast<char*>(data);
      size_ = size;
    }
    return data_;
  }

 private:
  char* data_ = nullptr;
  int64_t size_ = 0;
};

// The chunks of a pixel that a block multiplies before its sums are put aside.
template <class Engine>
VF_HD int64_t chunks_at_once(const Plan& plan) {
  const int64_t chunks = Engine::kSteps / taps(plan);
  return chunks < 1 ? 1 : least(chunks, plan.chunks);
}

// What the channels of a pixel fill of its last chunk.
template <class Engine>
VF_HD int last_units(const Plan& plan) {
  constexpr int64_t kPerUnit = 4 / static_cast<int64_t>(sizeof(typename Engine::Packed));
  const int64_t units = ceil_div(plan.channels, kPerUnit);
  return static_cast<int>(units - (plan.chunks - 1) * kUnits);
}

// Pixels whose sums are kept: all of a strip, unless a block's are complete at once.
template <class Engine>
VF_HD int64_t kept_pixels(const Plan& plan) {
  const bool complete = chunks_at_once<Engine>(plan) == plan.chunks;
  return complete ? Engine::kPixels : plan.rows * plan.width + Engine::kPixels;
}

// Sums of a block of fewer tiles, or of all.
template <class Engine, class T, class Params, class Rows, int kTiles = Engine::kTiles>
VF_HD void store_tiles(int tiles, const Params& p, const Plan& plan,
                       const typename Engine::Sum* sums, Range range, const Rows& rows,
                       int64_t channel, typename Engine::Sum* pool) {
  if constexpr (kTiles > 1) {
    if (tiles < kTiles) {
      return store_tiles<Engine, T, Params, Rows, kTiles - 1>(tiles, p, plan, sums, range, rows,
                                                              channel, pool);
    }
  }
  store_block<Engine, T, kTiles>(p, plan, sums, range, rows, channel, pool);
}

// The sums of a task from gathered input, or from the input itself, behind which nothing is read.
template <class Engine, class T, class Params>
void multiply(const Params& p, const Plan& plan, const Task& task, Block block, bool gathered,
              typename Engine::Sum* kept, typename Engine::Sum* pool) {
  const auto rows = rows_of<T>(p, task);
  // Runs of pixels that are counted through: all of the strip, or, for an engine to which pixels
  // that are not stored cost as much as others, each row by itself.
  const bool by_rows = Engine::kByRows && plan.extra > 0 && p.out_width >= kWideRow;
  const int64_t runs = by_rows ? task.rows : 1;
  const int64_t length = by_rows ? p.out_width : (task.rows - 1) * plan.width + p.out_width;
  const int64_t size = Engine::block_pixels(length), group = chunks_at_once<Engine>(plan);
  const char *input = block.input, *weight = block.weight;
  for (int64_t tile = task.first_tile; tile < task.last_tile; tile += Engine::kTiles) {
    block.tiles = static_cast<int>(least<int64_t>(Engine::kTiles, task.last_tile - tile));
    const int64_t channels = block.tiles * kTileChannels;
    for (int64_t chunk = 0; chunk < plan.chunks; chunk += group) {
      block.chunks = least(group, plan.chunks - chunk);
      block.last_units = chunk + block.chunks == plan.chunks ? last_units<Engine>(plan) : kUnits;
      block.weight = weight + tile * block.tile_step + chunk * taps(plan) * kTileBytes;
      for (int64_t i = 0; i < runs * ceil_div(length, size); ++i) {
        const int64_t blocks = ceil_div(length, size), run = i / blocks, first = i % blocks * size;
        const int pixels = static_cast<int>(least(size, length - first));
        // The last block then begins earlier, and has some pixels of the one before.
        const int64_t begin = gathered ? first : least(first, length - size);
        block.input =
            input + (run * plan.width + begin) * block.pixel_step + chunk * block.chunk_step;
        block.pixels = static_cast<int>(gathered ? pixels : size);
        const int64_t at = run * plan.width + first;
        auto* sums = group == plan.chunks ? kept : kept + at * channels;
        Engine::multiply(block, sums, chunk > 0);
        if (chunk + group < plan.chunks) continue;
        store_tiles<Engine, T>(block.tiles, p, plan, sums + (first - begin) * channels,
                               Range{at, pixels}, rows, tile * kTileChannels, pool);
      }
    }
  }
}

template <class Engine, class Params>
VF_HD Plan plan_of(const Params& p) {
  return divide({p.out_height, p.out_width, p.c_in, p.c_out, p.kernel, p.stride},
                kChunkBytes / static_cast<int64_t>(sizeof(typename Engine::Packed)));
}

// A depthwise 3x3 comes first, which parts of the output channels would each make for themselves:
// then there is a strip for every thread. It has no pool partials, whose number strips are.
template <class Params>
VF_HD bool is_depthwise(const Params& p) {
  if constexpr (std::is_same_v<Params, ConvParams>) return p.taps != nullptr;
  return false;
}

template <class Engine, class T, class Params>
void run_task(const Params& p, const Plan& plan, const Task& task, const int64_t* offsets,
              char* gathered, typename Engine::Sum* kept) {
  using Packed = typename Engine::Packed;
  using Sum = typename Engine::Sum;
  constexpr int64_t kChunk = kChunkBytes / static_cast<int64_t>(sizeof(Packed));
  Sum* pool = nullptr;
  if (p.pool_partials != nullptr) {
    const int64_t first = task.first_tile * kTileChannels;
    pool = static_cast<Sum*>(p.pool_partials) + (task.image * plan.strips + task.strip) * p.c_out;
    zero(pool + first, least(task.last_tile * kTileChannels, p.c_out) - first);
  }
  if constexpr (kAlone<Engine>) {
    if (Engine::template alone<T>(p, plan, task, gathered, kept, pool)) return;
  }
  Block block{gathered,
              kChunkBytes,
              plan.pixels * kChunkBytes,
              offsets,
              static_cast<const char*>(p.tiles),
              static_cast<const char*>(p.tiles),
              tile_step(plan),
              plan.chunks,
              static_cast<int>(taps(plan)),
              0,
              0,
              0};
  const bool direct = Engine::kDirect && !is_depthwise(p) && p.kernel == 1 && p.stride == 1 &&
                      p.c_in % kChunk == 0 && p.x.stride_h == p.width * p.x.stride_w &&
                      task.rows * p.width >= Engine::kPixels;
  if (direct) {
    const T* x =
        static_cast<const T*>(p.x.data) + task.image * p.x.stride_n + task.row * p.x.stride_h;
    block.input = reinterpret_cast<const char*>(x);
    block.pixel_step = p.x.stride_w * static_cast<int64_t>(sizeof(T));
    block.chunk_step = kChunkBytes;
  } else {
    gather<T, Packed>(p, plan, task.image, task.row, task.rows, gathered);
  }
  multiply<Engine, T>(p, plan, task, block, !direct, kept, pool);
}

template <class Engine, class T, class Params>
void run(const Params& p, int threads) {
  using Sum = typename Engine::Sum;
  static_assert(sizeof(Sum) == 4, "sums take four bytes");
  Plan plan = plan_of<Engine>(p);
  if (is_depthwise(p)) {
    while (plan.rows > 1 && p.n * plan.strips < 2 * threads) {
      set_rows(p.out_height, ceil_div(plan.rows, 2), &plan);
    }
  }
  int64_t offsets[kMaxTaps];
  for (int64_t tap = 0; tap < taps(plan); ++tap) {
    const int64_t h = tap / plan.kernel, w = tap % plan.kernel;
    const int64_t plane = h % plan.stride * plan.planes + w % plan.stride;
    offsets[tap] =
        kChunkBytes * (plane * plan.plane_pixels + h / plan.stride * plan.width + w / plan.stride);
  }
  // Few strips are divided further, by output channels; each part gathers for itself.
  const int64_t strips = p.n * plan.strips;
  const int64_t parts = least(plan.tiles, ceil_div(threads, strips));
  const int64_t behind = Engine::kPixels + plan.extra * (plan.width + 1);  // read by a last block
  const int64_t input_bytes = (plan.chunks * plan.pixels + behind) * kChunkBytes;
  const int64_t sum_bytes = kept_pixels<Engine>(plan) * Engine::kTiles * kTileChannels * 4;
  Tasks tasks(strips * parts, threads);
  Failure failed;
  on_threads(threads, [&](int mine, int) {
    static thread_local Workspace workspace;
    char* gathered = workspace.get(input_bytes + sum_bytes);
    if (gathered == nullptr) return failed.set();
    auto* kept = reinterpret_cast<Sum*>(gathered + input_bytes);
    const typename Engine::Session session;
    for (int64_t i = 0; tasks.next(&mine, &i);) {
      const int64_t part = i % parts, strip = i / parts % plan.strips;
      const int64_t row = strip * plan.rows;
      run_task<Engine, T>(
          p, plan,
          {i / parts / plan.strips, strip, row, least(plan.rows, p.out_height - row),
           plan.tiles * part / parts, plan.tiles * (part + 1) / parts},
          offsets, gathered, kept);
    }
  });
  if (failed) throw std::bad_alloc();
}

}  // namespace conv
}  // namespace VF_ISA
}  // namespace vovnet_fast
