"""Rewritten graphs as text, through torch.compile and torch.export."""

from __future__ import annotations

import expecttest

from tests.helpers import exported_graph, rewritten_graph
from tests.models import Attention
from tests.test_rewrites import REWRITTEN


class TestGraphs(expecttest.TestCase):
    """The graph that the rest of Inductor sees. EXPECTTEST_ACCEPT=1 updates the texts."""

    maxDiff = None

    def check(self, name: str) -> tuple[str, str]:
        """The graph through torch.compile and through torch.export."""
        model, operands, *_ = REWRITTEN[name]
        module = Attention(model)
        return rewritten_graph(module, *operands), exported_graph(module, *operands)

    def test_llama(self) -> None:
        compiled, exported = self.check("llama")
        self.assertExpectedInline(
            compiled,
            """\
arg0_1: bf16[2, 4, 16, 64]
arg1_1: bf16[2, 2, 16, 64]
arg2_1: bf16[2, 2, 16, 64]
iota = iota(32, start=0, step=1, dtype=torch.int64, device=cpu, requires_grad=False)
mul = mul.Tensor(iota, 2)
add = add.Tensor(mul, 0)
convert_element_type = convert_element_type(add, torch.float32)
neg = neg(convert_element_type)
div = div.Tensor(neg, 64)
pow_1 = pow.Scalar(10000.0, div)
iota_1 = iota(16, start=0, step=1, dtype=torch.int64, device=cpu, requires_grad=False)
mul_1 = mul.Tensor(iota_1, 1)
add_1 = add.Tensor(mul_1, 0)
convert_element_type_1 = convert_element_type(add_1, torch.float32)
unsqueeze = unsqueeze(convert_element_type_1, 1)
unsqueeze_1 = unsqueeze(pow_1, 0)
mul_2 = mul.Tensor(unsqueeze, unsqueeze_1)
unsqueeze_2 = unsqueeze(mul_2, 1)
expand = expand(unsqueeze_2, [16, 2, 32])
clone = clone(expand, memory_format=torch.contiguous_format)
view = view(clone, [16, 64])
unsqueeze_3 = unsqueeze(view, 0)
cos = cos(unsqueeze_3)
convert_element_type_2 = convert_element_type(cos, torch.bfloat16)
sin = sin(unsqueeze_3)
convert_element_type_3 = convert_element_type(sin, torch.bfloat16)
slice_tensor = slice.Tensor(convert_element_type_2, 2, 0, 32, 1)
unsqueeze_default = unsqueeze(slice_tensor, 1)
slice_tensor_1 = slice.Tensor(convert_element_type_3, 2, 0, 32, 1)
unsqueeze_default_1 = unsqueeze(slice_tensor_1, 1)
quantize_default = lp_inductor.quantize(arg0_1, unsqueeze_default, unsqueeze_default_1, False, 0, 64, 2, False)
getitem_4 = quantize_default[0]
getitem_5 = quantize_default[1]
quantize_default_1 = lp_inductor.quantize(arg1_1, unsqueeze_default, unsqueeze_default_1, False, 0, 64, 1, True)
getitem_6 = quantize_default_1[0]
getitem_7 = quantize_default_1[1]
quantize_centered_default = lp_inductor.quantize_centered(arg2_1)
getitem_8 = quantize_centered_default[0]
getitem_9 = quantize_centered_default[1]
getitem_10 = quantize_centered_default[2]
_scaled_dot_product_flash_attention_quantized = _scaled_dot_product_flash_attention.quantized(getitem_4, getitem_6, getitem_8, getitem_5, getitem_7, getitem_9, 0.0, True, False, scale=0.125)
getitem_11 = _scaled_dot_product_flash_attention_quantized[0]
expand_default = expand(getitem_10, [-1, -1, 2, -1])
clone_default = clone(expand_default, memory_format=torch.contiguous_format)
view_default = view(clone_default, [-1, 4, 1, 64])
convert_element_type_default = convert_element_type(getitem_11, torch.float32)
add_tensor = add.Tensor(convert_element_type_default, view_default)
convert_element_type_default_1 = convert_element_type(add_tensor, torch.bfloat16)
clone_default_1 = clone(convert_element_type_default_1, memory_format=torch.contiguous_format)
return clone_default_1""",
        )
        self.assertExpectedInline(
            exported,
            """\
arg0_1: bf16[2, 4, 16, 64]
arg1_1: bf16[2, 2, 16, 64]
arg2_1: bf16[2, 2, 16, 64]
iota = iota(32, start=0, step=1, dtype=torch.int64, device=cpu, requires_grad=False)
mul = mul.Tensor(iota, 2)
add = add.Tensor(mul, 0)
convert_element_type = convert_element_type(add, torch.float32)
neg = neg(convert_element_type)
div = div.Tensor(neg, 64)
pow_1 = pow.Scalar(10000.0, div)
iota_1 = iota(16, start=0, step=1, dtype=torch.int64, device=cpu, requires_grad=False)
mul_1 = mul.Tensor(iota_1, 1)
add_1 = add.Tensor(mul_1, 0)
convert_element_type_1 = convert_element_type(add_1, torch.float32)
unsqueeze = unsqueeze(convert_element_type_1, 1)
unsqueeze_1 = unsqueeze(pow_1, 0)
mul_2 = mul.Tensor(unsqueeze, unsqueeze_1)
unsqueeze_2 = unsqueeze(mul_2, 1)
expand = expand(unsqueeze_2, [16, 2, 32])
clone = clone(expand, memory_format=torch.contiguous_format)
view = view(clone, [16, 64])
unsqueeze_3 = unsqueeze(view, 0)
cos = cos(unsqueeze_3)
_assert_tensor_metadata = _assert_tensor_metadata(cos, None, None, torch.float32, device=cpu, layout=torch.strided)
convert_element_type_2 = convert_element_type(cos, torch.bfloat16)
sin = sin(unsqueeze_3)
_assert_tensor_metadata_1 = _assert_tensor_metadata(sin, None, None, torch.float32, device=cpu, layout=torch.strided)
convert_element_type_3 = convert_element_type(sin, torch.bfloat16)
slice_tensor = slice.Tensor(convert_element_type_2, 2, 0, 32, 1)
unsqueeze_default = unsqueeze(slice_tensor, 1)
slice_tensor_1 = slice.Tensor(convert_element_type_3, 2, 0, 32, 1)
unsqueeze_default_1 = unsqueeze(slice_tensor_1, 1)
quantize_default = lp_inductor.quantize(arg0_1, unsqueeze_default, unsqueeze_default_1, False, 0, 64, 2, False)
getitem_4 = quantize_default[0]
getitem_5 = quantize_default[1]
quantize_default_1 = lp_inductor.quantize(arg1_1, unsqueeze_default, unsqueeze_default_1, False, 0, 64, 1, True)
getitem_6 = quantize_default_1[0]
getitem_7 = quantize_default_1[1]
quantize_centered_default = lp_inductor.quantize_centered(arg2_1)
getitem_8 = quantize_centered_default[0]
getitem_9 = quantize_centered_default[1]
getitem_10 = quantize_centered_default[2]
_scaled_dot_product_flash_attention_quantized = _scaled_dot_product_flash_attention.quantized(getitem_4, getitem_6, getitem_8, getitem_5, getitem_7, getitem_9, 0.0, True, False, scale=0.125)
getitem_11 = _scaled_dot_product_flash_attention_quantized[0]
expand_default = expand(getitem_10, [-1, -1, 2, -1])
clone_default = clone(expand_default, memory_format=torch.contiguous_format)
view_default = view(clone_default, [-1, 4, 1, 64])
convert_element_type_default = convert_element_type(getitem_11, torch.float32)
add_tensor = add.Tensor(convert_element_type_default, view_default)
convert_element_type_default_1 = convert_element_type(add_tensor, torch.bfloat16)
clone_default_1 = clone(convert_element_type_default_1, memory_format=torch.contiguous_format)
return clone_default_1""",
        )

    def test_interleaved(self) -> None:
        compiled, exported = self.check("interleaved")
        self.assertExpectedInline(
            compiled,
            """\
arg0_1: bf16[2, 4, 16, 64]
arg1_1: bf16[2, 4, 16, 64]
arg2_1: bf16[2, 4, 16, 64]
iota = iota(32, start=0, step=1, dtype=torch.int64, device=cpu, requires_grad=False)
mul = mul.Tensor(iota, 2)
add = add.Tensor(mul, 0)
convert_element_type = convert_element_type(add, torch.float32)
neg = neg(convert_element_type)
div = div.Tensor(neg, 64)
pow_1 = pow.Scalar(10000.0, div)
iota_1 = iota(16, start=0, step=1, dtype=torch.int64, device=cpu, requires_grad=False)
mul_1 = mul.Tensor(iota_1, 1)
add_1 = add.Tensor(mul_1, 0)
convert_element_type_1 = convert_element_type(add_1, torch.float32)
unsqueeze = unsqueeze(convert_element_type_1, 1)
unsqueeze_1 = unsqueeze(pow_1, 0)
mul_2 = mul.Tensor(unsqueeze, unsqueeze_1)
cos = cos(mul_2)
sin = sin(mul_2)
cos_1 = cos(mul_2)
sin_1 = sin(mul_2)
unsqueeze_default = unsqueeze(cos, 0)
unsqueeze_default_1 = unsqueeze(unsqueeze_default, 1)
unsqueeze_default_2 = unsqueeze(sin, 0)
unsqueeze_default_3 = unsqueeze(unsqueeze_default_2, 1)
quantize_default = lp_inductor.quantize(arg0_1, unsqueeze_default_1, unsqueeze_default_3, True, 0, 64, 1, False)
getitem = quantize_default[0]
getitem_1 = quantize_default[1]
unsqueeze_default_4 = unsqueeze(cos_1, 0)
unsqueeze_default_5 = unsqueeze(unsqueeze_default_4, 1)
unsqueeze_default_6 = unsqueeze(sin_1, 0)
unsqueeze_default_7 = unsqueeze(unsqueeze_default_6, 1)
quantize_default_1 = lp_inductor.quantize(arg1_1, unsqueeze_default_5, unsqueeze_default_7, True, 0, 64, 1, True)
getitem_2 = quantize_default_1[0]
getitem_3 = quantize_default_1[1]
quantize_centered_default = lp_inductor.quantize_centered(arg2_1)
getitem_4 = quantize_centered_default[0]
getitem_5 = quantize_centered_default[1]
getitem_6 = quantize_centered_default[2]
_scaled_dot_product_flash_attention_quantized = _scaled_dot_product_flash_attention.quantized(getitem, getitem_2, getitem_4, getitem_1, getitem_3, getitem_5, 0.0, True, False, scale=None)
getitem_7 = _scaled_dot_product_flash_attention_quantized[0]
convert_element_type_default = convert_element_type(getitem_7, torch.float32)
add_tensor = add.Tensor(convert_element_type_default, getitem_6)
convert_element_type_default_1 = convert_element_type(add_tensor, torch.bfloat16)
clone_default = clone(convert_element_type_default_1, memory_format=torch.contiguous_format)
return clone_default""",
        )
        self.assertExpectedInline(
            exported,
            """\
arg0_1: bf16[2, 4, 16, 64]
arg1_1: bf16[2, 4, 16, 64]
arg2_1: bf16[2, 4, 16, 64]
iota = iota(32, start=0, step=1, dtype=torch.int64, device=cpu, requires_grad=False)
mul = mul.Tensor(iota, 2)
add = add.Tensor(mul, 0)
convert_element_type = convert_element_type(add, torch.float32)
neg = neg(convert_element_type)
div = div.Tensor(neg, 64)
pow_1 = pow.Scalar(10000.0, div)
iota_1 = iota(16, start=0, step=1, dtype=torch.int64, device=cpu, requires_grad=False)
mul_1 = mul.Tensor(iota_1, 1)
add_1 = add.Tensor(mul_1, 0)
convert_element_type_1 = convert_element_type(add_1, torch.float32)
unsqueeze = unsqueeze(convert_element_type_1, 1)
unsqueeze_1 = unsqueeze(pow_1, 0)
mul_2 = mul.Tensor(unsqueeze, unsqueeze_1)
_assert_tensor_metadata = _assert_tensor_metadata(arg0_1, None, None, torch.bfloat16, device=cpu, layout=torch.strided)
_assert_tensor_metadata_1 = _assert_tensor_metadata(arg0_1, None, None, torch.bfloat16, device=cpu, layout=torch.strided)
cos = cos(mul_2)
sin = sin(mul_2)
_assert_tensor_metadata_3 = _assert_tensor_metadata(arg1_1, None, None, torch.bfloat16, device=cpu, layout=torch.strided)
_assert_tensor_metadata_4 = _assert_tensor_metadata(arg1_1, None, None, torch.bfloat16, device=cpu, layout=torch.strided)
cos_1 = cos(mul_2)
sin_1 = sin(mul_2)
unsqueeze_default = unsqueeze(cos, 0)
unsqueeze_default_1 = unsqueeze(unsqueeze_default, 1)
unsqueeze_default_2 = unsqueeze(sin, 0)
unsqueeze_default_3 = unsqueeze(unsqueeze_default_2, 1)
quantize_default = lp_inductor.quantize(arg0_1, unsqueeze_default_1, unsqueeze_default_3, True, 0, 64, 1, False)
getitem = quantize_default[0]
getitem_1 = quantize_default[1]
unsqueeze_default_4 = unsqueeze(cos_1, 0)
unsqueeze_default_5 = unsqueeze(unsqueeze_default_4, 1)
unsqueeze_default_6 = unsqueeze(sin_1, 0)
unsqueeze_default_7 = unsqueeze(unsqueeze_default_6, 1)
quantize_default_1 = lp_inductor.quantize(arg1_1, unsqueeze_default_5, unsqueeze_default_7, True, 0, 64, 1, True)
getitem_2 = quantize_default_1[0]
getitem_3 = quantize_default_1[1]
quantize_centered_default = lp_inductor.quantize_centered(arg2_1)
getitem_4 = quantize_centered_default[0]
getitem_5 = quantize_centered_default[1]
getitem_6 = quantize_centered_default[2]
_scaled_dot_product_flash_attention_quantized = _scaled_dot_product_flash_attention.quantized(getitem, getitem_2, getitem_4, getitem_1, getitem_3, getitem_5, 0.0, True, False, scale=None)
getitem_7 = _scaled_dot_product_flash_attention_quantized[0]
convert_element_type_default = convert_element_type(getitem_7, torch.float32)
add_tensor = add.Tensor(convert_element_type_default, getitem_6)
convert_element_type_default_1 = convert_element_type(add_tensor, torch.bfloat16)
clone_default = clone(convert_element_type_default_1, memory_format=torch.contiguous_format)
return clone_default""",
        )

    def test_partial(self) -> None:
        compiled, exported = self.check("partial")
        self.assertExpectedInline(
            compiled,
            """\
arg0_1: bf16[2, 4, 16, 64]
arg1_1: bf16[2, 4, 16, 64]
arg2_1: bf16[2, 4, 16, 64]
iota = iota(8, start=0, step=1, dtype=torch.int64, device=cpu, requires_grad=False)
mul = mul.Tensor(iota, 2)
add = add.Tensor(mul, 0)
convert_element_type = convert_element_type(add, torch.float32)
neg = neg(convert_element_type)
div = div.Tensor(neg, 16)
pow_1 = pow.Scalar(10000.0, div)
iota_1 = iota(16, start=0, step=1, dtype=torch.int64, device=cpu, requires_grad=False)
mul_1 = mul.Tensor(iota_1, 1)
add_1 = add.Tensor(mul_1, 0)
convert_element_type_1 = convert_element_type(add_1, torch.float32)
unsqueeze = unsqueeze(convert_element_type_1, 1)
unsqueeze_1 = unsqueeze(pow_1, 0)
mul_2 = mul.Tensor(unsqueeze, unsqueeze_1)
unsqueeze_2 = unsqueeze(mul_2, 1)
expand = expand(unsqueeze_2, [16, 2, 8])
clone = clone(expand, memory_format=torch.contiguous_format)
view = view(clone, [16, 16])
unsqueeze_3 = unsqueeze(view, 0)
cos = cos(unsqueeze_3)
convert_element_type_2 = convert_element_type(cos, torch.bfloat16)
sin = sin(unsqueeze_3)
convert_element_type_3 = convert_element_type(sin, torch.bfloat16)
slice_tensor = slice.Tensor(convert_element_type_2, 2, 0, 8, 1)
unsqueeze_default = unsqueeze(slice_tensor, 1)
slice_tensor_1 = slice.Tensor(convert_element_type_3, 2, 0, 8, 1)
unsqueeze_default_1 = unsqueeze(slice_tensor_1, 1)
quantize_default = lp_inductor.quantize(arg0_1, unsqueeze_default, unsqueeze_default_1, False, 0, 16, 1, False)
getitem_4 = quantize_default[0]
getitem_5 = quantize_default[1]
quantize_default_1 = lp_inductor.quantize(arg1_1, unsqueeze_default, unsqueeze_default_1, False, 0, 16, 1, True)
getitem_6 = quantize_default_1[0]
getitem_7 = quantize_default_1[1]
quantize_centered_default = lp_inductor.quantize_centered(arg2_1)
getitem_8 = quantize_centered_default[0]
getitem_9 = quantize_centered_default[1]
getitem_10 = quantize_centered_default[2]
_scaled_dot_product_flash_attention_quantized = _scaled_dot_product_flash_attention.quantized(getitem_4, getitem_6, getitem_8, getitem_5, getitem_7, getitem_9, 0.0, True, False, scale=None)
getitem_11 = _scaled_dot_product_flash_attention_quantized[0]
convert_element_type_default = convert_element_type(getitem_11, torch.float32)
add_tensor = add.Tensor(convert_element_type_default, getitem_10)
convert_element_type_default_1 = convert_element_type(add_tensor, torch.bfloat16)
clone_default = clone(convert_element_type_default_1, memory_format=torch.contiguous_format)
return clone_default""",
        )
        self.assertExpectedInline(
            exported,
            """\
arg0_1: bf16[2, 4, 16, 64]
arg1_1: bf16[2, 4, 16, 64]
arg2_1: bf16[2, 4, 16, 64]
iota = iota(8, start=0, step=1, dtype=torch.int64, device=cpu, requires_grad=False)
mul = mul.Tensor(iota, 2)
add = add.Tensor(mul, 0)
convert_element_type = convert_element_type(add, torch.float32)
neg = neg(convert_element_type)
div = div.Tensor(neg, 16)
pow_1 = pow.Scalar(10000.0, div)
iota_1 = iota(16, start=0, step=1, dtype=torch.int64, device=cpu, requires_grad=False)
mul_1 = mul.Tensor(iota_1, 1)
add_1 = add.Tensor(mul_1, 0)
convert_element_type_1 = convert_element_type(add_1, torch.float32)
unsqueeze = unsqueeze(convert_element_type_1, 1)
unsqueeze_1 = unsqueeze(pow_1, 0)
mul_2 = mul.Tensor(unsqueeze, unsqueeze_1)
unsqueeze_2 = unsqueeze(mul_2, 1)
expand = expand(unsqueeze_2, [16, 2, 8])
clone = clone(expand, memory_format=torch.contiguous_format)
view = view(clone, [16, 16])
unsqueeze_3 = unsqueeze(view, 0)
cos = cos(unsqueeze_3)
_assert_tensor_metadata = _assert_tensor_metadata(cos, None, None, torch.float32, device=cpu, layout=torch.strided)
convert_element_type_2 = convert_element_type(cos, torch.bfloat16)
sin = sin(unsqueeze_3)
_assert_tensor_metadata_1 = _assert_tensor_metadata(sin, None, None, torch.float32, device=cpu, layout=torch.strided)
convert_element_type_3 = convert_element_type(sin, torch.bfloat16)
slice_tensor = slice.Tensor(convert_element_type_2, 2, 0, 8, 1)
unsqueeze_default = unsqueeze(slice_tensor, 1)
slice_tensor_1 = slice.Tensor(convert_element_type_3, 2, 0, 8, 1)
unsqueeze_default_1 = unsqueeze(slice_tensor_1, 1)
quantize_default = lp_inductor.quantize(arg0_1, unsqueeze_default, unsqueeze_default_1, False, 0, 16, 1, False)
getitem_4 = quantize_default[0]
getitem_5 = quantize_default[1]
quantize_default_1 = lp_inductor.quantize(arg1_1, unsqueeze_default, unsqueeze_default_1, False, 0, 16, 1, True)
getitem_6 = quantize_default_1[0]
getitem_7 = quantize_default_1[1]
quantize_centered_default = lp_inductor.quantize_centered(arg2_1)
getitem_8 = quantize_centered_default[0]
getitem_9 = quantize_centered_default[1]
getitem_10 = quantize_centered_default[2]
_scaled_dot_product_flash_attention_quantized = _scaled_dot_product_flash_attention.quantized(getitem_4, getitem_6, getitem_8, getitem_5, getitem_7, getitem_9, 0.0, True, False, scale=None)
getitem_11 = _scaled_dot_product_flash_attention_quantized[0]
convert_element_type_default = convert_element_type(getitem_11, torch.float32)
add_tensor = add.Tensor(convert_element_type_default, getitem_10)
convert_element_type_default_1 = convert_element_type(add_tensor, torch.bfloat16)
clone_default = clone(convert_element_type_default_1, memory_format=torch.contiguous_format)
return clone_default""",
        )

    def test_no_rope(self) -> None:
        compiled, exported = self.check("no_rope")
        self.assertExpectedInline(
            compiled,
            """\
arg0_1: bf16[2, 4, 16, 64]
arg1_1: bf16[2, 4, 16, 64]
arg2_1: bf16[2, 4, 16, 64]
quantize_default = lp_inductor.quantize(arg0_1, None, None, False, 0, 0, 1, False)
getitem = quantize_default[0]
getitem_1 = quantize_default[1]
quantize_default_1 = lp_inductor.quantize(arg1_1, None, None, False, 0, 0, 1, True)
getitem_2 = quantize_default_1[0]
getitem_3 = quantize_default_1[1]
quantize_centered_default = lp_inductor.quantize_centered(arg2_1)
getitem_4 = quantize_centered_default[0]
getitem_5 = quantize_centered_default[1]
getitem_6 = quantize_centered_default[2]
_scaled_dot_product_flash_attention_quantized = _scaled_dot_product_flash_attention.quantized(getitem, getitem_2, getitem_4, getitem_1, getitem_3, getitem_5, 0.0, False, False, scale=None)
getitem_7 = _scaled_dot_product_flash_attention_quantized[0]
convert_element_type_default = convert_element_type(getitem_7, torch.float32)
add_tensor = add.Tensor(convert_element_type_default, getitem_6)
convert_element_type_default_1 = convert_element_type(add_tensor, torch.bfloat16)
clone_default = clone(convert_element_type_default_1, memory_format=torch.contiguous_format)
return clone_default""",
        )
        self.assertExpectedInline(
            exported,
            """\
arg0_1: bf16[2, 4, 16, 64]
arg1_1: bf16[2, 4, 16, 64]
arg2_1: bf16[2, 4, 16, 64]
quantize_default = lp_inductor.quantize(arg0_1, None, None, False, 0, 0, 1, False)
getitem = quantize_default[0]
getitem_1 = quantize_default[1]
quantize_default_1 = lp_inductor.quantize(arg1_1, None, None, False, 0, 0, 1, True)
getitem_2 = quantize_default_1[0]
getitem_3 = quantize_default_1[1]
quantize_centered_default = lp_inductor.quantize_centered(arg2_1)
getitem_4 = quantize_centered_default[0]
getitem_5 = quantize_centered_default[1]
getitem_6 = quantize_centered_default[2]
_scaled_dot_product_flash_attention_quantized = _scaled_dot_product_flash_attention.quantized(getitem, getitem_2, getitem_4, getitem_1, getitem_3, getitem_5, 0.0, False, False, scale=None)
getitem_7 = _scaled_dot_product_flash_attention_quantized[0]
convert_element_type_default = convert_element_type(getitem_7, torch.float32)
add_tensor = add.Tensor(convert_element_type_default, getitem_6)
convert_element_type_default_1 = convert_element_type(add_tensor, torch.bfloat16)
clone_default = clone(convert_element_type_default_1, memory_format=torch.contiguous_format)
return clone_default""",
        )

    def test_cross(self) -> None:
        compiled, exported = self.check("cross")
        self.assertExpectedInline(
            compiled,
            """\
arg0_1: bf16[2, 4, 8, 64]
arg1_1: bf16[2, 4, 24, 64]
arg2_1: bf16[2, 4, 24, 64]
quantize_default = lp_inductor.quantize(arg0_1, None, None, False, 0, 0, 1, False)
getitem = quantize_default[0]
getitem_1 = quantize_default[1]
quantize_default_1 = lp_inductor.quantize(arg1_1, None, None, False, 0, 0, 1, True)
getitem_2 = quantize_default_1[0]
getitem_3 = quantize_default_1[1]
quantize_centered_default = lp_inductor.quantize_centered(arg2_1)
getitem_4 = quantize_centered_default[0]
getitem_5 = quantize_centered_default[1]
getitem_6 = quantize_centered_default[2]
_scaled_dot_product_flash_attention_quantized = _scaled_dot_product_flash_attention.quantized(getitem, getitem_2, getitem_4, getitem_1, getitem_3, getitem_5, 0.0, False, False, scale=0.1)
getitem_7 = _scaled_dot_product_flash_attention_quantized[0]
convert_element_type_default = convert_element_type(getitem_7, torch.float32)
add_tensor = add.Tensor(convert_element_type_default, getitem_6)
convert_element_type_default_1 = convert_element_type(add_tensor, torch.bfloat16)
clone_default = clone(convert_element_type_default_1, memory_format=torch.contiguous_format)
return clone_default""",
        )
        self.assertExpectedInline(
            exported,
            """\
arg0_1: bf16[2, 4, 8, 64]
arg1_1: bf16[2, 4, 24, 64]
arg2_1: bf16[2, 4, 24, 64]
quantize_default = lp_inductor.quantize(arg0_1, None, None, False, 0, 0, 1, False)
getitem = quantize_default[0]
getitem_1 = quantize_default[1]
quantize_default_1 = lp_inductor.quantize(arg1_1, None, None, False, 0, 0, 1, True)
getitem_2 = quantize_default_1[0]
getitem_3 = quantize_default_1[1]
quantize_centered_default = lp_inductor.quantize_centered(arg2_1)
getitem_4 = quantize_centered_default[0]
getitem_5 = quantize_centered_default[1]
getitem_6 = quantize_centered_default[2]
_scaled_dot_product_flash_attention_quantized = _scaled_dot_product_flash_attention.quantized(getitem, getitem_2, getitem_4, getitem_1, getitem_3, getitem_5, 0.0, False, False, scale=0.1)
getitem_7 = _scaled_dot_product_flash_attention_quantized[0]
convert_element_type_default = convert_element_type(getitem_7, torch.float32)
add_tensor = add.Tensor(convert_element_type_default, getitem_6)
convert_element_type_default_1 = convert_element_type(add_tensor, torch.bfloat16)
clone_default = clone(convert_element_type_default_1, memory_format=torch.contiguous_format)
return clone_default""",
        )
