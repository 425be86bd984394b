"""Whole sites become Triton kernels: what is lowered together, what apart, and with which arguments.

Over fake CUDA tensors, so that no GPU is needed; what the arguments compute is checked in Triton's
interpreter.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph
from torch.fx.experimental.proxy_tensor import make_fx

from lp_inductor import Fp8Config, ops
from lp_inductor.lowerings import attention, triton
from lp_inductor.lowerings.attention import lower_graph
from lp_inductor.passes.inline import Inliner
from tests.helpers import sqnr
from tests.kernels.cases import HAS_TRITON, INTERPRETED
from tests.kernels.test_trace import Target
from tests.test_quantization import WAYS

compiled = pytest.mark.skipif(
    not HAS_TRITON or INTERPRETED, reason="needs Triton, not its interpreter"
)
interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs Triton and TRITON_INTERPRET=1")

Tensors = tuple[Tensor, ...]


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Code is compiled for a Hopper GPU, which need not be there."""
    monkeypatch.setattr(triton, "can_compile", lambda device: device.type == "cuda")
    if not torch.cuda.is_available():
        from triton.runtime import driver

        monkeypatch.setattr(driver, "_active", Target())
        # A torch without CUDA cannot index or copy fake CUDA tensors, as what is lowered apart does.
        monkeypatch.setattr(triton, "_attention", _empty_result)
        for op, fake in (
            (ops.quantize, ops._quantize_fake),
            (ops.quantize_centered, ops._quantize_centered_fake),
        ):
            monkeypatch.setitem(attention._DECOMPOSITIONS, op, fake)


def _empty_result(query: Tensor, key: Tensor, value: Tensor, *_: Any, **options: Any) -> Tensor:
    return query.new_empty((*query.shape[:3], value.shape[3]), dtype=options["out_dtype"])


def apart(calls: int) -> dict[str, int]:
    """What :func:`launches` counts where attention is lowered without its quantisation."""
    return {"attention_forward": calls} if torch.cuda.is_available() else {}


