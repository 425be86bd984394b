"""The mask prover on masks of positions alone: what it must prove, and what it must not."""

from __future__ import annotations

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import Tensor

from lp_inductor.passes.mask import MaskForm, MaskProof, MaskProver
from lp_inductor.passes.result import Miss, MissCode
from tests.passes.mask_checks import (
    CAUSAL,
    DECODE,
    FULL,
    SQUARE,
    TALL,
    WIDE,
    Build,
    Sizes,
    band,
    below,
    check_all,
    columns,
    distance,
    form_of,
    ones,
    prove,
    rows,
    tokens,
    trace,
)

STATIC_OR_NOT = pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])


def put(mask: Tensor, where: Tensor) -> Tensor:
    return torch.index_put(mask, (where,), torch.zeros((), dtype=torch.bool))


def overwritten(s: Sizes) -> Tensor:
    """Causal, written in place."""
    mask = ones(s)
    mask[:, 1:] = False
    mask[1:, 1:] = columns(s)[:, 1:] <= rows(s)[1:]
    return mask


def one_overwritten(s: Sizes) -> Tensor:
    mask = below(s)
    mask[0, 3] = True
    return mask


def aligned_right(s: Sizes) -> Tensor:
    """Causal so that the last query sees every key."""
    offset: int = s.keys - s.queries
    return columns(s) <= rows(s) + offset


def without_packing(s: Sizes) -> Tensor:
    """Hugging Face's search for packed sequences, in position ids that are a plain range."""
    ids = tokens(s.queries)[None].expand(s.batch, -1)
    step = torch.diff(ids, prepend=ids[:, :1] - 1, dim=-1)
    sequence = (step != 1).cumsum(-1)
    batch, i, j = tokens(s.batch)[:, None, None, None], rows(s)[None, None], columns(s)[None, None]
    return (sequence[batch, i] == sequence[batch, j]) & (ids[batch, j] <= ids[batch, i])


def flattened(s: Sizes) -> Tensor:
    i = tokens(s.queries).view(1, -1, 1).expand(s.heads, -1, s.keys)
    j = tokens(s.keys).expand(s.heads, s.queries, s.keys)
    return (j.reshape(-1) <= i.reshape(-1)).view(s.heads, s.queries, s.keys)


