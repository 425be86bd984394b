"""Which keys a query sees: a band of distances, a chunk of tokens, and a mask tensor, all at once.

Key j is visible to query i where every part that is given allows it::

    lower <= j - i <= upper          a causal mask has upper = 0, a window of w keys lower = 1 - w
    j // chunk == i // chunk         chunked attention
    tensor[b, h, i, j]               a bool mask, or a bias added to the score, -inf to hide

Tokens are counted from the first query and the first key: a causal mask is aligned top left. The
mask that flash-attention calls causal, aligned bottom right, has ``upper = key_len - query_len``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Visibility:
    """What an attention kernel is told about its mask; None is no condition.

    Attributes:
        lower, upper: bounds of j - i, in tokens, both included.
        chunk: tokens per chunk.
        tensor: (batch or 1, heads or 1, query_len or 1, key_len or 1); bool, True where visible,
            or floating point, added to the scaled scores.
    """

    lower: int | None = None
    upper: int | None = None
    chunk: int | None = None
    tensor: Tensor | None = None

    @property
    def is_banded(self) -> bool:
        """Whether positions alone hide some keys."""
        return any(bound is not None for bound in (self.lower, self.upper, self.chunk))

    @property
    def is_full(self) -> bool:
        """Every query sees every key."""
        return not self.is_banded and self.tensor is None

    @property
    def is_causal(self) -> bool:
        """Query i sees keys 0 to i, and nothing else hides a key."""
        only_upper = self.lower is None and self.chunk is None and self.tensor is None
        return only_upper and isinstance(self.upper, int) and self.upper == 0

    def band(self, query_len: int, key_len: int, device: torch.device) -> Tensor:
        """What positions allow: (query_len, key_len), bool."""
        i = torch.arange(query_len, device=device)[:, None]
        j = torch.arange(key_len, device=device)[None, :]
        visible = torch.ones((query_len, key_len), dtype=torch.bool, device=device)
        if self.upper is not None:
            visible = visible & (j - i <= self.upper)
        if self.lower is not None:
            visible = visible & (j - i >= self.lower)
        if self.chunk is not None:
            visible = visible & (j // self.chunk == i // self.chunk)
        return visible

    def dense(self, query_len: int, key_len: int, device: torch.device) -> Tensor | None:
        """The whole mask as one tensor that broadcasts to the scores; None where it is full.

        Returns:
            bool, True where visible, or float32, to be added to the scaled scores.
        """
        mask = self.tensor
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.float()
        if not self.is_banded:
            return mask
        band = self.band(query_len, key_len, device)
        if mask is None:
            return band
        return mask & band if mask.dtype == torch.bool else mask.masked_fill(~band, -torch.inf)


def visible_rows(mask: Tensor) -> Tensor:
    """Whether each query sees any key.

    Args:
        mask: as :meth:`Visibility.dense` returns it, (..., query_len or 1, key_len or 1).

    Returns:
        (..., query_len or 1, 1), bool. Attention returns zeros for the rows that see none.
    """
    visible = mask if mask.dtype == torch.bool else mask > -torch.inf
    return visible.any(dim=-1, keepdim=True)
