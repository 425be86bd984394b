"""Launching the quantisation of query, key and value."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lp_inductor.kernels.triton.cuts import Cut, choose_cut, parts_of
from lp_inductor.kernels.triton.operands import Operands, Quantized, new_float32
from lp_inductor.kernels.triton.rope import rope_arguments
from lp_inductor.kernels.triton.samples import Samples, sample
from lp_inductor.kernels.triton.sizes import (
    cdiv,
    heads_first,
    interpreted,
    padded_lanes,
    padded_len,
    padded_row,
)
from lp_inductor.quantization import FP8, TOKEN_BLOCK

#: What is done with the tiles of an operand: see :mod:`quantize_kernel`.
ABSENT, BLOCK, ROW, GIVEN, GUESSED = range(5)
#: Programs among which the tiles of a head are divided that is rounded again.
_SPLITS = 8
#: Half the distance of bfloat16's numbers at 1. Those of other types lie so close together that
#: their rounding needs no dither.
_HALF_STEP = 2.0**-8


def quantize_fine(
    operands: Operands,
    *,
    qk_dtype: torch.dtype = FP8,
    center_key: bool = True,
    center_value: bool = False,
    exact_mean: bool = False,
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
        exact_mean: of all tokens where there are many: see :func:`sample`.
        static_descales: of query, key and value.
        cut: None: as measured best.
    """
    samples = sample(
        operands, center_key=center_key, center_value=center_value, exact_mean=exact_mean
    )
    given = static_descales is not None
    int8 = qk_dtype == torch.int8
    modes = (GIVEN, GIVEN, GIVEN) if given else (ROW, ROW if int8 else BLOCK, BLOCK)
    out = Quantized(v_mean=samples.v_mean)
    out.query, out.key, out.value = _storage(operands, qk_dtype, True)
    if not given:
        out.q_descale = new_float32(operands.query, lambda t: (*t.shape[:3], 1))
        out.k_descale = new_float32(
            operands.key,
            lambda t: (*t.shape[:3], 1) if int8 else _per_tile(t, TOKEN_BLOCK),
        )
        out.v_descale = new_float32(
            operands.value, functools.partial(_per_tile, tokens=TOKEN_BLOCK)
        )
    scales = static_descales or (1.0, 1.0, 1.0)
    for part in [operands] if cut is not None else parts_of(operands, BLOCK in modes):
        _launch(part, out, modes, samples, cut=cut, given=scales)
    return _as_operands(operands, out, True)


