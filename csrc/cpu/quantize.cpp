// levels
//
// wush::transform_quantize: rows times their blocks' transforms, then scales and codes of each group.

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "convert.h"
#include "feedback.h"
#include "kernels.h"
#include "simd.h"

namespace wush::cpu::WUSH_LEVEL {
namespace {

// -- scales and codes of one group: formats.py's functions of the same names ------------------------------------------

template <int G>
constexpr int kVectors = G / kLanes;                     // of a group

// A power of two whose sum with `a`, from 0 to 8, is rounded to e2m1's spacing there.
inline Floats rounder(Floats a) {
  return floats(add(both(bits(most(a, all(1.f))), every(0x7f800000)), every(22 << 23)));
}

// Sums over a group, in the order that is part of the format.
template <int G, class Term>
float group_sum(const Floats* x, Term term) {
  float sums[kVectors<G>];
  for (int i = 0; i < kVectors<G>; i++) sums[i] = tree_sum(term(x[i]));
  for (int n = kVectors<G> / 2; n >= 1; n /= 2)
    for (int i = 0; i < n; i++) sums[i] = sums[2 * i] + sums[2 * i + 1];
  return sums[0];
}

template <int G>
float squared_error(const Floats* x, float inverse, float unit) {
  return group_sum<G>(x, [&](Floats v) {
    const Floats a = magnitude(mul(v, all(inverse))), held = least(a, all(8.f)), c = rounder(held);
    const Floats error = mul(sub(a, least(sub(add(held, c), c), all(6.f))), all(unit));
    return mul(error, error);
  });
}

template <int G>
float halved_scale_gain(const Floats* x, float inverse) {
  return group_sum<G>(x, [&](Floats v) {
    const Floats a = mul(magnitude(v), all(inverse));
    const Floats distance = magnitude(sub(magnitude(sub(a, all(.5f))), all(.25f)));
    const Floats above = least(most(sub(a, all(3.5f)), zero()), all(1.f));
    return sub(most(sub(all(.125f), distance), zero()), mul(above, all(4.f)));
  });
}

template <int G>
int mxfp4_scale(const Floats* x, float amax, Rule rule) {
  const uint32_t b = to_bits(amax);
  const int exponent = b >> 23;
  if (rule == Rule::paper) return std::clamp(exponent, 1, 254);
  if (rule == Rule::ocp) return std::clamp(exponent - 2, 1, 254);
  const int best = std::clamp(exponent - 2 + ((b & 0x7fffff) > 0x400000), 1, 254);
  if (rule == Rule::absmax) return best;
  return halved_scale_gain<G>(x, exp2_of(127 - best)) > 0 ? std::max(best - 1, 1) : best;
}

int e4m3_byte(float x) {                                 // of 0 to 448
  const int exponent = std::max(int(to_bits(x) >> 23) - 127, -6);
  return int(std::nearbyintf(x * exp2_of(3 - exponent))) + ((exponent + 6) << 3);
}

template <int G>
int search_nvfp4(const Floats* x, int first, float g) {
  auto error = [&](int byte) {
    const float s = e4m3_value(byte);
    return squared_error<G>(x, g / s, s);
  };
  int best = first;
  float least = error(first);
  for (int offset : {-1, 4, 5}) {
    const int byte = std::clamp(first + offset, 0x01, 0x7e);
    const float e = error(byte);
    if (e < least) {
      best = byte;
      least = e;
    }
  }
  return best;
}

template <int G>
int nvfp4_scale(const Floats* x, float amax, Rule rule, float g) {
  auto byte_for = [&](float largest) {
    return std::clamp(e4m3_byte(std::min(amax * (g / largest), 448.f)), 0x01, 0x7e);
  };
  const int best = byte_for(6.f);
  if (rule == Rule::search) return search_nvfp4<G>(x, best, g);
  if (rule != Rule::mse) return best;
  const int narrow = byte_for(4.f);
  const float s0 = e4m3_value(best), s1 = e4m3_value(narrow);
  return squared_error<G>(x, g / s1, s1) < squared_error<G>(x, g / s0, s0) ? narrow : best;
}

// With `batch` the group's codes follow when the batch is rounded.
template <int G>
void quantize_group(const float* values, const Quantize& q, int64_t at, int64_t index, Batch<G>* batch) {
  uint8_t *codes = q.codes + at / 2, *scale = q.scales + at / G;
  Floats x[kVectors<G>];
  // The bits of non-negative floats are ordered as the floats are; those of Inf and NaN are above all others.
  Integers top = every(0);
  for (int i = 0; i < kVectors<G>; i++) {
    x[i] = load(values + i * kLanes);
    top = most(top, bits(magnitude(x[i])));
  }
  const int b = largest(top);
  if (b >= 0x7f800000) {
    *scale = G == 32 ? 0xff : 0x7f;
    std::fill(codes, codes + G / 2, 0);
    return;
  }
  const float amax = from_bits(b);
  float unit, inverse;
  if constexpr (G == 32) {
    *scale = mxfp4_scale<G>(x, amax, q.rule);
    unit = exp2_of(*scale - 127), inverse = exp2_of(127 - *scale) * q.global_scale;
  } else {
    *scale = nvfp4_scale<G>(x, amax, q.rule, q.global_scale);
    unit = e4m3_value(*scale), inverse = q.global_scale / unit;
  }
  if (batch) return batch->push(x, inverse, unit, amax, q.feedback + index * Batch<G>::kNumbers, codes);
  for (int i = 0; i < kVectors<G>; i++) {
    const Floats v = mul(x[i], all(inverse)), a = least(magnitude(v), all(6.f));
    const Integers sum = bits(add(a, rounder(a)));       // (149 + e) << 23 | the number of steps, for 2^e <= max(a, 1)
    const Integers code = add(add(both(sum, every(7)), shift_right<22>(sum)), every(-298));
    store_nibbles(codes + i * kLanes / 2, either(code, both(shift_right<28>(bits(v)), every(8))));
  }
}

// -- the transform ----------------------------------------------------------------------------------------------------

// y[r][i] = Σ_j x[r][j] · T[i][j], with `transposed` T[j][i]; block is a multiple of kLanes.
template <int ROWS>
void transform_rows(const float* x, const float* transposed, int64_t block, int64_t stride, float* y) {
  for (int64_t i = 0; i < block; i += kLanes) {
    Floats sums[ROWS];
    for (int r = 0; r < ROWS; r++) sums[r] = zero();
    for (int64_t j = 0; j < block; j++) {
      const Floats t = load(transposed + j * block + i);
      for (int r = 0; r < ROWS; r++) sums[r] = fma(all(x[r * stride + j]), t, sums[r]);
    }
    for (int r = 0; r < ROWS; r++) store(y + r * stride + i, sums[r]);
  }
}

void read_transposed(const Quantize& q, int64_t index, float* out) {
  const int64_t b = q.block, start = (q.blocks == 1 ? 0 : index) * b * b;
  for (int64_t i = 0; i < b; i++)
    for (int64_t j = 0; j < b; j++) out[j * b + i] = read(q.transform, q.transform_type, start + i * b + j);
}

constexpr int kRows = 8;                                 // rows that are transformed together

// Units run over the rows of one range of channels, then over those of the next. So a transform is read once.
template <int G>
void quantize_units(const Quantize& q, int64_t begin, int64_t end) {
  const int64_t unit = q.unit();
  // One for each group of a unit: many rows, one after the other, then have the same F.
  std::vector<Batch<G>> batches(q.feedback ? unit / G : 0, Batch<G>(q.global_scale));
  std::vector<float> x(kRows * unit), y(kRows * unit), transposed(q.transform ? unit / q.block * q.block * q.block : 0);
  int64_t loaded = -1;
  for (int64_t index = begin; index < end;) {
    const int64_t range = index / q.rows, row = index % q.rows;
    const int64_t rows = std::min({int64_t(kRows), q.rows - row, end - index});
    const int64_t channel = range * unit;
    for (int64_t r = 0; r < rows; r++)
      for (int64_t k = 0; k < unit; k += kLanes)
        store(x.data() + r * unit + k, read_vector(q.x, q.type, (row + r) * q.stride + channel + k));
    const float* values = x.data();
    if (q.transform) {
      const int64_t b = q.block, count = unit / b;
      if (loaded != range && (q.blocks > 1 || loaded < 0))
        for (int64_t c = 0; c < count; c++) read_transposed(q, channel / b + c, transposed.data() + c * b * b);
      loaded = range;
      for (int64_t c = 0; c < count; c++) {
        const float* t = transposed.data() + c * b * b;
        if (rows == kRows) {
          transform_rows<kRows>(x.data() + c * b, t, b, unit, y.data() + c * b);
        } else {
          for (int64_t r = 0; r < rows; r++)
            transform_rows<1>(x.data() + r * unit + c * b, t, b, unit, y.data() + r * unit + c * b);
        }
      }
      values = y.data();
    }
    for (int64_t k = 0; k < unit; k += G)
      for (int64_t r = 0; r < rows; r++)
        quantize_group<G>(values + r * unit + k, q, (row + r) * q.width + channel + k, (channel + k) / G,
                          q.feedback ? &batches[k / G] : nullptr);
    index += rows;
  }
  for (auto& batch : batches) batch.finish();
}

}  // namespace

void quantize(const Quantize& q, int64_t begin, int64_t end) {
  (q.format == Format::mxfp4 ? quantize_units<32> : quantize_units<16>)(q, begin, end);
}

}  // namespace wush::cpu::WUSH_LEVEL
