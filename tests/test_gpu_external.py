"""On an NVIDIA GPU: kernels that live in other libraries, each where it is installed."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lp_inductor
from lp_inductor import AttentionCall, Fp8Config, MaskPart, Miss, MissCode, Ok, reference
from lp_inductor.kernels import get_kernel
from lp_inductor.visibility import Visibility
from tests import models
from tests.helpers import compile_fp8, sqnr
from tests.test_rewrites import MIN_DB, REWRITTEN, qkv

DEVICE = torch.device("cuda")
#: Short sequences too, where it need not pay.
FA3 = Fp8Config(kernel="fa3", force=True)


def missing_fa3() -> str | None:
    """Why FA3 cannot run here."""
    if not torch.cuda.is_available():
        return "needs an NVIDIA GPU"
    verdict = get_kernel("fa3").availability(DEVICE)
    return verdict.detail if isinstance(verdict, Miss) else None


NOT_HERE = missing_fa3()
HAS_FA3_FWD = importlib.util.find_spec("fa3_fwd_interface") is not None

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(NOT_HERE is not None, reason=str(NOT_HERE)),
]


def normal(
    batch: int = 2,
    heads: int = 4,
    kv_heads: int = 4,
    query_len: int = 512,
    key_len: int | None = None,
    dim: int = 128,
    value_dim: int | None = None,
) -> list[Tensor]:
    """Query, key and value, N(0, 1), bfloat16."""
    shapes = (
        (heads, query_len, dim),
        (kv_heads, key_len or query_len, dim),
        (kv_heads, key_len or query_len, value_dim or dim),
    )
    return [torch.randn(batch, *shape, device=DEVICE, dtype=torch.bfloat16) for shape in shapes]


def fp8(q: Tensor, k: Tensor, v: Tensor, config: Fp8Config = FA3, **options: Any) -> Tensor:
    """Eager FP8 attention."""
    return lp_inductor.scaled_dot_product_attention_fp8(
        q, k, v, enable_gqa=True, config=config, **options
    )


def exact(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """The same in float64."""
    return F.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), enable_gqa=q.shape[1] != k.shape[1], **options
    )


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("dim", [16, 48, 64, 80, 96, 128, 160, 192, 256])
def test_accuracy(dim: int, kv_heads: int, is_causal: bool) -> None:
    q, k, v = normal(dim=dim, kv_heads=kv_heads, query_len=1000)
    result = fp8(q, k, v, is_causal=is_causal)
    assert result.dtype == torch.bfloat16
    # FA3's kernel for 256 lanes loses half a decibel in the sums of the scores; with 16 lanes few
    # roundings even out.
    least = {16: 24.0, 256: 24.5}.get(dim, 25.0)
    assert sqnr(exact(q, k, v, is_causal=is_causal), result) >= least


@pytest.mark.parametrize(("dim", "value_dim"), [(192, 128), (144, 112)])
def test_values_of_another_size(dim: int, value_dim: int) -> None:
    q, k, v = normal(dim=dim, value_dim=value_dim)
    assert sqnr(exact(q, k, v), fp8(q, k, v)) >= 25


@pytest.mark.parametrize("lengths", [(1, 700), (17, 4096), (300, 77), (128, 16384)])
def test_lengths_that_differ(lengths: tuple[int, int]) -> None:
    """Few queries over many keys: the library splits the keys."""
    q, k, v = normal(batch=1, heads=8, kv_heads=2, query_len=lengths[0], key_len=lengths[1])
    result = fp8(q, k, v)
    assert sqnr(exact(q, k, v), result) >= 24.5
    assert torch.equal(result, fp8(q, k, v)), "run to run"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes(dtype: torch.dtype) -> None:
    q, k, v = (t.to(dtype) for t in normal())
    result = fp8(q, k, v + 1, is_causal=True)
    assert result.dtype == dtype
    assert sqnr(exact(q, k, v + 1, is_causal=True), result) >= 25


@pytest.mark.parametrize("is_causal", [False, True])
def test_centring_lifts_it_at_long_sequences(is_causal: bool) -> None:
    """V with mean 1 in every channel: without centring the accumulator loses it."""
    q, k, v = normal(batch=1, heads=1, kv_heads=1, query_len=16384)
    v = v + 1
    wanted = exact(q, k, v, is_causal=is_causal)
    assert sqnr(wanted, fp8(q, k, v, is_causal=is_causal)) >= (40 if is_causal else 45)
    plain = fp8(q, k, v, Fp8Config(kernel="fa3", smooth_v=False), is_causal=is_causal)
    assert sqnr(wanted, plain) < 30


def test_bottom_right_and_hidden_queries() -> None:
    """What needs no window of the library: a causal mask aligned at the last token."""
    kernel = get_kernel("fa3")
    for query_len, key_len, upper in ((64, 192, 128), (64, 192, 0), (192, 64, -128)):
        q, k, v = normal(batch=1, query_len=query_len, key_len=key_len, dim=64)
        q8, q_descale = reference.quantize(q, None, None, False, 0, 0, 1, False)
        k8, k_descale = reference.quantize(k, None, None, False, 0, 0, 1, True)
        v8, v_descale, mean = reference.quantize_centered(v + 1)
        out = kernel.run(
            q8, k8, v8, q_descale, k_descale, v_descale, v_mean=mean,
            visible=Visibility(upper=upper), scale=None, out_dtype=torch.bfloat16,
        )  # fmt: skip
        wanted = reference.sdpa_quantized(
            q8, k8, v8, q_descale, k_descale, v_descale, mean, None, None, upper, None, None,
            torch.float32,
        )  # fmt: skip
        assert torch.equal((out == 0).all(-1), (wanted == 0).all(-1))
        assert sqnr(wanted, out) >= 28


@pytest.mark.skipif(not HAS_FA3_FWD, reason="fa3-fwd is not installed")
def test_fa3_fwd_says_that_it_has_no_windows() -> None:
    if importlib.util.find_spec("flash_attn_interface") is not None:
        pytest.skip("the official package is asked first")
    asked = AttentionCall(
        DEVICE, torch.bfloat16, 1, 4, 4, 64, 64, 64, 64, frozenset({MaskPart.BAND})
    )
    verdict = get_kernel("fa3").supports(asked)
    assert isinstance(verdict, Miss) and verdict.code is MissCode.MASK_FORM
    assert "fa3-fwd was built without local windows" in verdict.detail


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("name", ["llama", "gqa_flag"])
def test_compiled(name: str, mode: str) -> None:
    """``torch.compile(backend="lp_fp8")``, under CUDA graphs too."""
    model, operands, rope, mask, _ = REWRITTEN[name]
    operands = [t.cuda() for t in operands]
    with torch.no_grad():
        (site,) = lp_inductor.explain(model, *operands, config=FA3).sites
        torch._dynamo.reset()
        compiled = torch.compile(
            model,
            backend="lp_fp8",
            options={"kernel": "fa3", "force": True},
            mode=None,
            fullgraph=True,
        )
        if mode != "default":
            compiled = compile_fp8(model, FA3, fullgraph=True, mode=mode)
        results = [compiled(*operands).clone() for _ in range(4)]
    assert (site.kernel, site.rope, site.mask) == ("fa3", rope, mask)
    assert all(torch.equal(results[0], result) for result in results)
    wanted = model(*(t.double() for t in operands))
    assert MIN_DB <= sqnr(wanted, results[-1]) < 40


def test_a_graph_is_captured_and_replayed_on_new_operands() -> None:
    static = normal(batch=1, query_len=256, kv_heads=2)
    for _ in range(2):
        fp8(*static, is_causal=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = fp8(*static, is_causal=True)
    fresh = normal(batch=1, query_len=256, kv_heads=2)
    for target, source in zip(static, fresh, strict=True):
        target.copy_(source)
    graph.replay()
    assert sqnr(exact(*fresh, is_causal=True), result) >= 25


def test_a_length_that_varies() -> None:
    compiled = compile_fp8(models.llama, FA3, fullgraph=True)
    for length in (128, 192, 320):
        operands = [t.cuda() for t in qkv(kv_heads=2, query_len=length, key_len=length)]
        for tensor in operands:
            torch._dynamo.mark_dynamic(tensor, 2, min=2, max=4096)
        with torch.no_grad():
            result = compiled(*operands)
        assert sqnr(models.llama(*(t.double() for t in operands)), result) >= MIN_DB


def test_a_stream_of_the_users_own() -> None:
    operands = normal(batch=1, query_len=2048)
    expected = fp8(*operands, is_causal=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results = [fp8(*operands, is_causal=True) for _ in range(8)]
    stream.synchronize()
    assert all(torch.equal(expected, result) for result in results)


# --- what the user has activated ------------------------------------------------------------------


@pytest.fixture
def activated() -> Iterator[None]:
    """FA3 activated in PyTorch, with fa3-fwd under the names of the official package.

    PyTorch wants an operator for gradients too, which fa3-fwd has not: one that raises.
    """
    from torch.nn import attention

    if not HAS_FA3_FWD or importlib.util.find_spec("flash_attn_interface") is not None:
        pytest.skip("wants fa3-fwd, and not the official package")
    import fa3_fwd_interface  # noqa: F401

    forward = torch.ops.fa3_fwd.fwd.default

    def no_gradient(dout: Tensor) -> Tensor:
        raise NotImplementedError("fa3-fwd has no backward pass")

    library = torch.library.Library("flash_attn_3", "FRAGMENT")
    library.define(str(forward._schema).removeprefix("fa3_fwd::"))
    library.impl("fwd", lambda *args, call=forward: call(*args), "CUDA")
    library.define("bwd(Tensor dout) -> Tensor")
    library.impl("bwd", no_gradient, "CUDA")
    module = types.ModuleType("flash_attn_interface")
    module.__spec__ = ModuleSpec("flash_attn_interface", None)
    sys.modules["flash_attn_interface"] = module
    try:
        attention.activate_flash_attention_impl("FA3")
        yield
    finally:
        attention.restore_flash_attention_impl()
        del sys.modules["flash_attn_interface"]
        library._destroy()


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_activated(activated: None, mode: str) -> None:
    """The ATen overload, as PyTorch's dispatcher has it, eager and compiled."""
    config = Fp8Config(kernel="activated", force=True)
    operands = [t.cuda() for t in qkv(kv_heads=2)]
    wanted = models.llama(*(t.double() for t in operands))
    with torch.no_grad():
        (site,) = lp_inductor.explain(models.llama, *operands, config=config).sites
        compiled = compile_fp8(models.llama, config, fullgraph=True, mode=mode)
        for _ in range(3):
            result = compiled(*operands).clone()
    assert site.kernel == "activated"
    assert MIN_DB <= sqnr(wanted, result) < 40
    q, k, v = normal(kv_heads=2)
    for is_causal in (False, True):
        eager = fp8(q, k, v + 1, config, is_causal=is_causal)
        assert sqnr(exact(q, k, v + 1, is_causal=is_causal), eager) >= 30


def test_auto_takes_what_is_activated_and_not_what_was(activated: None) -> None:
    from torch.nn import attention

    kernel = get_kernel("activated")
    assert isinstance(kernel.availability(DEVICE), Ok)
    attention.restore_flash_attention_impl()
    verdict = kernel.availability(DEVICE)
    assert isinstance(verdict, Miss) and verdict.code is MissCode.KERNEL_UNAVAILABLE
    attention.activate_flash_attention_impl("FA3")
    assert isinstance(kernel.availability(DEVICE), Ok)