def quantize_per_head(
    operands: Operands,
    *,
    group_size: int = 1,
    query_rows: bool = False,
    qk_dtype: torch.dtype = FP8,
    center_key: bool = True,
    center_value: bool = True,
    exact_mean: bool = True,
    transpose_value: bool = True,
    cut: Cut | None = None,
) -> Quantized:
    """Quantise with one scale a key/value head, in one pass over memory.

    The scale is at most 8 times what the largest number of the head needs, of a value that a
    Hadamard matrix spreads 8 * value_head_dim ** 0.5 times.

    Args:
        operands: those to quantise.
        group_size: query heads that share a scale: those of one key/value head.
        query_rows: give the query a scale a row instead.
        qk_dtype: float8_e4m3fn; or int8 for query and key, which then have a scale a row.
        center_key: subtract the mean of a sample of tokens, which attention does not see.
        center_value: subtract the mean of a sample of tokens, which is returned.
        exact_mean: the mean of all tokens where there are many: see :func:`sample`.
        transpose_value: store the value as our own attention kernel reads it.
        cut: None: as measured best.

    Returns:
        scales (batch, kv_heads); those of rows (batch, heads, tokens, 1).
    """
    key_rows = qk_dtype == torch.int8
    query_rows = query_rows or key_rows
    present = [t is not None for t in (operands.query, operands.key, operands.value)]
    samples = sample(
        operands, center_key=center_key, center_value=center_value, exact_mean=exact_mean,
        guess=(present[0] and not query_rows, present[1] and not key_rows, present[2]),
        group=group_size,
    )  # fmt: skip
    out = Quantized(v_mean=samples.v_mean)
    out.query, out.key, out.value = _storage(operands, qk_dtype, transpose_value)
    out.q_descale = new_float32(
        operands.query,
        lambda t: (*t.shape[:3], 1) if query_rows else (t.shape[0], t.shape[1] // group_size),
    )
    out.k_descale = new_float32(
        operands.key, lambda t: (*t.shape[:3], 1) if key_rows else t.shape[:2]
    )
    out.v_descale = new_float32(operands.value, lambda t: t.shape[:2])
    more: dict[str, Any] = {"cut": cut, "group": group_size, "transpose": transpose_value}
    modes = (ROW if query_rows else GUESSED, ROW if key_rows else GUESSED, GUESSED)
    _launch(operands, out, modes, samples, **more)
    guessed = replace(operands, query=None, q_rope=None) if query_rows else operands
    if key_rows:
        guessed = replace(guessed, key=None, k_rope=None, hadamard_qk=False)
    if not guessed.empty:
        _launch(guessed, out, modes, samples, splits=_SPLITS, **more)
    return _as_operands(operands, out, transpose_value)


def _per_tile(x: Tensor, tokens: int) -> tuple[Any, ...]:
    """(batch, heads, tiles + 1): one number more, so that no guard asks whether it is one."""
    return *x.shape[:2], cdiv(x.shape[2], tokens) + 1


def used_blocks(descale: Tensor, x: Tensor) -> Tensor:
    """Scales of blocks, (batch, heads, blocks), without the one entry more that is not used."""
    return descale[:, :, : cdiv(x.shape[2], TOKEN_BLOCK)]


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
    samples: Samples,
    *,
    cut: Cut | None = None,
    given: tuple[float, float, float] = (1.0, 1.0, 1.0),
    group: int = 1,
    transpose: bool = True,
    splits: int = 0,
) -> None:
    """Start the kernel on the operands there are; pointers that are not used get any tensor.

    With ``splits`` it settles the scales that were guessed.
    """
    x = operands.any
    query, key, value = (
        x if t is None else t for t in (operands.query, operands.key, operands.value)
    )
    q_mode, k_mode, v_mode = (
        ABSENT if t is None else mode
        for t, mode in zip((operands.query, operands.key, operands.value), modes, strict=True)
    )
    cut = cut or choose_cut(operands, BLOCK in modes, transpose)
    programs = 0
    for mode, t, tile, together in (
        (q_mode, query, cut.q_tokens, cut.q_heads), (k_mode, key, cut.k_tokens, cut.k_heads),
        (v_mode, value, cut.v_tokens, cut.v_heads),
    ):  # fmt: skip
        if mode != ABSENT and splits:
            programs += t.shape[1] * splits
        elif mode != ABSENT:
            programs += cdiv(t.shape[2], tile) * (t.shape[1] // together)
    q_tables, q_strides, q_rope = rope_arguments(operands.q_rope, query)
    k_tables, k_strides, k_rope = rope_arguments(operands.k_rope, key)
    pointers = (
        operands.query, operands.key, operands.value, *q_tables, *k_tables,
        samples.k_mean, samples.v_mean, out.query, out.key, out.value,
        out.q_descale, out.k_descale, out.v_descale, *samples.seen, *samples.guesses,
    )  # fmt: skip
    v_guess = samples.guesses[2]
    v_guesses = 1 if v_guess is None else int(v_guess.shape[2])
    from lp_inductor.kernels.triton import launch

    launch.quantize_operands(
        (programs, x.shape[0]),
        *(x if t is None else t for t in pointers),
        *query.stride(), *key.stride(), *value.stride(), *q_strides, *k_strides,
        query.shape[1], key.shape[1], query.shape[2], key.shape[2],
        *(1.0 / descale for descale in given),
        D=key.shape[3], DV=value.shape[3],
        DP=padded_lanes(key.shape[3]), DVP=padded_lanes(value.shape[3]),
        ROW_BYTES=padded_row(key.shape[3]), V_ROW_BYTES=padded_row(value.shape[3]),
        Q_TILE=cut.q_tokens, K_TILE=cut.k_tokens, V_TILE=cut.v_tokens,
        Q_HEADS=cut.q_heads, K_HEADS=cut.k_heads, V_HEADS=cut.v_heads,
        Q_HEADS_FIRST=heads_first(query), K_HEADS_FIRST=heads_first(key),
        V_HEADS_FIRST=heads_first(value),
        **{f"Q_{name}": constant for name, constant in q_rope.items()},
        **{f"K_{name}": constant for name, constant in k_rope.items()},
        Q_TABLE_PER_HEAD=operands.q_rope is not None and operands.q_rope.per_head,
        K_TABLE_PER_HEAD=operands.k_rope is not None and operands.k_rope.per_head,
        Q_SCALE=q_mode, K_SCALE=k_mode, V_SCALE=v_mode,
        CENTER_K=samples.k_mean is not None, CENTER_V=samples.v_mean is not None,
        DITHER=_HALF_STEP if value.dtype == torch.bfloat16 else 0.0,
        HADAMARD_QK=operands.hadamard_qk, HADAMARD_V=operands.hadamard_v,
        INT8=torch.int8 in (t.dtype for t in (out.query, out.key) if t is not None),
        TRANSPOSE=transpose, GROUP=group, GROUP_PADDED=_power(group),
        V_GUESSES=v_guesses, V_GUESSES_PADDED=_power(v_guesses), KEEP=cut.keep,
        SPLITS=splits, NUM_STAGES=cut.stages, INTERPRET=interpreted(), num_warps=cut.warps,
    )  # fmt: skip


def _power(count: int) -> int:
    """The least power of two that is not smaller."""
    return 1 << (count - 1).bit_length()
