"""The kernel registry: choice, refusal, and a third party's kernel in a compiled graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import lp_inductor
from lp_inductor import (
    AttentionCall,
    ConfigError,
    Fp8Config,
    Kernel,
    KernelError,
    MaskPart,
    Miss,
    MissCode,
    Ok,
    reference,
)
from lp_inductor.kernels import choose_kernel
from lp_inductor.kernels.activated import ActivatedKernel
from tests import models, near_misses
from tests.helpers import (
    canonical,
    compile_fp8,
    compile_stock,
    interpret_fp8,
    rewritten_graph,
    sqnr,
    stock_graph,
)
from tests.test_rewrites import MIN_DB, qkv

PADDING = torch.arange(16)[None, :] < torch.tensor([16, 11])[:, None]


class Counting(Kernel):
    """The reference, counting its calls; serves head_dim 64 only."""

    name = "counting"
    min_seq_len = 8

    def __init__(self) -> None:
        self.calls: list[tuple[torch.Size, bool, torch.dtype]] = []

    def availability(self, device: torch.device) -> Ok | Miss:
        """On CPUs."""
        if device.type == "cpu":
            return Ok()
        return Miss(MissCode.KERNEL_UNAVAILABLE, "CPUs only")

    def supports(self, call: AttentionCall) -> Ok | Miss:
        """head_dim 64."""
        if call.head_dim != 64:
            return Miss(MissCode.KERNEL_UNSUPPORTED, f"head_dim {call.head_dim}")
        return Ok()

    def run(
        self, query: Tensor, key: Tensor, value: Tensor, *descales: Tensor, **options: Any
    ) -> Tensor:
        """Count, and compute; the result is contiguous, which is not what the graph expects."""
        visible = options["visible"]
        self.calls.append((key.shape, visible.is_causal, options["out_dtype"]))
        assert query.transpose(1, 2).is_contiguous() and query.dtype == torch.float8_e4m3fn
        out = reference.sdpa_quantized(
            query,
            key,
            value,
            *descales,
            None,
            None,
            None,
            visible.upper,
            None,
            options["scale"],
            options["out_dtype"],
        )
        return out.contiguous()


@pytest.fixture
def counting() -> Iterator[Counting]:
    """A registered kernel."""
    kernel = Counting()
    lp_inductor.register_kernel(kernel)
    yield kernel
    lp_inductor.unregister_kernel(kernel.name)


def call(**changes: Any) -> AttentionCall:
    """A call on the CPU."""
    fields = {
        "device": torch.device("cpu"),
        "dtype": torch.bfloat16,
        "batch": 2,
        "heads": 4,
        "kv_heads": 2,
        "query_len": 16,
        "key_len": 16,
        "head_dim": 64,
        "value_head_dim": 64,
        "mask": frozenset({MaskPart.CAUSAL}),
    }
    return AttentionCall(**{**fields, **changes})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_registered_kernel_serves_compiled_models(counting: Counting, dtype: torch.dtype) -> None:
    operands = qkv(kv_heads=2, dtype=dtype)
    with torch.no_grad():
        (site,) = lp_inductor.explain(models.llama, *operands).sites
        compiled = compile_fp8(models.llama, fullgraph=True)
        results = [compiled(*operands) for _ in range(2)]
    assert site.kernel == "counting"
    assert counting.calls == [(torch.Size([2, 2, 16, 64]), True, dtype)] * 2
    assert torch.equal(*results)
    assert sqnr(models.llama(*(t.double() for t in operands)), results[0]) >= MIN_DB


def test_auto_goes_on_where_a_kernel_does_not_serve(counting: Counting) -> None:
    with torch.no_grad():
        (served,) = lp_inductor.explain(models.no_rope, *qkv()).sites
        (other,) = lp_inductor.explain(models.no_rope, *qkv(dim=32)).sites
    assert (served.kernel, other.kernel) == ("counting", "reference")


def test_a_named_kernel_is_not_replaced_by_another(counting: Counting) -> None:
    config = Fp8Config(kernel="counting")
    with torch.no_grad():
        (site,) = lp_inductor.explain(models.no_rope, *qkv(dim=32), config=config).sites
        stock = compile_stock(models.no_rope)(*qkv(dim=32))
        ours = compile_fp8(models.no_rope, config)(*qkv(dim=32))
    assert site.miss is not None and site.miss.code is MissCode.KERNEL_UNSUPPORTED
    assert torch.equal(stock, ours) and not counting.calls


def test_the_granularity_asked_for_is_the_kernels(counting: Counting) -> None:
    counting.granularities = ("per_tensor",)
    asked = Fp8Config(granularity="per_head")
    chosen = choose_kernel(asked, call())
    assert not isinstance(chosen, Miss) and chosen.name == "reference"
    named = choose_kernel(Fp8Config(kernel="counting", granularity="per_head"), call())
    assert isinstance(named, Miss) and named.code is MissCode.KERNEL_UNSUPPORTED
    assert "per_tensor" in named.detail


def test_a_kernels_own_bound_counts(counting: Counting) -> None:
    config = Fp8Config(kernel="counting")
    short = qkv(key_len=7)
    with torch.no_grad():
        (site,) = lp_inductor.explain(models.cross, *short, config=config).sites
        (forced,) = lp_inductor.explain(
            models.cross, *short, config=Fp8Config(kernel="counting", force=True)
        ).sites
    assert site.miss is not None and site.miss.code is MissCode.SHORT_SEQUENCE
    assert forced.kernel == "counting"


def test_eager_uses_a_registered_kernel(counting: Counting) -> None:
    lp_inductor.scaled_dot_product_attention_fp8(*qkv(), is_causal=True)
    assert len(counting.calls) == 1


def test_forcing_what_cannot_run_raises_with_the_reason() -> None:
    compiled = compile_fp8(models.no_rope, Fp8Config(kernel="activated"))
    with torch.no_grad(), pytest.raises(Exception, match="cannot run here: no activated kernel"):
        compiled(*qkv())
    with pytest.raises(KernelError, match="serves cpu"):
        choose_kernel(Fp8Config(kernel="activated"), call())


def test_without_any_kernel_there_is_a_reason() -> None:
    other = call(device=torch.device("xpu"))
    chosen = choose_kernel(Fp8Config(), other)
    assert isinstance(chosen, Miss) and chosen.code is MissCode.NO_KERNEL
    assert "activated: no activated kernel serves xpu" in chosen.detail
    with pytest.raises(KernelError):
        choose_kernel(Fp8Config(kernel="reference"), other)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"dtype": torch.float32}, MissCode.KERNEL_UNSUPPORTED),
        ({"value_head_dim": 32}, MissCode.HEAD_DIM),
        ({"head_dim": 40, "value_head_dim": 40}, MissCode.HEAD_DIM),
        ({"head_dim": 512, "value_head_dim": 512}, MissCode.HEAD_DIM),
    ],
)
def test_what_the_aten_overload_cannot_serve(changes: dict[str, Any], code: MissCode) -> None:
    verdict = ActivatedKernel().supports(call(**changes))
    assert isinstance(verdict, Miss) and verdict.code is code
    assert isinstance(ActivatedKernel().supports(call()), Ok)


@pytest.mark.parametrize("name", ["", "auto", "reference"])
def test_names_are_taken_once(name: str) -> None:
    kernel = Counting()
    kernel.name = name
    with pytest.raises(ConfigError, match="empty, reserved or taken"):
        lp_inductor.register_kernel(kernel)


def test_only_kernels_are_registered_and_built_ins_stay() -> None:
    with pytest.raises(ConfigError, match="expected a Kernel"):
        lp_inductor.register_kernel(object())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="built in"):
        lp_inductor.unregister_kernel("reference")
    with pytest.raises(ConfigError, match="no kernel 'nobody'"):
        lp_inductor.unregister_kernel("nobody")
    names = [kernel.name for kernel in lp_inductor.registered_kernels()]
    assert names == ["activated", "fa3", "fa4", "triton", "reference"]


#: model, operands, why a kernel that takes causal masks only does not serve it
MASKED: dict[str, tuple[Any, list[Tensor], MissCode]] = {
    "window": (near_misses.sliding_window, qkv(), MissCode.MASK_FORM),
    "bottom_right": (near_misses.bottom_right_causal, qkv(query_len=8), MissCode.MASK_FORM),
    "causal_cross": (near_misses.causal_cross, qkv(query_len=8), MissCode.MASK_FORM),
    "padding": (near_misses.padding_mask, [*qkv(), PADDING], MissCode.MASK_IS_DATA),
    "bias": (near_misses.additive_mask, [*qkv(), torch.randn(16, 16)], MissCode.MASK_IS_DATA),
    "one_element": (near_misses.causal_but_one_by_index, qkv(), MissCode.MASK_NOT_PROVED),
}


@pytest.mark.parametrize("name", MASKED)
def test_a_mask_that_the_kernel_does_not_take(counting: Counting, name: str) -> None:
    model, operands, code = MASKED[name]
    config = Fp8Config(kernel="counting")
    with torch.no_grad():
        (site,) = lp_inductor.explain(model, *operands, config=config).sites
        stock = stock_graph(model, *operands)
    assert site.miss is not None and site.miss.code is code, str(site.miss)
    ours = rewritten_graph(model, *operands, config=config)
    assert canonical(stock) == canonical(ours) and not counting.calls


class Banded(Counting):
    """Takes windows and key masks, and leaves adding the mean to its caller."""

    name = "banded"
    masks = frozenset({MaskPart.CAUSAL, MaskPart.BAND, MaskPart.BOOL})

    def run(
        self, query: Tensor, key: Tensor, value: Tensor, *descales: Tensor, **options: Any
    ) -> Tensor:
        """Attention over the centred values."""
        visible = options["visible"]
        assert options["v_mean"] is None
        return reference.sdpa_quantized(
            query, key, value, *descales, None, visible.tensor, visible.lower, visible.upper,
            visible.chunk, options["scale"], options["out_dtype"],
        )  # fmt: skip


@pytest.mark.parametrize(
    "model", [near_misses.sliding_window, near_misses.causal_but_one, near_misses.causal_cross]
)
def test_the_mean_is_added_behind_a_kernel_that_does_not(model: Any) -> None:
    q, k, v = qkv(kv_heads=4)
    v = v + 1
    lp_inductor.register_kernel(Banded())
    try:
        result, (site,) = interpret_fp8(model, q, k, v)
    finally:
        lp_inductor.unregister_kernel("banded")
    assert site.kernel == "banded"
    assert sqnr(model(q.double(), k.double(), v.double()), result) >= MIN_DB


def test_hidden_queries_get_no_mean_behind_a_kernel() -> None:
    q, k, v = qkv(query_len=16, key_len=8)
    lp_inductor.register_kernel(Banded())
    try:
        result, (site,) = interpret_fp8(near_misses.bottom_right_causal, q, k, v + 1)
    finally:
        lp_inductor.unregister_kernel("banded")
    assert site.kernel == "banded"
    assert (result[:, :, :8] == 0).all() and not (result[:, :, 8:] == 0).any()
