// Vectors of fp32 at two levels: AVX-512 with bf16 dot products, and AVX2 with FMA. A source is compiled once a level.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace wush::cpu::WUSH_LEVEL {

// The values of the 16 codes of e2m1, and those of the 8 magnitudes.
alignas(64) constexpr float kE2M1[16] = {0.f, .5f, 1.f, 1.5f, 2.f, 3.f, 4.f, 6.f, -0.f, -.5f, -1.f, -1.5f, -2.f, -3.f, -4.f, -6.f};

#ifdef __AVX512BF16__

constexpr int kLanes = 16;
using Floats = __m512;
using Integers = __m512i;

inline Floats zero() { return _mm512_setzero_ps(); }
inline Floats all(float v) { return _mm512_set1_ps(v); }
inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Floats v) { _mm512_storeu_ps(p, v); }
inline Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline __m256 half_sum(Floats v) { return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)); }
inline Floats first_half(Floats v) { return _mm512_maskz_mov_ps(0xff, v); }
inline Integers load_bytes(const uint8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Floats load_int8(const uint8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
// The permutation reads the low four bits of each lane.
inline Floats low_codes(Integers bytes) { return _mm512_permutexvar_ps(bytes, _mm512_load_ps(kE2M1)); }
inline Floats high_codes(Integers bytes) { return low_codes(_mm512_srli_epi32(bytes, 4)); }
// The scales of `bytes` codes 2·kLanes at a time: one group of 32, or two of 16.
template <int GROUP>
inline Floats scales(const uint8_t* bytes, const float* table) {
  if constexpr (GROUP == 32) return all(table[bytes[0]]);
  return _mm512_mask_blend_ps(0xff00, all(table[bytes[0]]), all(table[bytes[1]]));
}

// Pairs of bf16 numbers in 32 bits: of values that bf16 has, even ones and odd ones.
inline Floats bf16_pair(Floats even, Floats odd) {
  const Integers low = _mm512_srli_epi32(_mm512_castps_si512(even), 16);
  return _mm512_castsi512_ps(_mm512_mask_blend_epi16(0xaaaaaaaa, low, _mm512_castps_si512(odd)));
}
// a·b + c: of fp32 numbers, or of pairs.
template <bool BF16>
inline Floats multiply_add(Floats a, Floats b, Floats c) {
  if constexpr (BF16) return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
  return fma(a, b, c);
}
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
inline Floats least(Floats a, Floats b) { return _mm512_min_ps(a, b); }
inline Floats most(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Integers bits(Floats v) { return _mm512_castps_si512(v); }
inline Floats floats(Integers v) { return _mm512_castsi512_ps(v); }
inline Integers every(int v) { return _mm512_set1_epi32(v); }
inline Integers add(Integers a, Integers b) { return _mm512_add_epi32(a, b); }
inline Integers both(Integers a, Integers b) { return _mm512_and_si512(a, b); }
inline Integers either(Integers a, Integers b) { return _mm512_or_si512(a, b); }
template <int N>
inline Integers shift_right(Integers v) { return _mm512_srli_epi32(v, N); }
inline Integers most(Integers a, Integers b) { return _mm512_max_epi32(a, b); }
template <int N>
inline Integers shift_left(Integers v) { return _mm512_slli_epi32(v, N); }
// The bits of a where the mask has ones, else those of b.
inline Integers select(Integers mask, Integers a, Integers b) { return _mm512_ternarylogic_epi32(mask, a, b, 0xca); }
// Four 32-bit numbers of each of the rows 0, 4, 8, ..: 128 bits a row.
inline Floats load_quarters(const char* const rows[], int64_t at) {
  Floats v = _mm512_castps128_ps512(_mm_loadu_ps(reinterpret_cast<const float*>(rows[0] + at)));
  v = _mm512_insertf32x4(v, _mm_loadu_ps(reinterpret_cast<const float*>(rows[4] + at)), 1);
  v = _mm512_insertf32x4(v, _mm_loadu_ps(reinterpret_cast<const float*>(rows[8] + at)), 2);
  return _mm512_insertf32x4(v, _mm_loadu_ps(reinterpret_cast<const float*>(rows[12] + at)), 3);
}
inline Floats low_pairs(Floats a, Floats b) { return _mm512_unpacklo_ps(a, b); }
inline Floats high_pairs(Floats a, Floats b) { return _mm512_unpackhi_ps(a, b); }
inline Floats low_halves(Floats a, Floats b) { return _mm512_shuffle_ps(a, b, 0x44); }
inline Floats high_halves(Floats a, Floats b) { return _mm512_shuffle_ps(a, b, 0xee); }
inline int largest(Integers v) { return _mm512_reduce_max_epi32(v); }
// Neighbours first, then neighbours of these, until one sum is left.
inline float tree_sum(Floats v) {
  v = add(v, _mm512_permute_ps(v, 0xb1));
  v = add(v, _mm512_permute_ps(v, 0x4e));
  v = add(v, _mm512_shuffle_f32x4(v, v, 0xb1));
  return _mm512_cvtss_f32(add(v, _mm512_shuffle_f32x4(v, v, 0x4e)));
}
// Numbers below 16, two a byte, the first of each two in the low nibble.
inline void store_nibbles(uint8_t* p, Integers v) {
  const Integers pairs = _mm512_or_si512(v, _mm512_srli_epi64(v, 28));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm512_cvtepi64_epi8(pairs));
}
inline Floats from_half(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline void to_half(uint16_t* p, Floats v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
inline Floats from_bf16(const uint16_t* p) {
  const Integers wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
// The bits of bf16 in the upper halves, rounded to nearest even; NaN is 0x7fc0.
inline Floats round_bf16(Floats v) {
  const Integers bits = _mm512_castps_si512(v), one = _mm512_set1_epi32(1);
  const Integers odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
  const Integers sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const Integers rounded = _mm512_and_si512(sum, _mm512_set1_epi32(0xffff0000));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_castsi512_ps(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000)));
}
inline void store_upper(uint16_t* p, Floats v) {
  const Integers upper = _mm512_srli_epi32(_mm512_castps_si512(v), 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(upper));
}

#else

constexpr int kLanes = 8;
using Floats = __m256;
using Integers = __m256i;

inline Floats zero() { return _mm256_setzero_ps(); }
inline Floats all(float v) { return _mm256_set1_ps(v); }
inline Floats load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Floats v) { _mm256_storeu_ps(p, v); }
inline Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline __m256 half_sum(Floats v) { return v; }
inline Floats first_half(Floats v) { return v; }         // no half is ever left: groups have 16 channels or 32
inline Integers load_bytes(const uint8_t* p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
inline Floats load_int8(const uint8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
// The permutation reads the low three bits of each lane: the magnitude. The fourth is the sign.
inline Floats low_codes(Integers bytes) {
  const Floats magnitude = _mm256_permutevar8x32_ps(_mm256_load_ps(kE2M1), bytes);
  const Integers sign = _mm256_slli_epi32(_mm256_and_si256(bytes, _mm256_set1_epi32(8)), 28);
  return _mm256_xor_ps(magnitude, _mm256_castsi256_ps(sign));
}
inline Floats high_codes(Integers bytes) { return low_codes(_mm256_srli_epi32(bytes, 4)); }
template <int GROUP>
inline Floats scales(const uint8_t* bytes, const float* table) {
  return all(table[bytes[0]]);
}

Floats bf16_pair(Floats even, Floats odd);               // of the other level
template <bool BF16>
inline Floats multiply_add(Floats a, Floats b, Floats c) {
  return fma(a, b, c);
}
inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
inline Floats sub(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
inline Floats least(Floats a, Floats b) { return _mm256_min_ps(a, b); }
inline Floats most(Floats a, Floats b) { return _mm256_max_ps(a, b); }
inline Integers bits(Floats v) { return _mm256_castps_si256(v); }
inline Floats floats(Integers v) { return _mm256_castsi256_ps(v); }
inline Integers every(int v) { return _mm256_set1_epi32(v); }
inline Integers add(Integers a, Integers b) { return _mm256_add_epi32(a, b); }
inline Integers both(Integers a, Integers b) { return _mm256_and_si256(a, b); }
inline Integers either(Integers a, Integers b) { return _mm256_or_si256(a, b); }
template <int N>
inline Integers shift_right(Integers v) { return _mm256_srli_epi32(v, N); }
template <int N>
inline Integers shift_left(Integers v) { return _mm256_slli_epi32(v, N); }
inline Integers select(Integers mask, Integers a, Integers b) {
  return _mm256_or_si256(_mm256_and_si256(mask, a), _mm256_andnot_si256(mask, b));
}
inline Floats load_quarters(const char* const rows[], int64_t at) {
  const __m128 low = _mm_loadu_ps(reinterpret_cast<const float*>(rows[0] + at));
  return _mm256_insertf128_ps(_mm256_castps128_ps256(low), _mm_loadu_ps(reinterpret_cast<const float*>(rows[4] + at)), 1);
}
inline Floats low_pairs(Floats a, Floats b) { return _mm256_unpacklo_ps(a, b); }
inline Floats high_pairs(Floats a, Floats b) { return _mm256_unpackhi_ps(a, b); }
inline Floats low_halves(Floats a, Floats b) { return _mm256_shuffle_ps(a, b, 0x44); }
inline Floats high_halves(Floats a, Floats b) { return _mm256_shuffle_ps(a, b, 0xee); }
inline Integers most(Integers a, Integers b) { return _mm256_max_epi32(a, b); }
inline int largest(Integers v) {
  __m128i m = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1)));
}
inline float tree_sum(Floats v) {
  v = add(v, _mm256_permute_ps(v, 0xb1));
  v = add(v, _mm256_permute_ps(v, 0x4e));
  return _mm256_cvtss_f32(add(v, _mm256_permute2f128_ps(v, v, 1)));
}
inline void store_nibbles(uint8_t* p, Integers v) {
  const Integers pairs = _mm256_or_si256(v, _mm256_srli_epi64(v, 28));
  alignas(32) uint64_t bytes[4];
  _mm256_store_si256(reinterpret_cast<__m256i*>(bytes), pairs);
  for (int i = 0; i < 4; i++) p[i] = uint8_t(bytes[i]);
}
inline Floats from_half(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline void to_half(uint16_t* p, Floats v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
inline Floats from_bf16(const uint16_t* p) {
  const Integers wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline Floats round_bf16(Floats v) {
  const Integers bits = _mm256_castps_si256(v), one = _mm256_set1_epi32(1);
  const Integers odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), one);
  const Integers sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const Integers rounded = _mm256_and_si256(sum, _mm256_set1_epi32(0xffff0000));
  const Floats nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
  return _mm256_blendv_ps(_mm256_castsi256_ps(rounded), _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000)), nan);
}
inline void store_upper(uint16_t* p, Floats v) {
  const Integers upper = _mm256_srli_epi32(_mm256_castps_si256(v), 16);
  const __m128i low = _mm256_castsi256_si128(upper), high = _mm256_extracti128_si256(upper, 1);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packus_epi32(low, high));
}

