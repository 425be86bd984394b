"""How operands are cut for quantisation: launches, programs and heads, as measured on an H200."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lp_inductor.kernels.triton.sizes import interpreted, padded_lanes
from lp_inductor.quantization import TOKEN_BLOCK

if TYPE_CHECKING:
    from lp_inductor.kernels.triton.operands import Operands


@dataclass(frozen=True)
class Cut:
    """How the operands are cut: heads that a program goes through, tokens of a query's tile.

    ``keep``: the rotation's tables stay in registers from head to head. ``stages``: heads whose
    loads are under way at a time.
    """

    q_heads: int
    k_heads: int
    v_heads: int
    q_tokens: int
    warps: int
    keep: bool = False
    stages: int = 1


def parts_of(operands: Operands) -> list[Operands]:
    """What goes into one launch each.

    Where there are many heads that share the rotation's tables, key and query keep those in
    registers while the next heads are on their way; the value would have to wait for room beside
    them. Few heads are better spread over many programs.
    """
    if operands.value is None or not _keeps_tables(operands):
        return [operands]
    return [
        replace(operands, value=None),
        replace(operands, query=None, key=None, q_rope=None, k_rope=None, hadamard_qk=False),
    ]


def _keeps_tables(operands: Operands) -> bool:
    x, rope = operands.key, operands.k_rope
    if x is None:
        x, rope = operands.query, operands.q_rope
    if x is None or rope is None or rope.per_head:
        return False
    # Two tiles under way must fit into 99 KiB of shared memory, which is all that Ada has.
    return x.shape[1] % 16 == 0 and padded_lanes(x.shape[3]) * x.element_size() <= 256


def choose_cut(operands: Operands, two_passes: bool) -> Cut:
    """As measured best on an H200."""
    q_heads, k_heads, v_heads = (
        1 if t is None else t.shape[1] for t in (operands.query, operands.key, operands.value)
    )
    if interpreted():
        return Cut(_divisor(q_heads, 2), _divisor(k_heads, 2), _divisor(v_heads, 2), TOKEN_BLOCK, 4)
    if two_passes:
        return Cut(_divisor(q_heads, 4), _divisor(k_heads, 4), 1, TOKEN_BLOCK, 8)
    if operands.value is None and _keeps_tables(operands):
        return Cut(_divisor(q_heads, 8), _divisor(k_heads, 8), 1, TOKEN_BLOCK, 16, True, 3)
    if operands.key is None and operands.query is None:
        return Cut(1, 1, 1, TOKEN_BLOCK, 8)
    q_together = 4 if operands.q_rope is not None else 1
    return Cut(_divisor(q_heads, q_together), 1, 1, TOKEN_BLOCK, 16)


def _divisor(heads: int, most: int) -> int:
    """The largest power of two up to ``most`` that divides ``heads``."""
    while heads % most:
        most //= 2
    return most
