// Gates, and the pool behind them, which takes rows while they are in a near cache.
#include "../ops.h"
#include "apply_gates.h"
#include "max_pool.h"

namespace vovnet_fast {
inline namespace VF_ISA {

namespace {

// The first row of the input that the window of an output row has, and no window of a row above.
VF_HD int64_t first_row(const MaxPoolParams& p, int64_t row) {
  if (row == p.out_height) return p.height;
  const int64_t start = window_start(row, pool::kStride, p.pad);
  return start < 0 || row == 0 ? 0 : start;
}

template <class T>
VF_HD void pool_row(const MaxPoolParams& p, int64_t image, int64_t row) {
  pool::run<T>(p, {image, 0, row * p.out_width, (row + 1) * p.out_width});
}

template <class T>
void run_gated_pool(const ApplyGatesParams& gates, const MaxPoolParams& p, int threads) {
  // A thread has some output rows of all images, and the input rows that begin with their windows.
  // The last row of a window is the next one's first: of those that another thread has, the outputs
  // are left until all threads are done.
  const int64_t rows = p.n * p.out_height, work = p.n * p.height * p.width * p.c;
  const int64_t parts = threads < 1 || work < kGrain ? 1 : threads;
  const auto last_of_image = [&](int64_t row)
                                 VF_LAMBDA { return row % p.out_height + 1 == p.out_height; };
  parallel(parts, work, threads, [&](int64_t part) {
    const int64_t first = rows * part / parts, end = rows * (part + 1) / parts;
    for (int64_t i = first; i < end; ++i) {
      const int64_t image = i / p.out_height, row = i % p.out_height;
      gating::run<T>(gates,
                     {image, 0, first_row(p, row) * p.width, first_row(p, row + 1) * p.width});
      if (row > 0 && i > first) pool_row<T>(p, image, row - 1);
      if (last_of_image(i)) pool_row<T>(p, image, row);
    }
  });
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t first = rows * part / parts, last = rows * (part + 1) / parts - 1;
    if (last < first || last_of_image(last)) continue;
    pool_row<T>(p, last / p.out_height, last % p.out_height);
  }
}

}  // namespace

void gated_pool(const ApplyGatesParams& gates, const MaxPoolParams& pool, int threads) {
  with_dtype(pool.dtype, [&](auto type) { run_gated_pool<decltype(type)>(gates, pool, threads); });
}

}  // namespace VF_ISA
}  // namespace vovnet_fast
