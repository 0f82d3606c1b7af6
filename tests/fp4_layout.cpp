// The functions of csrc/fp4_layout.h and linear_tiles.h as tables, for test_csrc_linear.py.
#include <initializer_list>

#include "fp4_layout.h"
#include "linear_tiles.h"

using namespace wush;

extern "C" {

int64_t bytes(int64_t rows, int64_t groups) { return swizzled_bytes(rows, groups); }

void offsets(int64_t rows, int64_t groups, int64_t* out) {
  for (int64_t r = 0; r < rows; r++)
    for (int64_t g = 0; g < groups; g++) out[r * groups + g] = swizzled_offset(r, g, groups);
}

int chunk(int row_bytes, int row, int c) {
  return row_bytes == 64    ? shared_chunk<64>(row, c)
         : row_bytes == 128 ? shared_chunk<128>(row, c)
                            : shared_chunk<256>(row, c);
}

int scale_row(int row) { return shared_scale_row(row); }
int scale_rows(int rows) { return shared_scale_rows(rows); }

// [lane][element] -> row, column
void fragment_a(int* out) {
  for (int l = 0; l < 32; l++)
    for (int i = 0; i < 32; i++) *out++ = fragment_a_row(l, i), *out++ = fragment_a_col(l, i);
}
void fragment_b(int* out) {
  for (int l = 0; l < 32; l++)
    for (int i = 0; i < 16; i++) *out++ = fragment_b_row(l, i), *out++ = fragment_b_col(l);
}
void fragment_c(int* out) {
  for (int l = 0; l < 32; l++)
    for (int i = 0; i < 4; i++) *out++ = fragment_c_row(l, i), *out++ = fragment_c_col(l, i);
}
// [lane] -> row of A, column of B whose scales it holds
void fragment_scales(int* out) {
  for (int l = 0; l < 32; l++) *out++ = fragment_scale_a_row(l), *out++ = fragment_scale_b_col(l);
}
// [lane] -> row and chunk that it points ldmatrix to
void ldmatrix_a(int* out) {
  for (int l = 0; l < 32; l++) *out++ = ldmatrix_a_row(l), *out++ = ldmatrix_a_chunk(l);
}
void ldmatrix_b(int* out) {
  for (int l = 0; l < 32; l++) *out++ = ldmatrix_b_row(l), *out++ = ldmatrix_b_chunk(l);
}

int choose_sm120(int64_t m, int64_t n, int sms) { return int(sm120::choose(m, n, sms)); }
int choose_sm100(int64_t m, int64_t n, int sms) { return int(sm100::choose(m, n, sms)); }
int shared_memory(int tile, int group) { return sm120::shared_bytes(sm120::SHAPES[tile], group); }
void shapes(int* out) {
  for (const auto& s : sm120::SHAPES)
    for (int v : {s.bm, s.bn, s.bk, s.warps_m, s.warps_n, s.warps_k, s.stages, s.blocks}) *out++ = v;
}
}
