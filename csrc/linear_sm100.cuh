// sm_100a, sm_103a (family 100f): the block-scaled product by tcgen05, through CUTLASS.
//
// Everything between device memory and tensor memory is CUTLASS's: no such GPU was at hand to try descriptors and
// tensor memory written by hand. Ours is the epilogue, in the order of linear.h, and the layouts handed over: codes as
// they are, both scales in tiles of 128 x 4 (fp4_layout.h), which are CUTLASS's `Sm1xxBlockScaledConfig`.
#pragma once

#include <cutlass/cutlass.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <cutlass/util/packed_stride.hpp>

#include "linear_sm100.h"

namespace wush::sm100 {

using namespace cute;

// alpha of two global scales; CUTLASS folds the scalars of a broadcast by this.
template <class T>
struct InverseOfProduct {
  CUTLASS_HOST_DEVICE T operator()(T a, T b) const { return T(1) / (a * b); }
};

template <class Element, class Tile, class Cluster, class MainloopSchedule, class EpilogueSchedule>
struct Kernel {
  using Out = cutlass::bfloat16_t;
  using Row = cutlass::layout::RowMajor;
  using BlockTile = decltype(shape_div(Tile{}, Cluster{}));          // a pair shares its tile's rows
  static constexpr auto Round = cutlass::FloatRoundStyle::round_to_nearest;
  static constexpr int OutAlignment = 8, CodeAlignment = 32;      // 16 bytes, which TMA asks for

  template <template <class> class Op, class To, class Compute = float>
  using Apply = cutlass::epilogue::fusion::Sm90Compute<Op, To, Compute, Round>;
  template <class... Nodes>
  using Tree = cutlass::epilogue::fusion::Sm90EVT<Nodes...>;

  using Alpha = cutlass::epilogue::fusion::Sm90ScalarBroadcast<float, Stride<_0, _0, int64_t>, 2, InverseOfProduct>;
  using Beta = cutlass::epilogue::fusion::Sm90ScalarBroadcast<float, Stride<_0, _0, int64_t>>;
  using Bias = cutlass::epilogue::fusion::Sm90RowBroadcast<0, BlockTile, Out, float, Stride<_0, _1, int64_t>>;
  using Scaled = Tree<Apply<cutlass::multiplies, float>, Alpha, cutlass::epilogue::fusion::Sm90AccFetch>;
  using Rounded = Tree<Apply<cutlass::plus, Out>, Scaled, Bias>;
  // beta is 0 or 1: with 0 the residual is not read at all.
  using Fusion = Tree<Apply<cutlass::homogeneous_multiply_add, Out>, Beta,
            cutlass::epilogue::fusion::Sm90SrcFetch<Out>, Rounded>;

  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
    cutlass::arch::Sm100, cutlass::arch::OpClassBlockScaledTensorOp, Tile, Cluster,
    Shape<_128, _32>, float, float,          // wider tiles of the epilogue spill
    Out, Row, OutAlignment, Out, Row, OutAlignment, EpilogueSchedule, Fusion>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
    cutlass::arch::Sm100, cutlass::arch::OpClassBlockScaledTensorOp,
    Element, Row, CodeAlignment, Element, cutlass::layout::ColumnMajor, CodeAlignment, float, Tile, Cluster,
    cutlass::gemm::collective::StageCountAutoCarveout<int(sizeof(typename Epilogue::SharedStorage))>,
    MainloopSchedule>::CollectiveOp;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<
    cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, Mainloop, Epilogue, void>>;

  // Without a device, `launch` false: only whether CUTLASS takes the arguments.
  static const char* run(const LinearArgs& a, cudaStream_t stream, bool launch) {
    const auto shape = make_shape(int(a.m), int(a.n), int(a.k), 1);
    using Codes = typename Mainloop::ElementA;
    using Scales = typename Mainloop::ElementSF;
    using Config = typename Mainloop::Sm1xxBlkScaledConfig;
    typename Gemm::Arguments arguments{
      cutlass::gemm::GemmUniversalMode::kGemm, shape,
      {static_cast<const typename Gemm::ElementA*>(a.x.codes),
       cutlass::make_cute_packed_stride(typename Gemm::GemmKernel::StrideA{}, make_shape(int(a.m), int(a.k), 1)),
       static_cast<const typename Gemm::ElementB*>(a.w.codes),
       cutlass::make_cute_packed_stride(typename Gemm::GemmKernel::StrideB{}, make_shape(int(a.n), int(a.k), 1)),
       static_cast<const Scales*>(a.x.scales), Config::tile_atom_to_shape_SFA(shape),
       static_cast<const Scales*>(a.w.scales), Config::tile_atom_to_shape_SFB(shape)},
      {{},
       static_cast<const Out*>(a.residual),
       cutlass::make_cute_packed_stride(typename Gemm::GemmKernel::StrideC{}, make_shape(int(a.m), int(a.n), 1)),
       static_cast<Out*>(a.out),
       cutlass::make_cute_packed_stride(typename Gemm::GemmKernel::StrideD{}, make_shape(int(a.m), int(a.n), 1))}};
    auto& fusion = arguments.epilogue.thread;
    fusion = {{{a.residual ? 1.0f : 0.0f}, {nullptr}, {}},                              // beta
          {},                                                                       // the residual
          {{{{1.0f, 1.0f}, {a.x.global_scale, a.w.global_scale}, {}}, {}, {}},      // alpha, the sum, times
           {static_cast<const Out*>(a.bias), Out(0), {}},
           {}},                                                                     // plus
          {}};                                                                      // plus the residual
    if (launch) {
      if (cudaGetDevice(&arguments.hw_info.device_id) != cudaSuccess) return "there is no current device";
      arguments.hw_info.sm_count =
          cutlass::KernelHardwareInfo::query_device_multiprocessor_count(arguments.hw_info.device_id);
    }
    Gemm gemm;
    auto status = gemm.can_implement(arguments);
    if (status == cutlass::Status::kSuccess && Gemm::get_workspace_size(arguments) != 0)
      status = cutlass::Status::kErrorWorkspaceNull;
    if (status == cutlass::Status::kSuccess && launch) status = gemm.initialize(arguments, nullptr, stream);
    if (status == cutlass::Status::kSuccess && launch) status = gemm.run(stream);
    return status == cutlass::Status::kSuccess ? nullptr : cutlassGetStatusString(status);
  }
};

using MxElement = cutlass::mx_float4_t<cutlass::float_e2m1_t>;
using NvElement = cutlass::nv_float4_t<cutlass::float_e2m1_t>;
using One = Shape<_1, _1, _1>;
using Pair = Shape<_2, _1, _1>;

}  // namespace wush::sm100
