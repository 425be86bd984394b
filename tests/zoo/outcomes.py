"""What becomes of the sites of a model: expected, measured, and how both are written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lp_inductor.passes.site import Site
from tests.zoo.measure import Built


@dataclass(frozen=True)
class Outcome:
    """What became of ``count`` sites that are alike.

    Attributes:
        count: how many.
        mask: the mask's form as the report has it; "" where the site is not rewritten.
        rope: the fused rotation; None where none is.
        rope_miss: code of why a rotation that was seen is not fused.
        miss: code of why the sites are not rewritten; None where they are.
    """

    count: int
    mask: str = ""
    rope: str | None = None
    rope_miss: str | None = None
    miss: str | None = None

    @property
    def fused(self) -> bool:
        """Whether the sites are rewritten."""
        return self.miss is None

    def __repr__(self) -> str:
        """As an expectation is written."""
        if self.miss is not None:
            return f"stock({self.count}, {self.miss!r})"
        return f"fused({self.count}, {self.mask!r}, {self.rope!r}, {self.rope_miss!r})"


def fused(
    count: int, mask: str = "none", rope: str | None = None, rope_miss: str | None = None
) -> Outcome:
    """Sites that are rewritten."""
    return Outcome(count, mask, rope, rope_miss)


def stock(count: int, miss: str) -> Outcome:
    """Sites that are not."""
    return Outcome(count, miss=miss)


def outcomes(sites: Iterable[Site]) -> tuple[Outcome, ...]:
    """The outcomes of measured sites, in the order in which they first occur."""
    counts: Counter[tuple[Any, ...]] = Counter()
    for site in sites:
        if site.miss is not None:
            counts["", None, None, site.miss.code.name] += 1
        else:
            rope_miss = site.rope_miss.code.name if site.rope_miss else None
            counts[site.mask, site.rope, rope_miss, None] += 1
    return tuple(Outcome(count, *rest) for rest, count in counts.items())


@dataclass(frozen=True)
class ZooCase:
    """One architecture, called in one way.

    Attributes:
        architecture, variant: together its name.
        build: makes the module and its arguments.
        expected: what becomes of its sites today.
        goal: what should become of them; None where that is what is expected.
        note: what keeps the case from its goal, or what is particular about it.
        graphs: how many graphs Dynamo makes of it.
        dynamo: options of torch._dynamo.config that the case needs.
        output_floor: least SQNR in dB of the FP8 model's output against stock.
    """

    architecture: str
    variant: str
    build: Callable[[], Built]
    expected: tuple[Outcome, ...]
    goal: tuple[Outcome, ...] | None = None
    note: str = ""
    graphs: int = 1
    dynamo: Mapping[str, Any] = field(default_factory=dict)
    output_floor: float = 15.0

    @property
    def name(self) -> str:
        """Architecture and variant."""
        return f"{self.architecture}, {self.variant}"

    @property
    def gap(self) -> bool:
        """Whether something is left to be done."""
        return self.goal is not None and Counter(self.goal) != Counter(self.expected)


def site_count(kinds: Sequence[Outcome]) -> int:
    """All sites."""
    return sum(kind.count for kind in kinds)


def fused_count(kinds: Sequence[Outcome]) -> int:
    """The sites that are rewritten."""
    return sum(kind.count for kind in kinds if kind.fused)


def describe(kinds: Sequence[Outcome], what: Callable[[Outcome], str | None]) -> str:
    """One property of the outcomes, each with its count: "2x causal, 1x none"."""
    counts: Counter[str] = Counter()
    for kind in kinds:
        text = what(kind)
        if text is not None:
            counts[text] += kind.count
    return "; ".join(f"{count}x {text}" for text, count in counts.items())
