// Serves a model that was compiled ahead of time (torch._inductor.aoti_compile_and_package), without Python:
//
//   serve PACKAGE INPUTS OUTPUTS
//
// INPUTS is a list of tensors, as torch.save([...]) writes it; the model is run on each. OUTPUTS becomes a tuple of the
// results, which torch.load reads.
#include <blockdiag.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <cstdio>
#include <exception>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace {

std::vector<torch::Tensor> load(const char* path) {
  std::ifstream file(path, std::ios::binary);
  const std::vector<char> bytes(std::istreambuf_iterator<char>(file), {});
  const auto list = torch::pickle_load(bytes);
  std::vector<torch::Tensor> tensors;
  for (const auto& value : list.toListRef()) {
    tensors.push_back(value.toTensor());
  }
  return tensors;
}

void save(std::vector<c10::IValue> tensors, const char* path) {
  const auto bytes = torch::pickle_save(c10::ivalue::Tuple::create(std::move(tensors)));
  std::ofstream file(path, std::ios::binary);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  if (!file.flush()) {
    throw std::runtime_error(std::string("cannot write ") + path);
  }
}

} // namespace

int main(int argc, char** argv) try {
  if (argc != 4) {
    std::fprintf(stderr, "usage: %s PACKAGE INPUTS OUTPUTS\n", argv[0]);
    return 2;
  }
  for (const char* path : {argv[1], argv[2]}) {
    if (!std::ifstream(path)) {
      throw std::runtime_error(std::string("cannot read ") + path);
    }
  }
  // The package calls the ops by name. The linker keeps libblockdiag only if this program calls something in it.
  std::printf("blockdiag %s\n", blockdiag::build_info().at("version").c_str());
  const c10::InferenceMode guard;
  torch::inductor::AOTIModelPackageLoader model(argv[1]);
  std::vector<c10::IValue> outputs;
  for (const auto& input : load(argv[2])) {
    outputs.emplace_back(model.run({input}).at(0));
  }
  save(std::move(outputs), argv[3]);
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
