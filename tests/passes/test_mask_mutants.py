"""The checks of the other tests are sharp: each deliberately broken prover fails them.

A battery of masks is proved, with a rule or a step of the prover exchanged for one that is wrong
in one thing, and every proof is checked on real data. The sound prover passes; no mutant does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor

from lp_inductor.passes import (
    mask,
    mask_elements,
    mask_forms,
    mask_keys,
    mask_ops,
    mask_pieces,
    mask_rules,
    mask_values,
)
from lp_inductor.passes.indexing import BATCH
from lp_inductor.passes.mask import MaskProof
from lp_inductor.passes.mask_arithmetic import Arithmetic
from lp_inductor.passes.mask_values import ONE, Leaf
from tests.passes.mask_checks import (
    DECODE,
    Build,
    Inputs,
    Sizes,
    Traced,
    below,
    check_all,
    columns,
    distance,
    no_inputs,
    prove,
    rows,
    trace,
)

aten = torch.ops.aten
LARGE = Sizes(3, 2, 7, 7)


def padding(s: Sizes) -> tuple[Tensor, ...]:
    return (torch.rand(s.batch, s.keys) < 0.6,)


def text(s: Sizes) -> tuple[Tensor, ...]:
    return (torch.rand(s.batch, s.keys - 3) < 0.6,)


def position(s: Sizes) -> tuple[Tensor, ...]:
    return (torch.randint(0, s.keys, ()),)


def segments(s: Sizes) -> tuple[Tensor, ...]:
    return (torch.randint(0, 3, (s.batch, s.keys)),)


def extremes(s: Sizes) -> tuple[Tensor, ...]:
    return (torch.tensor([2**63 - 1, -(2**63), 0])[torch.randint(3, (s.batch, s.keys))],)


def filled(mask: Tensor, value: float) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, value)


BATTERY: dict[str, tuple[Build, Inputs, Sizes]] = {
    "causal": (below, no_inputs, LARGE),
    "strict": (lambda s: distance(s) > 0, no_inputs, LARGE),
    "window": (lambda s: below(s) & (distance(s) < 3), no_inputs, LARGE),
    "both sides": (lambda s: distance(s).abs() <= 2, no_inputs, LARGE),
    "or": (lambda s: (distance(s) > 0) | (distance(s) > -2), no_inputs, LARGE),
    "tril": (lambda s: torch.ones(s.queries, s.keys).tril(1).bool(), no_inputs, LARGE),
    "chunks": (lambda s: rows(s) // 3 == columns(s) // 3, no_inputs, LARGE),
    "causal chunks": (lambda s: below(s) & (rows(s) // 3 == columns(s) // 3), no_inputs, LARGE),
    "shifted chunks": (
        lambda s: (rows(s) + 2) // 3 == (columns(s) + 2) // 3,
        no_inputs,
        LARGE,
    ),
    "later chunks": (lambda s: columns(s) // 3 >= rows(s) // 3, no_inputs, LARGE),
    "next chunk too": (lambda s: columns(s) // 3 - rows(s) // 3 <= 1, no_inputs, LARGE),
    "rows of remainder": (lambda s: rows(s) % 3 >= columns(s), no_inputs, LARGE),
    "padding": (lambda s, x: below(s) & x[:, None, None], padding, LARGE),
    "not padding": (lambda s, x: below(s) & ~x[:, None, None], padding, LARGE),
    "extremes": (lambda s, x: below(s) & (x + 1 > 0)[:, None, None], extremes, LARGE),
    "text": (
        lambda s, x: torch.cat([x, torch.ones(s.batch, 3, dtype=torch.bool)], 1)[:, None, None],
        text,
        LARGE,
    ),
    "padded text": (
        lambda s, x: torch.nn.functional.pad(x, (2, 1), value=True)[:, None, None],
        text,
        LARGE,
    ),
    "written": (
        lambda s, x: below(s) & x.slice_scatter(torch.ones_like(x[:, :2]), 1, 1, 3)[:, None, None],
        padding,
        LARGE,
    ),
    "selected": (
        lambda s, x: below(s) & x.select_scatter(torch.ones_like(x[:, 0]), 1, 2)[:, None, None],
        padding,
        LARGE,
    ),
    "packed": (
        lambda s, x: below(s) & (x[:, None, None] == x[:, None, :, None]),
        segments,
        LARGE,
    ),
    "queries too": (
        lambda s, x: below(s) & x[:, None, None] & x[:, None, :, None],
        padding,
        LARGE,
    ),
    "decode": (lambda s, x: columns(s) <= x, position, DECODE),
    "far below": (lambda s: distance(s) >= 2, no_inputs, LARGE),
    "-inf": (lambda s: filled(below(s), -torch.inf), no_inputs, LARGE),
    "-1e9": (lambda s: filled(below(s), -1e9), no_inputs, LARGE),
    "lowest, hidden rows": (
        lambda s: filled(distance(s) > 0, torch.finfo(torch.float32).min),
        no_inputs,
        LARGE,
    ),
}


@functools.cache
def traced(name: str) -> Traced:
    build, inputs, sizes = BATTERY[name]
    return trace(build, sizes, *inputs(sizes), decompositions={})


def failures() -> list[str]:
    """The masks of which something wrong is proved."""
    torch.manual_seed(0)
    found = []
    for name, (_, inputs, sizes) in BATTERY.items():
        answer = prove(traced(name))
        if isinstance(answer, MaskProof):
            try:
                check_all(traced(name), answer, sizes, inputs, draws=4)
            except (AssertionError, RuntimeError, LookupError):
                found.append(name)
    return found


def test_the_prover_itself_passes() -> None:
    assert failures() == []
    proved = [name for name in BATTERY if isinstance(prove(traced(name)), MaskProof)]
    assert set(BATTERY) - set(proved) == {"-1e9", "lowest, hidden rows"}


Patch = Callable[[pytest.MonkeyPatch], None]


def pointwise(overload: Any, rule: Callable[..., Any]) -> Patch:
    return lambda patch: patch.setitem(mask_ops.POINTWISE, overload, rule)


def attribute(owner: Any, name: str, make: Callable[[Any], Any]) -> Patch:
    """``owner.name`` exchanged for what ``make`` makes of it."""
    return lambda patch: patch.setattr(owner, name, make(getattr(owner, name)))


def rule(overload: Any, make: Callable[[Any], Any]) -> Patch:
    """The rule of an operator exchanged for what ``make`` makes of it."""
    return lambda patch: patch.setitem(mask_rules.RULES, overload, make(mask_rules.RULES[overload]))


def swapped_axes(proof: Callable[..., Any]) -> Callable[..., Any]:
    """The form of the transposed mask."""

    def split(elements: Any, region: Any, visible: Any) -> Any:
        form, keys = proof(elements, region, visible)
        lower = None if form.upper is None else -form.upper
        upper = None if form.lower is None else -form.lower
        return mask.MaskForm(lower, upper, form.chunk), keys

    return split


def shifted_index(dim: int) -> Callable[[Any], Any]:
    """A rule that reads its neighbour along one dimension."""

    def make(right: Any) -> Any:
        def wrong(elements: Any, node: Any, index: Any, region: Any) -> Any:
            index = (*index[:dim], index[dim] + 1, *index[dim + 1 :])
            return right(elements, node, index, region)

        return wrong

    return make


def of_other_batch(right: Any) -> Any:
    """Every atom is read at the first entry of the batch."""

    def wrong(self: Any, node: Any, index: Any, reason: str) -> Any:
        index = tuple(sympy.S.Zero if entry == BATCH else entry for entry in index)
        return right(self, node, index, reason)

    return wrong


def unclamped(right: Any) -> Any:
    def wrong(*args: Any) -> Any:
        source = right(*args)
        return source._replace(clamped=(False,) * len(source.clamped))

    return wrong


def half_chunks(right: Any) -> Any:
    """Of ``j // chunk == i // chunk`` only ``>=``."""
    return lambda form: right(form)[:-1] if form.chunk is not None else right(form)


