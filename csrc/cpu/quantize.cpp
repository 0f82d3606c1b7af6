// levels
//
// wush::transform_quantize: rows times their blocks' transforms, then scales and codes of each group.

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "convert.h"
#include "kernels.h"
#include "simd.h"

namespace wush::cpu::WUSH_LEVEL {
namespace {

// -- scales and codes of one group: formats.py's functions of the same names ------------------------------------------

float halves(float m) { return std::nearbyintf(std::min(m, 2.f) * 2.f); }
float ones(float m) { return std::nearbyintf(std::clamp(m - 2.f, 0.f, 2.f)); }
float twos(float m) { return std::nearbyintf(std::clamp(m - 4.f, 0.f, 2.f) * .5f); }

// Neighbours first; the order is part of the format.
template <int G>
float tree_sum(float* v) {
  for (int n = G / 2; n >= 1; n /= 2)
    for (int i = 0; i < n; i++) v[i] = v[2 * i] + v[2 * i + 1];
  return v[0];
}

template <int G>
float squared_error(const float* x, float inverse, float unit) {
  float d[G];
  for (int i = 0; i < G; i++) {
    const float v = std::fabs(x[i] * inverse);
    const float error = (v - (halves(v) * .5f + ones(v) + twos(v) * 2.f)) * unit;
    d[i] = error * error;
  }
  return tree_sum<G>(d);
}

template <int G>
float halved_scale_gain(const float* x, float inverse) {
  float d[G];
  for (int i = 0; i < G; i++) {
    const float v = std::fabs(x[i]) * inverse;
    const float gain = std::max(.125f - std::fabs(std::fabs(v - .5f) - .25f), 0.f);
    d[i] = gain - std::clamp(v - 3.5f, 0.f, 1.f) * 4.f;
  }
  return tree_sum<G>(d);
}

template <int G>
int mxfp4_scale(const float* x, float amax, Rule rule) {
  const uint32_t bits = to_bits(amax);
  const int exponent = bits >> 23;
  if (rule == Rule::paper) return std::clamp(exponent, 1, 254);
  if (rule == Rule::ocp) return std::clamp(exponent - 2, 1, 254);
  const int best = std::clamp(exponent - 2 + ((bits & 0x7fffff) > 0x400000), 1, 254);
  if (rule == Rule::absmax) return best;
  return halved_scale_gain<G>(x, exp2_of(127 - best)) > 0 ? std::max(best - 1, 1) : best;
}

int e4m3_byte(float x) {                                 // of 0 to 448
  const int exponent = std::max(int(to_bits(x) >> 23) - 127, -6);
  return int(std::nearbyintf(x * exp2_of(3 - exponent))) + ((exponent + 6) << 3);
}

template <int G>
int nvfp4_scale(const float* x, float amax, Rule rule, float g) {
  auto byte_for = [&](float largest) {
    return std::clamp(e4m3_byte(std::min(amax * (g / largest), 448.f)), 0x01, 0x7e);
  };
  const int best = byte_for(6.f);
  if (rule != Rule::mse) return best;
  const int narrow = byte_for(4.f);
  const float s0 = e4m3_value(best), s1 = e4m3_value(narrow);
  return squared_error<G>(x, g / s1, s1) < squared_error<G>(x, g / s0, s0) ? narrow : best;
}

template <int G>
void quantize_group(const float* x, const Quantize& q, uint8_t* codes, uint8_t* scale) {
  float largest[G];
  for (int i = 0; i < G; i++) largest[i] = std::fabs(x[i]);
  // The bits of non-negative floats are ordered as the floats are; those of Inf and NaN are above all others.
  uint32_t bits = 0;
  for (int i = 0; i < G; i++) bits = std::max(bits, to_bits(largest[i]));
  if (bits >= 0x7f800000) {
    *scale = G == 32 ? 0xff : 0x7f;
    std::fill(codes, codes + G / 2, 0);
    return;
  }
  const float amax = from_bits(bits);
  float inverse;
  if constexpr (G == 32) {
    *scale = mxfp4_scale<G>(x, amax, q.rule);
    inverse = exp2_of(127 - *scale) * q.global_scale;
  } else {
    *scale = nvfp4_scale<G>(x, amax, q.rule, q.global_scale);
    inverse = q.global_scale / e4m3_value(*scale);
  }
  int32_t code[G];
  for (int i = 0; i < G; i++) {
    const float v = x[i] * inverse, m = std::fabs(v);
    code[i] = int32_t(halves(m) + ones(m) + twos(m)) | ((to_bits(v) >> 28) & 8);
  }
  for (int i = 0; i < G / 2; i++) codes[i] = code[2 * i] | code[2 * i + 1] << 4;
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

}  // namespace

// Units run over the rows of one range of channels, then over those of the next. So a transform is read once.
void quantize(const Quantize& q, int64_t begin, int64_t end) {
  const int64_t unit = q.unit(), group = q.group();
  std::vector<float> x(kRows * unit), y(kRows * unit), transposed(q.transform ? unit / q.block * q.block * q.block : 0);
  int64_t loaded = -1;
  for (int64_t index = begin; index < end;) {
    const int64_t range = index / q.rows, row = index % q.rows;
    const int64_t rows = std::min({int64_t(kRows), q.rows - row, end - index});
    const int64_t channel = range * unit;
    for (int64_t r = 0; r < rows; r++)
      for (int64_t k = 0; k < unit; k++) x[r * unit + k] = read(q.x, q.type, (row + r) * q.stride + channel + k);
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
    for (int64_t r = 0; r < rows; r++) {
      for (int64_t k = 0; k < unit; k += group) {
        const int64_t at = (row + r) * q.width + channel + k;
        if (group == 32)
          quantize_group<32>(values + r * unit + k, q, q.codes + at / 2, q.scales + at / 32);
        else
          quantize_group<16>(values + r * unit + k, q, q.codes + at / 2, q.scales + at / 16);
      }
    }
    index += rows;
  }
}

}  // namespace wush::cpu::WUSH_LEVEL
