// Every op of csrc/cpu on every instruction set that runs here, against plain formulas in fp64:
// what a machine can run that has no torch, or is emulated. test_aarch64.py compiles and runs it.
//
//   cpu_driver          prints what is wrong, and at last how much was compared; fails if any is
//   cpu_driver --spoil  spoils every output first: then every comparison must be wrong
//   cpu_driver --isa    prints the instruction set that the environment chooses, or why it cannot
#include "cpu_driver.h"

#include <algorithm>
#include <stdexcept>

using namespace vovnet_fast;

namespace driver {

namespace {

constexpr int32_t kStored[] = {kHalf, kBrain, kSingle};

int64_t strided(int64_t size, int64_t stride) { return (size - 1) / stride + 1; }

// ---- Convolution -------------------------------------------------------------------------------

struct ConvCase {
  Shape x;
  int64_t c_out;
  int32_t kernel, stride, relu;
};

Values convolved(const ConvCase& t, const Tensor& x, const Tensor& weight, const Tensor& scale,
                 const Tensor& shift, const Shape& out) {
  Values y;
  for (int64_t n = 0; n < out.n; ++n) {
    for (int64_t h = 0; h < out.h; ++h) {
      for (int64_t w = 0; w < out.w; ++w) {
        for (int64_t o = 0; o < out.c; ++o) {
          double sum = 0;
          for (int64_t tap = 0; tap < t.kernel * t.kernel; ++tap) {
            const int64_t in_h = h * t.stride + tap / t.kernel - t.kernel / 2;
            const int64_t in_w = w * t.stride + tap % t.kernel - t.kernel / 2;
            if (in_h < 0 || in_h >= t.x.h || in_w < 0 || in_w >= t.x.w) continue;
            for (int64_t i = 0; i < t.x.c; ++i) {
              sum +=
                  x.at(n, in_h, in_w, i) * weight.get((o * t.kernel * t.kernel + tap) * t.x.c + i);
            }
          }
          sum = sum * scale.get(o) + shift.get(o);
          y.push_back(t.relu != 0 && sum < 0 ? 0 : sum);
        }
      }
    }
  }
  return y;
}

void* packed(const std::string& engine, const ConvCase& t, Tensor& weight, Tensor* scale,
             bool transposed, int32_t dtype, int threads) {
  const int64_t c_in = t.x.c, taps = t.kernel * t.kernel;
  const int64_t bytes = transposed ? cpu::conv_pack_bytes(engine, c_in, t.kernel, t.c_out)
                                   : cpu::conv_pack_bytes(engine, t.c_out, t.kernel, c_in);
  void* tiles = std::aligned_alloc(64, bytes);
  cpu::conv_pack({weight.array(), scale == nullptr ? Array{} : scale->array(), tiles, t.c_out,
                  t.kernel, c_in, taps * c_in, t.kernel * c_in, c_in, 1, transposed ? 1 : 0, dtype},
                 engine, threads);
  return tiles;
}

const std::string kUnpacked = "unpacked";

// The gradient of the input of a convolution with stride 1: added to what is in the first channels
// of its slot, and masked in the last ones.
void check_gradient(Report& report, const std::string& engine, const ConvCase& t, int32_t dtype) {
  Tensor g = Tensor::slot(dtype, {t.x.n, t.x.h, t.x.w, t.c_out}).random();
  Tensor out = Tensor::slot(dtype, t.x).random();
  const int64_t taps = t.kernel * t.kernel, add_c = (t.x.c + 1) / 2, mask_c = (2 * t.x.c + 2) / 3;
  Tensor mask = Tensor::slot(dtype, {t.x.n, t.x.h, t.x.w, mask_c}).random();
  Tensor weight = Tensor::packed(dtype, t.c_out * taps * t.x.c).random();
  Tensor scale = Tensor::packed(kSingle, t.c_out).random(0.5, 2);
  Values expected;
  for (int64_t i = 0; i < out.count(); ++i) {
    const int64_t c = i % t.x.c, w = i / t.x.c % t.x.w, h = i / t.x.c / t.x.w % t.x.h;
    const int64_t n = i / t.x.c / t.x.w / t.x.h, masked = c - (t.x.c - mask_c);
    double sum = c < add_c ? out.get(i) : 0;
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int64_t out_h = h - tap / t.kernel + t.kernel / 2;
      const int64_t out_w = w - tap % t.kernel + t.kernel / 2;
      if (out_h < 0 || out_h >= t.x.h || out_w < 0 || out_w >= t.x.w) continue;
      for (int64_t o = 0; o < t.c_out; ++o) {
        // The product in fp32, as the weight is packed: in fp64 it might round the other way.
        const float y = static_cast<float>(weight.get((o * taps + tap) * t.x.c + c)) *
                        static_cast<float>(scale.get(o));
        sum += g.at(n, out_h, out_w, o) * rounded(dtype, y);
      }
    }
    expected.push_back(masked >= 0 && mask.at(n, h, w, masked) <= 0 ? 0 : sum);
  }
  if (engine == kUnpacked) {
    ConvUnpackedInputGradParams params{};
    params.g = g.view(), params.out = params.add = out.view(), params.mask = mask.view();
    params.weight = weight.array(), params.scale = scale.data();
    params.n = t.x.n, params.height = params.out_height = t.x.h;
    params.width = params.out_width = t.x.w, params.c_in = t.x.c, params.c_out = t.c_out;
    params.add_c = add_c, params.mask_c = mask_c;
    params.stride_o = taps * t.x.c, params.stride_h = t.kernel * t.x.c;
    params.stride_w = t.x.c, params.stride_i = 1;
    params.kernel = t.kernel, params.stride = 1, params.dtype = dtype;
    cpu::conv_unpacked_input_grad(params, report.threads);
    report.compare(engine + ", gradient of " + words(t.x) + " from " + std::to_string(t.c_out) +
                       ", kernel " + std::to_string(t.kernel),
                   out, expected);
    return;
  }
  void* tiles = packed(engine, t, weight, &scale, true, dtype, report.threads);
  ConvParams params{};
  params.x = g.view(), params.out = params.add = out.view(), params.mask = mask.view();
  params.tiles = tiles, params.add_c = add_c, params.mask_c = mask_c;
  params.n = t.x.n, params.height = params.out_height = t.x.h;
  params.width = params.out_width = t.x.w, params.c_in = t.c_out, params.c_out = t.x.c;
  params.kernel = t.kernel, params.stride = 1, params.dtype = dtype;
  cpu::conv(params, engine, report.threads);
  std::free(tiles);
  report.compare(engine + ", gradient of " + words(t.x) + " from " + std::to_string(t.c_out) +
                     ", kernel " + std::to_string(t.kernel),
                 out, expected);
}

void check_conv(Report& report, const std::string& engine, const ConvCase& t, int32_t dtype) {
  const Shape out_shape{t.x.n, strided(t.x.h, t.stride), strided(t.x.w, t.stride), t.c_out};
  Tensor x = Tensor::slot(dtype, t.x).random(), out = Tensor::slot(dtype, out_shape);
  Tensor weight = Tensor::packed(dtype, t.c_out * t.kernel * t.kernel * t.x.c).random();
  Tensor scale = Tensor::packed(kSingle, t.c_out).random(0.5, 2);
  Tensor shift = Tensor::packed(kSingle, t.c_out).random();
  const int64_t parts =
      cpu::conv_parts(engine, out_shape.h, out_shape.w, t.x.c, t.c_out, t.kernel, t.stride);
  Tensor pool = Tensor::packed(kSingle, {t.x.n, parts, 1, t.c_out});
  void* tiles = packed(engine, t, weight, nullptr, false, dtype, report.threads);
  ConvParams params{};
  params.x = x.view(), params.out = out.view(), params.tiles = tiles;
  params.scale = scale.data(), params.shift = shift.data(), params.pool_partials = pool.data();
  params.n = t.x.n, params.height = t.x.h, params.width = t.x.w, params.c_in = t.x.c;
  params.out_height = out_shape.h, params.out_width = out_shape.w, params.c_out = t.c_out;
  params.kernel = t.kernel, params.stride = t.stride, params.relu = t.relu, params.dtype = dtype;
  cpu::conv(params, engine, report.threads);
  std::free(tiles);

  const Values expected = convolved(t, x, weight, scale, shift, out_shape);
  const int64_t pixels = out_shape.h * out_shape.w;
  Values sums(t.x.n * t.c_out), found(sums.size());
  for (int64_t i = 0; i < out_shape.count(); ++i) {
    sums[i / t.c_out / pixels * t.c_out + i % t.c_out] += expected[i];
  }
  for (int64_t i = 0; i < pool.count(); ++i) {
    found[i / t.c_out / parts * t.c_out + i % t.c_out] += pool.get(i);
  }
  Tensor pooled = Tensor::packed(kSingle, {t.x.n, 1, 1, t.c_out});
  for (int64_t i = 0; i < pooled.count(); ++i) pooled.set(i, found[i]);
  const std::string what = engine + " " + words(t.x) + " to " + std::to_string(t.c_out) +
                           ", kernel " + std::to_string(t.kernel) + ", stride " +
                           std::to_string(t.stride);
  report.compare(what, out, expected);
  report.compare(what + ", its pool", pooled, sums);
  report.around(what + ", its parts", pool);
}

// By a weight as it is: the forward pass with its pool, the gradients of the input and of the
// weight.
void check_unpacked(Report& report, const ConvCase& t) {
  const Shape out_shape{t.x.n, strided(t.x.h, t.stride), strided(t.x.w, t.stride), t.c_out};
  const int64_t taps = t.kernel * t.kernel, size = taps * t.x.c;
  Tensor x = Tensor::slot(kSingle, t.x).random(), out = Tensor::slot(kSingle, out_shape);
  Tensor weight = Tensor::packed(kSingle, t.c_out * size).random();
  Tensor scale = Tensor::packed(kSingle, t.c_out).random(0.5, 2);
  Tensor shift = Tensor::packed(kSingle, t.c_out).random();
  Tensor pool = Tensor::packed(kSingle, {t.x.n, 1, 1, t.c_out});
  ConvUnpackedParams params{};
  params.x = x.view(), params.out = out.view(), params.weight = weight.array();
  params.scale = scale.data(), params.shift = shift.data(), params.pool_partials = pool.data();
  params.n = t.x.n, params.height = t.x.h, params.width = t.x.w, params.c_in = t.x.c;
  params.out_height = out_shape.h, params.out_width = out_shape.w, params.c_out = t.c_out;
  params.stride_o = size, params.stride_h = t.kernel * t.x.c, params.stride_w = t.x.c;
  params.stride_i = 1, params.kernel = t.kernel, params.stride = t.stride;
  params.relu = t.relu, params.dtype = kSingle;
  cpu::conv_unpacked(params, report.threads);
  const Values expected = convolved(t, x, weight, scale, shift, out_shape);
  Values sums(t.x.n * t.c_out);
  const int64_t pixels = out_shape.h * out_shape.w;
  for (int64_t i = 0; i < out_shape.count(); ++i) {
    sums[i / t.c_out / pixels * t.c_out + i % t.c_out] += expected[i];
  }
  const std::string what = "unpacked " + words(t.x) + " to " + std::to_string(t.c_out) +
                           ", kernel " + std::to_string(t.kernel) + ", stride " +
                           std::to_string(t.stride);
  report.compare(what, out, expected);
  report.compare(what + ", its pool", pool, sums);
  if (t.stride == 1) check_gradient(report, kUnpacked, t, kSingle);

  Tensor g = Tensor::slot(kSingle, out_shape).random();
  Tensor dweight = Tensor::packed(kSingle, t.c_out * size);
  Tensor dscale = Tensor::packed(kSingle, t.c_out), dshift = Tensor::packed(kSingle, t.c_out);
  ConvUnpackedWeightGradParams grad{};
  grad.x = x.view(), grad.g = g.view(), grad.weight = weight.array(), grad.scale = scale.data();
  grad.dweight = dweight.data(), grad.dscale = dscale.data(), grad.dshift = dshift.data();
  grad.n = t.x.n, grad.height = t.x.h, grad.width = t.x.w, grad.c_in = t.x.c;
  grad.out_height = out_shape.h, grad.out_width = out_shape.w, grad.c_out = t.c_out;
  grad.stride_o = size, grad.stride_h = t.kernel * t.x.c, grad.stride_w = t.x.c;
  grad.stride_i = 1, grad.kernel = t.kernel, grad.stride = t.stride, grad.dtype = kSingle;
  cpu::conv_unpacked_weight_grad(grad, report.threads);
  Values by_weight(t.c_out * size), by_scale(t.c_out), by_shift(t.c_out);
  for (int64_t i = 0; i < out_shape.count(); ++i) {
    const int64_t o = i % t.c_out, w = i / t.c_out % out_shape.w;
    const int64_t h = i / t.c_out / out_shape.w % out_shape.h, n = i / t.c_out / pixels;
    by_shift[o] += g.get(i);
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int64_t in_h = h * t.stride + tap / t.kernel - t.kernel / 2;
      const int64_t in_w = w * t.stride + tap % t.kernel - t.kernel / 2;
      if (in_h < 0 || in_h >= t.x.h || in_w < 0 || in_w >= t.x.w) continue;
      for (int64_t c = 0; c < t.x.c; ++c) {
        const int64_t k = (o * taps + tap) * t.x.c + c;
        const double product = g.get(i) * x.at(n, in_h, in_w, c);
        by_weight[k] += product * scale.get(o);
        by_scale[o] += product * weight.get(k);
      }
    }
  }
  report.compare(what + ", its weight's gradient", dweight, by_weight);
  report.compare(what + ", its scale's gradient", dscale, by_scale);
  report.compare(what + ", its shift's gradient", dshift, by_shift);
}

