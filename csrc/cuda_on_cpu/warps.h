// What kernels that multiply on tensor cores use besides, on the host: asynchronous copies into
// shared memory, ldmatrix and mma.sync, as the PTX ISA has them.
//
// Copies land as late as they may, when their thread waits for their group, or as early, when they
// are issued (`copies_land_early`). Shared memory is addressed in bytes from its start. Of every
// four bytes it is known who wrote them, who read them, and between which barriers. Reported as
// errors, besides what cuda_on_cpu.h names:
//
//     what nobody has written is read;
//     what a copy is on its way to is read, or written;
//     a thread reads what another one wrote, or whose copy it waited for, with no barrier between;
//     a thread writes what another one wrote or read, with no barrier between;
//     addresses that are not aligned, or outside;
//     copies that are still under way, or in no group, when their thread returns.
#pragma once

#include <cstdint>

#include "../dtypes.h"
#include "cuda_on_cpu.h"

namespace cuda_on_cpu {

// Copies 16 bytes, or zeros if they are not `inside`, unless they are not `wanted`.
void copy_async(uint32_t to, const void* from, bool inside, bool wanted);
void commit_copies();
// Waits for all groups of this thread but the last `pending`.
void wait_copies(int pending);

float load_shared(uint32_t from);
void store_shared(uint32_t to, float value);
// The same of 16 bytes. All lanes of a warp make the same calls, in the same order, until one of
// them makes none any more.
void load_unit(void* unit, uint32_t from);
void store_unit(uint32_t to, const void* unit);

uint32_t load_word(uint32_t from);  // of 4 bytes

// ldmatrix.x2 or .x4: `count` words a lane.
void load_matrices(const char* place, uint32_t* words, int count, uint32_t from);

// ldmatrix.x4.trans: words hold two numbers of a column.
void load_transposed(const char* place, uint32_t (&words)[4], uint32_t from);

// mma.sync.m16n8k16 of halves, and m16n8k8 of TF32, which ignores the lowest 13 bits.
enum class Operands { kFloat16, kBFloat16, kTf32 };
void multiply_add(const char* place, Operands kind, float (&sums)[4], const uint32_t (&a)[4],
                  uint32_t b0, uint32_t b1);

template <class T>
constexpr Operands kOperands = Operands::kTf32;
template <>
inline constexpr Operands kOperands<vovnet_fast::float16> = Operands::kFloat16;
template <>
inline constexpr Operands kOperands<vovnet_fast::bfloat16> = Operands::kBFloat16;

template <class T>
void multiply_add(const char* place, float (&sums)[4], const uint32_t (&a)[4], uint32_t b0,
                  uint32_t b1) {
  multiply_add(place, kOperands<T>, sums, a, b0, b1);
}

// cvt.rna.tf32.f32: to nearest, ties away from zero.
uint32_t to_tf32(uint32_t bits);

// What launches have done since they were last counted.
struct Counts {
  uint64_t copies, copy_conflicts;      // of 16 bytes; phases of eight lanes that take longer
  uint64_t units, unit_conflicts;       // of 16 bytes that are loaded or stored; the same
  uint64_t matrices, matrix_conflicts;  // of 8 x 8; those whose rows share banks
  uint64_t words, word_conflicts;       // of load_word, by warps; what they take beyond one turn
  uint64_t products;                    // mma.sync
  uint64_t shared_bytes;                // of a block, the most
};
Counts take_counts();
void copies_land_early(bool early);
// Whether TF32 has the 10 bits it has, or all 23 of fp32: with these a whole network can be held
// against one in fp32.
void tf32_rounds(bool rounds);

}  // namespace cuda_on_cpu
