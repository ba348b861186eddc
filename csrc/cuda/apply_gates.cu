// Effective Squeeze-Excitation, where it goes over the pixels: gates and identity, and the
// backward.
#include "../ops.h"
#include "pixelwise.cuh"

namespace vovnet_fast {
namespace cuda {
namespace {

template <class T>
struct ApplyGates : Pixelwise<T, 2, true, 0> {
  ApplyGatesParams p;

  template <int V>
  struct Columns {
    High<T> gates[V];
  };

  explicit ApplyGates(const ApplyGatesParams& params) : p(params) {}

  VF_DEVICE const View& view(int k) const { return k == 0 ? p.z : p.identity; }
  VF_DEVICE const View& out() const { return p.out; }
  VF_DEVICE bool reads(int k, int64_t) const { return k == 0 || p.identity.data != nullptr; }

  template <int V>
  VF_DEVICE Columns<V> start(int64_t n, int64_t c) const {
    Columns<V> columns = {};
    if (p.gates != nullptr) {
      load_row(columns.gates, static_cast<const High<T>*>(p.gates) + n * p.c + c);
    }
    return columns;
  }

  template <int V>
  VF_DEVICE void apply(const Columns<V>& columns, const High<T> (&x)[2][V], High<T> (&y)[V],
                       High<T> (&)[1][V]) const {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      y[i] = p.gates != nullptr ? x[0][i] * columns.gates[i] : x[0][i];
      if (p.identity.data != nullptr) y[i] += x[1][i];
    }
  }
};

template <class T>
struct ApplyGatesBackward : Pixelwise<T, 2, true, 0> {
  ApplyGatesBackwardParams p;

  template <int V>
  struct Columns {
    High<T> gates[V], dpixel[V];
  };

  explicit ApplyGatesBackward(const ApplyGatesBackwardParams& params) : p(params) {}

  VF_DEVICE const View& view(int k) const { return k == 0 ? p.dout : p.y; }
  VF_DEVICE const View& out() const { return p.out; }

  template <int V>
  VF_DEVICE Columns<V> start(int64_t n, int64_t c) const {
    Columns<V> columns = {};
    if (p.gates != nullptr) {
      load_row(columns.gates, static_cast<const High<T>*>(p.gates) + n * p.c + c);
      load_row(columns.dpixel, static_cast<const High<T>*>(p.dpixel) + n * p.c + c);
    }
    return columns;
  }

  template <int V>
  VF_DEVICE void apply(const Columns<V>& columns, const High<T> (&x)[2][V], High<T> (&y)[V],
                       High<T> (&)[1][V]) const {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      y[i] = x[0][i];
      if (p.gates != nullptr) y[i] = scale_shift(y[i], columns.gates[i], columns.dpixel[i]);
      y[i] = relu_gradient(y[i], x[1][i]);
    }
  }
};

template <class T>
struct GateSums : Pixelwise<T, 2, false, 1> {
  GateSumsParams p;
  High<T>* partials;

  template <int V>
  struct Columns {};

  explicit GateSums(const GateSumsParams& params)
      : p(params), partials(static_cast<High<T>*>(params.partials)) {}

  VF_DEVICE const View& view(int k) const { return k == 0 ? p.dout : p.y; }

  template <int V>
  VF_DEVICE Columns<V> start(int64_t, int64_t) const {
    return {};
  }

  template <int V>
  VF_DEVICE void apply(const Columns<V>&, const High<T> (&x)[2][V], High<T> (&)[V],
                       High<T> (&sums)[1][V]) const {
#pragma unroll
    for (int i = 0; i < V; ++i) sums[0][i] += x[0][i] * x[1][i];
  }
};

}  // namespace

void apply_gates(const ApplyGatesParams& p, void* stream) {
  const char* name = "apply_gates";
  if (p.n * p.height * p.width * p.c == 0) return;
  check_device(name, p.out.data);
  const Size size = collapsed(checked_size(name, p.height, p.width), {p.z, p.out, p.identity});
  with_dtype(name, p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const bool fit = vectors_fit<T>({p.z, p.out, p.identity});
    pixelwise(name, ApplyGates<T>(p), p.n, size, p.c, 0, fit, stream);
  });
}

void apply_gates_backward(const ApplyGatesBackwardParams& p, void* stream) {
  const char* name = "apply_gates_backward";
  if (p.n * p.height * p.width * p.c == 0) return;
  check_device(name, p.out.data);
  const Size size = collapsed(checked_size(name, p.height, p.width), {p.dout, p.y, p.out});
  with_dtype(name, p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const bool fit = vectors_fit<T>({p.dout, p.y, p.out});
    pixelwise(name, ApplyGatesBackward<T>(p), p.n, size, p.c, 0, fit, stream);
  });
}

void gate_sums(const GateSumsParams& p, void* stream) {
  const char* name = "gate_sums";
  if (p.n * p.c == 0) return;
  check_device(name, p.out);
  const Size size = collapsed(checked_size(name, p.height, p.width), {p.dout, p.y});
  const int64_t tile = tile_of_parts(name, size, p.parts);
  with_dtype(name, p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (tile > 0) {
      const bool fit = vectors_fit<T>({p.dout, p.y});
      pixelwise(name, GateSums<T>(p), p.n, size, p.c, tile, fit, stream);
    }
    sum_rows<High<T>>(name, p.partials, p.n, parts_of(size, tile), p.c, 1, p.out, stream);
  });
}

}  // namespace cuda
}  // namespace vovnet_fast