# Masks that must be proved, by the form that they have where queries and keys may differ.
BANDS: dict[str, tuple[Build, MaskForm]] = {
    "ones": (ones, FULL),
    "new_ones": (lambda s: distance(s).new_ones(s, dtype=torch.bool), FULL),
    "always": (lambda s: columns(s) >= -rows(s), FULL),
    "within": (lambda s: (tokens(s.keys) < s.keys).expand(s.queries, s.keys), FULL),
    "not empty": (lambda s: ~torch.zeros(s.queries, s.keys, dtype=torch.bool), FULL),
    "tril": (lambda s: ones(s).tril(), CAUSAL),
    "tril 4d": (lambda s: ones(s)[None, None].tril().expand(s), CAUSAL),
    "tril of floats": (lambda s: torch.ones(s.queries, s.keys).tril().bool(), CAUSAL),
    "tril of floats, equal": (lambda s: torch.ones(s.queries, s.keys).tril() == 1.0, CAUSAL),
    "not triu": (lambda s: ~torch.ones(s.queries, s.keys).triu(1).bool(), CAUSAL),
    "triu == 0": (lambda s: ones(s, torch.int64).triu(1) == 0, CAUSAL),
    "1 - triu": (lambda s: (1.0 - torch.ones(s.queries, s.keys).triu(1)).bool(), CAUSAL),
    "logical_not triu": (lambda s: torch.logical_not(ones(s).triu(diagonal=1)), CAUSAL),
    "aranges": (below, CAUSAL),
    "distance": (lambda s: distance(s) >= 0, CAUSAL),
    "and True": (lambda s: below(s) & ones(s) & torch.tensor(True).new_ones(()), CAUSAL),
    "mul": (lambda s: below(s) * ones(s), CAUSAL),
    "or": (lambda s: (columns(s) < rows(s)) | (distance(s) == 0), CAUSAL),
    "xor": (lambda s: (distance(s) < 0) ^ ones(s), CAUSAL),
    "where": (lambda s: torch.where(rows(s) < columns(s), ~ones(s), ones(s)), CAUSAL),
    "where, scalars": (lambda s: torch.where(rows(s) < columns(s), 0, 1) == 1, CAUSAL),
    "masked_fill": (lambda s: (~ones(s)).masked_fill(below(s), True), CAUSAL),
    "4d": (lambda s: below(s)[None, None], CAUSAL),
    "expanded": (lambda s: below(s).expand(s), CAUSAL),
    "expanded from heads": (lambda s: below(s)[None].expand(s.heads, -1, -1)[None], CAUSAL),
    "transposed": (lambda s: (columns(s).mT <= rows(s).mT).mT, CAUSAL),
    "clone": (lambda s: below(s).clone().contiguous(), CAUSAL),
    "cumsum of ones": (
        lambda s: ones(s, torch.int64).cumsum(1) <= ones(s, torch.int64).cumsum(0),
        CAUSAL,
    ),
    "concatenated": (lambda s: torch.cat([below(s)[:2], below(s)[2:]]), CAUSAL),
    "stacked": (lambda s: torch.stack([below(s), ones(s)])[0], CAUSAL),
    "gathered": (lambda s: below(s)[:, tokens(s.keys)][tokens(s.queries)], CAUSAL),
    "gathered rows, columns": (
        lambda s: below(s)[rows(s), columns(s)],
        CAUSAL,
    ),
    "gathered apart": (
        lambda s: below(s)[:, None].expand(-1, 4, -1)[rows(s), :, columns(s)][..., 1],
        CAUSAL,
    ),
    "gathered apart, not at first": (
        lambda s: below(s)[None, :, None].expand(2, -1, 4, -1)[:, rows(s), :, columns(s)][
            ..., 1, 2
        ],
        CAUSAL,
    ),
    "cumsum as position": (lambda s: columns(s) <= ones(s, torch.int64).cumsum(0) - 1, CAUSAL),
    "repeated": (lambda s: below(s)[None, None].repeat(s.batch, 1, 1, 1), CAUSAL),
    "strictly below": (lambda s: distance(s) > 0, band(upper=-1)),
    "above": (lambda s: ones(s).triu(), band(lower=0)),
    "i and j exchanged": (lambda s: distance(s) <= 0, band(lower=0)),
    "one more": (lambda s: ones(s).tril(1), band(upper=1)),
    "diagonal": (lambda s: distance(s) == 0, band(0, 0)),
    "window": (lambda s: below(s) & (distance(s) < 3), band(-2, 0)),
    "window, tril and triu": (lambda s: ones(s).tril().triu(-2), band(-2, 0)),
    "both sides": (lambda s: distance(s).abs() <= 2, band(-2, 2)),
    "minimum": (lambda s: torch.minimum(distance(s), tokens(1)) >= 0, CAUSAL),
    "clamped out of the way": (lambda s: tokens(s.keys) <= rows(s).clamp_min(0), CAUSAL),
    "scaled": (lambda s: 2 * columns(s) <= 2 * rows(s) + 1, CAUSAL),
    "every second": (lambda s: tokens(2 * s.keys)[::2] <= 2 * rows(s), CAUSAL),
    "backwards": (
        lambda s: torch.arange(0, -s.keys, -1)[None] >= -rows(s),
        CAUSAL,
    ),
    "chunks": (lambda s: rows(s) // 2 == columns(s) // 2, band(chunk=2)),
    "chunks, floor_divide": (
        lambda s: torch.floor_divide(rows(s), 3) == torch.floor_divide(columns(s), 3),
        band(chunk=3),
    ),
    "chunks, trunc": (
        lambda s: (
            torch.div(rows(s), 3, rounding_mode="trunc")
            == torch.div(columns(s), 3, rounding_mode="trunc")
        ),
        band(chunk=3),
    ),
    "chunks of shifted positions": (
        lambda s: (rows(s) + 4) // 2 == (columns(s) + 4) // 2,
        band(chunk=2),
    ),
    "chunks by first positions": (
        lambda s: rows(s) - rows(s) % 3 == columns(s) - columns(s) % 3,
        band(chunk=3),
    ),
    "chunks, not above": (
        lambda s: (rows(s) // 2 >= columns(s) // 2) & ~(columns(s) // 2 < rows(s) // 2),
        band(chunk=2),
    ),
    "causal chunks": (lambda s: below(s) & (rows(s) // 2 == columns(s) // 2), band(None, 0, 2)),
    "tril of int8": (lambda s: ones(s, torch.int8).tril().bool(), CAUSAL),
    "tril of uint8": (lambda s: ones(s, torch.uint8).tril() > 0, CAUSAL),
    "padded": (lambda s: F.pad(below(s)[1:], (0, 0, 1, 0)) | (rows(s) + columns(s) == 0), CAUSAL),
    "cropped": (
        lambda s: F.pad(F.pad(below(s), (1, 2, 3, 4), value=True), (-1, -2, -3, -4)),
        CAUSAL,
    ),
    "rows scattered": (
        lambda s: torch.slice_scatter(ones(s), below(s)[1:], 0, 1).select_scatter(
            columns(s)[0] <= 0, 0, 0
        ),
        CAUSAL,
    ),
    "written in place": (overwritten, CAUSAL),
    "a number as a tensor": (lambda s: below(s) & torch.tensor(True), CAUSAL),
    "put where False": (lambda s: put(ones(s), ~below(s)), CAUSAL),
    "tiled": (
        lambda s: (
            columns(s).repeat(1, 2)[:, s.keys :] <= rows(s).repeat(3, 1)[s.queries : 2 * s.queries]
        ),
        CAUSAL,
    ),
    "and all of ones": (lambda s: below(s) & ones(s).all(1, keepdim=True) & ones(s).any(), CAUSAL),
    "or any of zeros": (lambda s: below(s) | (~ones(s)).any(-1)[:, None], CAUSAL),
}


# Masks that no form describes: the bound that is proved, and what else is needed.
BOUNDED: dict[str, tuple[Build, str]] = {
    "one more element": (lambda s: below(s) | ((rows(s) == 0) & (columns(s) == 3)), "full + mask"),
    "one element less": (
        lambda s: below(s) & ~((rows(s) == 3) & (columns(s) == 1)),
        "causal + mask",
    ),
    "first key hidden": (lambda s: below(s) & (columns(s) != 0), "causal + keys"),
    "last key hidden": (lambda s: columns(s) < s.keys - 1, "full + keys"),
    "all but the diagonal": (lambda s: distance(s) != 0, "full + mask"),
    "prefix": (lambda s: below(s) | (columns(s) < 2), "full + mask"),
    "two bands": (lambda s: below(s) ^ (distance(s) == 2), "causal + mask"),
    "checkerboard": (lambda s: (rows(s) + columns(s)) % 2 == 0, "full + mask"),
    "twice as steep": (lambda s: columns(s) <= 2 * rows(s), "full + mask"),
    "antidiagonal": (lambda s: columns(s) + rows(s) < s.keys, "full + mask"),
    "product": (lambda s: columns(s) * rows(s) <= 4, "full + mask"),
    "gathered from the end": (lambda s: below(s)[-1 - tokens(s.queries)], "full + mask"),
    "columns gathered twice": (
        lambda s: below(s)[:, torch.minimum(tokens(s.keys), tokens(2)[1])],
        "full + mask",
    ),
    "rows exchanged": (lambda s: torch.cat([below(s)[1:], below(s)[:1]]), "band[-inf, 1] + mask"),
    "rows doubled": (
        lambda s: torch.cat([below(s)[:1], below(s)])[: s.queries].logical_xor(below(s)),
        "band[0, 0] + mask",
    ),
    "clamped below": (lambda s: columns(s) <= rows(s).clamp(min=2), "full + mask"),
    "clamped above": (lambda s: columns(s).clamp(max=1) <= rows(s), "full + mask"),
    "one head differs": (lambda s: below(s) | (tokens(s.heads) == 1)[:, None, None], "full + mask"),
    "one sequence differs": (
        lambda s: below(s) & (tokens(s.batch) < 1)[:, None, None, None],
        "causal + keys",
    ),
    "head by head": (lambda s: distance(s) >= tokens(s.heads)[:, None, None], "causal + mask"),
    "sums of a triangle": (lambda s: below(s).cumsum(1) <= 1, "full + mask"),
    "wrapped": (lambda s: columns(s) + (2**63 - 3) <= rows(s) + (2**63 - 3), "full + mask"),
    "wrapped product": (lambda s: columns(s) * 2**62 <= rows(s) * 2**62, "full + mask"),
    "wrapped int32": (lambda s: columns(s).int() * 2**30 <= rows(s).int() * 2**30, "full + mask"),
    "bits of integers": (lambda s: (distance(s).clamp_min(0) & 2) == 0, "full + mask"),
    "one element written": (one_overwritten, "full + mask"),
    "wider than a band": (lambda s: below(s) & (distance(s) * distance(s) < 9), "causal + mask"),
    "shifted chunks": (
        lambda s: below(s) & ((rows(s) + 1) // 4 == (columns(s) + 1) // 4),
        "causal + mask",
    ),
    "chunks of two sizes": (lambda s: rows(s) // 4 == columns(s) // 2, "full + mask"),
    "flipped": (lambda s: below(s).flip(0), "full + mask"),
    "next chunk too": (lambda s: columns(s) // 2 - rows(s) // 2 <= 1, "full + mask"),
}

# Masks of which nothing is known, or that no exact arithmetic leads to.
REFUSED: dict[str, Build] = {
    "nothing": lambda s: ~ones(s),
    "rolled": lambda s: below(s).roll(1, 0),
    "gathered around the end": lambda s: below(s)[tokens(s.queries) - 1],
    "halves": lambda s: distance(s) > 0.5,
    "narrowed operand": lambda s: (columns(s).int() - rows(s).int()) <= torch.full((), 2**40),
    "additive, small": lambda s: torch.ones(s.queries, s.keys).triu(1),
    "int64 halves": (lambda s: distance(s) / 2 >= 0),
}


@pytest.mark.parametrize(
    ("sizes", "dynamic"),
    [(SQUARE, False), (WIDE, False), (SQUARE, True), (TALL, True)],
    ids=["square", "wide", "dynamic square", "dynamic tall"],
)
@pytest.mark.parametrize("name", BANDS)
def test_band(name: str, sizes: Sizes, dynamic: bool) -> None:
    build, form = BANDS[name]
    traced = trace(build, sizes, dynamic=dynamic)
    answer = prove(traced)
    assert form_of(answer) == form
    check_all(traced, answer, sizes)


@pytest.mark.parametrize("name", BANDS)
def test_band_without_decompositions(name: str) -> None:
    build, form = BANDS[name]
    assert form_of(prove(trace(build, WIDE, decompositions={}))) == form


@STATIC_OR_NOT
def test_bounds_may_be_sizes(dynamic: bool) -> None:
    traced = trace(aligned_right, WIDE, dynamic=dynamic)
    _, _, queries, keys = traced.sizes
    assert form_of(prove(traced)) == MaskForm(upper=keys - queries)
    traced = trace(lambda s: ones(s).tril(s.keys - s.queries), WIDE, dynamic=dynamic)
    assert form_of(prove(traced)) == MaskForm(upper=traced.sizes[3] - traced.sizes[2])


@STATIC_OR_NOT
def test_packed_sequence_search(dynamic: bool) -> None:
    assert form_of(prove(trace(without_packing, SQUARE, dynamic=dynamic))) == CAUSAL


@STATIC_OR_NOT
def test_flattened(dynamic: bool) -> None:
    assert form_of(prove(trace(flattened, WIDE, dynamic=dynamic))) == CAUSAL


def test_one_query() -> None:
    assert form_of(prove(trace(aligned_right, DECODE))) == FULL
    assert form_of(prove(trace(below, DECODE))) == CAUSAL
    assert form_of(prove(trace(lambda s: (tokens(s.keys) <= 4)[None], DECODE))) == band(upper=4)
    assert form_of(prove(trace(below, Sizes(2, 3, 1, 1)))) == FULL


def test_bounds_that_bind_nothing_are_dropped() -> None:
    wide_window = trace(lambda s: below(s) & (distance(s) < 16), SQUARE)
    assert form_of(prove(wide_window)) == CAUSAL
    long_chunk = trace(lambda s: below(s) & (rows(s) // 8 == columns(s) // 8), SQUARE)
    assert form_of(prove(long_chunk)) == CAUSAL


def test_descriptions() -> None:
    forms = (FULL, CAUSAL, band(-7, 0), band(-2), band(upper=3), band(None, 0, 8), band(chunk=4))
    assert [form.describe() for form in forms] == [
        "full",
        "causal",
        "band[-7, 0]",
        "band[-2, inf]",
        "band[-inf, 3]",
        "causal, chunk[8]",
        "chunk[4]",
    ]
    assert [form.is_full for form in forms] == [True] + [False] * 6
    assert [form.is_causal for form in forms] == [False, True] + [False] * 5
    proofs = (MaskProof(CAUSAL, None, True), MaskProof(FULL, "whole", False))
    assert [proof.describe() for proof in proofs] == ["causal", "full + mask"]


@STATIC_OR_NOT
@pytest.mark.parametrize("name", BOUNDED)
def test_bounded(name: str, dynamic: bool) -> None:
    build, description = BOUNDED[name]
    traced = trace(build, SQUARE, dynamic=dynamic)
    answer = prove(traced)
    assert isinstance(answer, MaskProof), answer
    assert answer.describe() == description
    assert answer.why is not None
    assert answer.why.code is MissCode.MASK_NOT_PROVED
    assert answer.why.detail
    check_all(traced, answer, SQUARE)


@STATIC_OR_NOT
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, dynamic: bool) -> None:
    answer = prove(trace(REFUSED[name], SQUARE, dynamic=dynamic))
    assert isinstance(answer, Miss), answer
    assert answer.code is MissCode.MASK_NOT_PROVED
    assert answer.detail


@pytest.mark.parametrize(
    "build",
    [
        lambda s: torch.arange(s.keys * 1.0) <= torch.arange(s.queries * 1.0)[:, None],
        lambda s: distance(s).float() >= 0,
        lambda s: distance(s).to(torch.int16) >= 0,
        lambda s: distance(s).bfloat16() >= 0,
    ],
    ids=["float positions", "float distance", "int16 distance", "bfloat16 distance"],
)
def test_exact_only_for_few_tokens(build: Build) -> None:
    """Positions as floats or short integers are followed as far as they provably do not round."""
    assert form_of(prove(trace(build, SQUARE))) == CAUSAL
    many = Sizes(1, 1, 2**25, 2**25)
    for answer in (prove(trace(build, many)), prove(trace(build, SQUARE, dynamic=True))):
        assert isinstance(answer, Miss) or answer.rest == "whole"


ROWS: dict[str, tuple[Build, Sizes, bool]] = {
    "causal": (below, SQUARE, True),
    "causal, more queries": (below, TALL, True),
    "causal, more keys": (below, WIDE, True),
    "window": (lambda s: distance(s).abs() <= 1, SQUARE, True),
    "window, more keys": (lambda s: distance(s).abs() <= 1, WIDE, True),
    "window, more queries": (lambda s: distance(s).abs() <= 1, TALL, False),
    "aligned right": (aligned_right, WIDE, True),
    "aligned right, more queries": (aligned_right, TALL, False),
    "not itself": (lambda s: distance(s) > 0, SQUARE, False),
    "above": (lambda s: distance(s) <= 0, SQUARE, True),
    "above, more queries": (lambda s: distance(s) <= 0, TALL, False),
    "below, far away": (lambda s: distance(s) >= 2, SQUARE, False),
    "chunks": (lambda s: rows(s) // 2 == columns(s) // 2, SQUARE, True),
    "chunks, more queries": (lambda s: rows(s) // 2 == columns(s) // 2, TALL, False),
    "first key too": (lambda s: (distance(s) == 2) | (columns(s) == 0), SQUARE, True),
    "last key too": (lambda s: (distance(s) > 1) | (columns(s) == s.keys - 1), SQUARE, True),
}


@STATIC_OR_NOT
@pytest.mark.parametrize("name", ROWS)
def test_rows_visible(name: str, dynamic: bool) -> None:
    build, sizes, visible = ROWS[name]
    traced = trace(build, sizes, dynamic=dynamic)
    answer = prove(traced)
    assert isinstance(answer, MaskProof)
    # Where sizes are symbols, less may be known of them than the example shows.
    assert answer.rows_visible is visible or (dynamic and not answer.rows_visible)
    assert build(sizes).expand(sizes).any(-1).all().item() is visible
    check_all(traced, answer, sizes)


@STATIC_OR_NOT
def test_right_for_the_example_size_only(dynamic: bool) -> None:
    traced = trace(lambda s: below(s) & (columns(s) < 6), SQUARE, dynamic=dynamic)
    answer = prove(traced)
    assert isinstance(answer, MaskProof)
    assert answer.describe() == ("causal + keys" if dynamic else "causal")
    check_all(traced, answer, SQUARE)


def test_other_sizes_than_the_masks_own() -> None:
    traced = trace(below, SQUARE)
    batch, heads, queries, _ = traced.sizes
    prover = MaskProver()
    assert isinstance(prover.prove(traced.mask, batch, heads, queries, sympy.Integer(7)), Miss)
    assert isinstance(prover.prove(traced.mask, batch, heads, queries, sympy.Symbol("s0")), Miss)
    assert isinstance(prover.prove(traced.mask, batch, heads, sympy.S.Zero, queries), Miss)
    five_dimensions = trace(lambda s: below(s)[None, None, None], SQUARE)
    assert isinstance(prove(five_dimensions), Miss)


def test_very_deep_graph() -> None:
    def build(s: Sizes) -> Tensor:
        position = distance(s)
        for _ in range(400):
            position = position + 1
        return position >= 0

    answer = prove(trace(build, SQUARE))
    assert isinstance(answer, MaskProof)
    assert answer.describe() == "full + mask"
    assert answer.why is not None
    assert answer.why.code is MissCode.MASK_NOT_PROVED


def test_equal_masks_are_proved_once() -> None:
    traced = trace(lambda s: torch.stack([below(s), below(s)]), SQUARE)
    first, second = traced.mask.graph.find_nodes(
        op="call_function", target=torch.ops.aten.le.Tensor
    )
    prover = MaskProver()
    answers = [prover.prove(mask, *traced.sizes) for mask in (first, second)]
    assert form_of(answers[0]) == CAUSAL
    assert answers[0] is answers[1]
