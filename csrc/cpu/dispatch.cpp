// Which instruction set the ops run on: the best one that the processor has, or the one that the
// environment variable VOVNET_FAST_CPU_ISA names.
//
// How this folder is compiled: every file that is named *_kernels.cpp once per instruction set,
// with -DVF_ISA=<name> and the flags below, and each of its functions lies in a namespace of that
// name; all other files once, without them.
//
//   baseline  none: SSE2 on x86-64; on AArch64 NEON, by which name it is known there
//   avx2      -mavx2 -mfma -mf16c
//   avx512    avx2 and -mavx512f -mavx512bw -mavx512vl -mavx512dq
//
// VF_WITH_AVX2 and VF_WITH_AVX512 are defined where these were compiled, on x86-64.
#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "../math.h"
#include "../ops.h"
#include "fingerprint.h"
#include "processor.h"

namespace vovnet_fast {

using Digests = decltype(cpu::digests);
using GatedPool = decltype(cpu::gated_pool);

#define VF_DECLARE(name, Params) void name(const Params& params, int threads);
namespace baseline {
VF_OPS(VF_DECLARE)
VF_CPU_OPS(VF_DECLARE)
Digests digests;
GatedPool gated_pool;
}  // namespace baseline
#ifdef VF_WITH_AVX2
namespace avx2 {
VF_OPS(VF_DECLARE)
VF_CPU_OPS(VF_DECLARE)
Digests digests;
GatedPool gated_pool;
}  // namespace avx2
#endif
#ifdef VF_WITH_AVX512
namespace avx512 {
VF_OPS(VF_DECLARE)
VF_CPU_OPS(VF_DECLARE)
Digests digests;
GatedPool gated_pool;
}  // namespace avx512
#endif
#undef VF_DECLARE

namespace cpu {
namespace {

// All ops of an instruction set.
struct Table {
  const char* isa;
  bool (*supported)();
#define VF_FIELD(name, Params) void (*name)(const Params& params, int threads);
  VF_OPS(VF_FIELD)
  VF_CPU_OPS(VF_FIELD)
#undef VF_FIELD
  Digests* digests;
  GatedPool* gated_pool;
};

bool always() { return true; }

constexpr const char* kBaseline = "baseline";
#ifdef __aarch64__
constexpr const char* kBaselineName = "neon";
#else
constexpr const char* kBaselineName = kBaseline;
#endif

// The best one last.
constexpr Table kTables[] = {
#define VF_ENTRY(name, Params) baseline::name,
    {kBaselineName, always, VF_OPS(VF_ENTRY) VF_CPU_OPS(VF_ENTRY) baseline::digests,
     baseline::gated_pool},
#undef VF_ENTRY
#ifdef VF_WITH_AVX2
#define VF_ENTRY(name, Params) avx2::name,
    {"avx2", has_avx2, VF_OPS(VF_ENTRY) VF_CPU_OPS(VF_ENTRY) avx2::digests, avx2::gated_pool},
#undef VF_ENTRY
#endif
#ifdef VF_WITH_AVX512
#define VF_ENTRY(name, Params) avx512::name,
    {"avx512", has_avx512, VF_OPS(VF_ENTRY) VF_CPU_OPS(VF_ENTRY) avx512::digests,
     avx512::gated_pool},
#undef VF_ENTRY
#endif
};

const Table& find(const std::string& isa) {
  if (isa == kBaseline) return kTables[0];
  std::string known;
  for (const Table& table : kTables) {
    if (isa == table.isa && table.supported()) return table;
    if (table.supported()) known += (known.empty() ? "" : ", ") + std::string(table.isa);
  }
  throw std::invalid_argument("this processor, or this build, has no instruction set \"" + isa +
                              "\": choose one of " + known);
}

const Table& best() {
  const Table* found = kTables;
  for (const Table& table : kTables) {
    if (table.supported()) found = &table;
  }
  return *found;
}

std::atomic<const Table*> chosen{nullptr};

const Table& current() { return *chosen.load(std::memory_order_relaxed); }

}  // namespace

void choose_isa() {
  const char* asked = std::getenv("VOVNET_FAST_CPU_ISA");
  if (asked == nullptr || *asked == '\0') {
    chosen = &best();
    return;
  }
  try {
    chosen = &find(asked);
  } catch (const std::invalid_argument& error) {
    throw std::invalid_argument("VOVNET_FAST_CPU_ISA=" + std::string(asked) + ": " + error.what());
  }
}

void use_isa(const std::string& isa) { chosen = &find(isa); }

std::string isa() { return current().isa; }

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const Table& table : kTables) {
    if (table.supported()) names.emplace_back(table.isa);
  }
  return names;
}

void refuse_dtype(int32_t dtype) {
  throw std::invalid_argument("no kernel for the dtype with code " + std::to_string(dtype));
}

#define VF_DEFINE(name, Params) \
  void name(const Params& params, int threads) { current().name(params, threads); }
VF_OPS(VF_DEFINE)
VF_CPU_OPS(VF_DEFINE)
#undef VF_DEFINE

void digests(const Piece* chunks, int64_t count, int64_t bytes, int threads, Digest* out) {
  current().digests(chunks, count, bytes, threads, out);
}

void gated_pool(const ApplyGatesParams& gates, const MaxPoolParams& pool, int threads) {
  current().gated_pool(gates, pool, threads);
}

int64_t reduction_parts(int64_t, int64_t height, int64_t width, int64_t) {
  return ceil_div(height * width, kTilePixels);
}

int64_t merge_groups(int64_t, int64_t) { return 0; }

}  // namespace cpu
}  // namespace vovnet_fast
