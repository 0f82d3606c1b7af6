// targets: sm_100a sm_103a
// uses: cutlass

#include "linear_sm100.cuh"

namespace wush::sm100 {

const char* nvfp4_wide(const LinearArgs& a, cudaStream_t stream, bool launch) {
  return Kernel<NvElement, Shape<_256, _256, _256>, Pair, cutlass::gemm::KernelTmaWarpSpecialized2SmNvf4Sm100,
                cutlass::epilogue::TmaWarpSpecialized2Sm>::run(a, stream, launch);
}

}  // namespace wush::sm100
