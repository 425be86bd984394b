"""A rotary embedding as the Triton kernels are told about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lp_inductor.kernels.triton.sizes import known


@dataclass(frozen=True)
class Rope:
    """A rotary embedding: tables and lanes, as in :func:`lp_inductor.reference.rotate`.

    Attributes:
        cos, sin: (batch or 1, tokens, width or width / 2), or with heads (or 1) behind the batch.
        interleaved: pairs are neighbouring lanes; otherwise half the width apart.
        start, width: the lanes that are rotated.
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool
    start: int
    width: int

    @property
    def per_head(self) -> bool:
        """Whether heads are rotated differently."""
        return any(t.dim() == 4 and not known(t.shape[1] == 1) for t in (self.cos, self.sin))

    def strides(self, table: Tensor) -> tuple[Any, Any, Any, Any]:
        """Strides over batch, heads, tokens and lanes; 0 where the table does not vary."""
        table = table.unsqueeze(1) if table.dim() == 3 else table
        batch, heads = (0 if known(table.shape[d] == 1) else table.stride(d) for d in (0, 1))
        return batch, heads, table.stride(2), table.stride(3)

    def lanes(self, head_dim: int) -> int:
        """The constexpr ROPE: which of :mod:`head_tiles`' ways the lanes are loaded in."""
        if self.interleaved:
            return 2 if self.start % 2 == 0 else 4
        whole = self.start == 0 and self.width == head_dim == 1 << (head_dim - 1).bit_length()
        return 1 if whole and head_dim >= 16 else 3


def rope_arguments(
    rope: Rope | None, x: Tensor
) -> tuple[tuple[Tensor | None, Tensor | None], tuple[Any, ...], dict[str, Any]]:
    """Tables, their strides, and the constants of a kernel that rotates ``x``."""
    if rope is None:
        return (None, None), (0,) * 8, {"ROPE": 0, "START": 0, "WIDTH": 2, "TABLE": 2}
    constants = {
        "ROPE": rope.lanes(x.shape[-1]),
        "START": rope.start, "WIDTH": rope.width, "TABLE": rope.cos.shape[-1],
    }  # fmt: skip
    return (rope.cos, rope.sin), (*rope.strides(rope.cos), *rope.strides(rope.sin)), constants
