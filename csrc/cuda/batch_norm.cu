// Batch norm with the statistics of the batch: their merge, and the backward. Numbers are merged in
// fp64, of which there are few.
#include "../ops.h"
#include "pixelwise.cuh"

namespace vovnet_fast {
namespace cuda {
namespace {

constexpr int kMergeColumns = 32, kMergeRows = 8;
constexpr int64_t kMergeAtOnce = 512;  // Parts. More than these are merged in groups first,
constexpr int64_t kGroup = 256;        // each of so many, or of more where
constexpr int64_t kMaxGroups = 512;    // there would be too many groups.

// Statistics of parts [first, last) of `partials`, [parts, 3, columns]: in the first row of
// threads.
template <class In>
VF_DEVICE Statistics<double> merged(const In* partials, int64_t first, int64_t last, int64_t column,
                                    int64_t columns) {
  VF_SHARED(double, shared, 3 * kMergeRows * kMergeColumns);
  constexpr int kEach = kMergeRows * kMergeColumns;
  Statistics<double> all = {0, 0, 0};
  if (column < columns) {
#pragma unroll 4
    for (int64_t part = first + threadIdx.y; part < last; part += kMergeRows) {
      const In* from = partials + part * kStatisticsRows * columns + column;
      all = merge(all, {static_cast<double>(from[0]), static_cast<double>(from[columns]),
                        static_cast<double>(from[2 * columns])});
    }
  }
  const int mine = threadIdx.y * kMergeColumns + threadIdx.x;
  shared[mine] = all.count;
  shared[kEach + mine] = all.sum;
  shared[2 * kEach + mine] = all.m2;
  __syncthreads();
  if (threadIdx.y > 0) return all;
  for (int row = 1; row < kMergeRows; ++row) {
    const int at = row * kMergeColumns + threadIdx.x;
    all = merge(all, {shared[at], shared[kEach + at], shared[2 * kEach + at]});
  }
  return all;
}

// A block merges kMergeColumns channels of a group of parts.
template <class In, class Out>
VF_KERNEL merge_kernel(const In* partials, Out* out, int64_t parts, int64_t each, int64_t c) {
  const int64_t blocks = ceil_div(c, kMergeColumns);
  const int64_t group = blockIdx.x / blocks;
  const int64_t column = blockIdx.x % blocks * kMergeColumns + threadIdx.x;
  const int64_t first = group * each, last = first + each < parts ? first + each : parts;
  const Statistics<double> all = merged(partials, first, last, column, c);
  if (threadIdx.y > 0 || column >= c) return;
  Out* to = out + group * kStatisticsRows * c + column;
  to[0] = static_cast<Out>(all.count);
  to[c] = static_cast<Out>(all.sum);
  to[2 * c] = static_cast<Out>(all.m2);
}

template <class In, class Out>
VF_KERNEL finish_kernel(const In* partials, Out* out, int64_t parts, int64_t c, double eps,
                        Array gamma, Array beta) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kMergeColumns + threadIdx.x;
  const Statistics<double> all = merged(partials, int64_t{0}, parts, column, c);
  if (threadIdx.y > 0 || column >= c) return;
  const Norm<Out> norm =
      finish_norm<Out>(all, element_or(gamma, column, 1.0), element_or(beta, column, 0.0), eps);
  const Out rows[kNormRows] = {norm.mean,  norm.rstd,     norm.scale,
                               norm.shift, norm.variance, norm.count};
  for (int row = 0; row < kNormRows; ++row) out[row * c + column] = rows[row];
}

constexpr dim3 kMergeBlock(kMergeColumns, kMergeRows);

template <class In, class Out>
void merge_parts(const char* name, const void* partials, void* out, int64_t parts, int64_t groups,
                 int64_t c, void* stream) {
  launch(name, merge_kernel<In, Out>, checked_grid(name, groups * ceil_div(c, kMergeColumns)),
         kMergeBlock, stream, static_cast<const In*>(partials), static_cast<Out*>(out), parts,
         ceil_div(parts, groups), c);
}

// Calls last(partials, parts), where partials are those of p, or of groups of them.
template <class Number, class Params, class Last>
void with_groups(const char* name, const Params& p, void* stream, Last last) {
  if (p.groups == 0) return last(static_cast<const Number*>(p.partials), p.parts);
  merge_parts<Number, double>(name, p.partials, p.scratch, p.parts, p.groups, p.c, stream);
  last(static_cast<const double*>(p.scratch), p.groups);
}

template <class T>
struct BatchNormSums : Pixelwise<T, 2, false, 2> {
  BatchNormSumsParams p;
  High<T>* partials;

  template <int V>
  struct Columns {
    High<T> mean[V], rstd[V];
  };

  explicit BatchNormSums(const BatchNormSumsParams& params)
      : p(params), partials(static_cast<High<T>*>(params.partials)) {}

  VF_DEVICE const View& view(int k) const { return k == 0 ? p.g : p.z; }

  template <int V>
  VF_DEVICE Columns<V> start(int64_t, int64_t c) const {
    Columns<V> columns;
    const High<T>* norm = static_cast<const High<T>*>(p.norm) + c;
    load_row(columns.mean, norm);
    load_row(columns.rstd, norm + p.c);
    return columns;
  }

  template <int V>
  VF_DEVICE void apply(const Columns<V>& columns, const High<T> (&x)[2][V], High<T> (&)[V],
                       High<T> (&sums)[2][V]) const {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      sums[0][i] += x[0][i];
      sums[1][i] += x[0][i] * normalize(x[1][i], columns.mean[i], columns.rstd[i]);
    }
  }
};

template <class T>
struct BatchNormInputGrad : Pixelwise<T, 2, true, 0> {
  BatchNormInputGradParams p;

