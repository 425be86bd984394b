"""Masks that are a form and a tensor of keys: the keys are emitted, run, and compared."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lp_inductor.passes.emit import Emitter
from lp_inductor.passes.mask import KeyMask, MaskProof
from lp_inductor.passes.result import MissCode
from tests.passes.mask_checks import (
    DECODE,
    EXTREMES,
    LONG,
    PADDING,
    SQUARE,
    TALL,
    WIDE,
    Build,
    Inputs,
    Sizes,
    below,
    bools,
    check_all,
    columns,
    distance,
    extremes,
    fit,
    integers,
    ones,
    prove,
    rows,
    tokens,
    trace,
)

STATIC_OR_NOT = pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])


def gathered(s: Sizes, keep: Tensor) -> Tensor:
    """Hugging Face's padding mask: gathered by batch and key positions."""
    batch = tokens(s.batch)[:, None, None, None]
    return keep[batch, columns(s)[None, None]]


def hunyuan(s: Sizes, keep: Tensor) -> Tensor:
    """Image tokens, then as many text tokens as ``keep`` counts."""
    lengths = s.keys - keep.shape[1] + keep.sum(dim=1, dtype=torch.int)
    hidden = tokens(s.keys)[None] >= lengths[:, None]
    mask = torch.ones(s.batch, s.keys, dtype=torch.bool).masked_fill(hidden, False)
    return mask[:, None, None]


def ring(s: Sizes, keep: Tensor) -> Tensor:
    """The newest keys stand in front: positions are read backwards."""
    return keep.flip(1)[:, None, None]


