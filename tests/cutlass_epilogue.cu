// The epilogue of csrc/linear_epilogue.cuh behind a bf16 product of sm_90, for test_csrc_linear.py.
#include "linear_epilogue.cuh"

namespace wush::sm100 {

using Tile = Shape<_128, _64, _64>;
using One = Shape<_1, _1, _1>;
using Store = cutlass::epilogue::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, One, cutlass::epilogue::collective::EpilogueTileAuto,
    float, float, Out, Row, OUT_ALIGNMENT, Out, Row, OUT_ALIGNMENT,
    cutlass::epilogue::TmaWarpSpecializedCooperative, Epilogue<Tile>::Fusion>::CollectiveOp;
using Mainloop = cutlass::gemm::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Out, Row, 8, Out, cutlass::layout::ColumnMajor, 8, float, Tile,
    One,
    cutlass::gemm::collective::StageCountAutoCarveout<int(sizeof(Store::SharedStorage))>,
    cutlass::gemm::KernelTmaWarpSpecializedCooperative>::CollectiveOp;
using Gemm = cutlass::gemm::device::GemmUniversalAdapter<
    cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, Mainloop, Store>>;

}  // namespace wush::sm100

extern "C" const char* epilogue(int m, int n, int k, const void* x, const void* w, const float* gx, const float* gw,
                                const void* bias, const void* residual, void* out, void* stream) {
  using namespace wush;
  using namespace wush::sm100;
  LinearArgs a{};
  a.m = m, a.n = n, a.k = k;
  a.x.global_scale = gx;
  a.w.global_scale = gw;
  a.bias = bias;
  a.residual = residual;
  a.out = out;
  Gemm::Arguments arguments{cutlass::gemm::GemmUniversalMode::kGemm, cute::make_shape(m, n, k, 1),
                            {static_cast<const Out*>(x),
                             cutlass::make_cute_packed_stride(Gemm::GemmKernel::StrideA{}, cute::make_shape(m, k, 1)),
                             static_cast<const Out*>(w),
                             cutlass::make_cute_packed_stride(Gemm::GemmKernel::StrideB{}, cute::make_shape(n, k, 1))}};
  set_epilogue(arguments.epilogue, a);
  return run_gemm<Gemm>(arguments, static_cast<cudaStream_t>(stream), true);
}