def quantised(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, **config: Any
) -> tuple[Tensors, Tensors, Tensors]:
    """Query, key and value as the passes have them quantised; the tables rotate the upper half."""
    how = Fp8Config(**config).quantization("", config.get("granularity", "per_head"))
    group, dim = q.shape[1] // k.shape[1], q.shape[3]
    rope = (cos, sin, True, dim // 2, dim // 2)
    query = ops.quantize(q, *rope, group, False, **how.query_options())
    key = ops.quantize(k, *rope, 1, how.smooth_k, **how.key_options())
    options = how.value_options()
    if how.smooth_v:
        return query, key, ops.quantize_centered(v, **options)
    return query, key, (*ops.quantize(v, None, None, False, 0, 0, 1, False, **options), None)


def attend(query: Tensors, key: Tensors, value: Tensors, kernel: str = "triton") -> Tensor:
    """Causal attention over quantised operands."""
    out: Tensor = ops.sdpa_quantized(
        query[0], key[0], value[0], query[1], key[1], value[1], value[2], None, None, 0, None,
        None, torch.bfloat16, kernel,
    )  # fmt: skip
    return out


def operands(device: str, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Query of 4 heads, key and value of 2, tables for half a head."""
    make = torch.randn if device == "cpu" else torch.empty
    q, k, v = (
        make(1, 200, heads, 32, device=device, dtype=dtype).transpose(1, 2) for heads in (4, 2, 2)
    )
    return [q, k, v, *(make(1, 1, 200, 8, device=device) for _ in range(2))]


def lowered(model: Callable[..., Any]) -> Graph:
    """The graph of ``model`` over fake CUDA tensors, lowered."""
    with FakeTensorMode():
        graph = make_fx(model)(*operands("cuda"))
    lower_graph(graph.graph)
    graph.graph.lint()
    return graph.graph


def launches(graph: Graph) -> Counter[str]:
    """How often each Triton kernel is started, and each operator of ours that is left."""
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    wrapper = torch.ops.higher_order.triton_kernel_wrapper_functional
    counts: Counter[str] = Counter()
    for node in graph.nodes:
        if node.target is wrapper:
            kernel = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
            while not hasattr(kernel, "__name__"):
                kernel = kernel.fn  # type: ignore[union-attr]
            counts[kernel.__name__] += 1
        elif str(node.target).startswith("lp_inductor"):
            counts[str(node.target)] += 1
    return counts


@compiled
@pytest.mark.parametrize("way", WAYS)
def test_a_site_is_one_quantisation_and_one_attention(hopper: None, way: str) -> None:
    def model(*tensors: Tensor) -> Tensor:
        return attend(*quantised(*tensors, **WAYS[way][0]))

    graph = lowered(model)
    counts = launches(graph)
    assert counts.pop("attention_forward") == 1
    assert set(counts) <= {"sample_operands", "quantize_operands", "transform_means"}
    assert counts["quantize_operands"] in (1, 2)
    assert not any(str(n.target).startswith("aten.amax") for n in graph.nodes)


@compiled
@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_copied_for_what_kernels_write_to(hopper: None, way: str) -> None:
    """Inductor lets every kernel write in place, also where one goes over another's result."""
    from torch._inductor.fx_passes.reinplace import reinplace_inplaceable_ops
    from torch._inductor.fx_utils import FakeTensorUpdater

    def model(*tensors: Tensor) -> Tensor:
        return attend(*quantised(*tensors, **WAYS[way][0]))

    graph = lowered(model)
    (parameter,) = list(inspect.signature(FakeTensorUpdater).parameters.values())[:1]
    updater = FakeTensorUpdater(graph.owning_module if parameter.name == "gm" else graph)  # type: ignore[arg-type]
    reinplace_inplaceable_ops(updater, graph)
    wrapper = torch.ops.higher_order.triton_kernel_wrapper_functional
    calls = [node for node in graph.nodes if node.target is wrapper]
    assert calls and not any(node.kwargs["tensors_to_clone"] for node in calls)


@compiled
@pytest.mark.parametrize("kernel", ["triton", "fa3"])
def test_operands_are_computed_once(hopper: None, kernel: str) -> None:
    """What the graph computes is to be stored, not computed for each launch that reads it."""

    def model(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        tensors = (q, k * 3, v, cos.cos(), sin)
        one = attend(*quantised(*tensors, granularity="per_head"), kernel=kernel)
        return attend(*quantised(*(t + 1 for t in tensors)), kernel=kernel) + one + 1

    stored = [n for n in lowered(model).nodes if n.meta.get("inductor_realize_to_strides")]
    names = ["mul", "cos", *(f"add{i}" for i in ("", "_1", "_2", "_3", "_4"))]
    assert [node.name.replace("_tensor", "") for node in stored] == names


@compiled
def test_kernels_of_the_model_are_given_what_the_model_gives_them(hopper: None) -> None:
    """They may look at more of a tensor than its address; ours get the memory of a view."""
    import triton as triton_package
    from triton import language as tl

    @triton_package.jit
    def double(x_ptr, out_ptr, N: tl.constexpr):  # type: ignore[no-untyped-def]
        lanes = tl.arange(0, N)
        tl.store(out_ptr + lanes, tl.load(x_ptr + lanes) * 2)

    def model(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        seen, out = sin.view(40, -1), torch.empty_like(sin)
        torch.library.wrap_triton(double)[(1,)](seen, out, N=32)
        table = cos.squeeze(0).unsqueeze(0)
        return attend(*quantised(q, k, v, table, table)) + out.sum()

    from torch._subclasses.functional_tensor import dispatch_functionalize

    graph = lowered(dispatch_functionalize(model))
    wrapper = torch.ops.higher_order.triton_kernel_wrapper_functional
    read = [node.kwargs["kwargs"] for node in graph.nodes if node.target is wrapper]
    assert [r["x_ptr"].target for r in read if "x_ptr" in r] == [torch.ops.aten.view.default]  # type: ignore[index, operator, union-attr]
    tables = [r["k_cos_ptr"].op for r in read if "k_cos_ptr" in r]  # type: ignore[index, operator, union-attr]
    assert tables and set(tables) == {"placeholder"}


@compiled
def test_shared_keys_and_values_are_quantised_once(hopper: None) -> None:
    """Two attention calls over one key: each is lowered alone, behind one quantisation."""

    def model(q: Tensor, *rest: Tensor) -> Tensor:
        query, key, value = quantised(q, *rest)
        other, _, _ = quantised(q * 2, *rest)
        return attend(query, key, value) + attend(other, key, value)

    assert launches(lowered(model)) == apart(2)


@compiled
@pytest.mark.parametrize("mixed", ["scale", "mean", "no mean", "granularity"])
def test_what_is_not_one_site_is_lowered_apart(hopper: None, mixed: str) -> None:
    """Scales, means or granularities that do not belong together are what the graph says."""

    def model(q: Tensor, k: Tensor, v: Tensor, *tables: Tensor) -> Tensor:
        query, key, value = quantised(q, k, v, *tables)
        _, other_key, other_value = quantised(q, k * 3, v + 1, *tables)
        if mixed == "scale":
            key = (key[0], other_key[1])
        if mixed == "mean":
            value = (*value[:2], other_value[2])
        if mixed == "no mean":
            value = (*value[:2], None)  # type: ignore[assignment]
        if mixed == "granularity":
            _, key, _ = quantised(q, k, v, *tables, granularity="per_block")
        return attend(query, key, value)

    assert launches(lowered(model)) == apart(1)


@compiled
@pytest.mark.parametrize("kernel", ["fa3", "somebody's"])
def test_quantisation_for_other_kernels(hopper: None, kernel: str) -> None:
    """One scale a head for query, key and value together; their attention remains a call."""

    def model(*tensors: Tensor) -> Tensor:
        return attend(*quantised(*tensors, granularity="per_head"), kernel=kernel)

    graph = lowered(model)
    counts = launches(graph)
    assert counts.pop("lp_inductor.sdpa_quantized.default") == 1
    assert counts == {"sample_operands": 1, "quantize_operands": 2}
    (call,) = (n for n in graph.nodes if n.target is ops.sdpa_quantized)
    value = call.args[2].meta["val"]
    assert value.shape == (1, 2, 200, 32) and value.stride(3) == 1


@compiled
def test_quantisation_used_before_the_site_is_whole(hopper: None) -> None:
    """The query's result is needed before the key exists: nothing may be moved behind it."""

    def model(q: Tensor, k: Tensor, v: Tensor, *tables: Tensor) -> Tensor:
        query, _, _ = quantised(q, k, v, *tables, granularity="per_head")
        late = k * query[1].sum().to(k.dtype)
        _, key, value = quantised(q, late, v, *tables, granularity="per_head")
        return attend(query, key, value, kernel="fa3")

    assert launches(lowered(model)) == {"lp_inductor.sdpa_quantized.default": 1}


@compiled
def test_cpus_are_not_lowered_so(hopper: None) -> None:
    def model(*tensors: Tensor) -> Tensor:
        return attend(*quantised(*tensors))

    with FakeTensorMode():
        graph = make_fx(model)(*operands("cpu"))
    lower_graph(graph.graph)
    assert launches(graph.graph) == {"lp_inductor.sdpa_quantized.default": 1}


@interpreted
@pytest.mark.parametrize("way", WAYS)
def test_the_arguments_mean_what_the_graph_means(way: str) -> None:
    """The layer that is traced, run with what is read off the graph, against the graph itself."""
    inputs = operands("cpu", torch.float32)

    def model(*tensors: Tensor) -> Tensor:
        return attend(*quantised(*tensors, **WAYS[way][0]), kernel="reference")

    graph = make_fx(model, tracing_mode="fake")(*inputs)
    (call,) = (n for n in graph.graph.nodes if n.target is ops.sdpa_quantized)
    site = triton.SiteCalls.of(call)
    assert site is not None and site.granularity is not None
    placeholders = [n for n in graph.graph.nodes if n.op == "placeholder"]
    values = dict(zip(placeholders, inputs, strict=True))
    tensors = [None if node is None else values[node] for node in site.tensors()]
    mask, lower, upper, chunk, scale, out_dtype = call.args[7:13]
    got = triton._layer(
        *tensors, mask, lower, upper, chunk, scale=scale, out_dtype=out_dtype, **site.constants()
    )  # type: ignore[arg-type]
    # Two roundings of the same numbers, about different means.
    assert sqnr(model(*inputs), got) > 20


def test_inlining_is_shared_between_layers() -> None:
    """Layers alike are traced once."""
    calls = []

    def function(x: Tensor) -> Tensor:
        calls.append(1)
        return x + 1

    with FakeTensorMode():
        graph = make_fx(lambda x: (ops.hadamard(x), ops.hadamard(x * 2)))(torch.empty(1, 2, 3, 16))
    from lp_inductor.passes.emit import Emitter

    inliner = Inliner()
    for node in graph.graph.find_nodes(op="call_function", target=ops.hadamard):
        inliner.inline(Emitter(graph.graph, node), function, node.args)
    assert len(calls) == 1