# Masks that are a form and a tensor of keys.
KEYS: dict[str, tuple[Build, Inputs, str, Sizes]] = {
    "padding": (lambda s, x: below(s) & x[:, None, None], PADDING, "causal + keys", SQUARE),
    "padding, more keys": (
        lambda s, x: below(s) & x[:, None, None],
        PADDING,
        "causal + keys",
        LONG,
    ),
    "padding, more queries": (
        lambda s, x: below(s) & x[:, None, None],
        PADDING,
        "causal + keys",
        TALL,
    ),
    "padding alone": (lambda s, x: x[:, None, None], PADDING, "full + keys", SQUARE),
    "padding alone, expanded": (
        lambda s, x: x[:, None, None].expand(s),
        PADDING,
        "full + keys",
        SQUARE,
    ),
    "padding of heads": (
        lambda s, x: x & below(s),
        bools("batch", "heads", 1, "keys"),
        "causal + keys",
        SQUARE,
    ),
    "padding of one batch": (
        lambda s, x: x & below(s),
        bools(1, 1, 1, "keys"),
        "causal + keys",
        LONG,
    ),
    "padding by rank": (lambda s, x: x & below(s), bools("keys"), "causal + keys", SQUARE),
    "heads alone": (lambda s, x: x & below(s), bools("heads", 1, 1), "causal + keys", SQUARE),
    "one for all": (lambda s, x: x & below(s), bools(), "causal + keys", SQUARE),
    "whole batches": (
        lambda s, x: x[:, None, None, None] & below(s),
        bools("batch"),
        "causal + keys",
        SQUARE,
    ),
    "a longer padding mask": (
        lambda s, x: below(s) & x[:, None, None, 3 : 3 + s.keys],
        lambda s: (torch.rand(s.batch, s.keys + 5) < 0.6,),
        "causal + keys",
        SQUARE,
    ),
    "turned around": (
        lambda s, x: below(s) & x[:, None, None],
        lambda s: ((torch.rand(s.keys, s.batch) < 0.6).mT,),
        "causal + keys",
        SQUARE,
    ),
    "key first": (
        lambda s, x: below(s) & x.permute(1, 0)[:, None, None],
        lambda s: (torch.rand(s.keys, s.batch) < 0.6,),
        "causal + keys",
        SQUARE,
    ),
    "integers": (
        lambda s, x: below(s) & x[:, None, None].bool(),
        integers("batch", "keys"),
        "causal + keys",
        SQUARE,
    ),
    "integers, extreme": (
        lambda s, x: below(s) & (x[:, None, None] != 0),
        extremes("batch", "keys"),
        "causal + keys",
        SQUARE,
    ),
    "integers between": (
        lambda s, x: below(s) & (x > -3)[:, None, None] & (x < 5)[:, None, None],
        extremes("batch", "keys"),
        "causal + keys",
        SQUARE,
    ),
    "uint8": (
        lambda s, x: below(s) & (x[:, None, None] != 0),
        integers("batch", "keys", high=255, dtype=torch.uint8),
        "causal + keys",
        SQUARE,
    ),
    "floats": (
        lambda s, x: below(s) & (x > 0.5)[:, None, None],
        lambda s: (torch.rand(s.batch, s.keys),),
        "causal + keys",
        SQUARE,
    ),
    "bools as floats": (
        lambda s, x: below(s) & (x.float()[:, None, None] == 1.0),
        PADDING,
        "causal + keys",
        SQUARE,
    ),
    "not": (lambda s, x: below(s) & ~x[:, None, None], PADDING, "causal + keys", SQUARE),
    "two": (
        lambda s, x, y: below(s) & (x | ~y)[:, None, None],
        lambda s: (*PADDING(s), *PADDING(s)),
        "causal + keys",
        SQUARE,
    ),
    "differing": (
        lambda s, x, y: below(s) & (x ^ y)[:, None, None] & (x == ~y)[:, None, None],
        lambda s: (*PADDING(s), *PADDING(s)),
        "causal + keys",
        SQUARE,
    ),
    "equal extremes": (
        lambda s, x, y: (x == y)[:, None, None] & below(s) & (x <= y)[:, None, None],
        lambda s: (*extremes("batch", "keys")(s), *extremes("batch", "keys")(s)),
        "causal + keys",
        SQUARE,
    ),
    "ordered extremes": (
        lambda s, x, y: (x > y)[:, None, None] & below(s),
        lambda s: (*extremes("batch", "keys")(s), *extremes("batch", "keys")(s)),
        "causal + keys",
        SQUARE,
    ),
    "window and padding": (
        lambda s, x: below(s) & (distance(s) < 3) & x[:, None, None],
        PADDING,
        "band[-2, 0] + keys",
        SQUARE,
    ),
    "wide window and padding": (
        lambda s, x: (distance(s) > -s.keys) & x[:, None, None],
        PADDING,
        "full + keys",
        SQUARE,
    ),
    "chunks and padding": (
        lambda s, x: below(s) & (rows(s) // 2 == columns(s) // 2) & x[:, None, None],
        PADDING,
        "causal, chunk[2] + keys",
        SQUARE,
    ),
    "gathered": (lambda s, x: below(s) & gathered(s, x), PADDING, "causal + keys", SQUARE),
    "gathered integers": (
        lambda s, x: gathered(s, x.bool()) & below(s),
        integers("batch", "keys"),
        "causal + keys",
        SQUARE,
    ),
    "where": (
        lambda s, x: torch.where(x[:, None, None], below(s), torch.zeros_like(below(s))),
        PADDING,
        "causal + keys",
        SQUARE,
    ),
    "masked_fill": (
        lambda s, x: below(s).masked_fill(~x[:, None, None], False),
        PADDING,
        "causal + keys",
        SQUARE,
    ),
    "product": (lambda s, x: below(s) * x[:, None, None], PADDING, "causal + keys", SQUARE),
    "tril of data": (
        lambda s, x: x[:, None, None].expand(-1, -1, s.queries, -1).tril(),
        PADDING,
        "causal + keys",
        SQUARE,
    ),
    "text after image": (  # QwenImage
        lambda s, x: fit(
            s, torch.cat([x, torch.ones(s.batch, 4, dtype=torch.bool)], 1)[:, None, None]
        ),
        lambda s: (torch.rand(s.batch, s.keys - 4) < 0.6,),
        "full + keys",
        LONG,
    ),
    "data between": (
        lambda s, x: fit(s, torch.cat([ones(s)[:1, :2], x, ones(s)[:1, :1]], 1)) & below(s),
        lambda s: (torch.rand(1, s.keys - 3) < 0.6,),
        "causal + keys",
        LONG,
    ),
    "two pieces": (
        lambda s, x, y: fit(s, torch.cat([x, ~y], 1)[:, None, None]),
        lambda s: (torch.rand(s.batch, s.keys - 5) < 0.6, torch.rand(s.batch, 5) < 0.6),
        "full + keys",
        LONG,
    ),
    "padded": (  # Mochi
        lambda s, x: fit(s, F.pad(x, (2, 1), value=True)[:, None, None]),
        lambda s: (torch.rand(s.batch, s.keys - 3) < 0.6,),
        "full + keys",
        LONG,
    ),
    "padded with False": (
        lambda s, x: fit(s, F.pad(x, (0, 3))[:, None, None]) & below(s),
        lambda s: (torch.rand(s.batch, s.keys - 3) < 0.6,),
        "causal + keys",
        LONG,
    ),
    "repeated": (
        lambda s, x: x.repeat(1, 2)[:, None, None, : s.keys],
        lambda s: (torch.rand(s.batch, s.keys - 2) < 0.6,),
        "full + keys",
        LONG,
    ),
    "key 0 always": (
        lambda s, x: (
            below(s) & x[:, None, None].select_scatter(ones(s)[0, 0].expand(s.batch, 1, 1), 3, 0)
        ),
        PADDING,
        "causal + keys",
        SQUARE,
    ),
    "the first keys always": (
        lambda s, x: x.slice_scatter(torch.ones_like(x[:, :2]), 1, 0, 2)[:, None, None],
        PADDING,
        "full + keys",
        SQUARE,
    ),
    "lengths": (
        lambda s, x: columns(s) < x[:, None, None, None],
        integers("batch", high=8),
        "full + keys",
        SQUARE,
    ),
    "extreme lengths": (
        lambda s, x: below(s) & (columns(s) < x[:, None, None, None]),
        extremes("batch"),
        "causal + keys",
        SQUARE,
    ),
    "int32 lengths": (
        lambda s, x: columns(s) < x[:, None, None, None] + 2,
        integers("batch", low=-5, high=8, dtype=torch.int32),
        "full + keys",
        SQUARE,
    ),
    "lengths in blocks": (
        lambda s, x: columns(s) // 2 < x[:, None, None, None] // 3,
        extremes("batch"),
        "full + keys",
        SQUARE,
    ),
    "keys modulo": (
        lambda s, x: columns(s) % 3 == x[:, None, None, None],
        integers("batch", high=3),
        "full + keys",
        SQUARE,
    ),
    "counted text": (hunyuan, lambda s: (torch.rand(s.batch, 5) < 0.6,), "full + keys", LONG),
    "any": (
        lambda s, x: below(s) & x.any(1)[:, None, None, None],
        bools("batch", 3),
        "causal + keys",
        SQUARE,
    ),
    "flipped": (ring, PADDING, "full + keys", SQUARE),
    "cumulated": (
        lambda s, x: below(s) & (x.cumsum(-1) > 2)[:, None, None],
        integers("batch", "keys"),
        "causal + keys",
        SQUARE,
    ),
    "decode": (lambda s, x: columns(s) <= x, integers(1, high=8), "full + keys", DECODE),
    "decode at a scalar": (lambda s, x: columns(s) <= x, integers(high=8), "full + keys", DECODE),
    "decode by query positions": (
        lambda s, x: columns(s)[None, None] <= (tokens(s.queries) + x)[None, None, :, None],
        integers(high=8),
        "full + keys",
        DECODE,
    ),
    "decode in a window": (
        lambda s, x: (columns(s) <= x) & (columns(s) > x - 3),
        integers(high=8),
        "full + keys",
        DECODE,
    ),
    "decode and padding": (
        lambda s, x, y: (columns(s) <= x) & y[:, None, None],
        lambda s: (*integers(high=8)(s), *PADDING(s)),
        "full + keys",
        DECODE,
    ),
    "decode, extreme": (
        lambda s, x: columns(s) <= x,
        lambda s: (EXTREMES[:1],),
        "full + keys",
        DECODE,
    ),
}


@STATIC_OR_NOT
@pytest.mark.parametrize("name", KEYS)
def test_keys(name: str, dynamic: bool) -> None:
    build, inputs, description, sizes = KEYS[name]
    traced = trace(build, sizes, *inputs(sizes), dynamic=dynamic)
    answer = prove(traced)
    assert isinstance(answer, MaskProof), answer
    assert answer.describe() == description
    assert not answer.rows_visible or not build_hides(build, inputs, sizes)
    assert answer.why is not None
    assert answer.why.code is MissCode.MASK_IS_DATA
    check_all(traced, answer, sizes, inputs)


def build_hides(build: Build, inputs: Inputs, s: Sizes) -> bool:
    """Whether some data hide every key of a query."""
    masks = [build(s, *inputs(s)).expand(s) for _ in range(50)]
    return not all(mask.any(-1).all() for mask in masks)


def test_proving_leaves_the_graph_alone() -> None:
    build, inputs, _, sizes = KEYS["text after image"]
    traced = trace(build, sizes, *inputs(sizes), dynamic=True)
    before = str(traced.mask.graph)
    prove(traced)
    assert str(traced.mask.graph) == before


def test_padding_is_emitted_as_views() -> None:
    """No copy and no gather where the data is laid out as the keys are."""
    build, inputs, _, sizes = KEYS["padding"]
    traced = trace(build, sizes, *inputs(sizes))
    proof = prove(traced)
    assert isinstance(proof, MaskProof)
    assert isinstance(proof.rest, KeyMask)
    graph = traced.mask.graph
    before = set(graph.nodes)
    site = next(n for n in reversed(graph.nodes) if n.op == "call_function")
    proof.rest.emit(Emitter(graph, site))
    emitted = [node.target for node in graph.nodes if node not in before]
    assert set(emitted) == {torch.ops.aten.unsqueeze.default}


def test_a_mask_of_keys_is_emitted_as_itself() -> None:
    traced = trace(lambda s, x: x, SQUARE, torch.ones(2, 1, 1, 6, dtype=torch.bool))
    proof = prove(traced)
    assert isinstance(proof, MaskProof)
    assert isinstance(proof.rest, KeyMask)
    site = next(n for n in reversed(traced.mask.graph.nodes) if n.op == "call_function")
    assert proof.rest.emit(Emitter(traced.mask.graph, site)) is traced.mask


@pytest.mark.parametrize("sizes", [DECODE, WIDE], ids=["one query", "four queries"])
def test_positions_as_symbolic_integers(sizes: Sizes) -> None:
    """A position that comes as a SymInt, unlike a size, bounds keys as a tensor would."""

    def build(s: Sizes, x: Tensor) -> Tensor:
        return columns(s) <= x.item() + 0 * rows(s)

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        traced = trace(build, sizes, torch.tensor(5), dynamic=True)
    proof = prove(traced)
    assert isinstance(proof, MaskProof), proof
    assert proof.describe() == "full + keys"
    check_all(traced, proof, sizes, integers(high=8))
