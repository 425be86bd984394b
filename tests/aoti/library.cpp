// A library of operators as a kernel's vendor would ship it: attention in C++, and nothing else.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <tuple>

namespace {

using OptionalTensor = std::optional<at::Tensor>;

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

// (batch, tokens, kv_heads, dim) and a scale for each head.
at::Tensor dequantize(const at::Tensor& x, const at::Tensor& descale, int64_t heads) {
  const int64_t group = heads / descale.size(1);
  const at::Tensor scales = descale.repeat_interleave(group / (heads / x.size(2)), 1);
  return (x.to(at::kFloat) * scales.unsqueeze(1).unsqueeze(3)).transpose(1, 2);
}

// FlashAttention-3's forward pass, its arguments and what it hands back: not all of it is defined.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> fwd(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const OptionalTensor& k_new,
    const OptionalTensor& out, const OptionalTensor& q_descale, const OptionalTensor& k_descale,
    const OptionalTensor& v_descale, std::optional<double> softmax_scale, bool is_causal,
    int64_t window_size_left, int64_t window_size_right, double softcap, bool is_rotary_interleaved,
    const OptionalTensor& scheduler_metadata, int64_t num_splits, std::optional<bool> pack_gqa,
    double dropout_keep) {
  TORCH_CHECK(!k_new && !out && !scheduler_metadata && !pack_gqa, "not given");
  TORCH_CHECK(window_size_left == -1 && window_size_right == (is_causal ? 0 : -1), "windows");
  TORCH_CHECK(softcap == 0.5 && is_rotary_interleaved && num_splits == 7 && dropout_keep == 0.75,
              "defaults");
  const int64_t heads = q.size(2);
  const at::Tensor result = attention(
      dequantize(q, *q_descale, heads), dequantize(k, *k_descale, heads),
      dequantize(v, *v_descale, heads), is_causal, softmax_scale);
  return {result.to(at::kBFloat16).transpose(1, 2).contiguous(), q.new_empty({0}), {}, {}};
}

}  // namespace

TORCH_LIBRARY(lp_test, library) {
  library.def(
      "attention(Tensor query, Tensor key, Tensor value, bool is_causal, float? scale) -> Tensor");
}
TORCH_LIBRARY_IMPL(lp_test, CPU, library) { library.impl("attention", attention); }
TORCH_LIBRARY_IMPL(lp_test, Meta, library) { library.impl("attention", attention_meta); }

TORCH_LIBRARY(lp_test_fa3, library) {
  library.def(
      "fwd(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new=None, Tensor(out!)? out=None, "
      "Tensor? q_descale=None, Tensor? k_descale=None, Tensor? v_descale=None, "
      "float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, "
      "int window_size_right=-1, float softcap=0.5, bool is_rotary_interleaved=True, "
      "Tensor? scheduler_metadata=None, int num_splits=7, bool? pack_gqa=None, "
      "float dropout_keep=0.75) -> (Tensor(out!), Tensor, Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(lp_test_fa3, CPU, library) { library.impl("fwd", fwd); }
