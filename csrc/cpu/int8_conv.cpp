// Which convolution engines there are in eight bits, and their choice by name.
#include <cstring>
#include <stdexcept>

#include "conv_plan.h"
#include "dispatch.h"
#include "int8_conv_engines.h"
#include "int8_conv_notes.h"
#include "int8_conv_winograd_limits.h"
#include "processor.h"

namespace vovnet_fast {

#define VF_DECLARE(isa, name)                                                \
  namespace isa {                                                            \
  void int8_conv_##name(const Int8ConvParams& params, int threads);          \
  void int8_conv_pack_##name(const Int8ConvPackParams& params, int threads); \
  }
#ifdef VF_WITH_AVX2
VF_DECLARE(avx2, maddubs)
VF_DECLARE(avx2, words)
VF_DECLARE(avx2, winograd)
#endif
#ifdef VF_WITH_AVXVNNI
VF_DECLARE(avxvnni, vnni)
VF_DECLARE(avxvnni, winograd_vnni)
#endif
#ifdef VF_WITH_AVX512
VF_DECLARE(avx512, maddubs)
VF_DECLARE(avx512, words)
VF_DECLARE(avx512, winograd)
#endif
#ifdef VF_WITH_AVX512VNNI
VF_DECLARE(avx512vnni, vnni)
VF_DECLARE(avx512vnni, winograd_vnni)
#endif
#ifdef VF_WITH_AMX
VF_DECLARE(amx, amx)
#endif
#undef VF_DECLARE

namespace cpu {

namespace {

// What an engine takes: bytes; bytes, and weights with notes; images as well; bytes, of 3x3 with a
// stride of 1.
enum class Takes { kBytes, kNoted, kAll, kTiles };

struct Engine {
  const char* name;
  const char* isa;  // that must be in use
  bool (*supported)();
  void (*run)(const Int8ConvParams& params, int threads);
  void (*pack)(const Int8ConvPackParams& params, int threads);
  Takes takes;
};

[[maybe_unused]] bool always() { return true; }

// An engine's functions, by the instruction set that they are compiled for.
#define VF_FUNCTIONS(isa, name) isa::int8_conv_##name, isa::int8_conv_pack_##name

// For an instruction set the fastest first.
constexpr Engine kEngines[] = {
#ifdef VF_WITH_AMX
    {"amx", "avx512", has_amx_int8, VF_FUNCTIONS(amx, amx), Takes::kBytes},
#endif
#ifdef VF_WITH_AVX512VNNI
    {"vnni", "avx512", has_avx512vnni, VF_FUNCTIONS(avx512vnni, vnni), Takes::kBytes},
    {"winograd_vnni", "avx512", has_avx512vnni, VF_FUNCTIONS(avx512vnni, winograd_vnni),
     Takes::kTiles},
#endif
#ifdef VF_WITH_AVX512
    {"maddubs", "avx512", always, VF_FUNCTIONS(avx512, maddubs), Takes::kNoted},
    {"winograd", "avx512", always, VF_FUNCTIONS(avx512, winograd), Takes::kTiles},
    {"words", "avx512", always, VF_FUNCTIONS(avx512, words), Takes::kAll},
#endif
#ifdef VF_WITH_AVXVNNI
    {"vnni", "avx2", has_avxvnni, VF_FUNCTIONS(avxvnni, vnni), Takes::kBytes},
    {"winograd_vnni", "avx2", has_avxvnni, VF_FUNCTIONS(avxvnni, winograd_vnni), Takes::kTiles},
#endif
#ifdef VF_WITH_AVX2
    {"maddubs", "avx2", always, VF_FUNCTIONS(avx2, maddubs), Takes::kNoted},
    {"winograd", "avx2", always, VF_FUNCTIONS(avx2, winograd), Takes::kTiles},
    {"words", "avx2", always, VF_FUNCTIONS(avx2, words), Takes::kAll},
#endif
    {"", "", nullptr, nullptr, nullptr, Takes::kBytes},  // No array is empty.
};
#undef VF_FUNCTIONS

bool runs(const Engine& engine) { return engine.isa == isa() && engine.supported(); }

const Engine& find(const std::string& name) {
  for (const Engine& engine : kEngines) {
    if (engine.name == name && runs(engine)) return engine;
  }
  throw std::invalid_argument("no convolution engine in eight bits \"" + name +
                              "\" runs on instruction set " + isa());
}

const Engine& find(const std::string& name, bool images) {
  const Engine& engine = find(name);
  if (images && engine.takes != Takes::kAll) {
    throw std::invalid_argument("convolution engine \"" + name + "\" is for steps, not for images");
  }
  return engine;
}

// Channels that make 64 bytes.
int64_t chunk_of(const Engine& engine) {
  return engine.takes == Takes::kBytes || engine.takes == Takes::kNoted ? 64 : 32;
}

void require(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(std::string("Winograd's convolution needs ") + what);
}

void require_kernel(const Engine& engine, int64_t kernel) {
  if (engine.takes == Takes::kTiles) require(kernel == 3, "a kernel of 3");
}

// Its sums are right only so far.
void require_tiles(const Int8ConvParams& p) {
  require(p.kernel == 3 && p.stride == 1, "a kernel of 3 and a stride of 1");
  require(p.pool_partials == nullptr, "pool_partials to be None");
  require(p.c_in > 0, "inputs");
  int64_t most;
  memcpy(&most, p.tiles, sizeof most);
  require(most >= 0 && most <= kWinogradMost, "the weight that was packed for it");
  require(
      most * p.levels < kWinogradMost,
      "outputs that are less than 2^25: the levels times the largest sum of an output channel's "
      "weights of one sign");
}

}  // namespace

std::vector<std::string> int8_conv_engines() {
  std::vector<std::string> names;
  for (const Engine& engine : kEngines) {
    if (runs(engine)) names.emplace_back(engine.name);
  }
  return names;
}

void int8_conv(const Int8ConvParams& params, const std::string& engine, int threads) {
  const Engine& found = find(engine, params.kind != kUnsignedBytes);
  if (params.n == 0 || params.out_height == 0 || params.out_width == 0 || params.c_out == 0) return;
  if (found.takes == Takes::kTiles) require_tiles(params);
  found.run(params, threads);
}

void int8_conv_pack(const Int8ConvPackParams& params, const std::string& engine, int threads) {
  const Engine& found = find(engine);
  if (params.kind == kWords && found.takes != Takes::kAll) {
    throw std::invalid_argument("convolution engine \"" + engine + "\" is for weights in 8 bits");
  }
  require_kernel(found, params.kernel);
  if (params.c_out == 0 || params.c_in == 0) return;  // There may be no memory to write to.
  found.pack(params, threads);
}

int64_t int8_conv_pack_bytes(const std::string& engine, int64_t c_out, int64_t kernel,
                             int64_t c_in) {
  const Engine& found = find(engine);
  require_kernel(found, kernel);
  if (found.takes == Takes::kTiles) return kWinogradHeaderBytes + winograd_tiles_bytes(c_out, c_in);
  const auto plan = conv::divide({1, 1, c_in, c_out, kernel, 1}, chunk_of(found));
  const int64_t notes = found.takes == Takes::kNoted ? notes_bytes(c_out, kernel, c_in) : 0;
  return notes + plan.tiles * conv::tile_step(plan);
}

int64_t int8_conv_parts(const std::string& engine, int64_t out_height, int64_t out_width,
                        int64_t c_in, int64_t c_out, int64_t kernel, int64_t stride) {
  const Engine& found = find(engine);
  if (out_height == 0 || found.takes == Takes::kTiles) return 0;
  return conv::divide({out_height, out_width, c_in, c_out, kernel, stride}, chunk_of(found)).strips;
}

}  // namespace cpu
}  // namespace vovnet_fast
