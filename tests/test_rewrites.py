"""Rewritten models against float64, through torch.compile and torch.export."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

import lp_inductor
from tests import models
from tests.helpers import compile_fp8, exported_graph, sqnr
from tests.models import Attention

MIN_DB = 24.0


def qkv(
    heads: int = 4,
    kv_heads: int = 4,
    query_len: int = 16,
    key_len: int = 16,
    dim: int = 64,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> list[Tensor]:
    """Random query, key and value ~ N(0, 1)."""
    torch.manual_seed(0)
    return [
        torch.randn(2, heads, query_len, dim, dtype=dtype),
        torch.randn(2, kv_heads, key_len, dim, dtype=dtype),
        torch.randn(2, kv_heads, key_len, value_dim or dim, dtype=dtype),
    ]


def table_pair(tokens: int, width: int) -> list[Tensor]:
    """Cos and sin tables (tokens, width) whose halves differ: nothing may assume they do not."""
    return [
        t.bfloat16() for t in (torch.rand(tokens, width).cos(), torch.rand(tokens, width).sin())
    ]


def gptfast_table(tokens: int, width: int) -> Tensor:
    """Cos and sin as the last dimension of one table (tokens, width / 2, 2)."""
    angles = models.angles(tokens, width)
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def strides(x: Tensor) -> list[int]:
    """The strides that mean anything."""
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size != 1]


#: model, operands, the RoPE and mask the report must name, key/value heads
REWRITTEN: dict[str, tuple[Any, list[Tensor], str | None, str, int]] = {
    "llama": (models.llama, qkv(kv_heads=2), "half[0:64]", "causal", 2),
    "interleaved": (models.interleaved, qkv(), "interleaved[0:64]", "causal", 4),
    "complex": (models.complex_rope, qkv(), "interleaved[0:64]", "none", 4),
    "partial": (models.partial, qkv(), "half[0:16]", "causal", 4),
    "no_rope": (models.no_rope, qkv(), None, "none", 4),
    "cross": (models.cross, qkv(query_len=8, key_len=24), None, "none", 4),
    "one_head": (models.one_head_broadcast, qkv(kv_heads=1), None, "causal", 1),
    "gqa_flag": (models.gqa_flag, qkv(kv_heads=2), None, "causal", 2),
    "input_tables": (models.input_tables, qkv() + table_pair(16, 64), "half[0:64]", "causal", 4),
    "batch_tables": (
        models.batch_tables,
        [*qkv(), torch.randint(0, 90, (2, 16))],
        "half[0:64]",
        "causal",
        4,
    ),
    "gptfast": (
        models.gptfast_tables,
        [*qkv(), gptfast_table(16, 64)],
        "interleaved[0:64]",
        "causal",
        4,
    ),
    "per_head_table": (
        models.per_head_table,
        qkv(heads=8, kv_heads=8, query_len=8, key_len=8),
        "half[0:64]",
        "causal",
        8,
    ),
    "inverse": (models.inverse_rope, qkv(), "half[0:64]", "causal", 4),
    "normed": (models.normed_rope, qkv(), "half[0:64]", "causal", 4),
    "float32": (models.llama, qkv(kv_heads=2, dtype=torch.float32), "half[0:64]", "causal", 2),
    "float16": (models.no_rope, qkv(dtype=torch.float16), None, "none", 4),
    "value_dim": (models.gqa_flag, qkv(kv_heads=2, value_dim=32), None, "causal", 2),
    "one_batch_one_head": (
        models.llama,
        [t[:1, :1] for t in qkv()],
        "half[0:64]",
        "causal",
        1,
    ),
}


@pytest.mark.parametrize("name", REWRITTEN)
def test_report_names_what_was_found(name: str) -> None:
    model, operands, rope, mask, kv_heads = REWRITTEN[name]
    with torch.no_grad():
        (site,) = lp_inductor.explain(model, *operands).sites
    assert (site.fused, site.rope, site.mask, site.miss) == (True, rope, mask, None)
    assert site.key_shape[1] == kv_heads
    assert site.kernel == "reference"


@pytest.mark.parametrize("name", REWRITTEN)
def test_close_to_float64(name: str) -> None:
    model, operands, *_ = REWRITTEN[name]
    doubles = [t.double() if t.is_floating_point() else t for t in operands]
    # Tables that come from outside keep the precision the model was given.
    with torch.no_grad():
        reference = model(*doubles)
        result = compile_fp8(model, fullgraph=True)(*operands)
        stock = model(*operands)
    assert result.dtype == stock.dtype
    assert strides(result) == strides(stock)
    assert sqnr(reference, result) >= MIN_DB
    # FP8 must really have happened: no bf16 or wider attention is this far off.
    assert sqnr(reference, result) < 40


def our_operators(graph: str) -> list[str]:
    """What of a graph is ours, without node names: the RoPE and attention arguments."""
    lines = [line.partition(" = ")[2] for line in graph.splitlines()]
    ours = [
        line for line in lines if line.startswith(("lp_inductor.", "_scaled_dot_product_flash"))
    ]
    return [re.sub(r"[a-z_]+[a-z]\w*_\d+|getitem|arg\d_1", "_", line) for line in ours]


@pytest.mark.parametrize("name", REWRITTEN)
def test_export_is_rewritten_alike(name: str) -> None:
    model, operands, rope, *_ = REWRITTEN[name]
    module = Attention(model)
    exported = exported_graph(module, *operands)
    assert exported.count("lp_inductor.quantize(") == 2
    assert exported.count("lp_inductor.quantize_centered(") == 1
    assert "lp_inductor.sdpa(" not in exported
    rotated = [line for line in our_operators(exported) if "(_, None, None, " not in line]
    assert sum("lp_inductor.quantize(" in line for line in rotated) == (2 if rope else 0)


@pytest.mark.skipif(
    torch.__version__ < (2, 12),
    reason="torch 2.11 cannot export this model with a dynamic length, with or without us",
)
def test_export_with_dynamic_length_asks_sizes_of_rotated_tensors() -> None:
    """repeat_kv reads the rotated key's shape; that must not keep the rotation alive."""
    tokens = torch.export.Dim("tokens")
    exported = exported_graph(
        Attention(models.llama),
        *qkv(kv_heads=2),
        dynamic_shapes=(tuple({2: tokens} for _ in range(3)),),
    )
    assert exported.count("lp_inductor.quantize(") == 2
    assert "neg(slice" not in exported and exported.count("cat(") == 0


