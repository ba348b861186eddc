// A convolution for Hopper: bulk copies, WGMMA with exactly C_out columns, and strips of pixels
// that three taps share.
//
// What a tile takes from L2 for every 64 input channels of a 3x3 layer: three strips of
// (tile_h + 2) * tile_w pixels and nine taps of weights, 128 bytes a row. A kernel that fetches the
// pixels of every tap takes nine times the pixels. In FLOP a byte:
//
//     pixels    channels    here    fetching every tap
//     16 x 16     112        138       78
//     16 x 16     128        146       85
//     16 x 16     160        160       98
//     16 x  8     224        105       81
//
// At 790 TFLOP/s 85 FLOP a byte ask L2 for 9.3 TB/s, 146 for 5.4. CTAs of a cluster share more:
// those of other pixels one copy of the weights, those of other channels one of the strips, by bulk
// copies that go to all of them. A pair of 16 x 16 pixels by 128 channels takes 205 FLOP a byte, a
// 1x1 convolution of 512 pixels by 512 channels 256. Where a CTA has all weights at once, as of
// 64>64, it fetches them for its first tile alone.
//
// WGMMA reads both operands from shared memory, (64 + N) * 32 bytes in N / 2 cycles for 64 pixels
// by N channels, at 128 bytes a cycle: 64 channels take all of it, 160 leave 30 % to the copies.
// The channels are never padded where some wide block divides them, where 80, 112 or 224 would
// become 128 or 256. All of this is arithmetic: nothing was measured yet.
//
// CTAs are persistent: one fills a processor's shared memory, so that only a CTA which goes on to
// the next tile can fetch it under the epilogue. It fetches as much of it as the rings hold. Where
// both warpgroups work on one tile, the products of the next one start after the epilogue. Where
// they take turns, with a tile of 128 pixels each, one multiplies while the other stores: a
// barrier hands the tensor cores on when the last products of a tile are issued. That leaves
// nothing idle but fetches more, as half the pixels share the weights: 90 FLOP a byte at 128
// channels, 140 in pairs of CTAs. Where the last wave is short, smaller tiles help.
//
// Small maps have fewer tiles than there are processors. There up to eight CTAs of a cluster share
// a tile, each with a part of its taps and input channels: 24 tiles of 128 pixels by 112 channels,
// of a map of 25 x 42 with 224 of them, keep 120 processors busy in five parts. The parts hand
// their fp32 sums over through distributed shared memory (parts.h): each writes all of its own, and
// reads one part of all others', so that a CTA moves a tile's sums once each way whatever the
// number of parts. No scratch and no second kernel.
//
// params.h has the arguments, plan.h makes of them what the kernel is told, layout.h says where
// everything lies, kernel.h what a thread does, epilogue.h and parts.h what becomes of its sums.
// device.cuh and wgmma.cuh are the instructions that it does it with; kernels.cuh makes kernels of
// that, which float16.cu and bfloat16.cu compile.
//
// In e4m3 (e4m3.cu) a row of 128 bytes is 128 channels, a WGMMA multiplies 32 of them, and as fast:
// per byte that is twice the FLOP, asked for at twice the rate, so that the table above holds with
// half its time. Two things differ: products are added to sums in fp32 registers for every tap and
// chunk (multiply_e4m3() of kernel.h), and the epilogue is that of networks in fp8
// (epilogue_e4m3.h). Of 64 channels half a row is filled with zeros, which nothing multiplies.
#include <cuda.h>
#include <cuda_runtime.h>

#include "../common.cuh"
#include "kernels.cuh"
#include "launch.h"
#include "plan.h"

