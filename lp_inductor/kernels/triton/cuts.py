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
    """How the operands are cut: heads that a program goes through, tokens of a tile.

    ``keep``: the rotation's tables stay in registers from head to head. ``stages``: heads whose
    loads are under way at a time.
    """

    q_heads: int = 1
    k_heads: int = 1
    v_heads: int = 1
    q_tokens: int = TOKEN_BLOCK
    k_tokens: int = TOKEN_BLOCK
    v_tokens: int = TOKEN_BLOCK
    warps: int = 4
    keep: bool = False
    stages: int = 1


def parts_of(operands: Operands, blocks: bool) -> list[Operands]:
    """What goes into one launch each.

    Beside blocks of tokens, whose tiles are large, a value is quicker in a launch of its own: it
    waits for nothing that the others need. Small tiles of all operands fill the card together.
    """
    alone = operands.key is None and operands.query is None
    if not blocks or operands.value is None or alone:
        return [operands]
    return [
        replace(operands, value=None),
        replace(operands, query=None, key=None, q_rope=None, k_rope=None, hadamard_qk=False),
    ]


def choose_cut(operands: Operands, blocks: bool, transpose: bool = True) -> Cut:
    """As measured best on an H200.

    Heads that share the rotation's tables are gone through by one program, which keeps those in
    registers while the next heads are on their way.

    Args:
        operands: those to quantise.
        blocks: some have a scale for a block of tokens, which is then their tile.
        transpose: the value is stored transposed.
    """
    q_heads, k_heads, v_heads = (
        1 if t is None else t.shape[1] for t in (operands.query, operands.key, operands.value)
    )
    if interpreted():
        return Cut(_divisor(q_heads, 2), _divisor(k_heads, 2), _divisor(v_heads, 2))
    q_together, k_together = (
        1 if rope is None or rope.per_head else _divisor(heads, 8 if blocks else 16)
        for rope, heads in ((operands.q_rope, q_heads), (operands.k_rope, k_heads))
    )
    x = operands.any
    # Tiles under way must fit into 99 KiB of shared memory, which is all that Ada has.
    row = padded_lanes(x.shape[3]) * x.element_size()
    if not blocks:
        tokens = 16 if transpose else 32
        stages = 4 if tokens * row <= 16384 else 2
        return Cut(q_together, k_together, 1, tokens, tokens, 64, 4, keep=True, stages=stages)
    alone = operands.key is None and operands.query is None
    fits = row <= 256
    return Cut(q_together, k_together, warps=8 if alone else 16, keep=fits, stages=3 if fits else 1)


def _divisor(heads: int, most: int) -> int:
    """The largest power of two up to ``most`` that divides ``heads``."""
    while heads % most:
        most //= 2
    return most
