// Runs a packaged model without Python: ./host model.pt2 TOKEN TOKEN ...
// Prints the most likely next token at every position.
#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

int main(int argc, char** argv) {
  if (argc < 3) {
    std::fprintf(stderr, "usage: %s model.pt2 TOKEN...\n", argv[0]);
    return 2;
  }
  std::vector<int64_t> tokens;
  for (int i = 2; i < argc; ++i) tokens.push_back(std::atoll(argv[i]));
  torch::inductor::AOTIModelPackageLoader model(argv[1]);
  at::Device device(model.get_metadata()["AOTI_DEVICE_KEY"]);
  auto ids = at::from_blob(tokens.data(), {1, static_cast<int64_t>(tokens.size())}, at::kLong).to(device);
  at::Tensor next = model.run(std::vector<at::Tensor>{ids})[0].argmax(-1).cpu().contiguous();  // [1, S]
  for (int64_t i = 0; i < next.numel(); ++i) {
    std::printf("%lld ", static_cast<long long>(next.data_ptr<int64_t>()[i]));
  }
  std::printf("\n");
}
