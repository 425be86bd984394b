"""Launching the quantisation of query, key and value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lp_inductor.kernels.triton.cuts import Cut, choose_cut, parts_of
from lp_inductor.kernels.triton.rope import Rope, rope_arguments
from lp_inductor.kernels.triton.sizes import (
    cdiv,
    heads_first,
    interpreted,
    padded_lanes,
    padded_len,
    padded_row,
)
from lp_inductor.quantization import FP8, HADAMARD_DIMS, TOKEN_BLOCK

#: What is done with the tiles of an operand: see :mod:`quantize_kernel`.
ABSENT, AMAX, BLOCK, ROW, GIVEN, HEAD = range(6)
#: Tokens that the mean of a key is estimated from; attention does not see by how much it is wrong.
SAMPLES = 128
#: Tokens that the mean of a value is estimated from. What it leaves is multiplied by what rounding
#: adds to the sum of the probabilities: with 128 samples a loss of 1.3 dB at 131072 tokens.
VALUE_SAMPLES = 1024
#: More than there are.
ALL_TOKENS = 2**30
#: Lanes of a value that one program takes the mean of.
_MEAN_LANES = 16


@dataclass(frozen=True)
class Operands:
    """What an attention call starts from; a missing operand is not quantised.

    Attributes:
        query: (batch, heads, query_tokens, head_dim), float32, bfloat16 or float16, any strides.
        key: (batch, kv_heads, key_tokens, head_dim), likewise.
        value: (batch, kv_heads, key_tokens, value_head_dim), likewise.
        q_rope, k_rope: rotations before quantisation; None: none.
        hadamard_qk, hadamard_v: multiply every row by a Hadamard matrix over dim ** 0.5; the dim is
            a power of two from 16 to 256. The result of attention is then transformed as the value.
    """

    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    q_rope: Rope | None = None
    k_rope: Rope | None = None
    hadamard_qk: bool = False
    hadamard_v: bool = False

    def __post_init__(self) -> None:
        """Raise ValueError for a transform of a size that has none."""
        for tensor, spread in (
            (self.query, self.hadamard_qk), (self.key, self.hadamard_qk),
            (self.value, self.hadamard_v),
        ):  # fmt: skip
            dim = 16 if tensor is None else tensor.shape[-1]
            if spread and dim not in HADAMARD_DIMS:
                raise ValueError(f"head_dim {dim} is not a power of two from 16 to 256")

    @property
    def any(self) -> Tensor:
        """One of the operands, for a device and a batch."""
        x = next((t for t in (self.key, self.value, self.query) if t is not None), None)
        assert x is not None
        return x


@dataclass
class Quantized:
    """Quantised operands. Scales say by their shape what one covers: see ``attention_triton``.

    Attributes:
        query, key: (batch, heads, tokens, head_dim), float8_e4m3fn or int8, stored in the order
            (batch, tokens, heads, head_dim).
        value: (batch, kv_heads, tokens, value_head_dim), stored likewise; or transposed, (batch,
            kv_heads, value_head_dim, tokens padded with zeros to a multiple of 16), contiguous.
        q_descale, k_descale, v_descale: those of blocks have one entry more than there are blocks.
        v_mean: what was subtracted from the value, (batch, kv_heads, 1, value_head_dim), float32.
    """

    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    q_descale: Tensor | None = None
    k_descale: Tensor | None = None
    v_descale: Tensor | None = None
    v_mean: Tensor | None = None


def sample_means(
    operands: Operands, center_key: bool, center_value: bool, value_samples: int = VALUE_SAMPLES
) -> tuple[Tensor | None, Tensor | None]:
    """Means over evenly spread tokens of the key and the value that are rounded.

    Args:
        operands: those to centre.
        center_key: by at most 128 tokens.
        center_value: by at most ``value_samples`` tokens.

    Returns:
        (batch, kv_heads, 1, dim), float32, each; None for what is not centred.
    """
    if not (center_key or center_value):
        return None, None
    x = operands.any
    key = x if operands.key is None else operands.key
    value = x if operands.value is None else operands.value
    batch, heads, tokens, _ = x.shape
    k_mean, v_mean = (
        t.new_empty((batch, heads, 1, t.shape[3]), dtype=torch.float32) if center else None
        for t, center in ((key, center_key), (value, center_value))
    )
    tables, table_strides, rope = rope_arguments(operands.k_rope, key)
    from lp_inductor.kernels.triton import launch

    dim, dim_v = key.shape[3], value.shape[3]
    launch.sample_means(
        (heads * (center_key + center_value * cdiv(dim_v, _MEAN_LANES)), batch),
        key, value, *tables, key if k_mean is None else k_mean, key if v_mean is None else v_mean,
        *key.stride(), *value.stride(), *table_strides, heads, tokens, value_samples,
        D=dim, DV=dim_v, DP=padded_lanes(dim), TILE=SAMPLES,
        LANES=_MEAN_LANES, V_TILE=256 if interpreted() else 1024,
        **rope, CENTER_K=center_key, CENTER_V=center_value,
        HADAMARD_QK=operands.hadamard_qk, INTERPRET=interpreted(), num_warps=8,
    )  # fmt: skip
    if v_mean is not None and operands.hadamard_v:
        launch.transform_means((batch * heads,), v_mean, D=dim_v, num_warps=8)
    return k_mean, v_mean


def quantize_fine(
    operands: Operands,
    *,
    qk_dtype: torch.dtype = FP8,
    center_key: bool = True,
    center_value: bool = False,
    value_samples: int = VALUE_SAMPLES,
    static_descales: tuple[float, float, float] | None = None,
    cut: Cut | None = None,
) -> Quantized:
    """Quantise in one pass over memory.

    A query has a scale a row; a key one for 128 tokens, with int8 one a row; a value one for 128
    tokens. With ``static_descales`` there are three scales in all, none is returned, and numbers
    beyond the range are clamped.

    Args:
        operands: those to quantise.
        qk_dtype: float8_e4m3fn, or int8 for query and key.
        center_key: subtract the mean of a sample of tokens, which attention does not see.
        center_value: subtract the mean of a sample of tokens, which is returned.
        value_samples: how many tokens.
        static_descales: of query, key and value.
        cut: None: as measured best.
    """
    k_mean, v_mean = sample_means(operands, center_key, center_value, value_samples)
    given = static_descales is not None
    int8 = qk_dtype == torch.int8
    modes = (GIVEN, GIVEN, GIVEN) if given else (ROW, ROW if int8 else BLOCK, BLOCK)
    out = Quantized(v_mean=v_mean)
    out.query, out.key, out.value = _storage(operands, qk_dtype, True)
    if not given:
        out.q_descale = _empty(operands.query, lambda t: (*t.shape[:3], 1))
        out.k_descale = _empty(
            operands.key,
            lambda t: (*t.shape[:3], 1) if int8 else (*t.shape[:2], _entries(t)),
        )
        out.v_descale = _empty(operands.value, lambda t: (*t.shape[:2], _entries(t)))
    scales = static_descales or (1.0, 1.0, 1.0)
    for part in [operands] if cut is not None else parts_of(operands):
        _launch(part, out, modes, k_mean, v_mean, cut=cut, given=scales)
    return _as_operands(operands, out, True)


def quantize_per_head(
    operands: Operands,
    *,
    group_size: int = 1,
    center_key: bool = True,
    center_value: bool = True,
    transpose_value: bool = True,
    cut: Cut | None = None,
) -> Quantized:
    """Quantise with one scale a key/value head, in two passes over memory.

    Args:
        operands: those to quantise.
        group_size: query heads that share a scale: those of one key/value head.
        center_key: subtract the mean of a sample of tokens, which attention does not see.
        center_value: subtract the mean over all tokens, which is returned, with what rounding moved
            it by.
        transpose_value: store the value as our own attention kernel reads it.
        cut: None: as measured best.

    Returns:
        all scales (batch, kv_heads).
    """
    k_mean, v_mean = sample_means(operands, center_key, center_value)
    out = Quantized(v_mean=v_mean)
    out.query, out.key, out.value = _storage(operands, FP8, transpose_value)
    out.q_descale = _empty(operands.query, lambda t: (t.shape[0], t.shape[1] // group_size))
    out.k_descale = _empty(operands.key, lambda t: t.shape[:2])
    out.v_descale = _empty(operands.value, lambda t: t.shape[:2])
    given = (operands.query, operands.key, operands.value)
    partials = [_empty(t, lambda t: (*t.shape[:2], _entries(t))) for t in given]
    lost = None
    if v_mean is not None:
        lost = _empty(
            operands.value,
            lambda t: (*t.shape[:2], _entries(t), padded_lanes(t.shape[3])),
        )
    more: dict[str, Any] = {"partials": partials, "group": group_size, "transpose": transpose_value}
    _launch(operands, out, (AMAX,) * 3, k_mean, v_mean, cut=cut, lost=lost, **more)
    _finish_statistics(operands, out, partials, lost, group_size)
    _launch(operands, out, (HEAD,) * 3, k_mean, v_mean, cut=cut, backwards=True, **more)
    if v_mean is not None:
        assert operands.value is not None and out.value is not None and out.v_descale is not None
        _finish_means(operands.value, out.value, out.v_descale, v_mean, transpose_value)
    return _as_operands(operands, out, transpose_value)


def _finish_statistics(
    operands: Operands,
    out: Quantized,
    partials: Sequence[Tensor | None],
    lost: Tensor | None,
    group: int,
) -> None:
    """Scales from the largest numbers of blocks, and the mean of the value."""
    from lp_inductor.kernels.triton import launch

    x = operands.any
    present = [t is not None for t in (operands.query, operands.key, operands.value)]
    batch, kv_heads, tokens, _ = x.shape
    dim = x.shape[3] if operands.value is None else operands.value.shape[3]
    query = operands.query
    q_rows = 0 if query is None else batch * (query.shape[1] // group)
    q_blocks = 0 if query is None else cdiv(query.shape[2], TOKEN_BLOCK)
    pointers = (*partials, out.q_descale, out.k_descale, out.v_descale, lost, out.v_mean)
    launch.finish_statistics(
        (q_rows + batch * kv_heads * (present[1] + present[2]),),
        *(x if t is None else t for t in pointers),
        q_rows, batch * kv_heads, q_blocks, cdiv(tokens, TOKEN_BLOCK), tokens,
        DV=dim, DVP=padded_lanes(dim), GROUP=group, CHUNK=max(8, 4096 // padded_lanes(dim)),
        HAS_Q=present[0], HAS_K=present[1], HAS_V=present[2], LOST=lost is not None, num_warps=8,
    )  # fmt: skip


def _finish_means(
    value: Tensor, rounded: Tensor, descale: Tensor, mean: Tensor, transposed: bool
) -> None:
    """Make up in the mean for what rounding moved."""
    from lp_inductor.kernels.triton import launch

    batch, heads, tokens, dim = value.shape
    over_batch, first, second, _ = rounded.stride()
    # (batch, heads, dim, tokens) or (batch, tokens, heads, dim)
    strides = (first, 1, second) if transposed else (second, first, 1)
    lanes = 16
    launch.finish_means(
        ((dim + lanes - 1) // lanes, heads, batch),
        rounded, descale, mean, over_batch, *strides, heads, tokens,
        D=dim, LANES=lanes, TILE=512, TRANSPOSED=transposed, num_warps=4,
    )  # fmt: skip


def _entries(x: Tensor) -> Any:
    """Numbers kept for the blocks of a head: one more, so that no guard asks whether it is one."""
    return cdiv(x.shape[2], TOKEN_BLOCK) + 1


def used_blocks(descale: Tensor, x: Tensor) -> Tensor:
    """Scales of blocks, (batch, heads, blocks), without the one entry more that is not used."""
    return descale[:, :, : cdiv(x.shape[2], TOKEN_BLOCK)]


def _empty(x: Tensor | None, shape: Any) -> Tensor | None:
    return None if x is None else x.new_empty(shape(x), dtype=torch.float32)


def _storage(
    operands: Operands, qk_dtype: torch.dtype, transpose_value: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What the kernel writes to, contiguous."""
    query, key = (
        None
        if t is None
        else t.new_empty(
            (t.shape[0], t.shape[2], t.shape[1], padded_row(t.shape[3])), dtype=qk_dtype
        )
        for t in (operands.query, operands.key)
    )
    value = operands.value
    if value is not None:
        batch, heads, tokens, dim = value.shape
        shape = (batch, heads, dim, padded_len(tokens))
        if not transpose_value:
            shape = (batch, tokens, heads, padded_row(dim))
        value = value.new_empty(shape, dtype=FP8)
    return query, key, value


