// 3x3 convolutions with a stride of 1 by fewer products, in fp32 from fp32, fp16 or bf16:
// Winograd's minimal filtering.
//
// Outputs are computed in square tiles of 2 or 4 pixels a side, from tiles of input that are two
// pixels wider. Both are seen as values of polynomials at a few points: at each of these a tile is
// one number a channel, and the convolution a product of matrices, tiles x C_in by C_in x C_out.
// That takes 16 products for 4 outputs, or 36 for 16, where the definition has 9 for each.
//
//   2  points 0, 1, -1 and infinity
//   4  points 0, +-5/8, +-3/2 and infinity, whose powers have few digits. The usual ones, 0, +-1
//      and +-2, double the error (arXiv:1803.10986 says why: numbers of different size are added)
//
// What is not finite spreads over the outputs of its tiles.
#pragma once

#include <cstdint>

#include "../params.h"

namespace vovnet_fast {
namespace cpu {

// Whether there is one for the instruction set that is in use.
bool conv_winograd_runs();

// As `conv` and `conv_pack` (conv_engines.h) with tiles of `side` pixels. Of `params` there are
// neither pool partials nor what belongs to gradients. Throws std::invalid_argument.
void conv_winograd(const ConvParams& params, int64_t side, int threads);
void conv_winograd_pack(const ConvPackParams& params, int64_t side, int threads);

// Size of a packed weight.
int64_t conv_winograd_pack_bytes(int64_t side, int64_t c_out, int64_t c_in);

}  // namespace cpu
}  // namespace vovnet_fast
