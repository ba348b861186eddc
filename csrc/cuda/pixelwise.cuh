// Ops that do the same to every pixel: load vectors from some views, compute, store one, add some
// up.
//
// An Op has
//   T, kViews, kStores, kSums   storage type; views that it reads; whether it stores; sums it takes
//   view(k), out()              the views
//   start<V>(n, c)              what it keeps for channels c.. of image n: Columns<V>
//   reads(k, c), channel(k, c)  whether view k has something for channel c, and which of its own
//   apply(columns, x, y, sums)  y and additions to sums, from vectors x of the views
//   partials                    [images, tiles, kSums, C], if it takes sums
#pragma once

#include "common.cuh"
#include "reduce.cuh"

namespace vovnet_fast {
namespace cuda {

constexpr int kInFlight = 4;  // Pixels whose loads a thread issues before it uses the first.

// What most ops have in common.
template <class Type, int Views, bool Stores, int Sums>
struct Pixelwise {
  using T = Type;
  static constexpr int kViews = Views;
  static constexpr bool kStores = Stores;
  static constexpr int kSums = Sums;

  VF_DEVICE bool reads(int, int64_t) const { return true; }
  VF_DEVICE int64_t channel(int, int64_t c) const { return c; }
};

template <class Op, int V>
VF_KERNEL pixelwise_kernel(const Op op, const Share share, const Size size, const int64_t c) {
  using T = typename Op::T;
  constexpr int kSums = Op::kSums;
  const Job job = job_of<V>(share, size.pixels(), blockIdx.x);
  High<T> sums[kSums > 0 ? kSums : 1][V] = {};
  if (job.active) {
    const auto columns = op.template start<V>(job.n, job.c);
    const int step = blockDim.y;
    for (int first = job.first + threadIdx.y; first < job.last; first += kInFlight * step) {
      Word<T, V> words[kInFlight][Op::kViews];
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        const Pixel at = pixel_at(size, first + u * step);
#pragma unroll
        for (int k = 0; k < Op::kViews; ++k) {
          if (first + u * step < job.last && op.reads(k, job.c)) {
            const T* from = image<T>(op.view(k), job.n, op.channel(k, job.c));
            words[u][k] = load_word<V>(from + offset(op.view(k), at.h, at.w));
          } else {
            words[u][k] = {};
          }
        }
      }
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        if (first + u * step >= job.last) break;
        High<T> x[Op::kViews][V], y[V];
#pragma unroll
        for (int k = 0; k < Op::kViews; ++k) unpack(x[k], raw_of<T, V>(words[u][k]));
        op.apply(columns, x, y, sums);
        if constexpr (Op::kStores) {
          const Pixel at = pixel_at(size, first + u * step);
          store_narrow(image<T>(op.out(), job.n, job.c) + offset(op.out(), at.h, at.w), y);
        }
      }
    }
  }
  if constexpr (kSums > 0) {
    High<T>* to =
        op.partials + (job.n * share.tiles + job.tile) * kSums * c + first_channel<V>(job);
#pragma unroll
    for (int k = 0; k < kSums; ++k) store_sums(sums[k], to + k * c, vectors_left<V>(share, job));
  }
}

// `tile`: pixels of a part of the sums; without sums 0, for any. `fit`: whether vectors may be
// used.
template <class Op>
void pixelwise(const char* name, const Op& op, int64_t images, Size size, int64_t c, int64_t tile,
               bool fit, void* stream) {
  for_channels<typename Op::T>(c, fit, [&](auto vector, int64_t first, int64_t vectors) {
    const dim3 block = block_for(vectors);
    const int64_t each =
        tile > 0 ? tile : tile_for(images, size.pixels(), vectors, kInFlight * block.y);
    const Share share = share_of(images, size.pixels(), first, vectors, each);
    launch(name, pixelwise_kernel<Op, decltype(vector)::value>, checked_grid(name, share.blocks()),
           block, stream, op, share, size, c);
  });
}

}  // namespace cuda
}  // namespace vovnet_fast
