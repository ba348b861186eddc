// Which convolution engines there are, and their choice by name.
#include <stdexcept>

#include "conv_engines.h"
#include "conv_weight_grad_plan.h"
#include "dispatch.h"
#include "loops.h"
#include "processor.h"

namespace vovnet_fast {

#define VF_DECLARE(isa, name)                                                                 \
  namespace isa {                                                                             \
  void conv_##name(const ConvParams& params, int threads);                                    \
  void conv_pack_##name(const ConvPackParams& params, int threads);                           \
  void conv_weight_grad_##name(const ConvWeightGradParams& params, int threads);              \
  void conv_weight_grad_finish_##name(const ConvWeightGradFinishParams& params, int threads); \
  }
#ifdef __aarch64__
VF_DECLARE(baseline, fma)
#endif
#ifdef VF_WITH_AVX2
VF_DECLARE(avx2, fma)
#endif
#ifdef VF_WITH_AVX512
VF_DECLARE(avx512, fma)
#endif
#ifdef VF_WITH_AVX512BF16
VF_DECLARE(avx512bf16, dpbf16)
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
  void (*run)(const ConvParams& params, int threads);
  void (*pack)(const ConvPackParams& params, int threads);
  void (*weight_grad)(const ConvWeightGradParams& params, int threads);   // or null
  void (*finish)(const ConvWeightGradFinishParams& params, int threads);  // or null
  int64_t chunk;  // channels that make 64 bytes
  bool (*takes)(int32_t dtype);
};

[[maybe_unused]] bool always() { return true; }
[[maybe_unused]] bool up_to_fp32(int32_t dtype) { return dtype != kFloat64; }

[[maybe_unused]] bool only_bf16(int32_t dtype) { return dtype == kBFloat16; }

// An engine's functions, by the instruction set that they are compiled for.
#define VF_FUNCTIONS(isa, name)                                          \
  isa::conv_##name, isa::conv_pack_##name, isa::conv_weight_grad_##name, \
      isa::conv_weight_grad_finish_##name

constexpr Engine kEngines[] = {
#ifdef __aarch64__
    {"fma", "neon", always, baseline::conv_fma, baseline::conv_pack_fma, nullptr, nullptr, 16,
     up_to_fp32},
#endif
#ifdef VF_WITH_AVX2
    {"fma", "avx2", always, VF_FUNCTIONS(avx2, fma), 16, up_to_fp32},
#endif
#ifdef VF_WITH_AVX512
    {"fma", "avx512", always, VF_FUNCTIONS(avx512, fma), 16, up_to_fp32},
#endif
#ifdef VF_WITH_AVX512BF16
    {"dpbf16", "avx512", has_avx512bf16, VF_FUNCTIONS(avx512bf16, dpbf16), 32, only_bf16},
#endif
#ifdef VF_WITH_AMX
    {"amx", "avx512", has_amx_bf16, VF_FUNCTIONS(amx, amx), 32, only_bf16},
#endif
    {"", "", nullptr, nullptr, nullptr, nullptr, nullptr, 0, nullptr},  // No array is empty.
};
#undef VF_FUNCTIONS

bool runs(const Engine& engine) { return engine.isa == isa() && engine.supported(); }

const Engine& find(const std::string& name) {
  for (const Engine& engine : kEngines) {
    if (engine.name == name && runs(engine)) return engine;
  }
  throw std::invalid_argument("no convolution engine \"" + name + "\" runs on instruction set " +
                              isa());
}

const Engine& find(const std::string& name, int32_t dtype) {
  const Engine& engine = find(name);
  if (!engine.takes(dtype)) refuse_dtype(dtype);
  return engine;
}

[[noreturn]] void refuse_weight_grad(const std::string& engine) {
  throw std::invalid_argument("convolution engine \"" + engine +
                              "\" has no weight gradients on instruction set " + isa());
}

template <class Function>
std::vector<std::string> names_of(Function Engine::* function) {
  std::vector<std::string> names;
  for (const Engine& engine : kEngines) {
    if (runs(engine) && engine.*function != nullptr) names.emplace_back(engine.name);
  }
  return names;
}

}  // namespace

std::vector<std::string> conv_engines() { return names_of(&Engine::run); }

std::vector<std::string> conv_weight_grad_engines() { return names_of(&Engine::weight_grad); }

void conv(const ConvParams& params, const std::string& engine, int threads) {
  const Engine& found = find(engine, params.dtype);
  if (params.n == 0 || params.out_height == 0 || params.out_width == 0 || params.c_out == 0) return;
  found.run(params, threads);
}

void conv_pack(const ConvPackParams& params, const std::string& engine, int threads) {
  find(engine, params.dtype).pack(params, threads);
}

int64_t conv_pack_bytes(const std::string& engine, int64_t c_out, int64_t kernel, int64_t c_in) {
  const auto plan = conv::divide({1, 1, c_in, c_out, kernel, 1}, find(engine).chunk);
  return plan.tiles * conv::tile_step(plan);
}

int64_t conv_parts(const std::string& engine, int64_t out_height, int64_t out_width, int64_t c_in,
                   int64_t c_out, int64_t kernel, int64_t stride) {
  const int64_t chunk = find(engine).chunk;
  if (out_height == 0) return 0;
  return conv::divide({out_height, out_width, c_in, c_out, kernel, stride}, chunk).strips;
}

void conv_weight_grad(const ConvWeightGradParams& params, const std::string& engine, int threads) {
  const Engine& found = find(engine, params.dtype);
  if (found.weight_grad == nullptr) refuse_weight_grad(engine);
  if (params.c_out == 0 || params.c_in == 0) return;
  if (params.n * params.out_height * params.out_width == 0) {
    const int64_t weights = params.c_out * params.kernel * params.kernel * params.c_in;
    return zero(static_cast<float*>(params.out), weights);
  }
  found.weight_grad(params, threads);
}

void conv_weight_grad_finish(const ConvWeightGradFinishParams& params, const std::string& engine,
                             int threads) {
  const Engine& found = find(engine);
  if (found.finish == nullptr) refuse_weight_grad(engine);
  found.finish(params, threads);
}

int64_t conv_weight_grad_parts(int64_t n, int64_t out_height, int64_t out_width, int64_t c_in,
                               int64_t c_out, int64_t kernel, int64_t stride) {
  if (n == 0 || out_height == 0 || out_width == 0 || c_in == 0 || c_out == 0) return 1;
  return conv::divide_parts({out_height, out_width, c_in, c_out, kernel, stride}, n);
}

}  // namespace cpu
}  // namespace vovnet_fast