void check_convolutions(Report& report) {
  std::vector<ConvCase> cases = {
      {{2, 10, 7, 3}, 19, 3, 2, 1},  {{1, 9, 11, 35}, 40, 3, 1, 1}, {{2, 7, 9, 33}, 17, 3, 2, 1},
      {{1, 11, 8, 64}, 32, 3, 2, 0}, {{2, 5, 3, 80}, 96, 3, 1, 1},  {{2, 17, 31, 33}, 24, 1, 1, 1},
      {{1, 9, 12, 32}, 24, 1, 2, 1}, {{1, 4, 6, 320}, 33, 1, 1, 0}, {{1, 1, 1, 1}, 1, 1, 1, 1},
      {{1, 1, 1, 16}, 16, 3, 1, 1},  {{1, 2, 33, 48}, 50, 3, 1, 0},
  };
  for (int64_t width = 1; width < 14; ++width) {  // Every number of pixels that a block can have.
    cases.push_back({{1, 1, width, 18}, 20, 1, 1, 1});
    cases.push_back({{1, 3, width, 18}, 20, 3, 1, 1});
  }
  if (cpu::conv_unpacked_runs()) {
    for (const ConvCase& t : cases) check_unpacked(report, t);
  }
  for (const std::string& engine : cpu::conv_engines()) {
    const bool only_bf16 = engine != "fma";
    for (const int32_t dtype : kStored) {
      if (only_bf16 && dtype != kBrain) continue;
      for (const ConvCase& t : cases) {
        check_conv(report, engine, t, dtype);
        if (t.stride == 1) check_gradient(report, engine, t, dtype);
      }
    }
    if (!only_bf16) check_conv(report, engine, {{1, 30, 64, 64}, 16, 1, 1, 1}, kSingle);
  }
}

