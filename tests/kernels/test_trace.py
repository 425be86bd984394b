"""A whole layer traced into a graph over fake CUDA tensors of symbolic sizes, without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)

from lp_inductor.visibility import Visibility
from tests.kernels.cases import HAS_TRITON, INTERPRETED

pytestmark = pytest.mark.skipif(
    not HAS_TRITON or INTERPRETED, reason="needs Triton, not its interpreter"
)


class Target:
    """Stands for the driver of a GPU that is not there: traced kernels are analysed for Hopper."""

    def get_current_target(self) -> Any:
        """The architecture to compile for."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@pytest.fixture(autouse=True)
def hopper() -> Iterator[None]:
    """Triton compiles for a Hopper GPU where there is no GPU."""
    if torch.cuda.is_available():
        yield
        return
    from triton.runtime import driver

    driver.set_active(Target())
    yield
    driver._active = None  # there is nothing to reset it to


def symbols() -> tuple[FakeTensorMode, list[torch.SymInt]]:
    """A fake mode, and a batch size, query and key lengths that it knows by symbol only."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    shape = (3, 700, 900)
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * 3)
    sized = mode.from_tensor(torch.empty(shape, device="meta"), symbolic_context=context)
    return mode, list(sized.shape)


def traced(layout: str, **options: Any) -> tuple[GraphModule, ShapeEnv]:
    """The graph of a layer with rotation and grouped heads."""
    from torch._dispatch.python import enable_python_dispatcher
    from torch._subclasses.functional_tensor import dispatch_functionalize

    from lp_inductor.kernels.triton.layer import attention_layer
    from lp_inductor.kernels.triton.rope import Rope

    mode, (batch, query_len, key_len) = symbols()
    dim = options.pop("dim", 128)
    with_mask = options.pop("mask", False)

    def layer(q: Any, k: Any, v: Any, q_table: Any, k_table: Any, mask: Any) -> Any:
        q_rope, k_rope = (Rope(t, t, False, 0, dim) for t in (q_table, k_table))
        visible = Visibility(upper=k.shape[2] - q.shape[2], tensor=mask if with_mask else None)
        return attention_layer(q, k, v, q_rope=q_rope, k_rope=k_rope, visible=visible, **options)

    with mode, enable_python_dispatcher():

        def operand(heads: int, tokens: Any) -> torch.Tensor:
            if layout == "bhsd":
                return torch.empty(batch, heads, tokens, dim, dtype=torch.bfloat16, device="cuda")
            x = torch.empty(batch, tokens, heads, dim, dtype=torch.bfloat16, device="cuda")
            return x.transpose(1, 2)

        tables = [torch.empty(1, n, dim // 2, device="cuda") for n in (query_len, key_len)]
        mask = torch.empty(batch, 1, query_len, key_len, dtype=torch.bool, device="cuda")
        args = (operand(8, query_len), operand(2, key_len), operand(2, key_len), *tables, mask)
        graph = make_fx(dispatch_functionalize(layer))(*args)
    assert mode.shape_env is not None
    return graph, mode.shape_env


def launches(graph: GraphModule) -> list[list[str]]:
    """For each Triton kernel that the graph starts, the arguments that it writes to."""
    wrapper = torch.ops.higher_order.triton_kernel_wrapper_functional
    calls = [node for node in graph.graph.nodes if node.target is wrapper]
    return [list(call.kwargs["tensors_to_clone"]) for call in calls]


#: What the kernels may write to: nothing that a model owns.
WRITTEN = {
    "k_mean_ptr", "v_mean_ptr", "q_out_ptr", "k_out_ptr", "v_out_ptr", "q_descale_ptr",
    "k_descale_ptr", "v_descale_ptr", "q_seen_ptr", "k_seen_ptr", "v_seen_ptr",
    "q_guess_ptr", "k_guess_ptr", "v_guess_ptr", "mean_ptr", "out_ptr",
}  # fmt: skip


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize(
    ("count", "options"),
    [
        (4, {}),
        (4, {"center_key": False, "center_value": False}),
        (5, {"mask": True, "hadamard_qk": True, "hadamard_v": True}),
        (4, {"qk_dtype": torch.int8}),
        (4, {"qk_dtype": torch.int8, "granularity": "per_block"}),
        (4, {"dim": 256}),
        (2, {"static_descales": (0.1, 0.1, 0.1), "center_key": False, "center_value": False}),
        (4, {"granularity": "per_block"}),
        (3, {"granularity": "per_block", "center_key": False, "center_value": False}),
    ],
    ids=[
        "head",
        "not-centred",
        "hadamard",
        "int8",
        "int8-block",
        "wide",
        "static",
        "block",
        "block-as-is",
    ],
)
def test_no_size_is_bound(layout: str, count: int, options: dict[str, Any]) -> None:
    """The graph holds for all sizes, has as few launches as said, and copies no operand."""
    graph, shape_env = traced(layout, **options)
    assert [str(guard.expr) for guard in shape_env.guards] == []
    assert len(launches(graph)) == count
    assert {name for call in launches(graph) for name in call} <= WRITTEN
    names = {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
    assert not any("copy" in name or "clone" in name for name in names), names


def test_what_each_launch_writes() -> None:
    """The largest numbers too, which are collected by atomic operations: others wait for them."""
    graph, _ = traced("bshd")
    sampling, rounding, settling, attention = (set(call) for call in launches(graph))
    seen, descales = {"k_seen_ptr", "v_seen_ptr"}, {"k_descale_ptr", "v_descale_ptr"}
    assert sampling >= seen | {"k_guess_ptr", "v_guess_ptr", "k_mean_ptr", "v_mean_ptr"}
    assert rounding >= seen | {"q_out_ptr", "k_out_ptr", "v_out_ptr", "q_descale_ptr"}
    assert settling >= descales | {"k_out_ptr", "v_out_ptr"}
    assert attention == {"out_ptr"}
    # What a launch only reads, it must not keep others from writing to.
    assert not settling & (seen | {"q_out_ptr", "q_descale_ptr"})


def test_result_shape() -> None:
    """The result has the symbols of the query, and is stored by tokens."""
    graph, _ = traced("bshd")
    (result,) = next(n for n in graph.graph.nodes if n.op == "output").all_input_nodes
    value = result.meta["val"]
    query = next(n for n in graph.graph.nodes if n.op == "placeholder").meta["val"]
    assert [str(s) for s in value.shape] == [str(s) for s in query.shape]
    assert [str(s) for s in value.stride()[1:]] == ["128", "1024", "1"]
    assert value.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("dim", "dtype", "stages"),
    [(128, torch.bfloat16, 3), (256, torch.bfloat16, 1), (128, torch.float32, 1)],
)
def test_tiles_fit_into_small_shared_memories(dim: int, dtype: torch.dtype, stages: int) -> None:
    """Tiles are under way ahead only where two of them take less than 99 KiB."""
    from lp_inductor.kernels.triton.cuts import choose_cut
    from lp_inductor.kernels.triton.operands import Operands
    from lp_inductor.kernels.triton.rope import Rope

    table = torch.empty(1, 256, dim // 2, device="meta")
    key = torch.empty(1, 32, 256, dim, dtype=dtype, device="meta")
    operands = Operands(key=key, k_rope=Rope(table, table, False, 0, dim))
    cut = choose_cut(operands, blocks=True)
    assert cut.stages == stages
    assert (cut.stages > 1) <= (2 * 128 * dim * dtype.itemsize < 99 * 1024)
    for transpose in (False, True):
        cut = choose_cut(operands, blocks=False, transpose=transpose)
        assert cut.stages > 1 and cut.k_heads == 16
        assert (cut.stages - 1) * cut.k_tokens * dim * dtype.itemsize < 99 * 1024
