"""What would become of exported programs: every decision, and no code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import lp_inductor
from lp_inductor import MissCode, MissError, PackageError, Report
from lp_inductor._compat import NewGuardError
from lp_inductor.export import PortabilityPass, aoti_inductor_configs
from lp_inductor.kernels.reference import ReferenceKernel
from lp_inductor.lowerings.attention import lower_graph
from tests import models
from tests.aoti.build import Layer, LibraryKernel, shape_env_of
from tests.lowerings.test_attention import attention_graph
from tests.test_rewrites import qkv

Q = (2, 4, 16, 32)
TOKENS = Dim("tokens", min=2, max=4096)
SELF = ({2: TOKENS},)


class Model(nn.Module):
    """Attention as a function of its operands."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Any:
        """Call it."""
        return self.function(*args)


def export(function: Callable[..., Any], *args: Tensor, dims: Any = None, **kw: Any) -> Any:
    """The exported program of a function."""
    shapes = None if dims is None else (dims,)
    return torch.export.export(Model(function), args, dynamic_shapes=shapes, **kw)


def explain_one(program: ExportedProgram, **config: Any) -> Any:
    """The only site of a program; no guard was added, and no open size was fixed."""
    env = shape_env_of(program)
    before = None if env is None else (len(env.guards), dict(env.replacements))
    (site,) = lp_inductor.explain(program, config=config).sites
    assert env is None or (len(env.guards), dict(env.replacements)) == before
    return site


def attend(q: Tensor) -> Tensor:
    """Causal self-attention of one operand."""
    return F.scaled_dot_product_attention(q, q, q, is_causal=True)


def windowed(q: Tensor) -> Tensor:
    """A sliding window of four keys, from positions."""
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(q.shape[2])
    return F.scaled_dot_product_attention(q, q, q, attn_mask=(i >= j) & (i - j < 4))


def padded(q: Tensor, keep: Tensor) -> Tensor:
    """Keys that run-time data hides."""
    return F.scaled_dot_product_attention(q, q, q, attn_mask=keep[:, None, None, :])


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("dynamic", [True, False])
def test_every_way_of_exporting(strict: bool, dynamic: bool) -> None:
    dims = {0: Dim("batch", min=1, max=8), 2: TOKENS}
    operands = qkv(kv_heads=2)
    program = export(
        models.llama, *operands, dims=(dims, dims, dims) if dynamic else None, strict=strict
    )
    site = explain_one(program)
    assert (site.fused, site.rope, site.mask) == (True, "half[0:64]", "causal")
    assert [isinstance(n, str) for n in site.query_shape] == [dynamic, False, dynamic, False]


@pytest.mark.parametrize(
    ("function", "mask"), [(attend, "causal"), (windowed, "band[-3, 0]")], ids=["causal", "window"]
)
def test_masks_from_positions(function: Any, mask: str) -> None:
    assert explain_one(export(function, torch.randn(Q), dims=SELF)).mask == mask


def test_a_mask_that_is_an_input() -> None:
    dims = ({2: TOKENS}, {1: TOKENS})
    program = export(padded, torch.randn(Q), torch.ones(2, 16, dtype=torch.bool), dims=dims)
    assert explain_one(program).mask == "keys"


def test_parameters_that_want_gradients() -> None:
    """A package is for inference; how the program was exported does not matter."""
    x, y = torch.randn(2, 16, 64, dtype=torch.bfloat16), torch.randn(16, dtype=torch.bfloat16)
    assert explain_one(torch.export.export(Layer(), (x,), {"y": y})).fused


def test_attention_in_subgraphs() -> None:
    def both(q: Tensor) -> Any:
        return torch.cond(q.sum() > 0, attend, lambda q: attend(-q), (q,))

    def without_grad(q: Tensor) -> Tensor:
        with torch.no_grad():
            return attend(q)

    sites = lp_inductor.explain(export(both, torch.randn(Q), dims=SELF)).sites
    assert [site.fused for site in sites] == [True, True]
    assert explain_one(export(without_grad, torch.randn(Q), dims=SELF)).fused


def test_a_subgraph_that_is_closed_is_refused_once() -> None:
    """Inductor shows it before the graph that says so."""
    from torch._higher_order_ops.map import map as map_over

    def mapped(q: Tensor) -> Any:
        return map_over(attend, q[None])

    site = explain_one(export(mapped, torch.randn(Q)))
    assert site.miss.code is MissCode.SUBGRAPH and "map" in site.miss.detail


def test_open_heads_are_refused() -> None:
    site = explain_one(export(attend, torch.randn(Q), dims=({1: Dim("heads")},)))
    assert site.miss.code is MissCode.DYNAMIC_DIM


def test_a_length_is_decided_from_its_range() -> None:
    for low, fused in ((2, False), (1024, True)):
        dims = ({2: Dim("tokens", min=low, max=8192)},)
        site = explain_one(export(attend, torch.randn(2, 4, 1024, 32), dims=dims), min_seq_len=1024)
        assert site.fused is fused
        if not fused:
            assert site.miss.code is MissCode.SHORT_SEQUENCE
            assert "min=1024" in site.miss.detail and "min_seq_len" in site.miss.detail


def test_a_length_that_is_fixed_is_compared() -> None:
    program = export(attend, torch.randn(Q))
    assert explain_one(program, min_seq_len=16).fused
    assert explain_one(program, min_seq_len=17).miss.code is MissCode.SHORT_SEQUENCE


