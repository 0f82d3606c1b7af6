#include "quantize.cuh"

namespace wush {
const char* quantize_nvfp4(const QuantizeArguments& arguments) { return quantize<true>(arguments); }
}  // namespace wush
