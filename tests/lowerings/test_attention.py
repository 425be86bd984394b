"""Lowering: what each operator of ours becomes, and what is not ours to touch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor import config as inductor_config
from torch._inductor.utils import fresh_inductor_cache, run_and_get_code
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

import lp_inductor
from lp_inductor import Fp8Config, Library, reference
from lp_inductor._compat import NewGuardError
from lp_inductor.lowerings.attention import lower_graph
from lp_inductor.passes.rewrite import KERNEL_META
from tests import models
from tests.helpers import compile_fp8
from tests.passes.test_movement import trace
from tests.test_kernels import Counting
from tests.test_rewrites import qkv

aten = torch.ops.aten
OURS = ("lp_inductor.", "_scaled_dot_product_flash_attention.quantized")


def quantized_operands() -> list[Tensor]:
    """FP8 query, key and value, and their descales."""
    operands, descales = [], []
    for x in qkv():
        quantized, descale = reference.quantize(x, None, None, False, 0, 0, 1, False)
        operands.append(quantized)
        descales.append(descale)
    return [*operands, *descales]


def attention_graph(outputs: tuple[int, ...] = (0,)) -> GraphModule:
    """One call of the ATen overload, returning the outputs asked for."""

    def call(*operands: Tensor) -> Any:
        results = aten._scaled_dot_product_flash_attention.quantized(*operands, 0.0, True)
        return [results[n] for n in outputs]

    return trace(call, *quantized_operands())


def targets(gm: GraphModule) -> str:
    """The operators of a graph, one a line."""
    return "\n".join(str(node.target) for node in gm.graph.nodes)


def test_the_reference_kernel_is_inlined_on_a_cpu() -> None:
    gm = attention_graph()
    lower_graph(gm.graph)
    gm.graph.lint()
    gm.recompile()
    assert not any(name in targets(gm) for name in OURS)
    operands = quantized_operands()
    expected = reference.sdpa_quantized(*operands, None, None, None, 0, None, None, torch.bfloat16)
    assert torch.equal(gm(*operands)[0], expected)


@pytest.mark.parametrize("outputs", [(0, 1), (1,)])
def test_a_call_whose_other_outputs_are_used_is_left_alone(outputs: tuple[int, ...]) -> None:
    gm = attention_graph(outputs)
    before = targets(gm)
    lower_graph(gm.graph)
    assert targets(gm) == before


@pytest.mark.parametrize("kernel", ["activated", "other"])
def test_other_kernels_are_called_not_inlined(kernel: str) -> None:
    gm = attention_graph()
    (node,) = gm.graph.find_nodes(
        op="call_function", target=aten._scaled_dot_product_flash_attention.quantized
    )
    node.meta[KERNEL_META] = kernel
    lower_graph(gm.graph)
    assert (OURS[1] in targets(gm)) is (kernel == "activated")
    assert ("lp_inductor.sdpa_quantized" in targets(gm)) is (kernel == "other")


def test_a_cpp_wrapper_reaches_the_activated_kernel_through_python() -> None:
    """From C++ the ATen overload is ATen's own function, which throws whatever is activated."""
    gm = attention_graph()
    (node,) = gm.graph.find_nodes(
        op="call_function", target=aten._scaled_dot_product_flash_attention.quantized
    )
    node.meta[KERNEL_META] = "activated"
    with inductor_config.patch(cpp_wrapper=True):
        lower_graph(gm.graph)
    assert OURS[1] not in targets(gm)
    assert "lp_inductor.sdpa_quantized" in targets(gm)


def targets_with(kernel: Counting, package: bool = False) -> str:
    """What is called in the graph once its attention is lowered for ``kernel``."""
    gm = attention_graph()
    (node,) = gm.graph.find_nodes(
        op="call_function", target=aten._scaled_dot_product_flash_attention.quantized
    )
    node.meta[KERNEL_META] = kernel.name
    lp_inductor.register_kernel(kernel)
    try:
        lower_graph(gm.graph, package=package)
    finally:
        lp_inductor.unregister_kernel(kernel.name)
    return targets(gm)


def test_a_portable_kernel_is_inlined() -> None:
    class Portable(Counting):
        name = "portable"
        portable = True

    found = targets_with(Portable())
    assert not any(name in found for name in OURS)


@pytest.mark.parametrize("package", [True, False])
def test_a_kernel_of_a_library_is_inlined_in_a_package_only(package: bool) -> None:
    class InLibrary(Counting):
        name = "in-library"
        portable = True
        libraries = (Library("mine", ("mine::attention",)),)

    found = targets_with(InLibrary(), package)
    assert ("lp_inductor.sdpa_quantized" in found) is not package


class Asking(Counting):
    """A kernel that asks about the number of tokens when it is traced."""

    name = "asking"
    portable = True

    def run(self, query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """A tensor of the right shape, whatever the answer is."""
        assert query.shape[2] != 1000
        return query.to(kwargs["out_dtype"])


def test_code_for_a_package_does_not_fix_a_size() -> None:
    """Under torch.compile there is a guard for it; a package has none."""

    def call(q: Tensor, k: Tensor, v: Tensor, *descales: Tensor) -> Tensor:
        out: Tensor = torch.ops.lp_inductor.sdpa_quantized(
            q, k, v, *descales, None, None, None, 0, None, None, torch.bfloat16, "asking"
        )
        return out

    lp_inductor.register_kernel(Asking())
    try:
        gm = make_fx(call, tracing_mode="symbolic")(*quantized_operands())
        with pytest.raises(NewGuardError, match="open size"):
            lower_graph(gm.graph, package=True)
        gm = make_fx(call, tracing_mode="symbolic")(*quantized_operands())
        lower_graph(gm.graph)
    finally:
        lp_inductor.unregister_kernel("asking")
    assert not any(name in targets(gm) for name in OURS)


def test_a_cpu_compile_is_all_cpp_with_real_fp8() -> None:
    with torch.no_grad(), fresh_inductor_cache():
        _, (code,) = run_and_get_code(compile_fp8(models.llama, fullgraph=True), *qkv(kv_heads=2))
    assert "Float8_e4m3fn" in code or "float8_e4m3fn" in code
    assert "ops.lp_inductor" not in code and ".quantized" not in code


def test_a_registered_kernel_is_a_fallback_call() -> None:
    kernel = Counting()
    lp_inductor.register_kernel(kernel)
    try:
        with torch.no_grad(), fresh_inductor_cache():
            compiled = compile_fp8(models.llama, Fp8Config(kernel="counting"), fullgraph=True)
            _, (code,) = run_and_get_code(compiled, *qkv(kv_heads=2))
    finally:
        lp_inductor.unregister_kernel("counting")
    assert "lp_inductor.sdpa_quantized" in code and "'counting'" in code
