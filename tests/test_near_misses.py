"""What looks like a well-known form and is not: rewritten rightly, with its difference named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import lp_inductor
from lp_inductor import Fp8Config, MissCode
from tests import models, near_misses
from tests.helpers import compile_fp8, interpret_fp8, sqnr
from tests.test_rewrites import qkv

right_padding = torch.ones(2, 16, dtype=torch.bool)
right_padding[1, 11:] = False
left_padding = right_padding.flip(1)

#: model, operands, why its rotation stays with the model
ROTATIONS: dict[str, tuple[Any, list[Tensor], MissCode | None]] = {
    "key_table": (near_misses.key_table_differs, qkv(), MissCode.ROPE_TABLES_DIFFER),
    "key_shifted": (near_misses.key_positions_shifted, qkv(), MissCode.ROPE_TABLES_DIFFER),
    "halves_differ": (near_misses.halves_differ, qkv(), MissCode.ROPE_HALVES_DIFFER),
    "wrong_sign": (near_misses.wrong_sign, qkv(), MissCode.ROPE_FORM),
    "odd_pairing": (near_misses.odd_pairing, qkv(dim=16), MissCode.ROPE_FORM),
}
#: model, operands, what is fused
FUSED: dict[str, tuple[Any, list[Tensor], str]] = {
    # As many tokens as heads: the table's shape does not tell which of them it varies over.
    "per_head_table": (
        models.per_head_table,
        qkv(heads=8, kv_heads=8, query_len=8, key_len=8),
        "half[0:64]",
    ),
}
#: model, operands, what is fused alone, why the other is not
ONE_SIDED: dict[str, tuple[Any, list[Tensor], str, MissCode | None]] = {
    "only_query": (near_misses.only_query_rotated, qkv(), "half[0:64] (query)", None),
    "returned": (
        near_misses.rotated_key_returned,
        qkv(),
        "half[0:64] (query)",
        MissCode.ROPE_OUTPUT_USED,
    ),
}
#: model, operands, the mask's description
MASKS: dict[str, tuple[Any, list[Tensor], str]] = {
    "padding": (near_misses.padding_mask, [*qkv(), right_padding], "causal + keys"),
    "left_padding": (near_misses.all_hidden_rows, [*qkv(), left_padding], "causal + keys"),
    "hidden_by_bias": (near_misses.hidden_by_bias, [*qkv(), left_padding], "bias"),
    "hidden_by_lowest": (near_misses.hidden_by_lowest, [*qkv(), left_padding], "bias"),
    "one_element": (near_misses.causal_but_one, qkv(), "bool"),
    "one_by_index": (near_misses.causal_but_one_by_index, qkv(), "bool"),
    "window": (near_misses.sliding_window, qkv(), "band[-3, 0]"),
    "chunked": (near_misses.chunked, qkv(), "causal, chunk[4]"),
    "bias": (near_misses.additive_mask, [*qkv(), torch.randn(2, 1, 16, 16).bfloat16()], "bias"),
    "bias_2d": (near_misses.additive_mask, [*qkv(), torch.randn(16, 16)], "bias"),
    "per_head_bias": (
        near_misses.per_head_bias,
        [*qkv(), torch.tensor([1.0, 0.5, 0.25, 0.0])],
        "bias",
    ),
    "causal_cross": (near_misses.causal_cross, qkv(query_len=8, key_len=16), "causal"),
    "causal_long_query": (near_misses.causal_cross, qkv(query_len=16, key_len=8), "causal"),
    "bottom_right": (
        near_misses.bottom_right_causal,
        qkv(query_len=8, key_len=16),
        "band[-inf, 8]",
    ),
    "bottom_right_hidden": (
        near_misses.bottom_right_causal,
        qkv(query_len=16, key_len=8),
        "band[-inf, -8]",
    ),
}
#: model, operands
HEADS: dict[str, tuple[Any, list[Tensor]]] = {
    "tiled": (near_misses.head_groups_tiled, qkv(kv_heads=2)),
    "orders_differ": (near_misses.key_and_value_groups_differ, qkv(kv_heads=2)),
    "one_head": (near_misses.heads_broadcast, qkv(kv_heads=1)),
}
ALL = {
    name: case[:2]
    for group in (ROTATIONS, FUSED, ONE_SIDED, MASKS, HEADS)
    for name, case in group.items()
}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("smooth_v", [True, False])
def test_result_is_right(name: str, smooth_v: bool) -> None:
    model, operands = ALL[name]
    # Values with a mean: the mean must reach every query that sees a key, and no other.
    q, k, v, *rest = operands
    operands = [q, k, v + 1, *rest]
    result, (site,) = interpret_fp8(model, *operands, config=Fp8Config(smooth_v=smooth_v))
    assert site.fused, str(site.miss)
    wide = [t.double() if t.is_floating_point() else t for t in operands]
    reference = tree_leaves(model(*wide))
    for expected, found in zip(reference, tree_leaves(result), strict=True):
        assert not found.isnan().any()
        assert sqnr(expected, found) >= 24


@pytest.mark.parametrize("name", ROTATIONS)
def test_rotation_stays_with_the_model(name: str) -> None:
    model, operands, code = ROTATIONS[name]
    with torch.no_grad():
        (site,) = lp_inductor.explain(model, *operands).sites
    assert site.fused and site.rope is None
    assert site.rope_miss is not None and site.rope_miss.code is code, str(site.rope_miss)


@pytest.mark.parametrize("name", FUSED)
def test_rotation_is_fused(name: str) -> None:
    model, operands, rope = FUSED[name]
    with torch.no_grad():
        (site,) = lp_inductor.explain(model, *operands).sites
    assert site.rope == rope and site.rope_miss is None


@pytest.mark.parametrize("name", ONE_SIDED)
def test_one_rotation_is_fused_alone(name: str) -> None:
    model, operands, rope, code = ONE_SIDED[name]
    with torch.no_grad():
        (site,) = lp_inductor.explain(model, *operands).sites
    assert site.rope == rope
    assert (site.rope_miss.code if site.rope_miss else None) is code


@pytest.mark.parametrize("name", MASKS)
def test_mask_is_described(name: str) -> None:
    model, operands, mask = MASKS[name]
    with torch.no_grad():
        (site,) = lp_inductor.explain(model, *operands).sites
    assert site.mask == mask


@pytest.mark.parametrize("name", HEADS)
def test_heads_as_the_kernel_gets_them(name: str) -> None:
    model, operands = HEADS[name]
    with torch.no_grad():
        (site,) = lp_inductor.explain(model, *operands).sites
    assert site.key_shape[1] == (1 if name == "one_head" else 4)


@pytest.mark.parametrize("name", ["padding", "hidden_by_bias", "window", "bottom_right_hidden"])
def test_compiled_result_is_the_interpreted_one(name: str) -> None:
    model, operands, _ = MASKS[name]
    interpreted, _ = interpret_fp8(model, *operands)
    with torch.no_grad():
        compiled = compile_fp8(model, fullgraph=True)(*operands)
    assert sqnr(interpreted, compiled) > 40


def test_rotation_may_always_be_left_to_the_model() -> None:
    with torch.no_grad():
        (site,) = lp_inductor.explain(
            models.llama, *qkv(kv_heads=2), config=Fp8Config(fuse_rope=False)
        ).sites
    assert site.fused and site.rope is None and site.rope_miss is None
