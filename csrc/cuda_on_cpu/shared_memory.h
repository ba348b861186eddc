// What the fibres tell the shared memory of warps.h.
#pragma once

#include <cstdint>

namespace cuda_on_cpu {

void block_begins(unsigned threads, uint32_t shared_bytes);
// The thread that runs now returns.
void thread_ends();
void block_ends();

}  // namespace cuda_on_cpu
