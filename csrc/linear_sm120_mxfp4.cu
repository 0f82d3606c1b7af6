// targets: sm_90a sm_120a sm_121a

#include "linear_sm120.cuh"

namespace wush::sm120 {

const char* linear_mxfp4(const LinearArgs& a, Choice choice, cudaStream_t stream) {
  return launch_choice<Format::mxfp4>(a, choice, stream);
}

}  // namespace wush::sm120
