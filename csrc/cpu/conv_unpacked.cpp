// Which instruction sets have convolutions by weights as they are.
#include "conv_unpacked.h"

#include <stdexcept>
#include <string>

#include "dispatch.h"

namespace vovnet_fast {

#define VF_DECLARE(isa)                                                                    \
  namespace isa {                                                                          \
  void conv_unpacked(const ConvUnpackedParams& params, int threads);                       \
  void conv_unpacked_input_grad(const ConvUnpackedInputGradParams& params, int threads);   \
  void conv_unpacked_weight_grad(const ConvUnpackedWeightGradParams& params, int threads); \
  }
#ifdef __aarch64__
VF_DECLARE(baseline)
#endif
#ifdef VF_WITH_AVX2
VF_DECLARE(avx2)
#endif
#ifdef VF_WITH_AVX512
VF_DECLARE(avx512)
#endif
#undef VF_DECLARE

namespace cpu {

namespace {

struct Functions {
  const char* isa;
  void (*forward)(const ConvUnpackedParams& params, int threads);
  void (*input_grad)(const ConvUnpackedInputGradParams& params, int threads);
  void (*weight_grad)(const ConvUnpackedWeightGradParams& params, int threads);
};

#define VF_FUNCTIONS(isa) \
  isa::conv_unpacked, isa::conv_unpacked_input_grad, isa::conv_unpacked_weight_grad
constexpr Functions kFunctions[] = {
#ifdef __aarch64__
    {"neon", VF_FUNCTIONS(baseline)},
#endif
#ifdef VF_WITH_AVX2
    {"avx2", VF_FUNCTIONS(avx2)},
#endif
#ifdef VF_WITH_AVX512
    {"avx512", VF_FUNCTIONS(avx512)},
#endif
    {"", nullptr, nullptr, nullptr},  // No array is empty.
};
#undef VF_FUNCTIONS

const Functions* find() {
  const std::string current = isa();
  for (const Functions& functions : kFunctions) {
    if (functions.forward != nullptr && functions.isa == current) return &functions;
  }
  return nullptr;
}

const Functions& need() {
  const Functions* found = find();
  if (found != nullptr) return *found;
  throw std::invalid_argument("no convolution by weights as they are runs on instruction set " +
                              isa());
}

template <class Params>
bool has_outputs(const Params& p) {
  return p.n > 0 && p.out_height > 0 && p.out_width > 0;
}

}  // namespace

bool conv_unpacked_runs() { return find() != nullptr; }

void conv_unpacked(const ConvUnpackedParams& params, int threads) {
  const Functions& functions = need();
  if (has_outputs(params) && params.c_out > 0) functions.forward(params, threads);
}

void conv_unpacked_input_grad(const ConvUnpackedInputGradParams& params, int threads) {
  const Functions& functions = need();
  if (has_outputs(params) && params.c_in > 0) functions.input_grad(params, threads);
}

void conv_unpacked_weight_grad(const ConvUnpackedWeightGradParams& params, int threads) {
  const Functions& functions = need();
  if (params.c_out > 0 && params.c_in > 0) functions.weight_grad(params, threads);
}

}  // namespace cpu
}  // namespace vovnet_fast
