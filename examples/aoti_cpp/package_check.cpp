#include "package_check.h"

#include <ATen/Version.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <dlfcn.h>
#include <torch/cuda.h>

#include <sstream>
#include <stdexcept>

namespace package_check {
namespace {

std::vector<std::string> words(const std::string& text) {
  std::istringstream stream(text);
  std::vector<std::string> found;
  for (std::string word; stream >> word;) found.push_back(word);
  return found;
}

// The GPU's compute capability as "sm_90". libtorch_cuda brings the CUDA runtime; asking it through
// dlsym lets this program be built without CUDA's headers, and run where there is no CUDA.
std::string gpu_architecture(int device) {
  using GetAttribute = int (*)(int*, int, int);
  constexpr int kMajor = 75, kMinor = 76;  // cudaDevAttrComputeCapabilityMajor and -Minor
  if (!torch::cuda::is_available()) return "no GPU";
  auto get_attribute =
      reinterpret_cast<GetAttribute>(dlsym(RTLD_DEFAULT, "cudaDeviceGetAttribute"));
  int major = 0, minor = 0;
  if (get_attribute == nullptr || get_attribute(&major, kMajor, device) != 0 ||
      get_attribute(&minor, kMinor, device) != 0) {
    return "unknown GPU";
  }
  return "sm_" + std::to_string(major) + std::to_string(minor);
}

// How far the vector instructions of x86 CPUs go; other names are all equal.
int vector_level(const std::string& isa) {
  if (isa.find("AVX512") != std::string::npos) return 2;
  return isa.find("AVX2") != std::string::npos ? 1 : 0;
}

void check_architecture(const Metadata& metadata, int device_index) {
  const std::string needed = get(metadata, "lp_inductor.architecture");
  std::string here = "cpu";
  if (needed == "cpu") {
    const std::string isa = get(metadata, "AOTI_CPU_ISA");
    if (vector_level(isa) <= vector_level(at::get_cpu_capability())) return;
    throw std::runtime_error("the model was compiled for a CPU with " + isa + "; this one has " +
                             at::get_cpu_capability());
  }
  here = gpu_architecture(device_index);
  if (here == needed) return;
  throw std::runtime_error("the model was compiled for " + needed + " (" +
                           get(metadata, "lp_inductor.device") + "); here is " + here);
}

void check_operators(const Metadata& metadata) {
  for (const std::string& name : words(get(metadata, "lp_inductor.operators"))) {
    if (c10::Dispatcher::singleton().findSchema({name, ""}).has_value()) continue;
    throw std::runtime_error("the model calls " + name + ", which no loaded library defines; load " +
                             get(metadata, "lp_inductor.libraries") + " first (--library PATH)");
  }
}

}  // namespace

std::string get(const Metadata& metadata, const std::string& key) {
  const auto found = metadata.find(key);
  return found == metadata.end() ? "" : found->second;
}

void load_library(const std::string& path) {
  // Lazily: a library that is a Python extension too names functions of Python's that nobody calls.
  if (dlopen(path.c_str(), RTLD_LAZY | RTLD_LOCAL) == nullptr) {
    throw std::runtime_error(std::string("cannot load the library: ") + dlerror());
  }
}

void check(const Metadata& metadata, int device_index) {
  if (get(metadata, "lp_inductor.version").empty()) return;  // compiled without lp_inductor
  check_architecture(metadata, device_index);
  check_operators(metadata);
}

}  // namespace package_check