def _as_operands(operands: Operands, out: Quantized, transposed: bool) -> Quantized:
    """Views in the order (batch, heads, tokens, head_dim) of what was written."""
    out.query = _rows(out.query, operands.query)
    out.key = _rows(out.key, operands.key)
    if not transposed:
        out.value = _rows(out.value, operands.value)
    return out


def _rows(stored: Tensor | None, x: Tensor | None) -> Tensor | None:
    if stored is None or x is None:
        return None
    dim = x.shape[3]
    return (stored if stored.shape[3] == dim else stored[..., :dim]).transpose(1, 2)


def _launch(
    operands: Operands,
    out: Quantized,
    modes: tuple[int, int, int],
    k_mean: Tensor | None,
    v_mean: Tensor | None,
    *,
    cut: Cut | None = None,
    given: tuple[float, float, float] = (1.0, 1.0, 1.0),
    partials: Sequence[Tensor | None] = (None, None, None),
    lost: Tensor | None = None,
    group: int = 1,
    transpose: bool = True,
    backwards: bool = False,
) -> None:
    """Start the kernel on the operands there are; pointers that are not used get any tensor."""
    x = operands.any
    query, key, value = (
        x if t is None else t for t in (operands.query, operands.key, operands.value)
    )
    q_mode, k_mode, v_mode = (
        ABSENT if t is None else mode
        for t, mode in zip((operands.query, operands.key, operands.value), modes, strict=True)
    )
    cut = cut or choose_cut(operands, AMAX in modes or HEAD in modes)
    q_tokens = cut.q_tokens if q_mode in (ROW, GIVEN) else TOKEN_BLOCK
    programs = 0
    for mode, t, tile, together in (
        (q_mode, query, q_tokens, cut.q_heads), (k_mode, key, TOKEN_BLOCK, cut.k_heads),
        (v_mode, value, TOKEN_BLOCK, cut.v_heads),
    ):  # fmt: skip
        if mode != ABSENT:
            programs += cdiv(t.shape[2], tile) * (t.shape[1] // together)
    q_tables, q_strides, q_rope = rope_arguments(operands.q_rope, query)
    k_tables, k_strides, k_rope = rope_arguments(operands.k_rope, key)
    pointers = (
        k_mean, v_mean, out.query, out.key, out.value,
        out.q_descale, out.k_descale, out.v_descale, *partials, lost,
    )  # fmt: skip
    from lp_inductor.kernels.triton import launch

    launch.quantize_operands(
        (programs, x.shape[0]),
        query, key, value, *q_tables, *k_tables, *(x if t is None else t for t in pointers),
        *query.stride(), *key.stride(), *value.stride(), *q_strides, *k_strides,
        query.shape[1], key.shape[1], query.shape[2], key.shape[2],
        *(1.0 / descale for descale in given),
        D=key.shape[3], DV=value.shape[3],
        DP=padded_lanes(key.shape[3]), DVP=padded_lanes(value.shape[3]),
        ROW_BYTES=padded_row(key.shape[3]), V_ROW_BYTES=padded_row(value.shape[3]),
        Q_TILE=q_tokens, TILE=TOKEN_BLOCK,
        Q_HEADS=cut.q_heads, K_HEADS=cut.k_heads, V_HEADS=cut.v_heads,
        Q_HEADS_FIRST=heads_first(query), K_HEADS_FIRST=heads_first(key),
        V_HEADS_FIRST=heads_first(value),
        **{f"Q_{name}": constant for name, constant in q_rope.items()},
        **{f"K_{name}": constant for name, constant in k_rope.items()},
        Q_TABLE_PER_HEAD=operands.q_rope is not None and operands.q_rope.per_head,
        K_TABLE_PER_HEAD=operands.k_rope is not None and operands.k_rope.per_head,
        Q_SCALE=q_mode, K_SCALE=k_mode, V_SCALE=v_mode,
        CENTER_K=k_mean is not None, CENTER_V=v_mean is not None,
        HADAMARD_QK=operands.hadamard_qk, HADAMARD_V=operands.hadamard_v,
        INT8=torch.int8 in (t.dtype for t in (out.query, out.key) if t is not None),
        TRANSPOSE=transpose, LOST=lost is not None, GROUP=group, KEEP=cut.keep,
        NUM_STAGES=cut.stages,
        BACKWARDS=backwards, INTERPRET=interpreted(), num_warps=cut.warps,
    )  # fmt: skip