void check_winograd(Report& report) {
  const std::vector<ConvCase> cases = {
      {{1, 1, 1, 1}, 1, 3, 1, 1},    {{2, 5, 3, 33}, 17, 3, 1, 1},  {{1, 9, 22, 70}, 40, 3, 1, 0},
      {{1, 4, 8, 16}, 16, 3, 1, 1},  {{3, 13, 6, 48}, 96, 3, 1, 1}, {{1, 2, 33, 100}, 50, 3, 1, 0},
      {{1, 31, 29, 32}, 32, 3, 1, 1}};
  for (const int64_t side : {2, 4}) {
    for (const ConvCase& t : cases) {
      const Shape shape{t.x.n, t.x.h, t.x.w, t.c_out};
      Tensor x = Tensor::slot(kSingle, t.x).random(), out = Tensor::slot(kSingle, shape);
      Tensor weight = Tensor::packed(kSingle, t.c_out * 9 * t.x.c).random();
      Tensor scale = Tensor::packed(kSingle, t.c_out).random(0.5, 2);
      Tensor shift = Tensor::packed(kSingle, t.c_out).random();
      void* tiles = std::aligned_alloc(64, cpu::conv_winograd_pack_bytes(side, t.c_out, t.x.c));
      cpu::conv_winograd_pack({weight.array(), Array{}, tiles, t.c_out, 3, t.x.c, 9 * t.x.c,
                               3 * t.x.c, t.x.c, 1, 0, kSingle},
                              side, report.threads);
      ConvParams params{};
      params.x = x.view(), params.out = out.view(), params.tiles = tiles;
      params.scale = scale.data(), params.shift = shift.data();
      params.n = t.x.n, params.height = params.out_height = t.x.h, params.c_in = t.x.c;
      params.width = params.out_width = t.x.w, params.c_out = t.c_out;
      params.kernel = 3, params.stride = 1, params.relu = t.relu, params.dtype = kSingle;
      cpu::conv_winograd(params, side, report.threads);
      std::free(tiles);
      report.compare("Winograd " + words(t.x) + " to " + std::to_string(t.c_out) + ", side " +
                         std::to_string(side),
                     out, convolved(t, x, weight, scale, shift, shape));
    }
  }
}