  template <int V>
  struct Columns {
    High<T> mean[V], rstd[V], scale[V], g_mean[V], slope[V];
  };

  explicit BatchNormInputGrad(const BatchNormInputGradParams& params) : p(params) {}

  VF_DEVICE const View& view(int k) const { return k == 0 ? p.g : p.z; }
  VF_DEVICE const View& out() const { return p.out; }

  template <int V>
  VF_DEVICE Columns<V> start(int64_t, int64_t c) const {
    Columns<V> columns;
    High<T> count[V];
    const High<T>* norm = static_cast<const High<T>*>(p.norm) + c;
    const High<T>* sums = static_cast<const High<T>*>(p.sums) + c;
    load_row(columns.mean, norm);
    load_row(columns.rstd, norm + p.c);
    load_row(count, norm + 5 * p.c);
    load_row(columns.g_mean, sums);
    load_row(columns.slope, sums + p.c);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      columns.g_mean[i] /= count[i];
      columns.slope[i] /= count[i];
      columns.scale[i] = columns.rstd[i] * element_or(p.gamma, c + i, High<T>(1));
    }
    return columns;
  }

  template <int V>
  VF_DEVICE void apply(const Columns<V>& columns, const High<T> (&x)[2][V], High<T> (&y)[V],
                       High<T> (&)[1][V]) const {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      y[i] = batch_norm_input_gradient(x[0][i], x[1][i], columns.mean[i], columns.rstd[i],
                                       columns.scale[i], columns.g_mean[i], columns.slope[i]);
    }
  }
};

template <class T>
struct ChannelSums : Pixelwise<T, 1, false, 1> {
  ChannelSumsParams p;
  High<T>* partials;

  template <int V>
  struct Columns {};

  explicit ChannelSums(const ChannelSumsParams& params)
      : p(params), partials(static_cast<High<T>*>(params.partials)) {}

  VF_DEVICE const View& view(int) const { return p.g; }

  template <int V>
  VF_DEVICE Columns<V> start(int64_t, int64_t) const {
    return {};
  }

  template <int V>
  VF_DEVICE void apply(const Columns<V>&, const High<T> (&x)[1][V], High<T> (&)[V],
                       High<T> (&sums)[1][V]) const {
#pragma unroll
    for (int i = 0; i < V; ++i) sums[0][i] += x[0][i];
  }
};

}  // namespace

int64_t merge_groups(int64_t parts, int64_t) {
  return parts <= kMergeAtOnce ? 0 : std::min(ceil_div(parts, kGroup), kMaxGroups);
}

void batch_norm_merge(const BatchNormMergeParams& p, void* stream) {
  const char* name = "batch_norm_merge";
  if (p.c == 0) return;
  check_device(name, p.out);
  with_high(name, p.dtype, [&](auto type) {
    using Number = typename decltype(type)::type;
    with_groups<Number>(name, p, stream, [&](const auto* partials, int64_t parts) {
      using In = std::decay_t<decltype(*partials)>;
      merge_parts<In, Number>(name, partials, p.out, parts, 1, p.c, stream);
    });
  });
}

void batch_norm_finish(const BatchNormFinishParams& p, void* stream) {
  const char* name = "batch_norm_finish";
  if (p.c == 0) return;
  check_device(name, p.out);
  with_high(name, p.dtype, [&](auto type) {
    using Number = typename decltype(type)::type;
    with_groups<Number>(name, p, stream, [&](const auto* partials, int64_t parts) {
      using In = std::decay_t<decltype(*partials)>;
      launch(name, finish_kernel<In, Number>, checked_grid(name, ceil_div(p.c, kMergeColumns)),
             kMergeBlock, stream, partials, static_cast<Number*>(p.out), parts, p.c, p.eps, p.gamma,
             p.beta);
    });
  });
}

void batch_norm_sums(const BatchNormSumsParams& p, void* stream) {
  const char* name = "batch_norm_sums";
  if (p.c == 0) return;
  check_device(name, p.out);
  const Size size = collapsed(checked_size(name, p.height, p.width), {p.g, p.z});
  const int64_t tile = tile_of_parts(name, size, p.parts);
  with_dtype(name, p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (p.n * tile > 0) {
      const bool fit = vectors_fit<T>({p.g, p.z});
      pixelwise(name, BatchNormSums<T>(p), p.n, size, p.c, tile, fit, stream);
    }
    sum_rows<High<T>>(name, p.partials, 1, p.n * parts_of(size, tile), 2 * p.c, 1, p.out, stream);
  });
}

void batch_norm_input_grad(const BatchNormInputGradParams& p, void* stream) {
  const char* name = "batch_norm_input_grad";
  if (p.n * p.height * p.width * p.c == 0) return;
  check_device(name, p.out.data);
  const Size size = collapsed(checked_size(name, p.height, p.width), {p.g, p.z, p.out});
  with_dtype(name, p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const bool fit = vectors_fit<T>({p.g, p.z, p.out});
    pixelwise(name, BatchNormInputGrad<T>(p), p.n, size, p.c, 0, fit, stream);
  });
}

void channel_sums(const ChannelSumsParams& p, void* stream) {
  const char* name = "channel_sums";
  if (p.c == 0) return;
  check_device(name, p.out);
  const Size size = collapsed(checked_size(name, p.height, p.width), {p.g});
  const int64_t tile = tile_of_parts(name, size, p.parts);
  with_dtype(name, p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (p.n * tile > 0) {
      pixelwise(name, ChannelSums<T>(p), p.n, size, p.c, tile, vectors_fit<T>({p.g}), stream);
    }
    sum_rows<High<T>>(name, p.partials, 1, p.n * parts_of(size, tile), p.c, 1, p.out, stream);
  });
}

}  // namespace cuda
}  // namespace vovnet_fast