class Asking(ReferenceKernel):
    """Decides by a size that a program may leave open."""

    name = "asking"
    portable = True

    def supports(self, call: Any) -> Any:
        """Lengths of an even number of tokens."""
        assert call.query_len % 2 == 0
        return super().supports(call)


@pytest.fixture
def kernels() -> Any:
    """Kernels that a package may not hold, or not always."""
    added = [Asking(), Interpreted(), LibraryKernel()]
    for kernel in added:
        lp_inductor.register_kernel(kernel)
    yield
    for kernel in added:
        lp_inductor.unregister_kernel(kernel.name)


class Interpreted(ReferenceKernel):
    """Is portable only if it says so itself, whatever it inherits from."""

    name = "interpreted"


def test_a_kernel_that_asks_too_much_refuses_the_site(kernels: Any) -> None:
    """Its question would fix the length to the example's without a word."""
    assert explain_one(export(attend, torch.randn(Q)), kernel="asking").fused
    program = export(attend, torch.randn(Q), dims=SELF)
    if not hasattr(shape_env_of(program), "error_on_new_guards"):
        # torch 2.11 notices when it is too late to go on.
        with pytest.raises(NewGuardError, match="open size"):
            lp_inductor.explain(program, config={"kernel": "asking"})
        return
    site = explain_one(program, kernel="asking")
    assert site.miss.code is MissCode.DYNAMIC_DIM and "Mod" in site.miss.detail


@pytest.mark.parametrize("name", ["interpreted", "library"])
def test_kernels_that_are_not_portable(kernels: Any, name: str) -> None:
    site = explain_one(export(attend, torch.randn(Q)), kernel=name)
    assert site.miss.code is MissCode.NOT_PORTABLE and name in site.miss.detail
    assert site.kernel is None


def test_auto_takes_the_next_kernel_that_is_portable(kernels: Any) -> None:
    assert explain_one(export(attend, torch.randn(Q))).kernel == "asking"
    lp_inductor.unregister_kernel("asking")
    try:
        assert explain_one(export(attend, torch.randn(Q))).kernel == "reference"
    finally:
        lp_inductor.register_kernel(Asking())


def test_the_program_stays_as_it_is() -> None:
    program = export(attend, torch.randn(Q), dims=SELF)
    before = str(program.graph)
    reports = [lp_inductor.explain(program) for _ in range(2)]
    assert reports[0] == reports[1] and str(program.graph) == before


def test_nothing_outside_the_compile_changes() -> None:
    from torch._inductor import config

    before = config.get_config_copy()
    lp_inductor.explain(export(attend, torch.randn(Q)))
    assert config.get_config_copy() == before


def test_on_miss_raise() -> None:
    program = export(attend, torch.randn(Q), dims=({1: Dim("heads")},))
    assert not lp_inductor.explain(program, config={"on_miss": "raise"}).fused
    with pytest.raises(MissError, match="DYNAMIC_DIM"):
        lp_inductor.aoti_compile_and_package(program, config={"on_miss": "raise"})


def test_an_operator_of_ours_that_needs_python_is_no_package() -> None:
    """A model may call our operators itself; what is left of them behind lowering cannot run."""

    def call(q: Tensor) -> Tensor:
        empty: Tensor = torch.ops.lp_inductor.sdpa(q, q, q, None, False, None, False)
        return torch.ops.lp_inductor.sdpa_quantized(
            *(q.to(torch.float8_e4m3fn) for _ in range(3)),
            *(torch.ones(2, 4) for _ in range(3)),
            None, None, None, None, None, None, torch.bfloat16, "interpreted",
        ) + empty  # fmt: skip

    lp_inductor.register_kernel(Interpreted())
    try:
        with pytest.raises(PackageError, match=r"sdpa_quantized.*Python"):
            lp_inductor.aoti_compile_and_package(export(call, torch.randn(Q, dtype=torch.bfloat16)))
    finally:
        lp_inductor.unregister_kernel("interpreted")


def test_the_upstream_overload_that_nothing_lowers_is_no_package() -> None:
    """A call whose other outputs are used stays ATen's, and would throw at its first run."""
    gm = attention_graph((0, 1))
    lower_graph(gm.graph)
    with pytest.raises(PackageError, match=r"flash_attention.quantized cannot be packaged"):
        PortabilityPass()(gm.graph)
    gm = attention_graph()
    lower_graph(gm.graph)
    PortabilityPass()(gm.graph)


def test_reports_survive_json() -> None:
    import json

    kept = lp_inductor.explain(export(attend, torch.randn(Q)), config={"skip": ("*",)})
    done = lp_inductor.explain(export(models.llama, *qkv(kv_heads=2)))
    for report in (kept, done):
        assert Report.from_json(json.loads(json.dumps(report.as_json()))) == report


def test_wrong_arguments(tmp_path: Any) -> None:
    program = export(attend, torch.randn(Q))
    with pytest.raises(lp_inductor.ConfigError, match="package_path"):
        lp_inductor.aoti_compile_and_package({"one": program})
    with pytest.raises(lp_inductor.ConfigError, match="collection"):
        aoti_inductor_configs(libraries="fa3_fwd")
    with pytest.raises(lp_inductor.ConfigError, match="smooth"):
        lp_inductor.aoti_compile_and_package(program, config={"smoth_k": True})
