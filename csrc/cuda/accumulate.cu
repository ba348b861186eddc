// What the input gradient of another library's convolution needs before it is in its slot.
#include "../ops.h"
#include "pixelwise.cuh"

namespace vovnet_fast {
namespace cuda {
namespace {

template <class T>
struct Accumulate : Pixelwise<T, 3, true, 0> {
  AccumulateParams p;

  template <int V>
  struct Columns {
    bool masked;
  };

  explicit Accumulate(const AccumulateParams& params) : p(params) {}

  VF_DEVICE const View& view(int k) const { return k == 0 ? p.z : k == 1 ? p.add : p.mask; }
  VF_DEVICE const View& out() const { return p.out; }

  // An absent view has no channels.
  VF_DEVICE bool reads(int k, int64_t c) const {
    return k == 0 || (k == 1 ? c < p.add_c : c >= p.c - p.mask_c);
  }
  VF_DEVICE int64_t channel(int k, int64_t c) const { return k < 2 ? c : c - (p.c - p.mask_c); }

  template <int V>
  VF_DEVICE Columns<V> start(int64_t, int64_t c) const {
    return {reads(2, c)};
  }

  template <int V>
  VF_DEVICE void apply(const Columns<V>& columns, const High<T> (&x)[3][V], High<T> (&y)[V],
                       High<T> (&)[1][V]) const {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      y[i] = p.add_c > 0 ? x[0][i] + x[1][i] : x[0][i];
      if (columns.masked) y[i] = relu_gradient(y[i], x[2][i]);
    }
  }
};

}  // namespace

void accumulate(const AccumulateParams& params, void* stream) {
  const char* name = "accumulate";
  if (params.n * params.height * params.width * params.c == 0) return;
  check_device(name, params.out.data);
  AccumulateParams p = params;
  if (p.add.data == nullptr) p.add_c = 0;
  if (p.mask.data == nullptr) p.mask_c = 0;
  const Size size = collapsed(checked_size(name, p.height, p.width), {p.z, p.out, p.add, p.mask});
  with_dtype(name, p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    // A vector has to lie inside a view, or outside.
    const bool fit = vectors_fit<T>({p.z, p.out, p.add, p.mask}) && p.add_c % kVector<T> == 0 &&
                     (p.c - p.mask_c) % kVector<T> == 0;
    pixelwise(name, Accumulate<T>(p), p.n, size, p.c, 0, fit, stream);
  });
}

}  // namespace cuda
}  // namespace vovnet_fast
