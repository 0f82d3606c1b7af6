// What the products of wush::fp4_linear share: how operands are laid out, and what is done to a sum.
#pragma once

#include "convert.h"
#include "kernels.h"
#include "simd.h"

namespace wush::cpu::WUSH_LEVEL {

inline int64_t padded(int64_t width) { return (width + kAlign - 1) / kAlign * kAlign; }

// Whether codes are decoded in registers.
inline bool few(const Linear& a) { return a.rows <= kFewRows; }

// Whether operands are multiplied as bf16: all are exact there but weights of 8 bits, and fp32 and fp16 activations.
#ifdef __AVX512BF16__
inline bool in_bf16(const Linear& a) {
  return !few(a) && a.format != Format::int8 && (a.values == nullptr || a.value_type == Type::bf16);
}
#else
inline bool in_bf16(const Linear&) { return false; }
#endif

// The scale of a group of a weight of 8 bits.
inline float int8_scale(const uint8_t* scales, int64_t group) {
  uint16_t bits;
  std::memcpy(&bits, scales + 2 * group, 2);
  return from_bits(uint32_t(bits) << 16);
}

// The result of row m and column n, from its sum.
inline void finish(const Linear& a, int64_t m, int64_t n, float sum) {
  float y = sum * (a.row_scales ? a.row_scales[m] : 1.f) * a.factors[n];
  if (a.bias) y += read(a.bias, a.type, n);
  if (a.residual) y = rounded(y, a.type) + read(a.residual, a.type, m * a.columns + n);
  write(a.out, a.type, m * a.columns + n, y);
}

// The product of more than a few rows (panels.cpp): columns begin .. end, at most `panel_tile` of them.
int64_t panel_tile(const Linear& a);
void panels(const Linear& a, int64_t begin, int64_t end);

}  // namespace wush::cpu::WUSH_LEVEL
