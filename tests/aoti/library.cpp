// A library of operators as a kernel's vendor would ship it: attention in C++, and nothing else.
#include <ATen/ATen.h>
#include <torch/library.h>

namespace {

at::Tensor attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                     bool is_causal, std::optional<double> scale) {
  return at::scaled_dot_product_attention(query, key, value, std::nullopt, 0.0, is_causal, scale,
                                          query.size(1) != key.size(1));
}

at::Tensor attention_meta(const at::Tensor& query, const at::Tensor&, const at::Tensor& value, bool,
                          std::optional<double>) {
  auto sizes = query.sym_sizes().vec();
  sizes.back() = value.sym_size(-1);
  return at::empty_symint(sizes, query.options());
}

}  // namespace

TORCH_LIBRARY(lp_test, library) {
  library.def(
      "attention(Tensor query, Tensor key, Tensor value, bool is_causal, float? scale) -> Tensor");
}
TORCH_LIBRARY_IMPL(lp_test, CPU, library) { library.impl("attention", attention); }
TORCH_LIBRARY_IMPL(lp_test, Meta, library) { library.impl("attention", attention_meta); }
