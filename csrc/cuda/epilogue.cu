// Scale, shift and ReLU, or the statistics, of another library's convolution output.
#include "../ops.h"
#include "pixelwise.cuh"

namespace vovnet_fast {
namespace cuda {
namespace {

template <class T, int Sums>
struct Epilogue : Pixelwise<T, 1, true, Sums> {
  View z, to;
  const High<T>* scale;
  const High<T>* shift;
  High<T>* partials;
  bool with_relu;

  template <int V>
  struct Columns {
    High<T> scale[V], shift[V];
  };

  VF_DEVICE const View& view(int) const { return z; }
  VF_DEVICE const View& out() const { return to; }

  template <int V>
  VF_DEVICE Columns<V> start(int64_t, int64_t c) const {
    Columns<V> columns = {};
    if (scale == nullptr) return columns;
    load_row(columns.scale, scale + c);
    load_row(columns.shift, shift + c);
    return columns;
  }

  template <int V>
  VF_DEVICE void apply(const Columns<V>& columns, const High<T> (&x)[1][V], High<T> (&y)[V],
                       High<T> (&sums)[1][V]) const {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      y[i] = x[0][i];
      if (scale != nullptr) y[i] = scale_shift(y[i], columns.scale[i], columns.shift[i]);
      if (with_relu) y[i] = relu(y[i]);
      if constexpr (Sums > 0) sums[0][i] += y[i];
    }
  }
};

template <class T, int Sums>
void scale_shift_sum(const char* name, const EpilogueParams& p, int64_t tile, void* stream) {
  Epilogue<T, Sums> op;
  op.z = p.z;
  op.to = p.out;
  op.scale = static_cast<const High<T>*>(p.scale);
  op.shift = static_cast<const High<T>*>(p.shift);
  op.partials = static_cast<High<T>*>(p.pool_partials);
  op.with_relu = p.relu != 0;
  const Size size = collapsed(checked_size(name, p.height, p.width), {p.z, p.out});
  pixelwise(name, op, p.n, size, p.c, tile, vectors_fit<T>({p.z, p.out}), stream);
}

// A number near those of a tile: the mean of its first pixels. Deviations from it are no larger
// than they have to be, and can be added up.
template <class T, int V>
VF_DEVICE void shifts(High<T> (&shift)[V], const EpilogueParams& p, const Job& job,
                      const Size& size) {
  const int count = min(kInFlight, job.last - job.first);
  Raw<T, V> raw[kInFlight];
#pragma unroll
  for (int u = 0; u < kInFlight; ++u) {
    const Pixel at = pixel_at(size, job.first + min(u, count - 1));
    raw[u] = load<V>(image<T>(p.z, job.n, job.c) + offset(p.z, at.h, at.w));
  }
#pragma unroll
  for (int i = 0; i < V; ++i) {
    shift[i] = 0;
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      if (u < count) shift[i] += widen(raw[u].element[i]) / static_cast<High<T>>(count);
    }
  }
}

// Stores count, sum and squared deviations, [3, c], from sums of `n` numbers and of their
// deviations.
template <int V, class Number>
VF_DEVICE void store_statistics(const Number (&sum)[V], const Number (&deviation)[V],
                                const Number (&square)[V], const Number (&shift)[V], int n,
                                Number* to, int64_t c, int vectors) {
  // Every row of threads has the same shift: one of them says it.
  Number said[V];
#pragma unroll
  for (int i = 0; i < V; ++i) said[i] = threadIdx.y == 0 ? shift[i] : Number(0);
  const Number count = static_cast<Number>(n), near = block_sum(said);
  const Number away = block_sum(deviation), squares = block_sum(square), plain = block_sum(sum);
  const Column column = column_of<V>(vectors);
  if (!column.present) return;
  const Number m2 = squares - away * (away / count);
  to[column.channel] = count;
  // The smaller sum has the smaller error. Deviations from an infinity are NaN, and no smaller.
  to[c + column.channel] = fabs(away) < fabs(plain) ? count * near + away : plain;
  to[2 * c + column.channel] = m2 < Number(0) ? Number(0) : m2;  // By rounding; NaN stays.
}

template <class T, int V>
VF_KERNEL statistics_kernel(const EpilogueParams p, const Share share, const Size size) {
  const Job job = job_of<V>(share, size.pixels(), blockIdx.x);
  High<T> shift[V] = {}, sum[V] = {}, deviation[V] = {}, square[V] = {};
  if (job.active) {
    shifts<T>(shift, p, job, size);
    const int step = blockDim.y;
    for (int first = job.first + threadIdx.y; first < job.last; first += kInFlight * step) {
      Raw<T, V> raw[kInFlight];
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        const Pixel at = pixel_at(size, first + u * step);
        const T* from = image<T>(p.z, job.n, job.c) + offset(p.z, at.h, at.w);
        raw[u] = first + u * step < job.last ? load<V>(from) : zeros<T, V>();
      }
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        if (first + u * step >= job.last) break;
        if (p.out.data != p.z.data) {
          const Pixel at = pixel_at(size, first + u * step);
          store(image<T>(p.out, job.n, job.c) + offset(p.out, at.h, at.w), raw[u]);
        }
#pragma unroll
        for (int i = 0; i < V; ++i) {
          const High<T> y = widen(raw[u].element[i]), away = y - shift[i];
          sum[i] += y;
          deviation[i] += away;
          square[i] += away * away;
        }
      }
    }
  }
  High<T>* to = static_cast<High<T>*>(p.statistics) +
                (job.n * share.tiles + job.tile) * kStatisticsRows * p.c + first_channel<V>(job);
  store_statistics(sum, deviation, square, shift, job.last - job.first, to, p.c,
                   vectors_left<V>(share, job));
}

template <class T>
void statistics(const char* name, const EpilogueParams& p, void* stream) {
  const Size size = collapsed(checked_size(name, p.height, p.width), {p.z, p.out});
  for_channels<T>(
      p.c, vectors_fit<T>({p.z, p.out}), [&](auto vector, int64_t first, int64_t vectors) {
        const Share share = share_of(p.n, size.pixels(), first, vectors, kTilePixels);
        launch(name, statistics_kernel<T, decltype(vector)::value>,
               checked_grid(name, share.blocks()), block_for(vectors), stream, p, share, size);
      });
}

}  // namespace

void epilogue(const EpilogueParams& p, void* stream) {
  const char* name = "epilogue";
  if (p.n * p.height * p.width * p.c == 0) return;
  check_device(name, p.out.data);
  with_dtype(name, p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (p.statistics != nullptr) {
      statistics<T>(name, p, stream);
    } else if (p.pool_partials != nullptr) {
      scale_shift_sum<T, 1>(name, p, kTilePixels, stream);
    } else {
      scale_shift_sum<T, 0>(name, p, 0, stream);
    }
  });
}

}  // namespace cuda
}  // namespace vovnet_fast
