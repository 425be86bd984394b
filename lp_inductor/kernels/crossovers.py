"""From what length on FP8 attention pays, and which kernel then pays most: measured, in one table.

:mod:`lp_inductor.kernels.measured` holds, for each card's compute capability, head size, causality
and grouping of heads, how much faster than the best bfloat16 attention a whole layer was (rotation,
quantisation and attention together). A call between two measured lengths counts as the shorter.

The table was measured with as many queries as keys and 32 heads. Other calls are compared with it
by their work: quantisation costs time for each token, attention for each pair of tokens, so few
queries count as a shorter sequence; and fewer heads must be made up for by a longer one, since
small calls do not fill the card.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from lp_inductor.kernels.base import AttentionCall, MaskPart
from lp_inductor.kernels.measured import HEADS

#: What a kernel must gain to be chosen: measurements scatter, and cards of one capability differ in
#: the bandwidth that quantisation needs.
LEAST_SPEEDUP = 1.03

#: Lengths and speed-ups of one kernel, ascending.
Curve = Mapping[int, float]
#: Compute capability, head size, causal, heads grouped.
Key = tuple[tuple[int, int], int, bool, bool]


def measured_curves(
    capability: tuple[int, int], call: AttentionCall, table: Mapping[Key, Mapping[str, Curve]]
) -> Mapping[str, Curve]:
    """What was measured for calls like this one, by kernel; empty where nothing was.

    A head size between two measured ones counts as the larger; one below the smallest was not
    measured.
    """
    dim = max(call.head_dim, call.value_head_dim)
    dims = sorted({key[1] for key in table if key[0] == capability})
    if not dims or dim <= dims[0] // 2 or dim > dims[-1]:
        return {}
    nearest = next(d for d in dims if d >= dim)
    is_causal = bool(call.mask & {MaskPart.CAUSAL, MaskPart.BAND, MaskPart.CHUNK})
    grouped = call.heads != call.kv_heads
    return table.get((capability, nearest, is_causal, grouped), {})


def fastest_by_length(
    curves: Mapping[str, Curve], kernels: Sequence[str]
) -> tuple[tuple[int, str | None], ...]:
    """(from this many tokens on, the fastest of ``kernels``; None: bfloat16 is), ascending."""
    lengths = sorted({length for name in kernels for length in curves.get(name, {})})
    segments: list[tuple[int, str | None]] = []
    for length in lengths:
        speedups = {
            name: curves[name][length] for name in kernels if length in curves.get(name, {})
        }
        best = max(speedups, key=speedups.__getitem__)
        name = best if speedups[best] >= LEAST_SPEEDUP else None
        if not segments or segments[-1][1] != name:
            segments.append((length, name))
    return tuple(segments)


def work_conditions(call: AttentionCall, tokens: int) -> Iterator[bool | torch.SymBool]:
    """What must hold for the call to pay at least as much as a square one of ``tokens``.

    With G query heads for each key head, L queries and S keys, quantisation handles L * G + 2 * S
    tokens for L * S * G pairs, a square call of T tokens T * (G + 2) for T * T * G. Conditions that
    follow from those before are left out: each one on a symbolic size becomes a guard.
    """
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    group = call.heads // call.kv_heads
    length, keys, rows = call.query_len, call.key_len, call.batch * call.heads
    yield keys >= tokens
    if not statically_known_true(length >= keys):
        yield length * keys * (group + 2) >= tokens * (length * group + 2 * keys)
    if not statically_known_true(rows >= HEADS) or not statically_known_true(length >= keys):
        yield rows * length >= HEADS * tokens
