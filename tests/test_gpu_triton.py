"""On an NVIDIA GPU: sites that become Triton kernels of the compiled code.

Every form of attention through ``torch.compile``, modes, dynamic lengths, streams, devices and
caches. The kernels alone are tested in test_gpu_kernels.py, and in the interpreter on CPUs.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

import lp_inductor
from lp_inductor import Fp8Config
from lp_inductor.kernels import get_kernel
from lp_inductor.passes.result import Ok
from tests import models
from tests.helpers import compile_fp8, compile_stock, sqnr
from tests.test_gpu import to_gpu
from tests.test_near_misses import ALL
from tests.test_quantization import WAYS
from tests.test_rewrites import MIN_DB, REWRITTEN, qkv

CUDA = torch.device("cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="needs compiled Triton"),
]

TRITON = Fp8Config(kernel="triton", force=True)


def long(tokens: int = 512, kv_heads: int = 2, dim: int = 128) -> list[Tensor]:
    """bfloat16 query of 4 heads, key and value on the GPU."""
    return to_gpu(qkv(kv_heads=kv_heads, query_len=tokens, key_len=tokens, dim=dim))


def in_double(model: Any, operands: list[Tensor]) -> Any:
    """The model in float64."""
    with torch.no_grad():
        return model(*(t.double() if t.is_floating_point() else t for t in operands))


def test_the_kernel_is_there() -> None:
    assert isinstance(get_kernel("triton").availability(CUDA), Ok)


@pytest.mark.parametrize("name", REWRITTEN)
def test_every_rewrite(name: str) -> None:
    model, operands, rope, mask, _ = REWRITTEN[name]
    operands = to_gpu(operands)
    with torch.no_grad():
        (site,) = lp_inductor.explain(model, *operands, config=TRITON).sites
        result = compile_fp8(model, TRITON, fullgraph=True)(*operands)
    assert (site.fused, site.kernel, site.rope, site.mask) == (True, "triton", rope, mask)
    assert site.granularity == "per_head"
    assert MIN_DB <= sqnr(in_double(model, operands), result) < 40


@pytest.mark.parametrize("name", ALL)
def test_near_misses(name: str) -> None:
    """Masks of every kind, rotations that stay with the model, odd groups of heads."""
    model, operands = ALL[name]
    operands = to_gpu(operands)
    with torch.no_grad():
        result = compile_fp8(model, TRITON, fullgraph=True)(*operands)
    reference = in_double(model, operands)
    for expected, found in zip(tree_leaves(reference), tree_leaves(result), strict=True):
        assert sqnr(expected, found) >= 24


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model", [models.no_rope, models.llama])
def test_every_way_to_quantise(way: str, model: Any) -> None:
    options, least = WAYS[way]
    config = Fp8Config(kernel="triton", force=True, **options)
    operands = long(kv_heads=4 if model is models.no_rope else 2)
    with torch.no_grad():
        result = compile_fp8(model, config, fullgraph=True)(*operands)
        eager = lp_inductor.scaled_dot_product_attention_fp8(*long(kv_heads=4), config=config)
    assert sqnr(in_double(model, operands), result) >= least - 0.5
    assert eager.dtype == torch.bfloat16


def test_the_code_holds_the_kernels() -> None:
    """No Python is called between the kernels."""
    from torch._inductor.utils import run_and_get_code

    compiled = compile_fp8(models.llama, TRITON, fullgraph=True)
    with torch.no_grad():
        _, (code,) = run_and_get_code(compiled, *long())
    assert "lp_inductor.sdpa_quantized" not in code
    launched = re.findall(r"(\w+?)_\d+\.run\(", code)
    ours = [name for name in launched if not name.startswith("triton_")]
    assert ours == ["sample_operands", *["quantize_operands"] * 2, "attention_forward"]


def test_results_are_operands() -> None:
    """One attention's result, with nothing in between, is another's query and key."""

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return F.scaled_dot_product_attention(x, x, v)

    operands = long(kv_heads=4)
    with torch.no_grad():
        result = compile_fp8(model, TRITON, fullgraph=True)(*operands)
    assert sqnr(in_double(model, operands), result) >= MIN_DB - 3


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"])
def test_modes_compute_the_same(mode: str) -> None:
    operands = long()
    with torch.no_grad():
        want = compile_fp8(models.llama, TRITON, fullgraph=True)(*operands)
        torch._dynamo.reset()
        compiled = compile_fp8(models.llama, TRITON, fullgraph=True, mode=mode)
        for _ in range(3):
            got = compiled(*operands).clone()
    assert torch.equal(want, got)


def test_cuda_graphs_see_new_inputs() -> None:
    compiled = compile_fp8(models.llama, TRITON, fullgraph=True, mode="reduce-overhead")
    for seed in range(4):
        torch.manual_seed(seed)
        operands = long()
        with torch.no_grad():
            got = compiled(*operands).clone()
        assert sqnr(in_double(models.llama, operands), got) >= MIN_DB


def test_dynamic_lengths_share_one_compile() -> None:
    compiled = compile_fp8(models.llama, TRITON, fullgraph=True)
    torch._dynamo.utils.counters.clear()
    for length in (160, 257, 384, 1000):
        operands = long(length)
        for tensor in operands:
            torch._dynamo.mark_dynamic(tensor, 2, min=130, max=4096)
        with torch.no_grad():
            result = compiled(*operands)
        assert sqnr(in_double(models.llama, operands), result) >= MIN_DB
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_repeats_are_equal_to_the_bit() -> None:
    operands = long(1000)
    compiled = compile_fp8(models.llama, TRITON, fullgraph=True)
    with torch.no_grad():
        first = compiled(*operands)
        assert all(torch.equal(first, compiled(*operands)) for _ in range(10))


def test_streams() -> None:
    """Work on a stream of the user's waits for nothing else, and is ordered behind its inputs."""
    compiled = compile_fp8(models.llama, TRITON, fullgraph=True)
    operands = long()
    with torch.no_grad():
        want = compiled(*operands)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(400_000_000)
            moved = [t * 1 for t in operands]
            got = compiled(*moved)
        assert not stream.query()
        stream.synchronize()
    assert torch.equal(want, got)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
