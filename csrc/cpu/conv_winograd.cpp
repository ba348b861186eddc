// Which instruction sets have Winograd's convolution, and what it takes.
#include "conv_winograd.h"

#include <stdexcept>
#include <string>

#include "../math.h"
#include "dispatch.h"

namespace vovnet_fast {

#define VF_DECLARE(isa)                                                             \
  namespace isa {                                                                   \
  void conv_winograd(const ConvParams& params, int64_t side, int threads);          \
  void conv_winograd_pack(const ConvPackParams& params, int64_t side, int threads); \
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
  void (*run)(const ConvParams& params, int64_t side, int threads);
  void (*pack)(const ConvPackParams& params, int64_t side, int threads);
};

constexpr Functions kFunctions[] = {
#ifdef __aarch64__
    {"neon", baseline::conv_winograd, baseline::conv_winograd_pack},
#endif
#ifdef VF_WITH_AVX2
    {"avx2", avx2::conv_winograd, avx2::conv_winograd_pack},
#endif
#ifdef VF_WITH_AVX512
    {"avx512", avx512::conv_winograd, avx512::conv_winograd_pack},
#endif
    {"", nullptr, nullptr},  // No array is empty.
};

const Functions* find() {
  const std::string current = isa();
  for (const Functions& functions : kFunctions) {
    if (functions.run != nullptr && functions.isa == current) return &functions;
  }
  return nullptr;
}

const Functions& need() {
  const Functions* found = find();
  if (found != nullptr) return *found;
  throw std::invalid_argument("no Winograd convolution runs on instruction set " + isa());
}

void require(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(std::string("Winograd's convolution needs ") + what);
}

void require_side(int64_t side) { require(side == 2 || side == 4, "tiles of 2 or 4 pixels"); }

}  // namespace

bool conv_winograd_runs() { return find() != nullptr; }

void conv_winograd(const ConvParams& params, int64_t side, int threads) {
  const Functions& functions = need();
  require_side(side);
  require(params.kernel == 3 && params.stride == 1, "a kernel of 3 and a stride of 1");
  require(params.dtype != kFloat64, "activations in fp32, fp16 or bf16");
  require(params.scale != nullptr, "scale and shift");
  require(params.pool_partials == nullptr, "pool_partials to be None");
  if (params.n == 0 || params.out_height == 0 || params.out_width == 0 || params.c_out == 0) return;
  functions.run(params, side, threads);
}

void conv_winograd_pack(const ConvPackParams& params, int64_t side, int threads) {
  const Functions& functions = need();
  require_side(side);
  require(params.kernel == 3, "a kernel of 3");
  require(params.dtype != kFloat64, "weights to be rounded to fp32, fp16 or bf16");
  functions.pack(params, side, threads);
}

int64_t conv_winograd_pack_bytes(int64_t side, int64_t c_out, int64_t c_in) {
  require_side(side);
  constexpr int64_t kTileChannels = 16, kTileBytes = 1024;
  const int64_t points = (side + 2) * (side + 2);
  return points * ceil_div(c_out, kTileChannels) * ceil_div(c_in, kTileChannels) * kTileBytes;
}

}  // namespace cpu
}  // namespace vovnet_fast
