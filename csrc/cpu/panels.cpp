// levels
//
// wush::fp4_linear for more than a few rows. A tile of the weight is decoded into the cache, as panels of 16 columns: step
// by step, a vector of one channel (fp32) or of a pair of channels (bf16, where the CPU has its dot products) of 16 columns. So
// a value of x is multiplied with a vector of columns, whose sums need not be added up across lanes.

#include <algorithm>
#include <memory>

#include "operand.h"

namespace wush::cpu::WUSH_LEVEL {
namespace {

constexpr int kColumns = 16;                             // of a panel
constexpr int kVectors = kColumns / kLanes;              // of a step of a panel
#ifdef __AVX512BF16__
constexpr int kPanels = 2, kRows = 12;                   // panels and rows whose sums are in registers at a time
#else
constexpr int kPanels = 1, kRows = 6;
#endif

// Steps of a row: bf16 operands have a pair of channels in each.
int64_t steps(const Linear& a) { return padded(a.width) / (in_bf16(a) ? 2 : 1); }

// -- decoding ---------------------------------------------------------------------------------------------------------

// 16 rows of 16 bytes, transposed.
void transpose(__m128i rows[16]) {
  for (int round = 0; round < 4; round++) {              // each puts bytes of rows i and i + 8 next to each other
    __m128i next[16];
    for (int i = 0; i < 8; i++) {
      next[2 * i] = _mm_unpacklo_epi8(rows[i], rows[i + 8]);
      next[2 * i + 1] = _mm_unpackhi_epi8(rows[i], rows[i + 8]);
    }
    std::copy(next, next + 16, rows);
  }
}

// A panel of columns n .. n + count, count <= 16; those beyond are zeros, as are the channels beyond the width.
template <int GROUP, bool BF16>
void decode_panel(const Linear& a, int64_t n, int64_t count, float* out) {
  const float* table = factors(a.format);
  const int64_t bytes = a.width / 2, groups = a.width / GROUP;
  for (int64_t c = 0; c < padded(a.width) / 32; c++) {
    const bool half = 32 * c + 32 > a.width;             // 16 channels are left
    __m128i rows[16];
    alignas(64) float scale[2][kColumns] = {};           // of the first 16 channels and of the other 16
    for (int i = 0; i < kColumns; i++) {
      rows[i] = _mm_setzero_si128();
      if (i >= count) continue;
      auto p = reinterpret_cast<const __m128i*>(a.weight_codes + (n + i) * bytes + 16 * c);
      rows[i] = half ? _mm_loadl_epi64(p) : _mm_loadu_si128(p);
      const uint8_t* s = a.weight_scales + (n + i) * groups + 32 * c / GROUP;
      scale[0][i] = table[s[0]];
      scale[1][i] = half ? 0.f : table[s[32 / GROUP - 1]];
    }
    transpose(rows);
    for (int j = 0; j < 16; j++) {                       // channels 2j and 2j + 1
      alignas(16) uint8_t codes[kColumns];
      _mm_store_si128(reinterpret_cast<__m128i*>(codes), rows[j]);
      for (int v = 0; v < kVectors; v++) {
        const Integers pair = load_bytes(codes + v * kLanes);
        const Floats s = load(scale[j / 8] + v * kLanes);
        const Floats low = mul(low_codes(pair), s), high = mul(high_codes(pair), s);
        if constexpr (BF16) {
          store(out + (16 * c + j) * kColumns + v * kLanes, bf16_pair(low, high));
        } else {
          store(out + (32 * c + 2 * j) * kColumns + v * kLanes, low);
          store(out + (32 * c + 2 * j + 1) * kColumns + v * kLanes, high);
        }
      }
    }
  }
}

// The same of weights of 8 bits: 16 channels at a time.
void decode_int8_panel(const Linear& a, int64_t n, int64_t count, float* out) {
  for (int64_t c = 0; c < a.width / 16; c++) {
    __m128i rows[16];
    alignas(64) float scale[kColumns] = {};
    for (int i = 0; i < kColumns; i++) {
      rows[i] = _mm_setzero_si128();
      if (i >= count) continue;
      rows[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(a.weight_codes + (n + i) * a.width + 16 * c));
      scale[i] = int8_scale(a.weight_scales, (n + i) * (a.width / 32) + c / 2);
    }
    transpose(rows);
    for (int j = 0; j < 16; j++) {
      alignas(16) uint8_t codes[kColumns];
      _mm_store_si128(reinterpret_cast<__m128i*>(codes), rows[j]);
      for (int v = 0; v < kColumns; v += kLanes)
        store(out + (16 * c + j) * kColumns + v, mul(load_int8(codes + v), load(scale + v)));
    }
  }
}

// -- products ---------------------------------------------------------------------------------------------------------

void finish_vector(const Linear& a, int64_t m, int64_t n, int64_t count, Floats sum) {
  if (count < kLanes) {
    float sums[kLanes];
    store(sums, sum);
    for (int64_t i = 0; i < count; i++) finish(a, m, n + i, sums[i]);
    return;
  }
  Floats y = mul(mul(sum, all(a.row_scales ? a.row_scales[m] : 1.f)), load(a.factors + n));
  if (a.bias) y = add(y, read_vector(a.bias, a.type, n));
  if (a.residual) y = add(round_vector(y, a.type), read_vector(a.residual, a.type, m * a.columns + n));
  write_vector(a.out, a.type, m * a.columns + n, y);
}

// Steps whose sum has an accumulator of its own, so that long sums round less. Products of bf16 are short.
template <bool BF16>
constexpr int64_t kSteps = BF16 ? 64 : 32;

// Rows m .. m + MR times kPanels panels; a step of the operand is 4 bytes.
template <int MR, bool BF16>
void block(const Linear& a, int64_t m, const float* panel, int64_t n, int64_t end) {
  constexpr int V = kPanels * kVectors;
  const int64_t count = steps(a);
  const float* x = static_cast<const float*>(a.operand) + m * count;
  Floats totals[MR][V];
  for (auto& row : totals)
    for (auto& s : row) s = zero();
  for (int64_t k = 0; k < count;) {
    Floats sums[MR][V];
    for (auto& row : sums)
      for (auto& s : row) s = zero();
    for (const int64_t stop = std::min(k + kSteps<BF16>, count); k < stop; k++) {
      Floats w[V];
      for (int v = 0; v < V; v++) w[v] = load(panel + (v / kVectors * count + k) * kColumns + v % kVectors * kLanes);
      for (int i = 0; i < MR; i++) {
        const Floats value = all(x[i * count + k]);
        for (int v = 0; v < V; v++) sums[i][v] = multiply_add<BF16>(value, w[v], sums[i][v]);
      }
    }
    for (int i = 0; i < MR; i++)
      for (int v = 0; v < V; v++) totals[i][v] = add(totals[i][v], sums[i][v]);
  }
  for (int i = 0; i < MR; i++)
    for (int v = 0; v < V; v++) finish_vector(a, m + i, n + v * kLanes, end - n - v * kLanes, totals[i][v]);
}

// The rows from m on, fewer than kRows.
template <bool BF16, int MR = kRows - 1>
void rest(const Linear& a, int64_t m, const float* panel, int64_t n, int64_t end) {
  if constexpr (MR > 0) {
    if (a.rows - m == MR) return block<MR, BF16>(a, m, panel, n, end);
    rest<BF16, MR - 1>(a, m, panel, n, end);
  }
}

template <int GROUP, bool BF16>
void panels_of(const Linear& a, int64_t begin, int64_t end) {
  const int64_t size = steps(a) * kColumns;              // of a panel
  const std::unique_ptr<float[]> space(new float[kPanels * size + 16]);
  auto panel = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(space.get()) + 63) & ~uintptr_t(63));
  for (int p = 0; p < kPanels; p++) {
    const int64_t first = begin + p * kColumns;
    const int64_t count = std::clamp<int64_t>(end - first, 0, kColumns);
    if constexpr (GROUP == 0)
      decode_int8_panel(a, first, count, panel + p * size);
    else
      decode_panel<GROUP, BF16>(a, first, count, panel + p * size);
  }
  int64_t m = 0;
  for (; m + kRows <= a.rows; m += kRows) block<kRows, BF16>(a, m, panel, begin, end);
  rest<BF16>(a, m, panel, begin, end);
}

}  // namespace

int64_t panel_tile(const Linear&) { return kPanels * kColumns; }

void panels(const Linear& a, int64_t begin, int64_t end) {
#ifdef __AVX512BF16__
  if (in_bf16(a)) return a.group() == 32 ? panels_of<32, true>(a, begin, end) : panels_of<16, true>(a, begin, end);
#endif
  switch (a.format) {
    case Format::mxfp4: return panels_of<32, false>(a, begin, end);
    case Format::nvfp4: return panels_of<16, false>(a, begin, end);
    default: return panels_of<0, false>(a, begin, end);          // weights of 8 bits
  }
}

}  // namespace wush::cpu::WUSH_LEVEL