// ---- Depthwise ---------------------------------------------------------------------------------

// each(output, input, tap): places of a channel, as indices of pixels.
void for_taps(const Shape& x, int32_t stride,
              const std::function<void(int64_t, int64_t, int64_t)>& each) {
  const int64_t out_h = strided(x.h, stride), out_w = strided(x.w, stride);
  for (int64_t i = 0; i < x.n * out_h * out_w * 9; ++i) {
    const int64_t pixel = i / 9, tap = i % 9, n = pixel / (out_h * out_w);
    const int64_t h = pixel / out_w % out_h * stride + tap / 3 - 1;
    const int64_t w = pixel % out_w * stride + tap % 3 - 1;
    if (h < 0 || h >= x.h || w < 0 || w >= x.w) continue;
    each(pixel, (n * x.h + h) * x.w + w, tap);
  }
}

void check_depthwise(Report& report, const Shape& s, int32_t stride, int32_t dtype) {
  const Shape o{s.n, strided(s.h, stride), strided(s.w, stride), s.c};
  const std::string what = words(s) + ", stride " + std::to_string(stride);
  Tensor x = Tensor::slot(dtype, s).random(), out = Tensor::slot(dtype, o);
  Tensor g = Tensor::slot(dtype, o).random(), dx = Tensor::slot(dtype, s);
  Tensor add = Tensor::slot(dtype, s).random(), mask = Tensor::slot(dtype, s).random();
  Tensor weight = Tensor::packed(dtype, 9 * s.c).random();
  Values y(o.count()), dy(s.count()), dw(9 * s.c);
  for (int64_t i = 0; i < s.count(); ++i) dy[i] = add.get(i);
  for_taps(s, stride, [&](int64_t pixel, int64_t input, int64_t tap) {
    for (int64_t c = 0; c < s.c; ++c) {
      const double gradient = g.get(pixel * s.c + c), w = weight.get(tap * s.c + c);
      y[pixel * s.c + c] += x.get(input * s.c + c) * w;
      dy[input * s.c + c] += gradient * w;
      dw[tap * s.c + c] += x.get(input * s.c + c) * gradient;
    }
  });
  for (int64_t i = 0; i < s.count(); ++i) {
    if (mask.get(i) <= 0) dy[i] = 0;
  }
  VF_CALL(depthwise, (DepthwiseParams{x.view(), out.view(), weight.data(), s.n, s.h, s.w, o.h, o.w,
                                      s.c, stride, dtype}));
  VF_CALL(depthwise_input_grad,
          (DepthwiseInputGradParams{g.view(), dx.view(), add.view(), mask.view(), weight.data(),
                                    s.n, s.h, s.w, o.h, o.w, s.c, stride, dtype}));
  const int64_t parts = cpu::reduction_parts(o.n, o.h, o.w, o.c);
  Tensor partials = Tensor::packed(high(dtype), o.n * parts * 9 * s.c);
  Tensor dweight = Tensor::packed(high(dtype), 9 * s.c);
  VF_CALL(depthwise_weight_grad,
          (DepthwiseWeightGradParams{x.view(), g.view(), partials.data(), dweight.data(), s.n, s.h,
                                     s.w, o.h, o.w, s.c, parts, stride, dtype}));
  report.compare("depthwise " + what, out, y);
  report.compare("depthwise_input_grad " + what, dx, dy);
  report.compare("depthwise_weight_grad " + what, dweight, dw);
  report.around("partials of depthwise_weight_grad " + what, partials);
}

