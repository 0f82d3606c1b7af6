// Where CUTLASS's sm_100 kernels look for the scale of (row, k), for test_csrc_linear.py.
#include <cutlass/detail/sm100_blockscaled_layout.hpp>

template <int GROUP>
static void table(int rows, int k, long long* out) {
  using Config = cutlass::detail::Sm1xxBlockScaledConfig<GROUP>;
  const auto layout = Config::tile_atom_to_shape_SFA(cute::make_shape(rows, 128, k, 1));
  for (int r = 0; r < rows; r++)
    for (int group = 0; group < k / GROUP; group++) *out++ = layout(r, group * GROUP, 0);
}

extern "C" void offsets(int group, int rows, int k, long long* out) {
  group == 16 ? table<16>(rows, k, out) : table<32>(rows, k, out);
}