MUTANTS: dict[str, Patch] = {
    "at_least, one too few": pointwise(
        aten.le.Tensor, lambda region, a, b: mask_ops.at_least(region, b, a + 1)
    ),
    "at_least, one too many": pointwise(
        aten.lt.Scalar, lambda region, a, b: mask_ops.at_least(region, b, a)
    ),
    "gt as ge": pointwise(aten.gt.Scalar, mask_ops.at_least),
    "le as ge": pointwise(aten.le.Tensor, mask_ops.at_least),
    "and, one conjunct dropped": pointwise(
        aten.bitwise_and.Tensor, lambda region, a, b: mask_ops.nonzero(region, a)
    ),
    "and, the other conjunct dropped": pointwise(
        aten.bitwise_and.Tensor, lambda region, a, b: mask_ops.nonzero(region, b)
    ),
    "or as and": pointwise(aten.bitwise_or.Tensor, mask_ops.POINTWISE[aten.bitwise_and.Tensor]),
    "not as itself": pointwise(aten.bitwise_not.default, mask_ops.nonzero),
    "abs as itself": pointwise(aten.abs.default, lambda region, a: Leaf(a)),
    "eq as ge": pointwise(aten.eq.Tensor, mask_ops.at_least),
    "i and j exchanged": attribute(mask, "split", swapped_axes),
    "keys of another entry of the batch": attribute(
        mask_elements.Elements, "_atom", of_other_batch
    ),
    "atoms that do not depend on queries": attribute(
        mask_elements.Elements,
        "depends_on",
        lambda right: lambda self, expr, axis: axis in expr.free_symbols,
    ),
    "integers that never wrap": attribute(
        mask_values, "is_exact", lambda right: lambda region, expr, dtype: True
    ),
    "chunk, one too large": attribute(
        mask_rules,
        "FloorDiv",
        lambda right: lambda a, divisor: right(a, divisor + 1),
    ),
    "chunks shifted by one": attribute(
        mask_rules, "FloorDiv", lambda right: lambda a, divisor: right(a + 1, divisor)
    ),
    "half of a chunk": attribute(mask_forms.MaskForm, "conditions", half_chunks),
    "facts of quotients off by one": attribute(
        Arithmetic,
        "_facts_of",
        lambda right: lambda self, atom: (fact - 1 for fact in right(self, atom)),
    ),
    "triangles off by one": rule(aten.tril.default, shifted_index(-1 % 2)),
    "cat, its pieces exchanged": attribute(
        mask_pieces,
        "join_pieces",
        lambda right: lambda node: (right(node)[0], right(node)[1][::-1]),
    ),
    "padding shifted": rule(aten.constant_pad_nd.default, shifted_index(1)),
    "slice_scatter shifted": rule(aten.slice_scatter.default, shifted_index(1)),
    "select_scatter shifted": rule(aten.select_scatter.default, shifted_index(1)),
    "-1e9 hides": attribute(
        mask, "hides", lambda right: lambda leaf, lowest: bool(leaf <= -(10**9))
    ),
    "lowest values need no visible key": attribute(
        mask, "every_query_sees_a_key", lambda right: lambda *args: True
    ),
    "a key of another place is visible": attribute(
        mask_elements.Elements,
        "substitute",
        lambda right: lambda self, expr, axis, place: sympy.S.Zero,
    ),
    "keys beyond the data are read": attribute(mask_keys, "_source", unclamped),
    "tests emitted without their constant": attribute(
        mask_keys,
        "_comparison",
        lambda right: (
            lambda region, test: right(region, test)._replace(right=right(region, test).right + 1)
        ),
    ),
    "strict tests everywhere": attribute(
        mask_keys,
        "_comparison",
        lambda right: lambda region, test: right(region, test)._replace(strict=True),
    ),
    "branches exchanged": attribute(
        mask_keys._KeyEmitter,
        "_tree",
        lambda right: (
            lambda self, value: right(
                self,
                value if isinstance(value, Leaf) else value._replace(yes=value.no, no=value.yes),
            )
        ),
    ),
    "exact where only bounded": attribute(
        mask, "split", lambda right: lambda *args: (right(*args)[0], ONE)
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_killed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for known in BATTERY:
        traced(known)  # graphs are traced with nothing exchanged
    MUTANTS[name](monkeypatch)
    assert failures(), f"nothing tells {name} from the prover"
