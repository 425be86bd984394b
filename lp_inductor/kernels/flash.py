"""What every flash-attention library has in common: layouts, windows, and the mean of the values.

The libraries take and return (batch, tokens, heads, head_dim), align masks at the last query and
the last key, and say what a query sees by two distances to the left and to the right of that
diagonal. :func:`window_of` brings any band of ours into that form, exactly.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.fx.experimental.symbolic_shapes import statically_known_true

from lp_inductor.kernels.base import Kernel, MaskPart, Visibility

#: Bytes that the tensor memory accelerator wants strides and addresses to be multiples of.
_ALIGNMENT = 16


@dataclass(frozen=True)
class Window:
    """A band as flash-attention libraries say it, over a part of the queries and of the keys.

    Query ``rows[0] + i`` of the n queries in ``rows`` sees key ``keys[0] + j`` of the m keys in
    ``keys`` where ``i + m - n - left <= j <= i + m - n + right``. All other queries see no key.

    Attributes:
        rows, keys: first and last plus one; every query in ``rows`` sees at least one key, and no
            query sees a key outside ``keys``.
        left, right: 0 or more tokens; None: no bound.
    """

    rows: tuple[int, int]
    keys: tuple[int, int]
    left: int | None
    right: int | None

    @property
    def is_empty(self) -> bool:
        """No query sees a key."""
        return self.rows[0] >= self.rows[1]

    @property
    def is_causal(self) -> bool:
        """The libraries' own causal mask, aligned at the last query and the last key."""
        return self.left is None and self.right == 0

    @property
    def is_local(self) -> bool:
        """It is neither the causal mask nor none at all: the library must know windows."""
        return not self.is_causal and (self.left is not None or self.right is not None)


def window_of(visible: Visibility, query_len: int, key_len: int) -> Window:
    """The band of ``visible`` (``lower <= j - i <= upper``) as a window.

    Cutting off the queries that see nothing and the keys that nobody sees leaves distances of 0
    or more, whatever the band: libraries read negative distances as no bound at all.

    Raises:
        ValueError: if chunks or a mask tensor hide keys too.
    """
    if visible.chunk is not None or visible.tensor is not None:
        raise ValueError("a window says nothing of chunks and mask tensors")
    lower = -query_len if visible.lower is None else max(int(visible.lower), -query_len)
    upper = key_len if visible.upper is None else min(int(visible.upper), key_len)
    first, last = max(0, -upper), min(query_len, key_len - lower)
    if lower > upper or first >= last:
        return Window((0, 0), (0, 0), None, None)
    keys = max(0, first + lower), min(key_len, last + upper)
    left, right = keys[1] - last - lower, upper + last - keys[1]
    # Of open sizes it may not be known; a bound that hides nothing is then left as it is.
    free_left = statically_known_true(left >= keys[1] - keys[0] - 1)
    free_right = statically_known_true(right >= last - first - 1)
    return Window(
        rows=(first, last),
        keys=keys,
        left=None if free_left else left,
        right=None if free_right else right,
    )


def is_traced() -> bool:
    """Whether tensors have no memory yet: code is being made for a package."""
    return get_proxy_mode() is not None


class FlashKernel(Kernel):
    """A kernel of a flash-attention library: FP8 operands, scales per head, bfloat16 results.

    Subclasses say how the library is called. Other output dtypes are converted to. The mean of
    the values is added here: in place where the result is bfloat16, with float32 arithmetic and
    one rounding.
    """

    masks = frozenset({MaskPart.CAUSAL})
    adds_mean = True

    @abc.abstractmethod
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        q_descale: Tensor,
        k_descale: Tensor,
        v_descale: Tensor,
        *,
        scale: float | None,
        window: Window,
    ) -> Tensor:
        """Call the library.

        Args:
            query: (batch, query_tokens, heads, head_dim), float8_e4m3fn; the queries of
                ``window.rows``. The last dimension is contiguous, other strides are multiples of
                16 bytes.
            key: (batch, key_tokens, kv_heads, head_dim) likewise; the keys of ``window.keys``.
            value: (batch, key_tokens, kv_heads, value_head_dim) likewise.
            q_descale, k_descale, v_descale: (batch, kv_heads), float32.
            scale: of the scores; None: head_dim ** -0.5.
            window: what the queries see.

        Returns:
            (batch, query_tokens, heads, value_head_dim), bfloat16, memory of its own.
        """

    def run(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        q_descale: Tensor,
        k_descale: Tensor,
        v_descale: Tensor,
        *,
        v_mean: Tensor | None,
        visible: Visibility,
        scale: float | None,
        out_dtype: torch.dtype,
    ) -> Tensor:
        """See :meth:`Kernel.run`; the result is stored (batch, tokens, heads, dim)."""
        batch, heads, query_len, _ = query.shape
        window = window_of(visible, query_len, key.shape[2])
        whole = (batch, query_len, heads, value.shape[3])
        if window.is_empty:
            return query.new_zeros(whole, dtype=out_dtype).transpose(1, 2)
        operands = (
            _operand(query, window.rows), _operand(key, window.keys), _operand(value, window.keys)
        )  # fmt: skip
        out = self.forward(*operands, q_descale, k_descale, v_descale, scale=scale, window=window)
        if v_mean is not None:
            out = add_mean(out, v_mean, out_dtype)
        elif out.dtype != out_dtype:
            out = out.to(out_dtype)
        if window.rows != (0, query_len):
            out, seen = out.new_zeros(whole), out
            out[:, slice(*window.rows)] = seen
        return out.transpose(1, 2)


def _operand(x: Tensor, tokens: tuple[int, int]) -> Tensor:
    """Tokens of (batch, heads, tokens, dim) as a library wants them: a view where possible."""
    if tokens != (0, x.shape[2]):
        x = x[:, :, slice(*tokens)]
    x = x.transpose(1, 2)
    *strides, last = x.stride()
    size = x.element_size()
    # Memory that is allocated for a tensor is aligned.
    start = x.storage_offset() * size if is_traced() else x.data_ptr()
    aligned = start % _ALIGNMENT == 0 and all(s * size % _ALIGNMENT == 0 for s in strides)
    return x if aligned and last == 1 else x.clone(memory_format=torch.contiguous_format)


def add_mean(out: Tensor, mean: Tensor, out_dtype: torch.dtype) -> Tensor:
    """Add (batch, kv_heads, 1, dim), float32, to (batch, tokens, heads, dim), bfloat16.

    Added in float32 and rounded once, in one pass; in place where the dtypes allow it.
    """
    from lp_inductor.kernels.triton.kernel import can_launch

    result = out if out.dtype == out_dtype else torch.empty_like(out, dtype=out_dtype)
    if can_launch(out.device) and all(t.is_contiguous() for t in (out, mean, result)):
        from lp_inductor.kernels.triton.mean import add_means

        add_means(out, mean, result)
        return result
    batch, kv_heads, _, dim = mean.shape
    mean = mean.reshape(batch, 1, kv_heads, 1, dim)
    torch.add(out.unflatten(2, (kv_heads, -1)), mean, out=result.unflatten(2, (kv_heads, -1)))
    return result
