#include "quantize.cuh"

namespace wush {
const char* quantize_mxfp4(const QuantizeArguments& arguments) { return quantize<false>(arguments); }
}  // namespace wush
