// Of cpu_driver.cpp: epilogues, gates, batch norm, and weights.
#include <algorithm>

#include "cpu_driver.h"

using namespace vovnet_fast;

namespace driver {

namespace {

double masked(double gradient, double y) { return y <= 0 ? 0 : gradient; }

// The numbers of a tensor.
Values values(const Tensor& x) {
  Values y;
  for (int64_t i = 0; i < x.count(); ++i) y.push_back(x.get(i));
  return y;
}

// Count, sum and squared deviations of a channel's pixels [first, last) of the tensor.
struct Moments {
  double count = 0, sum = 0, m2 = 0;

  Moments(const Tensor& x, int64_t channels, int64_t c, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) sum += x.get(i * channels + c);
    count = static_cast<double>(last - first);
    for (int64_t i = first; i < last; ++i) {
      const double deviation = x.get(i * channels + c) - sum / count;
      m2 += deviation * deviation;
    }
  }
};

void check_epilogue(Report& report, const Shape& s, int32_t dtype) {
  const int64_t pixels = s.h * s.w, tiles = (pixels + kTilePixels - 1) / kTilePixels;
  Tensor z = Tensor::slot(dtype, s).random(), out = Tensor::slot(dtype, s);
  Tensor copy = Tensor::slot(dtype, s);
  Tensor scale = Tensor::packed(high(dtype), s.c).random(0.5, 2);
  Tensor shift = Tensor::packed(high(dtype), s.c).random();
  Tensor pool = Tensor::packed(high(dtype), s.n * tiles * s.c);
  Tensor statistics = Tensor::packed(high(dtype), s.n * tiles * 3 * s.c);
  Values y(s.count()), sums(s.n * tiles * s.c), counts(s.n * tiles * 3 * s.c);
  for (int64_t i = 0; i < s.count(); ++i) {
    const int64_t c = i % s.c, pixel = i / s.c % pixels, n = i / s.c / pixels;
    y[i] = std::max(z.get(i) * scale.get(c) + shift.get(c), 0.0);
    sums[(n * tiles + pixel / kTilePixels) * s.c + c] += y[i];
  }
  for (int64_t i = 0; i < s.n * tiles * s.c; ++i) {
    const int64_t c = i % s.c, tile = i / s.c % tiles, n = i / s.c / tiles;
    const int64_t last = std::min((tile + 1) * kTilePixels, pixels);
    const Moments m(z, s.c, c, n * pixels + tile * kTilePixels, n * pixels + last);
    double* to = counts.data() + (i / s.c) * 3 * s.c + c;
    to[0] = m.count, to[s.c] = m.sum, to[2 * s.c] = m.m2;
  }
  VF_CALL(epilogue, (EpilogueParams{z.view(), out.view(), s.n, s.h, s.w, s.c, scale.data(),
                                    shift.data(), pool.data(), nullptr, 1, dtype}));
  VF_CALL(epilogue, (EpilogueParams{z.view(), copy.view(), s.n, s.h, s.w, s.c, nullptr, nullptr,
                                    nullptr, statistics.data(), 0, dtype}));
  report.compare("epilogue " + words(s), out, y);
  report.compare("epilogue, its pool, " + words(s), pool, sums);
  report.compare("epilogue, a copy, " + words(s), copy, values(z));
  report.compare("epilogue, its statistics, " + words(s), statistics, counts);
}

void check_accumulate(Report& report, const Shape& s, int32_t dtype) {
  const int64_t added = s.c / 2 + 1, unmasked = s.c / 3;
  Tensor z = Tensor::slot(dtype, s).random(), out = Tensor::slot(dtype, s);
  Tensor add = Tensor::slot(dtype, {s.n, s.h, s.w, added}).random();
  Tensor mask = Tensor::slot(dtype, {s.n, s.h, s.w, s.c - unmasked}).random();
  Values y = values(z);
  for (int64_t i = 0; i < s.count(); ++i) {
    const int64_t c = i % s.c, pixel = i / s.c;
    if (c < added) y[i] += add.get(pixel * added + c);
    if (c >= unmasked) y[i] = masked(y[i], mask.get(pixel * (s.c - unmasked) + c - unmasked));
  }
  VF_CALL(accumulate, (AccumulateParams{z.view(), out.view(), add.view(), mask.view(), s.n, s.h,
                                        s.w, s.c, added, s.c - unmasked, dtype}));
  report.compare("accumulate " + words(s), out, y);
}

// ---- Gates -------------------------------------------------------------------------------------

// The gate's two products, on their own: from partials to gates, and back.
void check_fc(Report& report, int64_t n, int64_t c, int32_t kind, int32_t weights, int32_t dtype) {
  const int64_t tiles = 3, num_pixels = 70;
  Tensor partials = Tensor::packed(dtype, n * tiles * c).random(-40, 40);
  Tensor mean = Tensor::packed(dtype, n * c), out = Tensor::packed(dtype, n * c);
  Tensor weight = Tensor::packed(weights, c * c).random(),
         bias = Tensor::packed(weights, c).random();
  Values means(n * c), y(n * c);
  for (int64_t i = 0; i < n * tiles * c; ++i) {
    means[i / c / tiles * c + i % c] += partials.get(i) / num_pixels;
  }
  for (int64_t i = 0; i < n * c; ++i) {
    double sum = bias.get(i % c);
    for (int64_t k = 0; k < c; ++k) sum += weight.get(i % c * c + k) * means[i / c * c + k];
    y[i] = kind == kSigmoid ? 1 / (1 + std::exp(-sum)) : std::clamp((sum + 3) / 6, 0.0, 1.0);
  }
  VF_CALL(gates, (GatesParams{partials.data(), mean.data(), out.data(), weight.array(),
                              bias.array(), n, tiles, c, num_pixels, kind, dtype}));
  const Values stored_mean = values(mean), stored = values(out);
  Tensor dgates = Tensor::packed(dtype, n * c).random(), dpixel = Tensor::packed(dtype, n * c);
  Tensor dweight = Tensor::packed(dtype, c * c), dbias = Tensor::packed(dtype, c);
  VF_CALL(gates_backward, (GatesBackwardParams{dgates.data(), out.data(), mean.data(),
                                               weight.array(), dpixel.data(), dweight.data(),
                                               dbias.data(), n, c, num_pixels, kind, dtype}));
  Values pixel(n * c), by_weight(c * c), by_bias(c);
  double largest = 0, largest_product = 0;
  for (int64_t i = 0; i < n * c; ++i) {
    const double gate = stored[i];
    const bool flat = gate <= 0 || gate >= 1;
    const double slope = kind == kSigmoid ? gate * (1 - gate) : flat ? 0 : 1.0 / 6;
    const double gradient = dgates.get(i) * slope;
    by_bias[i % c] += gradient;
    largest = std::max(largest, std::fabs(gradient));
    for (int64_t k = 0; k < c; ++k) {
      const double product = gradient * stored_mean[i / c * c + k];
      by_weight[i % c * c + k] += product;
      largest_product = std::max(largest_product, std::fabs(product));
      pixel[i / c * c + k] += gradient * weight.get(i % c * c + k) / num_pixels;
    }
  }
  const std::string what = std::to_string(c) + " channels, kind " + std::to_string(kind);
  report.compare("gates " + what, out, y);
  report.compare("gates, their means, " + what, mean, means);
  report.compare("gates_backward, dpixel, " + what, dpixel, pixel);
  report.compare("gates_backward, dfc_weight, " + what, dweight, by_weight, largest_product);
  report.compare("gates_backward, dfc_bias, " + what, dbias, by_bias, largest);
}

void check_apply(Report& report, const Shape& s, int32_t dtype) {
  const int64_t pixels = s.h * s.w, parts = cpu::reduction_parts(s.n, s.h, s.w, s.c);
  Tensor z = Tensor::slot(dtype, s).random(), identity = Tensor::slot(dtype, s).random();
  Tensor out = Tensor::slot(dtype, s), dz = Tensor::slot(dtype, s);
  Tensor dout = Tensor::slot(dtype, s).random();
  Tensor gates = Tensor::packed(high(dtype), s.n * s.c).random(0, 1);
  Tensor dpixel = Tensor::packed(high(dtype), s.n * s.c).random();
  Tensor partials = Tensor::packed(high(dtype), s.n * parts * s.c);
  Tensor sums = Tensor::packed(high(dtype), s.n * s.c);
  Values y(s.count()), gradient(s.count()), dgates(s.n * s.c);
  for (int64_t i = 0; i < s.count(); ++i) {
    const int64_t channel = i / s.c / pixels * s.c + i % s.c;
    y[i] = z.get(i) * gates.get(channel) + identity.get(i);
    gradient[i] = masked(dout.get(i) * gates.get(channel) + dpixel.get(channel), z.get(i));
    dgates[channel] += dout.get(i) * z.get(i);
  }
  VF_CALL(apply_gates, (ApplyGatesParams{z.view(), out.view(), identity.view(), gates.data(), s.n,
                                         s.h, s.w, s.c, dtype}));
  VF_CALL(gate_sums, (GateSumsParams{dout.view(), z.view(), partials.data(), sums.data(), s.n, s.h,
                                     s.w, s.c, parts, dtype}));
  VF_CALL(apply_gates_backward,
          (ApplyGatesBackwardParams{dout.view(), z.view(), dz.view(), gates.data(), dpixel.data(),
                                    s.n, s.h, s.w, s.c, dtype}));
  report.compare("apply_gates " + words(s), out, y);
  report.compare("gate_sums " + words(s), sums, dgates);
  report.compare("apply_gates_backward " + words(s), dz, gradient);
}

// By one call, and by two: the same numbers.
void check_gated_pool(Report& report, const Shape& s, int32_t pad, int32_t dtype) {
  const auto pooled = [&](int64_t size) { return pad == 0 ? size / 2 : (size + 1) / 2; };
  const Shape o{s.n, pooled(s.h), pooled(s.w), s.c};
  if (o.count() == 0) return;
  Tensor z = Tensor::slot(dtype, s).random(), identity = Tensor::slot(dtype, s).random();
  Tensor gates = Tensor::packed(high(dtype), s.n * s.c).random(0, 1);
  Tensor out = Tensor::slot(dtype, s), again = Tensor::slot(dtype, s);
  Tensor max = Tensor::slot(dtype, o), max_again = Tensor::slot(dtype, o);
  const auto gating = [&](Tensor& to) {
    return ApplyGatesParams{z.view(), to.view(), identity.view(), gates.data(), s.n, s.h, s.w,
                            s.c,      dtype};
  };
  const auto pool = [&](Tensor& from, Tensor& to) {
    return MaxPoolParams{from.view(), to.view(), nullptr, s.n, s.h, s.w, o.h, o.w, s.c, pad, dtype};
  };
  VF_CALL(apply_gates, gating(out));
  VF_CALL(max_pool, pool(out, max));
  vovnet_fast::cpu::gated_pool(gating(again), pool(again, max_again), report.threads);
  Values y, most;
  for (int64_t i = 0; i < s.count(); ++i) y.push_back(out.get(i));
  for (int64_t i = 0; i < o.count(); ++i) most.push_back(max.get(i));
  report.compare("gated_pool, gated, " + words(s), again, y);
  report.compare("gated_pool, pooled, " + words(s), max_again, most);
}

// ---- Batch norm --------------------------------------------------------------------------------

void check_norm(Report& report, const Shape& s, int32_t dtype) {
  const int64_t pixels = s.pixels(), parts = cpu::reduction_parts(s.n, s.h, s.w, s.c);
  const double eps = 1e-3;
  Tensor z = Tensor::slot(dtype, s).random(0.5, 2), g = Tensor::slot(dtype, s).random();
  Tensor dz = Tensor::slot(dtype, s);
  Tensor gamma = Tensor::packed(kHalf, s.c).random(0.5, 2),
         beta = Tensor::packed(dtype, s.c).random();
  Tensor partials = Tensor::packed(high(dtype), s.n * parts * 2 * s.c);
  Tensor few = Tensor::packed(high(dtype), s.n * parts * s.c);
  Tensor norm = Tensor::packed(high(dtype), kNormRows * s.c), made = norm, merged = few;
  Tensor sums = Tensor::packed(high(dtype), 2 * s.c), total = Tensor::packed(high(dtype), s.c);
  merged = Tensor::packed(high(dtype), kStatisticsRows * s.c);

  // The statistics of the pixels in two parts, and of none in a third.
  const int64_t half = (pixels + 1) / 2;
  Tensor statistics = Tensor::packed(high(dtype), 3 * kStatisticsRows * s.c);
  Values all(kStatisticsRows * s.c), rows(kNormRows * s.c), two(2 * s.c), one(s.c), y(s.count());
  for (int64_t c = 0; c < s.c; ++c) {
    const Moments a(z, s.c, c, 0, half), b(z, s.c, c, half, pixels), m(z, s.c, c, 0, pixels);
    const double kept[3][3] = {
        {a.count, a.sum, a.m2}, {0, 0, 0}, {b.count, b.sum, pixels > half ? b.m2 : 0}};
    for (int64_t i = 0; i < 9; ++i) statistics.set(i * s.c + c, kept[i / 3][i % 3]);
    all[c] = m.count, all[s.c + c] = m.sum, all[2 * s.c + c] = m.m2;
    const double mean = m.sum / m.count, rstd = 1 / std::sqrt(m.m2 / m.count + eps);
    const double scale = gamma.get(c) * rstd;
    const double row[] = {mean,   rstd, scale, beta.get(c) - mean * scale, m.m2 / (m.count - 1),
                          m.count};
    for (int64_t r = 0; r < kNormRows; ++r) {
      rows[r * s.c + c] = row[r];
      norm.set(r * s.c + c, row[r]);
    }
    for (int64_t i = c; i < s.count(); i += s.c) {
      one[c] += g.get(i);
      two[c] += g.get(i);
      two[s.c + c] += g.get(i) * (z.get(i) - mean) * rstd;
    }
    for (int64_t i = c; i < s.count(); i += s.c) {
      y[i] =
          scale * (g.get(i) - two[c] / m.count - (z.get(i) - mean) * rstd * two[s.c + c] / m.count);
    }
  }
  VF_CALL(batch_norm_merge, (BatchNormMergeParams{statistics.data(), nullptr, merged.data(), 3, s.c,
                                                  0, high(dtype)}));
  VF_CALL(batch_norm_finish,
          (BatchNormFinishParams{statistics.data(), nullptr, made.data(), gamma.array(),
                                 beta.array(), eps, 3, s.c, 0, high(dtype)}));
  VF_CALL(batch_norm_sums, (BatchNormSumsParams{g.view(), z.view(), norm.data(), partials.data(),
                                                sums.data(), s.n, s.h, s.w, s.c, parts, dtype}));
  VF_CALL(batch_norm_input_grad,
          (BatchNormInputGradParams{g.view(), z.view(), dz.view(), norm.data(), sums.data(),
                                    gamma.array(), s.n, s.h, s.w, s.c, dtype}));
  VF_CALL(channel_sums, (ChannelSumsParams{g.view(), few.data(), total.data(), s.n, s.h, s.w, s.c,
                                           parts, dtype}));
  report.compare("batch_norm_merge " + words(s), merged, all);
  report.compare("batch_norm_finish " + words(s), made, rows);
  report.compare("batch_norm_sums " + words(s), sums, two);
  report.compare("batch_norm_input_grad " + words(s), dz, y);
  report.compare("channel_sums " + words(s), total, one);
}

// ---- Weights -----------------------------------------------------------------------------------

void check_weights(Report& report, int64_t c_out, int64_t kernel, int64_t c_in, int32_t from,
                   int32_t dtype) {
  const int64_t taps = kernel * kernel, count = c_out * taps * c_in, row = kernel * c_in;
  Tensor weight = Tensor::packed(from, count).random();
  Tensor scale = Tensor::packed(high(dtype), c_out).random(0.5, 2);
  Tensor out = Tensor::packed(dtype, count), transposed = out;
  Values y(count), flipped(count), products(count), dscale(c_out);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t k = i % c_in, tap = i / c_in % taps, o = i / c_in / taps;
    y[i] = weight.get(i) * scale.get(o);
    flipped[(k * taps + taps - 1 - tap) * c_out + o] = y[i];
  }
  const PackParams params{weight.array(), scale.array(), out.data(), c_out, kernel, c_in,
                          kernel * row,   row,           c_in,       1,     dtype};
  PackParams other = params;
  other.out = transposed.data();
  VF_CALL(pack, params);
  VF_CALL(pack_transposed, other);
  const std::string what = words({c_out, kernel, kernel, c_in}) + " from " + format(from).name;
  report.compare("pack " + what, out, y);
  report.compare("pack_transposed " + what, transposed, flipped);

