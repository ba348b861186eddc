// Convolutions of the CPU half, by engine; which there are depends on the processor and the build.
//
//   fma      fp16, bf16 and fp32, products and sums in fp32         AVX2, AVX-512 or NEON
//   dpbf16   bf16, products of pairs (vdpbf16ps), sums in fp32      AVX512-BF16
//   amx      bf16, products by the matrix unit, sums in fp32        AMX
//
// On NEON there are no weight gradients. Layers of few pixels have others: conv_unpacked.h.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../params.h"

namespace vovnet_fast {
namespace cpu {

// What can run here, on the instruction set that is in use; and what of it has weight gradients.
std::vector<std::string> conv_engines();
std::vector<std::string> conv_weight_grad_engines();

// On `threads` threads; results do not depend on how many they are.
void conv(const ConvParams& params, const std::string& engine, int threads);
void conv_pack(const ConvPackParams& params, const std::string& engine, int threads);
void conv_weight_grad(const ConvWeightGradParams& params, const std::string& engine, int threads);
void conv_weight_grad_finish(const ConvWeightGradFinishParams& params, const std::string& engine,
                             int threads);

// Size of a packed weight.
int64_t conv_pack_bytes(const std::string& engine, int64_t c_out, int64_t kernel, int64_t c_in);

// Number of pool partials of an image.
int64_t conv_parts(const std::string& engine, int64_t out_height, int64_t out_width, int64_t c_in,
                   int64_t c_out, int64_t kernel, int64_t stride);

// Parts into which the pixels of all images are divided, each with sums of its own.
int64_t conv_weight_grad_parts(int64_t n, int64_t out_height, int64_t out_width, int64_t c_in,
                               int64_t c_out, int64_t kernel, int64_t stride);

}  // namespace cpu
}  // namespace vovnet_fast
