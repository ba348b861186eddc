// What the engines of weight gradients share: how their work is handed to threads.
#pragma once

#include <new>

#include "conv_strips.h"
#include "conv_weight_grad_finish.h"
#include "conv_weight_grad_plan.h"

namespace vovnet_fast {
inline namespace VF_ISA {
namespace conv {

// What one thread computes: sums over the strips of a part, of some chunks and tiles.
struct GradTask {
  int64_t first_strip, last_strip, first_chunk, last_chunk, first_tile, last_tile;
};

// Images, and output rows of each.
struct Strip {
  int64_t image, images, row, rows;
};

VF_HD Strip strip_of(const ConvWeightGradParams& p, const PixelPlan& plan, int64_t i) {
  const int64_t image = i / plan.row_strips * plan.images, row = i % plan.row_strips * plan.rows;
  return {image, least(plan.images, p.n - image), row, least(plan.rows, p.out_height - row)};
}

// x as the input of a convolution, `chunks` of its chunks alone. Unfolded, they are all of its
// taps.
template <class T>
VF_HD ConvParams input_of(const ConvWeightGradParams& p, const Plan& plan, int64_t chunk,
                          int64_t first_chunk, int64_t chunks) {
  ConvParams input{};
  const int64_t channel = first_chunk * chunk;
  input.x = p.x;
  input.x.data = static_cast<T*>(p.x.data) + channel;
  input.height = p.height;
  input.width = p.width;
  input.c_in = plan.unfolded ? p.c_in : least(chunks * chunk, p.c_in - channel);
  input.kernel = p.kernel;
  input.stride = p.stride;
  return input;
}

// run(task, memory, out) for all tasks, with so many bytes of memory that belong to the thread.
// `tiles`: of output channels, as the engine has them.
template <class Run>
void share_weight_grad(const ConvWeightGradParams& p, const PixelPlan& plan, int64_t tiles,
                       Ranges ranges, int64_t bytes, int threads, Run run) {
  auto* out = static_cast<float*>(p.out);
  auto* partials = static_cast<float*>(p.partials);
  const int64_t size = p.c_out * p.kernel * p.kernel * p.c_in;
  Tasks tasks(p.parts * ranges.chunks * ranges.tiles, threads);
  Failure failed;
  on_threads(threads, [&](int mine, int) {
    static thread_local Workspace workspace;
    char* memory = workspace.get(bytes);
    if (memory == nullptr) return failed.set();
    for (int64_t i = 0; tasks.next(&mine, &i);) {
      const int64_t part = i / ranges.chunks / ranges.tiles;
      const int64_t range = i / ranges.tiles % ranges.chunks, tile = i % ranges.tiles;
      float* to = p.parts == 1 ? out : partials + part * size;
      const GradTask task{plan.strips * part / p.parts,
                          plan.strips * (part + 1) / p.parts,
                          plan.input.chunks * range / ranges.chunks,
                          plan.input.chunks * (range + 1) / ranges.chunks,
                          tiles * tile / ranges.tiles,
                          tiles * (tile + 1) / ranges.tiles};
      if (task.first_strip < task.last_strip) {
        run(task, memory, to);
      } else if (range == 0 &&
                 tile == 0) {  // An engine may have fewer strips than there are parts.
        zero(to, size);
      }
    }
  });
  if (failed) throw std::bad_alloc();
  if (p.parts > 1) sum_packed_rows(partials, p.parts, size, threads, out);
}

}  // namespace conv
}  // namespace VF_ISA
}  // namespace vovnet_fast
