// The epilogue of sm_100's kernels as a tree of CUTLASS's visitors, in the order of linear.h: alpha from two scalars on
// the device, bias along the columns, one rounding, the residual. sm_90 has the same visitors, so tests run this tree
// on a Hopper GPU (tests/cutlass_epilogue.cu).
#pragma once

#include <cutlass/cutlass.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <cutlass/util/packed_stride.hpp>

#include "linear.h"

namespace wush::sm100 {

using namespace cute;

using Out = cutlass::bfloat16_t;
using Row = cutlass::layout::RowMajor;
constexpr int OUT_ALIGNMENT = 8;                                     // 16 bytes, for TMA

// alpha of two global scales; CUTLASS folds the scalars of a broadcast with this function.
template <class T>
struct InverseOfProduct {
  CUTLASS_HOST_DEVICE T operator()(T a, T b) const { return T(1) / (a * b); }
};

template <class BlockTile>
struct Epilogue {
  template <template <class> class Op, class To>
  using Apply = cutlass::epilogue::fusion::Sm90Compute<Op, To, float, cutlass::FloatRoundStyle::round_to_nearest>;
  template <class... Nodes>
  using Tree = cutlass::epilogue::fusion::Sm90EVT<Nodes...>;

  using Alpha = cutlass::epilogue::fusion::Sm90ScalarBroadcast<float, Stride<_0, _0, int64_t>, 2, InverseOfProduct>;
  using Beta = cutlass::epilogue::fusion::Sm90ScalarBroadcast<float, Stride<_0, _0, int64_t>>;
  using Bias = cutlass::epilogue::fusion::Sm90RowBroadcast<0, BlockTile, Out, float, Stride<_0, _1, int64_t>>;
  using Residual = cutlass::epilogue::fusion::Sm90SrcFetch<Out>;
  using Scaled = Tree<Apply<cutlass::multiplies, float>, Alpha, cutlass::epilogue::fusion::Sm90AccFetch>;
  using Rounded = Tree<Apply<cutlass::plus, Out>, Scaled, Bias>;
  // beta is 0 or 1. With 0 the residual is not read.
  using Fusion = Tree<Apply<cutlass::homogeneous_multiply_add, Out>, Beta, Residual, Rounded>;
};

// Fills `to`, the epilogue's part of a kernel's arguments.
template <class Arguments>
void set_epilogue(Arguments& to, const LinearArgs& a) {
  const auto shape = make_shape(int(a.m), int(a.n), 1);
  to.ptr_C = static_cast<const Out*>(a.residual ? a.residual : a.out);   // a valid address, not read when beta is 0
  to.dC = cutlass::make_cute_packed_stride(decltype(to.dC){}, shape);
  to.ptr_D = static_cast<Out*>(a.out);
  to.dD = cutlass::make_cute_packed_stride(decltype(to.dD){}, shape);
  to.thread = {{{a.residual ? 1.0f : 0.0f}, {nullptr}, {}},                               // beta
               {},                                                                        // the residual
               {{{{1.0f, 1.0f}, {a.x.global_scale, a.w.global_scale}, {}}, {}, {}},       // alpha, the sum, times
                {static_cast<const Out*>(a.bias), Out(0), {}},
                {}},                                                                      // plus
               {}};                                                                       // times beta, plus
}

// Null, or CUTLASS's error. With `launch` false it only checks the arguments, which needs no device.
template <class Gemm>
const char* run_gemm(typename Gemm::Arguments& arguments, cudaStream_t stream, bool launch) {
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

}  // namespace wush::sm100
