// A libtorch program that uses blockdiag: compares the op with a loop of linear layers, and trains with it.
#include <blockdiag.h>
#include <torch/torch.h>

#include <cstdio>
#include <cstdlib>

namespace {

void require(bool condition, const char* what) {
  if (!condition) {
    std::fprintf(stderr, "failed: %s\n", what);
    std::exit(1);
  }
}

torch::Tensor loop(const torch::Tensor& input, const torch::Tensor& weight, const torch::Tensor& bias) {
  const auto num_blocks = weight.size(0);
  const auto inputs = input.chunk(num_blocks, -1), biases = bias.chunk(num_blocks);
  std::vector<torch::Tensor> outputs;
  for (int64_t g = 0; g < num_blocks; ++g) {
    outputs.push_back(torch::linear(inputs[g], weight[g], biases[g]));
  }
  return torch::cat(outputs, -1);
}

} // namespace

int main() {
  torch::manual_seed(0);
  const auto input = torch::randn({64, 4 * 8});
  const auto weight = (torch::randn({4, 2, 8}) / 8).requires_grad_();
  const auto bias = torch::zeros({4 * 2}).requires_grad_();
  require(
      torch::allclose(blockdiag::linear(input, weight, bias), loop(input, weight, bias), 1e-5, 1e-6),
      "blockdiag::linear computes what a loop computes"
  );
  // The same op by name, for programs that only load the library.
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("blockdiag::linear", "");
  require(op.hasKernelForDispatchKey(c10::DispatchKey::CPU), "the op is registered for the CPU");

  const auto target = loop(input, torch::randn({4, 2, 8}), torch::randn({4 * 2}));
  torch::optim::Adam optimizer({weight, bias}, torch::optim::AdamOptions(0.05));
  double first = 0, last = 0;
  for (int step = 0; step < 200; ++step) {
    optimizer.zero_grad();
    const auto loss = torch::mse_loss(blockdiag::linear(input, weight, bias), target);
    loss.backward();
    optimizer.step();
    last = loss.item<double>();
    first = step == 0 ? last : first;
  }
  require(last < 0.01 * first, "training reduces the loss a hundredfold");

  bool threw = false;
  try {
    blockdiag::linear(torch::randn({3, 31}), weight, bias);
  } catch (const c10::Error& error) {
    threw = std::string(error.what()).find("blockdiag::linear: expected input's last dimension") != std::string::npos;
  }
  require(threw, "bad sizes throw");
  std::printf("loss %.3g -> %.3g, blockdiag %s\n", first, last, blockdiag::build_info().at("version").c_str());
}