// ---- Pooling -----------------------------------------------------------------------------------

void check_max_pool(Report& report, const Shape& s, int32_t pad, int32_t dtype) {
  const Shape o{s.n, pad == 0 ? s.h / 2 : strided(s.h, 2), pad == 0 ? s.w / 2 : strided(s.w, 2),
                s.c};
  if (o.count() == 0) return;
  const std::string what = words(s) + ", pad " + std::to_string(pad);
  Tensor x = Tensor::slot(dtype, s).random(), out = Tensor::slot(dtype, o);
  Tensor g = Tensor::slot(dtype, o).random(), dx = Tensor::slot(dtype, s);
  std::vector<uint8_t> argmax(o.count() + 8, 0xff), taps;
  Values y, dy(s.count());
  for (int64_t i = 0; i < o.count(); ++i) {
    const int64_t c = i % s.c, w = i / s.c % o.w, h = i / s.c / o.w % o.h, n = i / s.c / o.w / o.h;
    int best = -1;
    double most = 0;
    int64_t from = 0;
    for (int tap = 0; tap < 9; ++tap) {
      const int64_t in_h = 2 * h + tap / 3 - pad, in_w = 2 * w + tap % 3 - pad;
      if (in_h < 0 || in_h >= s.h || in_w < 0 || in_w >= s.w) continue;
      const double value = x.at(n, in_h, in_w, c);
      if (best >= 0 && value <= most) continue;
      best = tap, most = value, from = ((n * s.h + in_h) * s.w + in_w) * s.c + c;
    }
    y.push_back(most);
    taps.push_back(static_cast<uint8_t>(best));
    dy[from] += g.get(i);
  }
  VF_CALL(max_pool, (MaxPoolParams{x.view(), out.view(), argmax.data(), s.n, s.h, s.w, o.h, o.w,
                                   s.c, pad, dtype}));
  VF_CALL(max_pool_backward, (MaxPoolBackwardParams{g.view(), dx.view(), argmax.data(), s.n, s.h,
                                                    s.w, o.h, o.w, s.c, pad, dtype}));
  taps.resize(argmax.size(), 0xff);
  report.compare("max_pool " + what, out, y);
  report.same("max_pool, where it was, " + what, argmax == taps);
  report.compare("max_pool_backward " + what, dx, dy);
}

