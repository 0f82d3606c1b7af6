// targets: sm_100a sm_103a
// uses: cutlass

#include "linear_sm100.cuh"

namespace wush::sm100 {

const char* nvfp4_narrow(const LinearArgs& a, cudaStream_t stream) {
  return Kernel<NvElement, Shape<_128, _64, _256>, One, cutlass::gemm::KernelTmaWarpSpecialized1SmNvf4Sm100,
                cutlass::epilogue::TmaWarpSpecialized1Sm>::launch(a, stream);
}

}  // namespace wush::sm100
