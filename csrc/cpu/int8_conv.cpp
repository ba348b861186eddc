// Which convolution engines there are in eight bits, and their choice by name.
#include <stdexcept>

#include "conv_plan.h"
#include "dispatch.h"
#include "int8_conv_engines.h"
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
#endif
#ifdef VF_WITH_AVXVNNI
VF_DECLARE(avxvnni, vnni)
#endif
#ifdef VF_WITH_AVX512
VF_DECLARE(avx512, maddubs)
VF_DECLARE(avx512, words)
#endif
#ifdef VF_WITH_AVX512VNNI
VF_DECLARE(avx512vnni, vnni)
#endif
#ifdef VF_WITH_AMX
VF_DECLARE(amx, amx)
#endif
#undef VF_DECLARE

namespace cpu {

namespace {

struct Engine {
  const char* name;
  const char* isa;  // that must be in use
  bool (*supported)();
  void (*run)(const Int8ConvParams& params, int threads);
  void (*pack)(const Int8ConvPackParams& params, int threads);
  int64_t chunk;  // channels that make 64 bytes
};

[[maybe_unused]] bool always() { return true; }

// An engine's functions, by the instruction set that they are compiled for.
#define VF_FUNCTIONS(isa, name) isa::int8_conv_##name, isa::int8_conv_pack_##name

constexpr int64_t kBytes = 64, kWordsChunk = 32;

// For an instruction set the fastest first.
constexpr Engine kEngines[] = {
#ifdef VF_WITH_AMX
    {"amx", "avx512", has_amx_int8, VF_FUNCTIONS(amx, amx), kBytes},
#endif
#ifdef VF_WITH_AVX512VNNI
    {"vnni", "avx512", has_avx512vnni, VF_FUNCTIONS(avx512vnni, vnni), kBytes},
#endif
#ifdef VF_WITH_AVX512
    {"maddubs", "avx512", always, VF_FUNCTIONS(avx512, maddubs), kBytes},
    {"words", "avx512", always, VF_FUNCTIONS(avx512, words), kWordsChunk},
#endif
#ifdef VF_WITH_AVXVNNI
    {"vnni", "avx2", has_avxvnni, VF_FUNCTIONS(avxvnni, vnni), kBytes},
#endif
#ifdef VF_WITH_AVX2
    {"maddubs", "avx2", always, VF_FUNCTIONS(avx2, maddubs), kBytes},
    {"words", "avx2", always, VF_FUNCTIONS(avx2, words), kWordsChunk},
#endif
    {"", "", nullptr, nullptr, nullptr, 0},  // No array is empty.
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

const Engine& find(const std::string& name, bool words) {
  const Engine& engine = find(name);
  if ((engine.chunk == kWordsChunk) != words) {
    throw std::invalid_argument("convolution engine \"" + name + "\" is for " +
                                (words ? "steps, not for images" : "images, not for steps"));
  }
  return engine;
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
  found.run(params, threads);
}

void int8_conv_pack(const Int8ConvPackParams& params, const std::string& engine, int threads) {
  const Engine& found = find(engine);
  if (params.kind == kWords && found.chunk != kWordsChunk) {
    throw std::invalid_argument("convolution engine \"" + engine + "\" is for weights in 8 bits");
  }
  found.pack(params, threads);
}

int64_t int8_conv_pack_bytes(const std::string& engine, int64_t c_out, int64_t kernel,
                             int64_t c_in) {
  const auto plan = conv::divide({1, 1, c_in, c_out, kernel, 1}, find(engine).chunk);
  return plan.tiles * conv::tile_step(plan);
}

int64_t int8_conv_parts(const std::string& engine, int64_t out_height, int64_t out_width,
                        int64_t c_in, int64_t c_out, int64_t kernel, int64_t stride) {
  const int64_t chunk = find(engine).chunk;
  if (out_height == 0) return 0;
  return conv::divide({out_height, out_width, c_in, c_out, kernel, stride}, chunk).strips;
}

}  // namespace cpu
}  // namespace vovnet_fast
