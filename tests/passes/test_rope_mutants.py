"""Would the tests notice? Each mutant breaks one step of the proof; the battery must kill it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor

from lp_inductor.passes import joins, placement, rope, rotation, sources, tables
from lp_inductor.passes.coefficients import CoefficientKeys
from lp_inductor.passes.indexing import Lanes, modulo
from lp_inductor.passes.lanes import LaneTracker
from lp_inductor.passes.pairing import Pairing
from lp_inductor.passes.result import Miss
from lp_inductor.passes.rope import RopeMatch
from tests.rope_checks import find_rope
from tests.rotations import CASES, bhsd, halves, pair, refused_cases


def tiled(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads copied as a whole, not each beside itself: no grouping."""
    return halves(x, cos, sin).repeat(1, 2, 1, 1)


def moved_beside_text(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Lanes are moved for the tokens that turn only."""
    a, b = x[:, :, 2:, 0::2], x[:, :, 2:, 1::2]
    turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    return torch.cat([x[:, :, :2], turned], dim=2)


def battery() -> list[Callable[[], bool]]:
    """Checks that hold; a wrong match raises besides."""

    def matches(name: str) -> bool:
        case = CASES[name]
        found = find_rope(case.function, *case.inputs)
        return isinstance(found, RopeMatch) and found.describe() == case.rope

    def refuses(name: str) -> bool:
        function, inputs = refused_cases()[name]
        return isinstance(find_rope(function, *inputs), Miss)

    checks: list[Callable[[], bool]] = [lambda n=n: matches(n) for n in CASES]  # type: ignore[misc]
    checks += [lambda n=n: refuses(n) for n in refused_cases()]  # type: ignore[misc]
    checks.append(lambda: not isinstance(find_rope(tiled, bhsd(), *pair(6, 16)), RopeMatch))
    checks.append(lambda: isinstance(find_rope(moved_beside_text, bhsd(), *pair(4, 8)), Miss))
    return checks


def is_killed() -> bool:
    """Whether any check fails."""
    for check in battery():
        try:
            if not check():
                return True
        except AssertionError:
            return True
    return False


def test_the_battery_holds_without_a_mutant() -> None:
    assert not is_killed()


def opposite_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sign of sin does not count."""
    original = rotation.match_pairing

    def mutant(lanes: Any) -> Pairing | Miss:
        found = original(lanes)
        return replace(found, inverse=False) if isinstance(found, Pairing) else found

    monkeypatch.setattr(rotation, "match_pairing", mutant)


def partner_off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The partner's table is read one lane further."""
    original = rotation._readings

    def mutant(*args: Any) -> Any:
        cos, sin = original(*args)
        return cos, (*sin[1:], sin[0])

    monkeypatch.setattr(rotation, "_readings", mutant)


def token_offset_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens are read from the first on, wherever a run begins."""
    original = placement.match_layout

    def mutant(*args: Any) -> Any:
        found = original(*args)
        return found and replace(found, token_start=sympy.S.Zero)

    monkeypatch.setattr(placement, "match_layout", mutant)


def keys_ignore_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    """All elements of a table count as equal."""
    original = CoefficientKeys.__call__

    def mutant(self: CoefficientKeys, *args: Any) -> Any:
        found = original(self, *args)
        return (found[0],) * len(found)

    monkeypatch.setattr(CoefficientKeys, "__call__", mutant)


def wrong_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """A join gives each position to the piece at the other end."""
    original = joins.join_of

    def mutant(node: Any) -> Any:
        found = original(node)
        if found is None or len(found.pieces) < 2:
            return found
        tensors = [piece.tensor for piece in found.pieces][::-1]
        pieces = zip(found.pieces, tensors, strict=True)
        return replace(found, pieces=tuple(replace(p, tensor=t) for p, t in pieces))

    monkeypatch.setattr(joins, "join_of", mutant)


def scatter_writes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scatter gives its base everywhere."""
    original = joins.join_of

    def mutant(node: Any) -> Any:
        found = original(node)
        return found and (replace(found, pieces=()) if found.base is not None else found)

    monkeypatch.setattr(joins, "join_of", mutant)


def scatter_off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scatter writes one position further."""
    original = joins.scatter_start

    def mutant(*args: Any) -> Any:
        start = original(*args)
        return None if start is None else start + 1

    monkeypatch.setattr(joins, "scatter_start", mutant)


def heads_reversed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of heads count as a group in whatever order they come."""

    def mutant(expr: Any, divisor: Any, bounds: Any) -> Any:
        return modulo(expr, bounds[expr] / divisor, bounds)

    monkeypatch.setattr(placement, "floor_div", mutant)


def sign_in_front_of_cast(monkeypatch: pytest.MonkeyPatch) -> None:
    """A negation between the table that is read and its elements is forgotten."""
    monkeypatch.setattr(tables.Reading, "sign", lambda self, depth: 1)


def memory_without_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was never written may be read."""
    monkeypatch.setattr(placement, "is_uninitialised", lambda node: False)


def cut_off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of tokens ends one token late."""
    original = rope._inner_cut

    def mutant(*args: Any) -> Any:
        found = original(*args)
        return None if found is None else found + 1

    monkeypatch.setattr(rope, "_inner_cut", mutant)


def identity_of_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that do not turn get cos = 0."""
    monkeypatch.setattr(rope, "Filled", lambda value, *rest: sources.Filled(0.0, *rest))


def order_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Moved lanes count as being in place."""
    monkeypatch.setattr(rope, "RopeMatch", _unmoved(rope.RopeMatch))


def _unmoved(original: Any) -> Any:
    def mutant(*args: Any) -> Any:
        found = original(*args)
        return replace(found, permutation=tuple(range(found.width)))

    return mutant


def neighbouring_runs_swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces are joined in the wrong order."""
    original = sources.Joined.emit

    def mutant(self: sources.Joined, emitter: Any) -> Any:
        return original(replace(self, parts=self.parts[::-1]), emitter)

    monkeypatch.setattr(sources.Joined, "emit", mutant)


def tables_follow_the_first_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every token reads the table at lane positions shifted by one."""
    original = tables._common_index

    def mutant(readings: Any, depths: Any) -> Any:
        index = original(readings, depths)
        shift = [Lanes(x + 1 for x in e) if isinstance(e, Lanes) and len(set(e)) > 1 else e
                 for e in index or ()]  # fmt: skip
        return index and tuple(shift)

    monkeypatch.setattr(tables, "_common_index", mutant)


def sums_drop_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A difference counts as a sum."""

    def mutant(self: LaneTracker, element: Any, below: Any) -> Any:
        left, right = self._operands(element) or (None, None)
        if left is None or right is None:
            return [below]
        return [*self._sum(left, below), *self._sum(right, below)]

    monkeypatch.setattr(LaneTracker, "_add", mutant)


MUTANTS = [
    opposite_turn,
    partner_off_by_one,
    token_offset_dropped,
    keys_ignore_lanes,
    wrong_piece,
    scatter_writes_nothing,
    scatter_off_by_one,
    heads_reversed,
    sign_in_front_of_cast,
    memory_without_value,
    cut_off_by_one,
    identity_of_zeros,
    order_forgotten,
    neighbouring_runs_swapped,
    tables_follow_the_first_token,
    sums_drop_signs,
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_mutant_is_killed(
    mutant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mutant(monkeypatch)
    assert is_killed()