// ---- Storage -----------------------------------------------------------------------------------

// Every number of 16 bits, and its products with a gate: what they are widened and rounded to.
void check_conversions(Report& report, int32_t dtype) {
  const int64_t c = 1 << 16;
  Tensor z = Tensor::packed(dtype, c), out = Tensor::packed(dtype, c);
  Tensor gates = Tensor::packed(kSingle, c);
  for (int64_t i = 0; i < c; ++i) {
    const auto bits = static_cast<uint16_t>(i);
    memcpy(static_cast<char*>(z.data()) + 2 * i, &bits, 2);
    gates.set(i, std::ldexp(1 + uniform(), static_cast<int>(uniform() * 24) - 20));
  }
  VF_CALL(apply_gates,
          (ApplyGatesParams{z.view(), out.view(), View{}, gates.data(), 1, 1, 1, c, dtype}));
  int64_t wrong = 0;
  for (int64_t i = 0; i < c; ++i) {
    const double expected = rounded(dtype, rounded(kSingle, z.get(i) * gates.get(i)));
    const double found = out.get(i);
    wrong += std::isnan(expected) ? !std::isnan(found) : found != expected;
  }
  report.same(std::string("conversions of ") + format(dtype).name, wrong == 0);
  report.around("conversions", out);
}

}  // namespace

