"""Broken on purpose: each mutant of the matcher or rewriter makes a model of the battery wrong.

A test suite that a broken prover passes proves nothing. Every mutant here is a mistake that is
easily made; the battery of models must notice each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sympy
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lp_inductor import reference
from lp_inductor.passes import match, rewrite, rope, site_mask
from tests import models
from tests.helpers import interpret_fp8, sqnr
from tests.test_near_misses import ALL
from tests.test_rewrites import MIN_DB, qkv

BATTERY: dict[str, tuple[Callable[..., Any], list[Tensor]]] = {
    "llama": (models.llama, qkv(kv_heads=2)),
    "interleaved": (models.interleaved, qkv()),
    "partial": (models.partial, qkv()),
    "inverse": (models.inverse_rope, qkv()),
    **{
        name: ALL[name]
        for name in (
            "key_table",
            "key_shifted",
            "left_padding",
            "window",
            "one_by_index",
            "causal_cross",
            "bottom_right_hidden",
            "tiled",
            "returned",
        )
    },
}


def wrong_models() -> Iterator[str]:
    """The models of the battery whose result is off. A mutant that raises would fail its test."""
    for name, (model, (q, k, v, *rest)) in BATTERY.items():
        operands = [q, k, v + 1, *rest]
        wide = [t.double() if t.is_floating_point() else t for t in operands]
        result, _ = interpret_fp8(model, *operands)
        pairs = zip(tree_leaves(model(*wide)), tree_leaves(result), strict=True)
        if any(sqnr(expected, found) < MIN_DB for expected, found in pairs):
            yield name


def test_without_a_mutant_nothing_is_wrong() -> None:
    assert list(wrong_models()) == []


Patch = Callable[[pytest.MonkeyPatch], None]


def changed(owner: Any, name: str, change: Callable[[Any], Any]) -> Patch:
    """A mutant whose function ``owner.name`` returns what ``change`` makes of its result."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        right = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: change(right(*args, **kwargs)))

    return patch


def replaced(owner: Any, name: str, wrong: Any) -> Patch:
    """A mutant that has ``wrong`` for ``owner.name``."""
    return lambda monkeypatch: monkeypatch.setattr(owner, name, wrong)


def on(kind: type, **changes: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Change fields of results of one kind, and leave others as they are."""

    def change(found: Any) -> Any:
        if not isinstance(found, kind):
            return found
        return dataclasses.replace(found, **{k: new(found) for k, new in changes.items()})

    return change


def negated(table: Any) -> Any:
    """The table of the inverse rotation, or of its inverse."""
    source = dataclasses.replace(table.source, negate=not table.source.negate)
    return dataclasses.replace(table, source=source)


def later(form: Any) -> Any:
    """A mask that shows one key more."""
    return dataclasses.replace(form, upper=form.upper + 1) if form.upper is not None else form


def bottom_right(found: Any) -> Any:
    """Flash-attention's alignment for PyTorch's."""
    form = found.form
    if form.upper == 0 and site_mask.MaskPart.BAND in found.parts:
        form = dataclasses.replace(form, upper=sympy.Integer(8))
    return dataclasses.replace(found, form=form)


def one_table_for_both(right: Any) -> Any:
    """The key rotated with the query's tables."""

    def settle(query: Any, key: Any) -> Any:
        if isinstance(query, rope.RopeMatch) and isinstance(key, rope.RopeMatch):
            key = dataclasses.replace(key, cos=query.cos, sin=query.sin, keys=query.keys)
        return right(query, key)

    return settle


def mean_for_all(out: Tensor, mean: Tensor, mask: Tensor | None) -> Tensor:
    """Queries that see nothing get the mean as well."""
    return reference_add_mean(out, mean, None)


reference_add_mean = reference.add_mean

MUTANTS: dict[str, Patch] = {
    "lanes swapped": changed(
        rope.RopeMatcher,
        "match_rope",
        on(rope.RopeMatch, interleaved=lambda m: not m.interleaved),
    ),
    "window off by two lanes": changed(
        rope.RopeMatcher, "match_rope", on(rope.RopeMatch, width=lambda m: m.width - 2)
    ),
    "sin negated": changed(
        rope.RopeMatcher, "match_rope", on(rope.RopeMatch, sin=lambda m: negated(m.sin))
    ),
    "cos and sin swapped": changed(
        rope.RopeMatcher,
        "match_rope",
        on(rope.RopeMatch, cos=lambda m: m.sin, sin=lambda m: m.cos),
    ),
    "key with the query's table": lambda monkeypatch: monkeypatch.setattr(
        match, "settle_ropes", one_table_for_both(match.settle_ropes)
    ),
    "mask off by one": changed(
        match, "match_mask", on(site_mask.SiteMask, form=lambda m: later(m.form))
    ),
    "conjunct dropped": changed(
        match,
        "match_mask",
        on(site_mask.SiteMask, tensor=lambda m: None, rows_visible=lambda m: True),
    ),
    "aligned bottom right": changed(match, "match_mask", bottom_right),
    "mean for hidden queries": replaced(reference, "add_mean", mean_for_all),
    "mean left off": changed(
        rewrite.Rewriter, "_quantize_value", lambda found: (found[0], found[1], None)
    ),
    "key scales for values": changed(
        rewrite.Rewriter, "_own_attention", lambda node: swap_arguments(node, 4, 5)
    ),
}


def swap_arguments(node: Any, first: int, second: int) -> Any:
    """Exchange two arguments of a node."""
    args = list(node.args)
    args[first], args[second] = args[second], args[first]
    node.args = tuple(args)
    return node


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_killed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MUTANTS[name](monkeypatch)
    assert next(wrong_models(), None) is not None
