"""Masks that run-time data decides: the part that is proved, and the keys that are emitted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lp_inductor.passes.mask import KeyMask, MaskProof, MaskProver
from lp_inductor.passes.movement import value_of
from lp_inductor.passes.result import Miss, MissCode
from tests.passes.mask_checks import (
    DECODE,
    SQUARE,
    TALL,
    WIDE,
    Build,
    Inputs,
    Sizes,
    below,
    check_all,
    columns,
    distance,
    ones,
    prove,
    rows,
    tokens,
    trace,
)

STATIC_OR_NOT = pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
EXTREMES = torch.tensor([-(2**63), 2**63 - 1, -1, 0, 1, 5])


def bools(*names: Any) -> Inputs:
    """A random bool tensor; each dimension is a size by name, or a number."""

    def make(s: Sizes) -> Sequence[Tensor]:
        shape = [getattr(s, n) if isinstance(n, str) else n for n in names]
        return (torch.rand(shape) < 0.6,)

    return make


def integers(*names: Any, low: int = 0, high: int = 2, dtype: torch.dtype = torch.int64) -> Inputs:
    def make(s: Sizes) -> Sequence[Tensor]:
        shape = [getattr(s, n) if isinstance(n, str) else n for n in names]
        return (torch.randint(low, high, shape, dtype=dtype),)

    return make


def extremes(*names: str) -> Inputs:
    """Integers that wrap as soon as anybody computes with them."""

    def make(s: Sizes) -> Sequence[Tensor]:
        shape = [getattr(s, n) for n in names]
        return (EXTREMES[torch.randint(len(EXTREMES), shape)],)

    return make


LONG = Sizes(2, 3, 4, 13)


def fit(s: Sizes, mask: Tensor) -> Tensor:
    """What attention asserts of a mask that is not broadcast along the keys."""
    torch._check(mask.shape[-1] == s.keys)
    return mask


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


PADDING = bools("batch", "keys")
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


SEGMENTS = integers("batch", "queries", high=3)
# Masks of which a form is proved, and that need more than keys.
WHOLE: dict[str, tuple[Build, Inputs, str, Sizes]] = {
    "packed": (
        lambda s, x: below(s) & (x[:, None, :, None] == x[:, None, None, :]),
        SEGMENTS,
        "causal + mask",
        SQUARE,
    ),
    "packed, cumulated": (
        lambda s, x: below(s) & (x.cumsum(1)[:, None, :, None] == x.cumsum(1)[:, None, None, :]),
        SEGMENTS,
        "causal + mask",
        SQUARE,
    ),
    "position ids": (
        lambda s, x: x[:, None, None] <= x[:, None, :, None],
        SEGMENTS,
        "full + mask",
        SQUARE,
    ),
    "queries too": (
        lambda s, x: below(s) & x[:, None, None] & x[:, None, :, None],
        PADDING,
        "causal + mask",
        SQUARE,
    ),
    "queries too, first key always": (  # HunyuanVideo's text refiner
        lambda s, x: (x[:, None, None] & x[:, None, :, None]).select_scatter(
            torch.ones(s.batch, 1, s.queries, dtype=torch.bool), 3, 0
        ),
        PADDING,
        "full + mask",
        SQUARE,
    ),
    "or": (lambda s, x: below(s) | x[:, None, None], PADDING, "full + mask", SQUARE),
    "xor": (lambda s, x: below(s) ^ x[:, None, None], PADDING, "full + mask", SQUARE),
    "a mask and more": (
        lambda s, x: x & below(s) & (distance(s) < 3),
        bools("batch", 1, "queries", "keys"),
        "band[-2, 0] + mask",
        SQUARE,
    ),
    "prefill at an offset": (
        lambda s, x: columns(s) <= rows(s) + x,
        integers(high=8),
        "full + mask",
        WIDE,
    ),
    "prefill at positions": (
        lambda s, x: columns(s) <= x[:, None],
        integers("queries", high=8),
        "full + mask",
        WIDE,
    ),
    "left-padded chunks": (
        lambda s, x: (
            below(s)
            & (
                (rows(s) - x[:, None, None, None]) // 2
                == (columns(s) - x[:, None, None, None]) // 2
            )
        ),
        integers("batch", high=5),
        "causal + mask",
        SQUARE,
    ),
    "images see all": (
        lambda s, x: (
            below(s) | ((x[:, None, None] == x[:, None, :, None]) & (x[:, None, None] >= 0))
        ),
        integers("batch", "keys", low=-1, high=2),
        "full + mask",
        SQUARE,
    ),
    "row 0 of data": (
        lambda s, x: below(s).expand(s).select_scatter(x[:, None].expand(-1, s.heads, -1), 2, 0),
        PADDING,
        "full + mask",
        SQUARE,
    ),
}


@STATIC_OR_NOT
@pytest.mark.parametrize("name", WHOLE)
def test_whole(name: str, dynamic: bool) -> None:
    build, inputs, description, sizes = WHOLE[name]
    traced = trace(build, sizes, *inputs(sizes), dynamic=dynamic)
    answer = prove(traced)
    assert isinstance(answer, MaskProof), answer
    assert (answer.describe(), answer.rest) == (description, "whole")
    check_all(traced, answer, sizes, inputs)


@pytest.mark.parametrize("name", ["packed", "queries too, first key always", "or"])
def test_rows_visible_in_spite_of_data(name: str) -> None:
    build, inputs, _, sizes = WHOLE[name]
    answer = prove(trace(build, sizes, *inputs(sizes)))
    assert isinstance(answer, MaskProof)
    assert answer.rows_visible


# Masks of which nothing is known.
DATA: dict[str, tuple[Build, Inputs]] = {
    "the mask itself": (lambda s, x: x, bools("queries", "keys")),
    "the mask itself, 4d": (lambda s, x: x, bools("batch", 1, "queries", "keys")),
    "the mask, moved": (lambda s, x: x.mT[None].expand(s), bools("keys", "queries")),
    "opaque": (lambda s, x: x.sigmoid() > 0.5, lambda s: (torch.randn(s.queries, s.keys),)),
    "additive": (lambda s, x: x, lambda s: (torch.zeros(s.queries, s.keys),)),
    "additive of bools": (
        lambda s, x: torch.where(below(s) & x[:, None, None], 0.0, -torch.inf),
        PADDING,
    ),
    "additive bias": (
        lambda s, x: (1.0 - x[:, None, None].float()) * -10000.0,
        PADDING,
    ),
}


@STATIC_OR_NOT
@pytest.mark.parametrize("name", DATA)
def test_data(name: str, dynamic: bool) -> None:
    build, inputs = DATA[name]
    traced = trace(build, SQUARE, *inputs(SQUARE), dynamic=dynamic)
    answer = prove(traced)
    assert isinstance(answer, Miss)
    assert answer.code is MissCode.MASK_IS_DATA
    data_input = [node.name for node in traced.mask.graph.nodes if node.op == "placeholder"][2]
    assert data_input in answer.detail


@pytest.mark.parametrize(
    ("build", "description"),
    [
        (lambda s: torch.rand(s.queries, s.keys) < 2, None),
        (lambda s: torch.empty(s.queries, s.keys) == 0, None),
        (lambda s: torch.tensor([True, False])[:1].expand(s.queries, s.keys), "full + keys"),
        (lambda s: below(s) & (torch.rand(s.keys) < 0.5), "causal + keys"),
    ],
    ids=["random", "uninitialised", "constant tensor", "random keys"],
)
def test_what_no_index_determines(build: Build, description: str | None) -> None:
    answer = prove(trace(build, SQUARE))
    if description is None:
        assert isinstance(answer, Miss)
        assert answer.code is MissCode.MASK_IS_DATA
        return
    assert isinstance(answer, MaskProof)
    assert answer.describe() == description
    assert answer.why is not None
    assert answer.why.code is MissCode.MASK_IS_DATA


def test_shape_of_data_is_no_data() -> None:
    traced = trace(lambda s, x: torch.ones_like(x).tril().bool(), SQUARE, torch.zeros(6, 6))
    answer = prove(traced)
    assert isinstance(answer, MaskProof)
    assert (answer.describe(), answer.rest) == ("causal", None)


def test_data_that_cancels_is_no_data() -> None:
    build: Build = lambda s, x: distance(s) >= x - x  # noqa: E731
    traced = trace(build, SQUARE, torch.zeros((), dtype=torch.int64))
    answer = prove(traced)
    assert isinstance(answer, MaskProof)
    assert (answer.describe(), answer.rest) == ("causal", None)
    check_all(traced, answer, SQUARE, lambda s: (EXTREMES[0],))


def test_arithmetic_that_may_wrap_is_data() -> None:
    """x + 1 > x is false for the greatest x."""
    build: Build = lambda s, x: below(s) & (x + 1 > x)[:, None, None]  # noqa: E731
    inputs = extremes("batch", "keys")
    traced = trace(build, SQUARE, *inputs(SQUARE))
    answer = prove(traced)
    assert isinstance(answer, MaskProof)
    assert answer.describe() == "causal + keys"
    check_all(traced, answer, SQUARE, inputs, draws=10)


def test_equal_masks_share_their_keys() -> None:
    """Layers that build equal masks get equal keys, and one emission serves them all."""

    def build(s: Sizes, x: Tensor) -> Tensor:
        first, second = (below(s) & x[:, None, None].bool() for _ in range(2))
        third = below(s) & x[:, None, None].logical_not()
        return torch.stack([first, second, third])

    traced = trace(build, SQUARE, torch.ones(2, 6, dtype=torch.int64))
    (stack,) = [n for n in traced.mask.graph.nodes if n.target is torch.ops.aten.cat.default]
    prover = MaskProver()
    masks = [n.args[0] if len(value_of(n).shape) > 4 else n for n in stack.args[0]]
    rests = []
    for mask in masks:
        proof = prover.prove(mask, *traced.sizes)
        assert isinstance(proof, MaskProof), proof
        assert isinstance(proof.rest, KeyMask)
        rests.append(proof.rest)
    assert rests[0] == rests[1]
    assert hash(rests[0]) == hash(rests[1])
    assert rests[0] != rests[2]


def test_keys_of_other_inputs_differ() -> None:
    def build(s: Sizes, x: Tensor, y: Tensor) -> Tensor:
        return torch.stack([x[:, None, None].expand(s), y[:, None, None].expand(s)])

    x = torch.ones(2, 6, dtype=torch.bool)
    traced = trace(build, SQUARE, x, x.clone())
    first, second = (
        n
        for n in traced.mask.graph.find_nodes(
            op="call_function", target=torch.ops.aten.expand.default
        )
        if value_of(n).shape == SQUARE
    )
    prover = MaskProver()
    proofs = [prover.prove(mask, *traced.sizes) for mask in (first, second)]
    assert proofs[0] != proofs[1]
    assert not isinstance(proofs[0], Miss)
    assert not isinstance(proofs[1], Miss)
    assert proofs[0].rest != proofs[1].rest


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
    from lp_inductor.passes.emit import Emitter

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
    from lp_inductor.passes.emit import Emitter

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
