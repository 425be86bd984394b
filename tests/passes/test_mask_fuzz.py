"""Soundness: whatever is proved of a random mask must be what the mask really is.

A random mask is a term: a nested tuple of an operator's name, terms and plain arguments. Terms
are vectors of integers along one axis, or masks of all queries and keys; both may read run-time
data. LP_INDUCTOR_FUZZ sets the number of masks, and makes them random; without it a few fixed
ones are checked.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, event, given, reject, settings
from hypothesis import strategies as st
from torch import Tensor

from lp_inductor.passes.mask import MaskProof
from lp_inductor.passes.result import Miss
from tests.passes.mask_checks import (
    Build,
    Sizes,
    check,
    example,
    ones,
    other_sizes,
    prove,
    run_graph,
    tokens,
    trace,
)

Term: TypeAlias = tuple[Any, ...]
COMPARISONS = st.sampled_from(["le", "lt", "ge", "gt", "eq", "ne"])
SMALL = st.integers(-3, 4)
DIVISORS = st.sampled_from([1, 2, 3, 5])
EXAMPLES = int(os.environ.get("LP_INDUCTOR_FUZZ", "60"))

#: The run-time tensors that terms may read, as (name, shape): -1 is the axis of the vector.
INTEGER_DATA = ("positions", "lengths", "extremes", "scalar")
BOOL_DATA = ("keys", "rows", "heads", "all", "one")


def data(s: Sizes) -> list[Tensor]:
    """Random values for every tensor that a term may read, in the order of :class:`Data`."""
    b, h, q, k = s
    wild = torch.tensor([-(2**63), 2**63 - 1, -(2**31), 0, 1, 2])

    def bits(*shape: int) -> Tensor:
        return torch.rand(shape) < 0.6

    def numbers(*shape: int) -> Tensor:
        return torch.randint(-2, 7, shape)

    return [
        bits(b, 1, 1, k),
        bits(b, 1, q, 1),
        bits(1, h, 1, k),
        bits(b, 1, q, k),
        bits(),
        bits(k),
        numbers(q),
        numbers(k),
        numbers(k).int(),
        wild[torch.randint(len(wild), (k,))],
        wild[torch.randint(len(wild), (q,))],
        numbers(),
        numbers(b, 1, 1, 1),
    ]


class Data:
    """The run-time tensors by name."""

    def __init__(self, *tensors: Tensor) -> None:
        (
            self.keys, self.rows, self.heads, self.all, self.one, self.plain,
            self.at_queries, self.at_keys, self.narrow, self.wild_keys, self.wild_queries,
            self.scalar, self.lengths,
        ) = tensors  # fmt: skip


def pad_rows(s: Sizes, a: Tensor, before: int, value: bool) -> Tensor:
    a = a.expand(s)
    return F.pad(a[..., before:, :] if before > 0 else a, (0, 0, max(before, 0), 0), value=value)


def written(s: Sizes, a: Tensor, b: Tensor, start: int, length: int) -> Tensor:
    """``a`` with some keys of ``b``."""
    a, b = a.expand(s), b.expand(s)
    stop = start + length
    return torch.slice_scatter(a, b[..., start:stop], 3, start, stop)


OPERATORS: dict[str, Callable[..., Tensor]] = {
    # Vectors
    "tokens": lambda s, d, axis: tokens(getattr(s, axis)),
    "counted": lambda s, d, axis, start, step: torch.arange(
        start, start + step * getattr(s, axis), step
    ),
    "data": lambda s, d, name: getattr(d, name),
    "plus": lambda s, d, a, b: a + b,
    "minus": lambda s, d, a, b: a - b,
    "times": lambda s, d, a, b: a * b,
    "divided": lambda s, d, a, b: a // b,
    "cut off": lambda s, d, a, b: torch.div(a, b, rounding_mode="trunc"),
    "remainder": lambda s, d, a, b: a % b,
    "at least": lambda s, d, a, b: a.clamp(min=b) if isinstance(b, int) else torch.maximum(a, b),
    "at most": lambda s, d, a, b: a.clamp(max=b) if isinstance(b, int) else torch.minimum(a, b),
    "negative": lambda s, d, a: -a,
    "absolute": lambda s, d, a: a.abs(),
    "int32": lambda s, d, a: a.int(),
    "int8": lambda s, d, a: a.to(torch.int8),
    "reversed": lambda s, d, a: a[a.shape[0] - 1 - tokens(a.shape[0])],
    "from the end": lambda s, d, a: a[-1 - tokens(a.shape[0])],
    "later": lambda s, d, a, step: torch.cat([a, a[-1:] + step])[1:],
    "earlier": lambda s, d, a, step: torch.cat([a[:1] - step, a])[:-1],
    "cut": lambda s, d, a, at: torch.cat([a[:at], a[at:]]),
    "taken": lambda s, d, a, places: a[places],
    "either": lambda s, d, op, a, bound, b: torch.where(getattr(torch, op)(a, bound), a, b),
    "runs": lambda s, d, a: (torch.diff(a, prepend=a[:1] - 1) != 1).cumsum(0),
    "count": lambda s, d, a: torch.ones_like(a).cumsum(0),
    "padded": lambda s, d, a, before, value: F.pad(a[before:], (before, 0), value=value),
    "interleaved": lambda s, d, a, b: torch.stack([a, b], 1).view(-1)[::2],
    "spread": lambda s, d, a: a[:, None].expand(-1, 2).reshape(-1)[1::2],
    # Masks
    "compare": lambda s, d, op, i, j: getattr(torch, op)(j[None], i[:, None]),
    "key bound": lambda s, d, op, j, bound: getattr(torch, op)(j, bound),
    "distance": lambda s, d, op, i, j, bound: getattr(torch, op)(i[:, None] - j[None], bound),
    "chunk": lambda s, d, i, j, c: i[:, None] // c == j[None] // c,
    "lower": lambda s, d, diagonal, dtype: ones(s, dtype).tril(diagonal).bool(),
    "upper": lambda s, d, diagonal, dtype: ones(s, dtype).triu(diagonal) == 0,
    "all": lambda s, d, value: torch.full((s.queries, s.keys), value),
    "heads": lambda s, d, op, bound: getattr(torch, op)(tokens(s.heads), bound)[:, None, None],
    "and": lambda s, d, a, b: a & b,
    "or": lambda s, d, a, b: torch.logical_or(a, b),
    "xor": lambda s, d, a, b: a ^ b,
    "product": lambda s, d, a, b: a * b,
    "same": lambda s, d, a, b: a == b,
    "not": lambda s, d, a: ~a,
    "if": lambda s, d, condition, a, b: torch.where(condition, a, b),
    "filled": lambda s, d, a, where, value: a.expand(s).masked_fill(where, value),
    "halves": lambda s, d, a, at: torch.cat(
        [a.expand(s)[..., :at, :], a.expand(s)[..., at:, :]], -2
    ),
    "sides": lambda s, d, a, b, at: torch.cat([a.expand(s)[..., :at], b.expand(s)[..., at:]], -1),
    "pad rows": lambda s, d, a, before, value: pad_rows(s, a, before, value),
    "written": lambda s, d, a, b, start, length: written(s, a, b, start, length),
    "row written": lambda s, d, a, b: a.expand(s).select_scatter(b.expand(s)[:, :, 0], 2, 0),
    "column written": lambda s, d, a, b: a.expand(s).select_scatter(b.expand(s)[..., -1], 3, -1),
    "tril of": lambda s, d, a, diagonal: a.expand(s).tril(diagonal),
    "rows": lambda s, d, a, i: a.expand(s)[:, :, i],
    "grid": lambda s, d, a, i, j: a.expand(s)[..., i[:, None], j],
    "flat": lambda s, d, a: a.reshape(-1).view(a.shape),
    "whole": lambda s, d, a: a.expand(s).clone(),
    "twice": lambda s, d, a: a.expand(s).repeat(1, 1, 1, 2)[..., s.keys :],
    "any": lambda s, d, a: a.any(-1, keepdim=True),
    "all of": lambda s, d, a: a.expand(s).all(-2, keepdim=True),
    "through float": lambda s, d, a: a.float() > 0,
    "through lowest": lambda s, d, a: (
        torch.where(a, 0.0, torch.finfo(torch.bfloat16).min).bfloat16() == 0
    ),
}


def op(name: str, *arguments: Any) -> st.SearchStrategy[Term]:
    """Terms of one operator."""
    return st.tuples(st.just(name), *arguments)


def vectors(axis: str, read: tuple[str, ...]) -> st.SearchStrategy[Term]:
    plain = op("tokens", st.just(axis))
    leaves = plain | plain | op("counted", st.just(axis), SMALL, st.sampled_from([1, 1, 2, -1]))
    leaves |= op("data", st.sampled_from(read))

    def grow(inner: st.SearchStrategy[Term]) -> st.SearchStrategy[Term]:
        terms = [op(name, inner, inner) for name in ("plus", "minus", "interleaved", "taken")]
        terms += [op(name, inner, inner | SMALL) for name in ("at least", "at most")]
        terms += [op(name, inner) for name in ("negative", "absolute", "int32", "reversed", "int8")]
        terms += [op(name, inner) for name in ("runs", "count", "spread", "from the end")]
        terms += [op(name, inner, SMALL) for name in ("plus", "times", "later", "earlier")]
        terms += [op(name, inner, DIVISORS) for name in ("divided", "cut off", "remainder")]
        terms += [op("cut", inner, st.integers(0, 3)), op("taken", inner, plain)]
        terms += [op("plus", inner, op("data", st.just("scalar")))]
        terms += [op("padded", inner, st.integers(0, 2), SMALL)]
        return st.one_of(*terms, op("either", COMPARISONS, inner, SMALL, inner))

    return st.recursive(leaves, grow, max_leaves=3)


def masks() -> st.SearchStrategy[Term]:
    i = vectors("queries", ("at_queries", "wild_queries"))
    j = vectors("keys", ("at_keys", "narrow", "wild_keys"))
    plain_i, plain_j = op("tokens", st.just("queries")), op("tokens", st.just("keys"))
    dtypes = st.sampled_from([torch.bool, torch.float32, torch.int64, torch.uint8])
    compared, far = op("compare", COMPARISONS, i, j), op("distance", COMPARISONS, i, j, SMALL)
    band = op("distance", COMPARISONS, plain_i, plain_j, SMALL)
    chunk = op("chunk", i, j, DIVISORS) | op("chunk", plain_i, plain_j, DIVISORS)
    triangle = op("lower", SMALL, dtypes) | op("upper", SMALL, dtypes)
    bits = op("data", st.sampled_from(["keys", "rows", "heads", "all", "one", "plain"]))
    bounds = op("data", st.sampled_from(["scalar", "lengths"])) | SMALL
    keys = op("data", st.sampled_from(["keys", "plain"])) | op("key bound", COMPARISONS, j, bounds)
    leaves = st.one_of(compared, far, band, chunk, triangle, bits, keys, op("all", st.booleans()))

    def grow(inner: st.SearchStrategy[Term]) -> st.SearchStrategy[Term]:
        terms = [op(name, inner, inner) for name in ("and", "or", "xor", "product", "same")]
        terms += [op("and", inner, keys), op("and", band, keys), op("and", triangle, inner)]
        terms += [op(name, inner) for name in ("not", "flat", "whole", "twice", "any", "all of")]
        terms += [op(name, inner) for name in ("through float", "through lowest")]
        terms += [op("if", inner, inner, inner), op("filled", inner, inner, st.booleans())]
        terms += [op("halves", inner, st.integers(0, 3)), op("rows", inner, i)]
        terms += [op("sides", inner, inner, st.integers(0, 3)), op("tril of", inner, SMALL)]
        terms += [op("written", inner, inner, st.integers(0, 3), st.integers(0, 3))]
        terms += [op(name, inner, inner) for name in ("row written", "column written")]
        terms += [op("pad rows", inner, st.integers(0, 2), st.booleans())]
        terms += [op("grid", inner, i, j), op("and", inner, op("heads", COMPARISONS, SMALL))]
        return st.one_of(*terms)

    return st.recursive(leaves, grow, max_leaves=5)


def make(s: Sizes, d: Data, term: Any) -> Any:
    """What a term stands for, in torch."""
    if not isinstance(term, tuple):
        return term
    name, *arguments = term
    return OPERATORS[name](s, d, *(make(s, d, argument) for argument in arguments))


#: Whole masks of floats, by what they hold where a key is hidden.
ADDITIVE: dict[str, Callable[[Tensor], Tensor]] = {
    "-inf": lambda mask: torch.where(mask, 0.0, -torch.inf),
    "lowest": lambda mask: torch.zeros(mask.shape).masked_fill(
        ~mask, torch.finfo(torch.float32).min
    ),
    "lowest, bfloat16": lambda mask: (1 - mask.bfloat16()) * torch.finfo(torch.bfloat16).min,
    "rounded": lambda mask: torch.where(mask, 0.0, torch.finfo(torch.float32).min).bfloat16(),
    "too high": lambda mask: torch.where(mask, 0.0, torch.finfo(torch.bfloat16).min),
}


def term_build(term: Term, additive: str | None) -> Build:
    def build(s: Sizes, *tensors: Tensor) -> Tensor:
        mask: Tensor = make(s, Data(*tensors), term)
        return mask if additive is None else ADDITIVE[additive](mask)

    return build


@settings(
    max_examples=EXAMPLES,
    derandomize="LP_INDUCTOR_FUZZ" not in os.environ,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],
)
@given(
    term=masks(),
    sizes=st.tuples(*[st.integers(1, 2)] * 2, *[st.integers(1, 7)] * 2).map(lambda t: Sizes(*t)),
    dynamic=st.booleans(),
    additive=st.sampled_from([None] * 7 + list(ADDITIVE)),
    seed=st.integers(0, 2**31),
)
def test_whatever_is_proved_is_so(
    term: Term, sizes: Sizes, dynamic: bool, additive: str | None, seed: int
) -> None:
    torch.manual_seed(seed)
    try:
        traced = trace(term_build(term, additive), sizes, *data(sizes), dynamic=dynamic)
    except (RuntimeError, IndexError):
        reject()
    answer = prove(traced)
    if isinstance(answer, Miss):
        event(answer.code.name)
        return
    event("exact" if answer.rest is None else f"form + {answer.describe().split()[-1]}")
    event("full" if answer.form.is_full else "a form")
    for concrete in (sizes, *other_sizes(traced)):
        for _ in range(3):
            operands = [*example(concrete), *data(concrete)]
            try:
                run_graph(traced, None, operands)
            except (RuntimeError, IndexError):
                continue  # the mask itself cannot be built of these
            check(traced, answer, concrete, operands)


def test_the_grammar_reaches_every_kind_of_answer() -> None:
    """A battery that proves nothing would find nothing wrong."""
    found: set[str] = set()

    @settings(
        max_examples=60,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(term=masks())
    def look(term: Term) -> None:
        sizes = Sizes(2, 2, 5, 5)
        try:
            answer = prove(trace(term_build(term, None), sizes, *data(sizes)))
        except (RuntimeError, IndexError):
            return
        if isinstance(answer, MaskProof):
            found.add("exact" if answer.rest is None else answer.describe().split()[-1])

    look()
    assert found == {"exact", "keys", "mask"}