def test_another_device() -> None:
    """On a device that is not the current one: compiled, eager and under CUDA graphs."""
    operands = long()
    elsewhere = [t.to("cuda:1") for t in operands]
    assert torch.cuda.current_device() == 0
    with torch.no_grad():
        want = compile_fp8(models.llama, TRITON, fullgraph=True)(*operands)
        for mode in ("default", "reduce-overhead"):
            torch._dynamo.reset()
            compiled = compile_fp8(models.llama, TRITON, fullgraph=True, mode=mode)
            for _ in range(3):
                got = compiled(*elsewhere).clone()
            assert got.device == torch.device("cuda:1")
            assert torch.equal(want.cpu(), got.cpu())
        eager = lp_inductor.scaled_dot_product_attention_fp8(
            *elsewhere, enable_gqa=True, config=TRITON
        )
    assert eager.device == torch.device("cuda:1") and torch.cuda.current_device() == 0


CHILD = """
import torch, lp_inductor
from torch._dynamo.utils import counters
from lp_inductor import Fp8Config
from tests import models
torch.manual_seed(0)
q, k, v = (torch.randn(1, h, 256, 64, device="cuda", dtype=torch.bfloat16) for h in (4, 2, 2))
compiled = lp_inductor.compile_with_fp8_fusion(models.llama, Fp8Config(kernel="triton", force=True))
with torch.no_grad():
    out = compiled(q, k, v)
inductor = counters["inductor"]
print(inductor["fxgraph_cache_hit"], inductor["fxgraph_cache_miss"], out.double().sum().item())
"""


def test_a_second_process_finds_the_kernels_in_the_cache(tmp_path: Any) -> None:
    def run() -> list[str]:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", CHILD],
            capture_output=True, text=True, env=environment, check=True, timeout=300,
        )  # fmt: skip
        return done.stdout.split()

    first, second = run(), run()
    assert first[:2] == ["0", "1"] and second[:2] == ["1", "0"]
    assert first[2] == second[2]


def test_the_default_follows_the_measured_table() -> None:
    """A short sequence is stock to the bit; a long one is rewritten, by the kernel that wins."""
    short, longer = (
        long(64, kv_heads=2),
        [torch.randn(1, h, 16384, 128, device="cuda", dtype=torch.bfloat16) for h in (32, 8, 8)],
    )
    with torch.no_grad():
        (site,) = lp_inductor.explain(models.llama, *short).sites
        assert site.miss is not None
        stock, ours = compile_stock(models.llama)(*short), compile_fp8(models.llama)(*short)
        assert torch.equal(stock, ours)
        (site,) = lp_inductor.explain(models.llama, *longer).sites
        assert site.fused and site.kernel in ("triton", "fa3", "activated"), site.miss


def test_eager_attention() -> None:
    q, k, v = long(1000)
    with torch.no_grad():
        got = lp_inductor.scaled_dot_product_attention_fp8(
            q, k, v, is_causal=True, enable_gqa=True, config=TRITON
        )
    want = torch.nn.functional.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), is_causal=True, enable_gqa=True
    )
    assert sqnr(want, got) >= MIN_DB