namespace vovnet_fast {
namespace conv_sm90 {
namespace {

constexpr char kOp[] = "conv_sm90";

using Encode = decltype(&cuTensorMapEncodeTiled);

// The driver's function, which libcuda has: nothing links against that.
Encode encoder() {
  static const Encode found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    const cudaError_t status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                                12000, cudaEnableDefault, &result);
#else
    const cudaError_t status =
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &result);
#endif
    cuda::check(kOp, status, "cannot ask the driver for cuTensorMapEncodeTiled");
    if (result != cudaDriverEntryPointSuccess) {
      throw std::runtime_error(
          "conv_sm90: the driver has no cuTensorMapEncodeTiled: update it to CUDA 12.0 or newer");
    }
    return reinterpret_cast<Encode>(function);
  }();
  return found;
}

CUtensorMap encode(const Box& box, CUtensorMapDataType type, const char* name) {
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  CUtensorMap map;
  const CUresult status =
      encoder()(&map, type, box.rank, const_cast<void*>(box.data),
                reinterpret_cast<const cuuint64_t*>(box.sizes),
                reinterpret_cast<const cuuint64_t*>(box.strides), box.box, steps,
                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    throw std::runtime_error(std::string("conv_sm90: cuTensorMapEncodeTiled refuses ") + name +
                             " with CUresult " + std::to_string(status));
  }
  return map;
}

int processors() {
  int device, count;
  cuda::check(kOp, cudaGetDevice(&device), "no current device");
  cuda::check(kOp, cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
              "cannot count processors");
  return count;
}

// Runs a kernel on what was planned of `params`.
void launch(Kernel kernel, const ConvSm90Params& params, const Problem& p, CUtensorMapDataType type,
            void* stream) {
  using cuda::check;
  const CUtensorMap x = encode(strip_box(params), type, "x");
  const CUtensorMap weight = encode(weight_box(params), type, "weight");
  const int bytes = static_cast<int>(shared_bytes(p)) + kAtomBytes;
  check(kOp, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
        "no kernel for this device (it is for compute capability 9.0), or none with " +
            std::to_string(bytes) + " bytes of shared memory");
  const int size = cluster_size(p);
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = size;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = processors() / size * size;
  config.blockDim = kThreads;
  config.dynamicSmemBytes = bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cluster;
  config.numAttrs = size > 1 ? 1 : 0;
  int together = processors();
  if (size > 1) {  // Of those that start at once, every cluster lies within one part of the GPU.
    check(kOp, cudaOccupancyMaxActiveClusters(&together, kernel, &config),
          "cannot ask for clusters of " + std::to_string(size));
  }
  const int clusters = std::min(p.tiles, std::max(together, 1));
  config.gridDim = clusters * size;
  check(kOp, cudaLaunchKernelEx(&config, kernel, x, weight, p),
        "cannot launch " + std::to_string(clusters) + " clusters of " + std::to_string(size));
}

}  // namespace
}  // namespace conv_sm90

namespace cuda {

void conv_sm90(const ConvSm90Params& params, void* stream) {
  using namespace vovnet_fast::conv_sm90;
  if (params.n == 0 || params.height == 0 || params.width == 0 || params.c_out == 0) return;
  const Problem p = plan(params);
  check_device(kOp, params.out.data);
  const bool half = params.dtype == kFloat16;
  const int blocks = blocks_of(params);
  const Kernel kernel =
      half ? float16_kernel(p.block_out, blocks) : bfloat16_kernel(p.block_out, blocks);
  const auto type = half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  conv_sm90::launch(kernel, params, p, type, stream);
}

void conv_sm90_fp8(const ConvSm90Fp8Params& params, void* stream) {
  using namespace vovnet_fast::conv_sm90;
  if (params.n == 0 || params.height == 0 || params.width == 0 || params.c_out == 0) return;
  const Problem p = plan(params);
  check_device(kOp, params.out.data != nullptr ? params.out.data : params.feature.data);
  const ConvSm90Params like = common(params);
  const Kernel kernel = e4m3_kernel(p.block_out, blocks_of(like));
  conv_sm90::launch(kernel, like, p, CU_TENSOR_MAP_DATA_TYPE_UINT8, stream);
}

}  // namespace cuda
}  // namespace vovnet_fast
