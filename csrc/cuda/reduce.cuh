// Sums that are always taken in the same order: threads of a block, then rows of partials.
#pragma once

#include "common.cuh"

namespace vovnet_fast {
namespace cuda {

// Which sum of a block a thread gets: that of channel `channel` of the block's first vector on, or
// none, where it is past the `vectors` that the share has from there.
struct Column {
  int channel;
  bool present;
};

template <int V>
VF_DEVICE Column column_of(int vectors) {
  static_assert(kThreads / kMaxVectors >= V, "there is a thread for every column");
  const int across = blockDim.x, index = threadIdx.y * across + threadIdx.x;
  const int vector = index % across, element = index / across;
  return {vector * V + element, element < V && vector < vectors};
}

// The sum over the threads of a block that have the same channels, for the thread that column_of
// gives it to. All threads have to call it.
template <int V, class Number>
VF_DEVICE Number block_sum(const Number (&mine)[V]) {
  VF_SHARED(Number, sums, kThreads * V);
  const int across = blockDim.x, x = threadIdx.x, y = threadIdx.y;
  __syncthreads();  // Others may still read what was summed before.
#pragma unroll
  for (int i = 0; i < V; ++i) sums[(y * V + i) * across + x] = mine[i];
  __syncthreads();
  const int column = y * across + x;
  Number sum = 0;
  if (column < V * across) {
    for (int row = 0; row < static_cast<int>(blockDim.y); ++row) {
      sum += sums[row * V * across + column];
    }
  }
  return sum;
}

// Stores these sums: to[0] is that of the block's first channel.
template <int V, class Number>
VF_DEVICE void store_sums(const Number (&mine)[V], Number* to, int vectors) {
  const Number sum = block_sum(mine);
  const Column column = column_of<V>(vectors);
  if (column.present) to[column.channel] = sum;
}

constexpr int kSumColumns = 32, kSumRows = 16;

// out[group, column] = sum over its rows / divisor. A block has kSumColumns columns.
template <class Number>
__global__ void __launch_bounds__(kSumColumns* kSumRows)
    sum_rows_kernel(const Number* rows, Number* out, int64_t count, int64_t columns,
                    Number divisor) {
  VF_SHARED(Number, sums, kSumColumns * kSumRows);
  const int64_t blocks = ceil_div(columns, kSumColumns);
  const int64_t group = blockIdx.x / blocks;
  const int64_t column = (blockIdx.x - group * blocks) * kSumColumns + threadIdx.x;
  Number sum = 0;
  if (column < columns) {
    const Number* from = rows + group * count * columns + column;
#pragma unroll 8
    for (int64_t row = threadIdx.y; row < count; row += kSumRows) sum += from[row * columns];
  }
  sums[threadIdx.y * kSumColumns + threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || column >= columns) return;
  sum = 0;
  for (int row = 0; row < kSumRows; ++row) sum += sums[row * kSumColumns + threadIdx.x];
  out[group * columns + column] = sum / divisor;
}

// rows: [groups, count, columns] packed. out: [groups, columns] packed; zeros without rows.
template <class Number>
void sum_rows(const char* op, const void* rows, int64_t groups, int64_t count, int64_t columns,
              int64_t divisor, void* out, void* stream) {
  const unsigned grid = checked_grid(op, groups * ceil_div(columns, kSumColumns));
  launch(op, sum_rows_kernel<Number>, grid, dim3(kSumColumns, kSumRows), stream,
         static_cast<const Number*>(rows), static_cast<Number*>(out), count, columns,
         static_cast<Number>(divisor));
}

}  // namespace cuda
}  // namespace vovnet_fast
