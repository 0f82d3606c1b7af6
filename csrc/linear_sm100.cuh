// sm_100a, sm_103a (family 100f): the block-scaled product by tcgen05, through CUTLASS.
//
// CUTLASS does everything between device memory and tensor memory: no such GPU was at hand to try hand-written
// descriptors and tensor memory. This file adds the epilogue (linear_epilogue.cuh) and the layouts: codes unchanged,
// both scales in tiles of 128 x 4 (fp4_layout.h), which is CUTLASS's `Sm1xxBlockScaledConfig`.
#pragma once

#include "linear_epilogue.cuh"
#include "linear_sm100.h"

namespace wush::sm100 {

template <class Element, class Tile, class Cluster, class MainloopSchedule, class EpilogueSchedule>
struct Kernel {
  static constexpr int CODE_ALIGNMENT = 32;                          // 16 bytes
  using BlockTile = decltype(shape_div(Tile{}, Cluster{}));          // a pair of blocks splits the rows of a tile
  using Store = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm100, cutlass::arch::OpClassBlockScaledTensorOp, Tile, Cluster,
      Shape<_128, _32>, float, float,                                // wider epilogue tiles spill registers
      Out, Row, OUT_ALIGNMENT, Out, Row, OUT_ALIGNMENT, EpilogueSchedule,
      typename Epilogue<BlockTile>::Fusion>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm100, cutlass::arch::OpClassBlockScaledTensorOp,
      Element, Row, CODE_ALIGNMENT, Element, cutlass::layout::ColumnMajor, CODE_ALIGNMENT, float, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<int(sizeof(typename Store::SharedStorage))>,
      MainloopSchedule>::CollectiveOp;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<
      cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, Mainloop, Store, void>>;

  static const char* run(const LinearArgs& a, cudaStream_t stream, bool launch) {
    using Scales = typename Mainloop::ElementSF;
    using Config = typename Mainloop::Sm1xxBlkScaledConfig;
    const int m = int(a.m), n = int(a.n), k = int(a.k);
    const auto shape = make_shape(m, n, k, 1);
    typename Gemm::Arguments arguments{
        cutlass::gemm::GemmUniversalMode::kGemm, shape,
        {static_cast<const typename Gemm::ElementA*>(a.x.codes),
         cutlass::make_cute_packed_stride(typename Gemm::GemmKernel::StrideA{}, make_shape(m, k, 1)),
         static_cast<const typename Gemm::ElementB*>(a.w.codes),
         cutlass::make_cute_packed_stride(typename Gemm::GemmKernel::StrideB{}, make_shape(n, k, 1)),
         static_cast<const Scales*>(a.x.scales), Config::tile_atom_to_shape_SFA(shape),
         static_cast<const Scales*>(a.w.scales), Config::tile_atom_to_shape_SFB(shape)}};
    set_epilogue(arguments.epilogue, a);
    return run_gemm<Gemm>(arguments, stream, launch);
  }
};

using MxElement = cutlass::mx_float4_t<cutlass::float_e2m1_t>;
using NvElement = cutlass::nv_float4_t<cutlass::float_e2m1_t>;
using One = Shape<_1, _1, _1>;
using Pair = Shape<_2, _1, _1>;

}  // namespace wush::sm100