  const int32_t number = high(dtype);
  Tensor gradients = Tensor::packed(dtype, count).random();
  Tensor dweight = Tensor::packed(number, count), sums = Tensor::packed(number, c_out);
  for (int64_t i = 0; i < count; ++i) {
    products[i] = gradients.get(i) * scale.get(i / c_in / taps);
    dscale[i / c_in / taps] += gradients.get(i) * weight.get(i);
  }
  VF_CALL(pack_backward, (PackBackwardParams{gradients.array(), weight.array(), scale.data(),
                                             dweight.data(), sums.data(), c_out, kernel, c_in,
                                             kernel * row, row, c_in, 1, number}));
  report.compare("pack_backward " + what, dweight, products);
  report.compare("pack_backward, dscale, " + what, sums, dscale);
}

}  // namespace

void check_epilogue(Report& report) {
  for (const int32_t dtype : kAll) {
    for (const Shape& s : kShapes) check_epilogue(report, s, dtype);
    check_epilogue(report, {1, 19, 17, 21}, dtype);  // Two tiles, the second one smaller.
  }
}

void check_accumulate(Report& report) {
  for (const int32_t dtype : kAll) {
    for (const Shape& s : kShapes) check_accumulate(report, s, dtype);
  }
}

void check_gates(Report& report) {
  for (const int32_t dtype : kAll) {
    for (const Shape& s : kShapes) check_apply(report, s, dtype);
    for (const Shape& s : kShapes) {
      for (const int32_t pad : {0, 1}) check_gated_pool(report, s, pad, dtype);
    }
    check_gated_pool(report, {3, 17, 31, 40}, 0, dtype);  // Of which each thread has some rows.
    for (const int32_t kind : {kHardSigmoid, kSigmoid}) {
      for (const int64_t c : {1, 21, 48}) check_fc(report, 2, c, kind, dtype, high(dtype));
    }
  }
}

void check_batch_norm(Report& report) {
  for (const int32_t dtype : kAll) {
    for (const Shape& s : kShapes) check_norm(report, s, dtype);
  }
}

void check_pack(Report& report) {
  for (const int32_t from : kAll) {
    for (const int32_t dtype : kAll) {
      check_weights(report, 19, 3, 5, from, dtype);
      check_weights(report, 35, 1, 37, from, dtype);
    }
  }
}

}  // namespace driver