#endif

constexpr int kChunk = 2 * kLanes;                       // codes of one vector of bytes
constexpr int kFewRows = 4;                              // with so many rows, codes are decoded in registers

inline __m128 quarter_sum(Floats v) {
  const __m256 half = half_sum(v);
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}
inline float sum(Floats v) {
  __m128 q = quarter_sum(v);
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_shuffle_ps(q, q, 1)));
}
inline void sum_four(const Floats v[4], float* out) {
  __m128 a = quarter_sum(v[0]), b = quarter_sum(v[1]), c = quarter_sum(v[2]), d = quarter_sum(v[3]);
  _MM_TRANSPOSE4_PS(a, b, c, d);
  _mm_store_ps(out, _mm_add_ps(_mm_add_ps(a, b), _mm_add_ps(c, d)));
}

// Four columns of 32-bit numbers, byte `at` of kLanes rows and on: out[i] has number i of each row.
inline void load_columns(const char* const rows[], int64_t at, Floats out[4]) {
  Floats v[4];
  for (int i = 0; i < 4; i++) v[i] = load_quarters(rows + i, at);
  const Floats a = low_pairs(v[0], v[1]), b = low_pairs(v[2], v[3]), c = high_pairs(v[0], v[1]), d = high_pairs(v[2], v[3]);
  out[0] = low_halves(a, b), out[1] = high_halves(a, b), out[2] = low_halves(c, d), out[3] = high_halves(c, d);
}

}  // namespace wush::cpu::WUSH_LEVEL
