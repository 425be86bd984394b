// Loads a package that lp_inductor compiled, runs it, and compares its results with a stored
// reference. There is no Python in the process.
//
//   run_package MODEL.pt2 REFERENCE.pt [--model NAME] [--library PATH]... [--repeat N]
//
// REFERENCE.pt is what Python writes with
//   torch.save({"inputs": [tensor, ...], "outputs": [tensor, ...]}, "REFERENCE.pt")
//
// Exit status: 0; 1 if the package does not fit this machine or fails; 2 for wrong arguments.

#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>
#include <torch/cuda.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

#include "package_check.h"

namespace {

using Tensors = std::vector<at::Tensor>;

struct Options {
  std::string package, reference, model = "model";
  std::vector<std::string> libraries;
  int repeat = 0;
};

struct Reference {
  Tensors inputs, outputs;
};

Options parse(int argc, char** argv) {
  Options options;
  std::vector<std::string> positional;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    if (word.rfind("--", 0) != 0) {
      positional.push_back(word);
      continue;
    }
    if (i + 1 == argc) throw std::invalid_argument(word + " needs a value");
    const std::string value = argv[++i];
    if (word == "--model") {
      options.model = value;
    } else if (word == "--library") {
      options.libraries.push_back(value);
    } else if (word == "--repeat") {
      options.repeat = std::stoi(value);
    } else {
      throw std::invalid_argument("unknown option " + word);
    }
  }
  if (positional.size() != 2) throw std::invalid_argument("expected MODEL.pt2 and REFERENCE.pt");
  options.package = positional[0];
  options.reference = positional[1];
  return options;
}

Tensors tensors(const c10::IValue& list) {
  Tensors found;
  for (const auto& element : list.toListRef()) found.push_back(element.toTensor());
  return found;
}

Reference read_reference(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot open " + path);
  const std::vector<char> bytes((std::istreambuf_iterator<char>(file)), {});
  const auto stored = torch::jit::pickle_load(bytes).toGenericDict();
  return {tensors(stored.at("inputs")), tensors(stored.at("outputs"))};
}

// Signal to quantisation noise in dB, in double precision.
double sqnr(const at::Tensor& reference, const at::Tensor& result) {
  const auto signal = reference.cpu().to(at::kDouble);
  const double noise = (signal - result.cpu().to(at::kDouble)).norm().item<double>();
  return 20.0 * std::log10(signal.norm().item<double>() / noise);
}

bool has_python() {
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    if (line.find("libpython") != std::string::npos || line.find("/bin/python") != std::string::npos)
      return true;
  }
  return false;
}

void synchronize(const at::Tensor& like) {
  if (like.is_cuda()) torch::cuda::synchronize();
}

// The median time of a run in milliseconds, each run waited for.
double latency(torch::inductor::AOTIModelPackageLoader& loader, const Tensors& inputs, int repeat) {
  std::vector<double> times;
  for (int i = -std::max(3, repeat / 10); i < repeat; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    synchronize(loader.run(inputs).at(0));
    const std::chrono::duration<double, std::milli> taken = std::chrono::steady_clock::now() - begin;
    if (i >= 0) times.push_back(taken.count());
  }
  std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
  return times[times.size() / 2];
}

void run(const Options& options) {
  using Loader = torch::inductor::AOTIModelPackageLoader;
  c10::InferenceMode guard;
  for (const std::string& path : options.libraries) package_check::load_library(path);
  const auto metadata = Loader::load_metadata_from_package(options.package, options.model);
  package_check::check(metadata);

  Loader loader(options.package, options.model);
  Reference reference = read_reference(options.reference);
  if (package_check::get(metadata, "AOTI_DEVICE_KEY") == "cuda") {
    for (auto& tensor : reference.inputs) tensor = tensor.cuda();
  }
  const Tensors results = loader.run(reference.inputs);
  if (results.size() != reference.outputs.size()) {
    throw std::runtime_error("the model returns " + std::to_string(results.size()) +
                             " tensors, the reference has " +
                             std::to_string(reference.outputs.size()));
  }
  std::printf("architecture: %s\n", package_check::get(metadata, "lp_inductor.architecture").c_str());
  std::printf("kernels: %s\n", package_check::get(metadata, "lp_inductor.kernels").c_str());
  std::printf("python: %s\n", has_python() ? "yes" : "no");
  for (size_t n = 0; n < results.size(); ++n) {
    if (results[n].sizes() != reference.outputs[n].sizes()) {
      throw std::runtime_error("output " + std::to_string(n) + " has another shape than the reference");
    }
    std::printf("sqnr: %.2f dB\n", sqnr(reference.outputs[n], results[n]));
  }
  if (options.repeat > 0) {
    std::printf("latency: %.4f ms\n", latency(loader, reference.inputs, options.repeat));
  }
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  try {
    options = parse(argc, argv);
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << "\n"
              << "usage: run_package MODEL.pt2 REFERENCE.pt [--model NAME] [--library PATH]... "
                 "[--repeat N]\n";
    return 2;
  }
  try {
    run(options);
  } catch (const c10::Error& error) {
    std::cerr << "error: " << error.what_without_backtrace() << "\n";
    return 1;
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << "\n";
    return 1;
  }
  return 0;
}