void check_winograd_where_it_runs(Report& report) {
  if (cpu::conv_winograd_runs()) check_winograd(report);
}

void check_layers(Report& report) {
  for (const int32_t dtype : kAll) {
    for (const Shape& s : kShapes) {
      for (const int32_t stride : {1, 2}) check_depthwise(report, s, stride, dtype);
      for (const int32_t pad : {0, 1}) check_max_pool(report, s, pad, dtype);
    }
  }
  check_conversions(report, kHalf);
  check_conversions(report, kBrain);
}

void check_all(Report& report) {
  for (const auto check :
       {check_convolutions, check_winograd_where_it_runs, check_layers, check_epilogue,
        check_accumulate, check_gates, check_batch_norm, check_pack}) {
    random_state() = 1;
    check(report);
  }
}

}  // namespace driver

int main(int count, char** words) {
  const std::string option = count > 1 ? words[1] : "";
  if (option == "--isa") {
    try {
      cpu::choose_isa();
    } catch (const std::invalid_argument& error) {
      puts(error.what());
      return 1;
    }
    puts(cpu::isa().c_str());
    return 0;
  }
  driver::Report report;
  report.spoil = option == "--spoil";
  for (const std::string& isa : cpu::isas()) {
    cpu::use_isa(isa);
    for (const int threads : {1, 3}) {
      report.threads = threads;
      report.called.clear();
      driver::check_all(report);
    }
    std::string engines;
    for (const std::string& engine : cpu::conv_engines()) engines += " " + engine;
    printf("instruction set %s, convolutions:%s\n", isa.c_str(), engines.c_str());
#define VF_CALLED(name, Params) \
  if (report.called.count(#name) == 0) report.tell("nobody has called " #name, false, 0);
    VF_OPS(VF_CALLED)
#undef VF_CALLED
  }
  printf("compared %lld, wrong %lld\n", static_cast<long long>(report.compared),
         static_cast<long long>(report.wrong));
  return report.wrong == 0 ? 0 : 1;
}
