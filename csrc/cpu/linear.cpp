// levels
//
// wush::fp4_linear: the operand as the products read it, and the product of a few rows, for which codes are decoded in
// registers and multiplied in fp32, each once. panels.cpp has the product of more rows.

#include <algorithm>
#include <vector>

#include "operand.h"

namespace wush::cpu::WUSH_LEVEL {
namespace {

// Codes of ROWS rows, decoded chunk by chunk: `take(chunk, low, high)` gets the values of the even and of the odd codes.
template <int GROUP, int ROWS, class Take>
inline void decode(const uint8_t* codes, const uint8_t* scale, int64_t code_stride, int64_t scale_stride, int64_t width,
                   const float* table, Take take) {
  const int64_t whole = width / kChunk;
  Floats low[ROWS], high[ROWS];
  for (int64_t c = 0; c < whole; c++) {
    for (int r = 0; r < ROWS; r++) {
      const Integers bytes = load_bytes(codes + r * code_stride + c * kLanes);
      const Floats s = scales<GROUP>(scale + r * scale_stride + c * kChunk / GROUP, table);
      low[r] = mul(low_codes(bytes), s), high[r] = mul(high_codes(bytes), s);
    }
    take(c, low, high);
  }
  if (whole * kChunk == width) return;
  for (int r = 0; r < ROWS; r++) {                       // half a chunk is left: the other half has the codes 0
    uint8_t rest[kLanes] = {}, pair[2];
    const uint8_t* row = codes + r * code_stride;
    std::copy(row + whole * kLanes, row + width / 2, rest);
    pair[0] = pair[1] = scale[r * scale_stride + whole * kChunk / GROUP];
    const Integers bytes = load_bytes(rest);
    const Floats s = scales<GROUP>(pair, table);
    low[r] = first_half(mul(low_codes(bytes), s)), high[r] = first_half(mul(high_codes(bytes), s));   // not 0 · NaN
  }
  take(whole, low, high);
}

// The same of weights of 8 bits, whose chunks are in the order of channels.
template <int ROWS, class Take>
inline void decode_int8(const uint8_t* codes, const uint8_t* scale, int64_t code_stride, int64_t scale_stride, int64_t width,
                        Take take) {
  Floats first[ROWS], second[ROWS];
  for (int64_t c = 0; c < width / kChunk; c++) {
    for (int r = 0; r < ROWS; r++) {
      const uint8_t* p = codes + r * code_stride + c * kChunk;
      const Floats s = all(int8_scale(scale + r * scale_stride, c * kChunk / 32));
      first[r] = mul(load_int8(p), s), second[r] = mul(load_int8(p + kLanes), s);
    }
    take(c, first, second);
  }
}

// For a few rows operands hold, chunk by chunk, the even channels and then the odd ones: as codes are decoded.
template <int GROUP>
void decode_chunks(const uint8_t* codes, const uint8_t* scale, int64_t width, const float* table, float* out) {
  decode<GROUP, 1>(codes, scale, 0, 0, width, table, [&](int64_t c, const Floats (&low)[1], const Floats (&high)[1]) {
    store(out + c * kChunk, low[0]);
    store(out + c * kChunk + kLanes, high[0]);
  });
}
int64_t chunk_place(int64_t k) { return k / kChunk * kChunk + k % 2 * kLanes + k % kChunk / 2; }

// Else they are in the order of channels.
template <int GROUP>
void decode_fp32(const uint8_t* codes, const uint8_t* scale, int64_t width, const float* table, float* out) {
  decode_chunks<GROUP>(codes, scale, width, table, out);
  float chunk[kChunk];
  for (int64_t c = 0; c < padded(width); c += kChunk) {
    std::copy(out + c, out + c + kChunk, chunk);
    for (int i = 0; i < kChunk; i++) out[c + i] = chunk[i % 2 * kLanes + i / 2];
  }
}

#ifdef __AVX512BF16__
template <int GROUP>
void decode_bf16(const uint8_t* codes, const uint8_t* scale, int64_t width, const float* table, uint16_t* out) {
  const Integers upper = _mm512_set1_epi32(0xffff0000);
  decode<GROUP, 1>(codes, scale, 0, 0, width, table, [&](int64_t c, const Floats (&low)[1], const Floats (&high)[1]) {
    const Integers even = _mm512_srli_epi32(_mm512_castps_si512(low[0]), 16);
    const Integers odd = _mm512_and_si512(_mm512_castps_si512(high[0]), upper);
    _mm512_storeu_si512(out + c * kChunk, _mm512_or_si512(even, odd));
  });
}
#endif

// A row of the operand, from codes.
void decode_row(const Linear& a, const uint8_t* codes, const uint8_t* scale, void* out) {
  const float* table = factors(a.format);
#ifdef __AVX512BF16__
  if (in_bf16(a)) {
    auto to = static_cast<uint16_t*>(out);
    a.group() == 32 ? decode_bf16<32>(codes, scale, a.width, table, to) : decode_bf16<16>(codes, scale, a.width, table, to);
    return;
  }
#endif
  auto to = static_cast<float*>(out);
  if (few(a))
    a.group() == 32 ? decode_chunks<32>(codes, scale, a.width, table, to) : decode_chunks<16>(codes, scale, a.width, table, to);
  else
    a.group() == 32 ? decode_fp32<32>(codes, scale, a.width, table, to) : decode_fp32<16>(codes, scale, a.width, table, to);
}

// -- a few rows -------------------------------------------------------------------------------------------------------

// Two columns at a time, so that x is read half as often. GROUP: 0 for weights of 8 bits.
template <int GROUP, int ROWS>
void few_rows(const Linear& a, int64_t begin, int64_t end) {
  const int64_t stride = padded(a.width), bytes = GROUP ? a.width / 2 : a.width;
  const int64_t groups = GROUP ? a.width / std::max(GROUP, 1) : a.width / 32 * 2;   // bytes of scales
  const float* x = static_cast<const float*>(a.operand);
  for (int64_t n = begin; n < end; n += 2) {
    const int64_t other = std::min(n + 1, end - 1);
    Floats first[ROWS], second[ROWS];
    for (int m = 0; m < ROWS; m++) first[m] = second[m] = zero();
    auto take = [&](int64_t c, const Floats (&low)[2], const Floats (&high)[2]) {
      for (int m = 0; m < ROWS; m++) {
        const float* p = x + m * stride + c * kChunk;
        const Floats even = load(p), odd = load(p + kLanes);
        first[m] = fma(high[0], odd, fma(low[0], even, first[m]));
        second[m] = fma(high[1], odd, fma(low[1], even, second[m]));
      }
    };
    const uint8_t *codes = a.weight_codes + n * bytes, *scale = a.weight_scales + n * groups;
    if constexpr (GROUP == 0)
      decode_int8<2>(codes, scale, (other - n) * bytes, (other - n) * groups, a.width, take);
    else
      decode<GROUP, 2>(codes, scale, (other - n) * bytes, (other - n) * groups, a.width, factors(a.format), take);
    for (int m = 0; m < ROWS; m++) {
      finish(a, m, n, sum(first[m]));
      finish(a, m, other, sum(second[m]));
    }
  }
}

template <int GROUP, int ROWS = kFewRows>
void few_rows_of(const Linear& a, int64_t begin, int64_t end) {
  if constexpr (ROWS > 0) {
    if (a.rows == ROWS) return few_rows<GROUP, ROWS>(a, begin, end);
    few_rows_of<GROUP, ROWS - 1>(a, begin, end);
  }
}

}  // namespace

int64_t operand_bytes(const Linear& a) { return a.rows * padded(a.width) * (in_bf16(a) ? 2 : 4); }

void prepare(const Linear& a, int64_t begin, int64_t end) {
  const int64_t stride = padded(a.width), bytes = stride * (in_bf16(a) ? 2 : 4), groups = a.width / a.group();
  static const auto e4m3 = [] {
    std::vector<float> table(256);
    for (int byte = 0; byte < 256; byte++) table[byte] = e4m3_value(byte);
    return table;
  }();
  for (int64_t m = begin; m < end; m++) {
    auto out = static_cast<uint8_t*>(a.operand) + m * bytes;
    std::fill(out, out + bytes, 0);
    if (a.codes) {
      decode_row(a, a.codes + m * (a.width / 2), a.scales + m * groups, out);
      continue;
    }
    if (in_bf16(a) && a.values) {
      std::memcpy(out, static_cast<const uint16_t*>(a.values) + m * a.width, 2 * a.width);
      continue;
    }
    for (int64_t k = 0; k < a.width; k++) {
      const float v = a.fp8 ? e4m3[a.fp8[m * a.width + k]] : read(a.values, a.value_type, m * a.width + k);
      if (in_bf16(a))
        reinterpret_cast<uint16_t*>(out)[k] = to_bits(v) >> 16;
      else
        reinterpret_cast<float*>(out)[few(a) && a.format != Format::int8 ? chunk_place(k) : k] = v;
    }
  }
}

int64_t tile(const Linear& a) { return few(a) ? 32 : panel_tile(a); }

void linear(const Linear& a, int64_t begin, int64_t end) {
  const uint16_t* rows = a.weight_global_scales;
  for (int64_t n = begin; n < end; n++)
    a.factors[n] = 1.f / (rows ? a.global_scale * from_bits(uint32_t(rows[n]) << 16) : a.global_scale);
  if (!few(a)) return panels(a, begin, end);
  switch (a.format) {
    case Format::mxfp4: return few_rows_of<32>(a, begin, end);
    case Format::nvfp4: return few_rows_of<16>(a, begin, end);
    default: return few_rows_of<0>(a, begin, end);
  }
}

void quantize(const Quantize& q, int64_t begin, int64_t end);

}  // namespace wush::cpu::WUSH_LEVEL

namespace wush::cpu {

#ifdef __AVX512BF16__
const Level kAvx512 =
#else
const Level kAvx2 =
#endif
    {WUSH_LEVEL::quantize, WUSH_LEVEL::operand_bytes, WUSH_LEVEL::prepare, WUSH_LEVEL::tile, WUSH_LEVEL::linear};

}  // namespace wush::cpu
