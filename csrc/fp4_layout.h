// Layouts: tiles of scales in memory, codes in shared memory, fragments in the registers of a warp.
//
// These are functions of integers for host and device, so tests run them without a GPU (tests/test_csrc_linear.py).
// Sources: "1D block scaling factors layout" of cuBLAS for the tiles; PTX ISA 9.7.14.5 "Matrix Fragments for
// mma.m16n8k64" and 9.7.14.3 "Block Scaling for mma.sync" for the fragments.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define WUSH_HD __host__ __device__ __forceinline__
#else
#define WUSH_HD inline
#endif

namespace wush {

// -- scales in memory: tiles of 128 rows x 4 groups, 512 bytes each, in row-major order of tiles --------------------

WUSH_HD int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Bytes of swizzled scales, padding included.
WUSH_HD int64_t swizzled_bytes(int64_t rows, int64_t groups) { return round_up(rows, 128) * round_up(groups, 4); }

// Byte offset of (row, group). Four groups of a row form one aligned word.
WUSH_HD int64_t swizzled_offset(int64_t row, int64_t group, int64_t groups) {
  const int64_t tile = row / 128 * (round_up(groups, 4) / 4) + group / 4;
  return tile * 512 + row % 32 * 16 + row % 128 / 32 * 4 + group % 4;
}

// -- codes in shared memory: rows of 64, 128 or 256 bytes whose 16-byte chunks are permuted ---------------------------

// Chunk of a row -> its place in the row. Eight rows of one chunk (one matrix of ldmatrix) then use all 32 banks.
template <int ROW_BYTES>
WUSH_HD int shared_chunk(int row, int chunk) {
  static_assert(ROW_BYTES == 64 || ROW_BYTES % 128 == 0, "eight rows must not meet in a bank");
  return ROW_BYTES == 64 ? chunk ^ ((row >> 1) & 3) : chunk ^ (row & 7);
}

// Row of a scale tile -> its word in shared memory, without bank conflicts. Writers store rows 32 apart together, which
// are neighbours in a swizzled tile. Readers load 16 consecutive rows together.
WUSH_HD int shared_scale_row(int row) { return row + row / 32 * 8; }
WUSH_HD constexpr int shared_scale_rows(int rows) { return rows + (rows - 1) / 32 * 8; }

// -- fragments of mma.m16n8k64: element i of a lane's registers (8 codes a register, low to high) --------------------

WUSH_HD int fragment_a_row(int lane, int i) { return lane / 4 + (i / 8 % 2 == 0 ? 0 : 8); }
WUSH_HD int fragment_a_col(int lane, int i) { return lane % 4 * 8 + i % 8 + (i < 16 ? 0 : 32); }
WUSH_HD int fragment_b_row(int lane, int i) { return lane % 4 * 8 + i % 8 + (i < 8 ? 0 : 32); }
WUSH_HD int fragment_b_col(int lane) { return lane / 4; }
WUSH_HD int fragment_c_row(int lane, int i) { return lane / 4 + (i < 2 ? 0 : 8); }
WUSH_HD int fragment_c_col(int lane, int i) { return lane % 4 * 2 + i % 2; }

// The row of A, or column of B, whose scales a lane holds, for thread-id 0. Of four lanes, the instruction reads A's
// scales from the first two and B's from the first. Here the others hold copies, so the selector does not matter.
WUSH_HD int fragment_scale_a_row(int lane) { return lane / 4 + lane % 2 * 8; }
WUSH_HD int fragment_scale_b_col(int lane) { return lane / 4; }

// -- ldmatrix.x4: the row and the 16-byte chunk (two for a k step of 64) that a lane points to ---------------

// Matrices in the order of A's registers: rows 0-7, rows 8-15, then both for the next chunk.
WUSH_HD int ldmatrix_a_row(int lane) { return lane % 16; }
WUSH_HD int ldmatrix_a_chunk(int lane) { return lane / 16; }
// Two blocks of eight columns of B, two chunks each.
WUSH_HD int ldmatrix_b_row(int lane) { return lane % 8 + lane / 16 * 8; }
WUSH_HD int ldmatrix_b_chunk(int lane) { return lane / 8 % 2; }

}  // namespace wush