def test_other_numbers_of_heads_are_other_compiles() -> None:
    """Automatic dynamic shapes make heads symbolic, alone or in ``8 // s * s``; kernels fix them."""
    for heads, kv_heads, tokens, dim in (
        (8, 4, 16, 32),
        (8, 4, 24, 16),
        (4, 2, 12, 8),
        (4, 1, 9, 8),
    ):
        q, k, v = (
            torch.randn(1, n, tokens, dim, dtype=torch.bfloat16)
            for n in (heads, kv_heads, kv_heads)
        )
        with torch.no_grad():
            (site,) = lp_inductor.explain(models.llama, q, k, v).sites
        assert site.fused and site.rope is not None, site.miss
        assert (site.query_shape[1], site.key_shape[1]) == (heads, kv_heads)


@pytest.mark.parametrize("name", ["llama", "gqa_flag", "one_head", "batch_tables", "cross"])
def test_every_size_dynamic(name: str) -> None:
    """``torch.compile(dynamic=True)``: heads and head_dim are fixed, the rest stays open."""
    model, operands, rope, mask, _ = REWRITTEN[name]
    with torch.no_grad(), torch._dynamo.config.patch(assume_static_by_default=False):
        (site,) = lp_inductor.explain(model, *operands).sites
    assert (site.fused, site.rope, site.mask) == (True, rope, mask), site.miss
    assert isinstance(site.query_shape[1], int) and isinstance(site.query_shape[2], str)
