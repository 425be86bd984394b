"""Launching the quantisation of query, key and value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
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
ABSENT, BLOCK, ROW, GIVEN, GUESSED = range(5)
#: Tokens that the mean of a key is estimated from, by which attention does not change, and the
#: scales of queries and keys.
SAMPLES = 64
#: Lanes of a value that one program looks at, and tokens at a time, which are the fewest.
_V_LANES, _V_TOKENS = 16, 128
#: Programs among which the tiles of a head are divided that is rounded again.
_SPLITS = 8


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


@dataclass
class Samples:
    """What a look at some tokens says.

    Attributes:
        k_mean, v_mean: (batch, kv_heads, 1, dim), float32; None for what is not centred.
        guesses: largest absolute numbers beside the mean, float32, of query and key (batch, heads),
            of the value (batch, kv_heads, parts) of its lanes; None where not asked for.
    """

    k_mean: Tensor | None = None
    v_mean: Tensor | None = None
    guesses: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)


def sample(
    operands: Operands,
    *,
    center_key: bool,
    center_value: bool,
    exact_mean: bool = False,
    guess: Sequence[bool] = (False, False, False),
) -> Samples:
    """Means and largest numbers over evenly spread tokens of the operands that are rounded.

    Args:
        operands: those to look at.
        center_key: by the mean of at most 64 tokens.
        center_value: by that of one token in 32, but 128 at least.
        exact_mean: by that of all from 32768 tokens on, and of ever fewer below. For kernels that
            add the products of all tokens in the matrix unit: a sum of one sign loses 1 % there at
            16384 tokens, and 2 % at 131072.
        guess: whether the largest numbers of query, key and value are asked for.
    """
    has_q, has_k, has_v = guess[0], guess[1] or center_key, guess[2] or center_value
    if not (has_q or has_k or has_v):
        return Samples()
    x = operands.any
    query, key, value = (
        x if t is None else t for t in (operands.query, operands.key, operands.value)
    )
    dim, dim_v = key.shape[3], value.shape[3]
    found = Samples(
        _empty(key, lambda t: (*t.shape[:2], 1, dim)) if center_key else None,
        _empty(value, lambda t: (*t.shape[:2], 1, dim_v)) if center_value else None,
        (
            _empty(query, lambda t: t.shape[:2]) if guess[0] else None,
            _empty(key, lambda t: t.shape[:2]) if guess[1] else None,
            _empty(value, lambda t: (*t.shape[:2], cdiv(dim_v, _V_LANES))) if guess[2] else None,
        ),
    )
    written = (found.k_mean, found.v_mean, *found.guesses)
    q_tables, q_strides, q_rope = rope_arguments(operands.q_rope, query)
    k_tables, k_strides, k_rope = rope_arguments(operands.k_rope, key)
    from lp_inductor.kernels.triton import launch

    programs = query.shape[1] * has_q
    programs += key.shape[1] * has_k + value.shape[1] * cdiv(dim_v, _V_LANES) * has_v
    launch.sample_operands(
        (programs, x.shape[0]),
        query, key, value, *q_tables, *k_tables, *(x if t is None else t for t in written),
        *query.stride(), *key.stride(), *value.stride(), *q_strides, *k_strides,
        query.shape[1], key.shape[1], query.shape[2], key.shape[2],
        D=dim, DV=dim_v, DP=padded_lanes(dim), TILE=SAMPLES,
        LANES=_V_LANES, V_TILE=_V_TOKENS if interpreted() else 512,
        V_LEAST=_V_TOKENS, V_EXACT=exact_mean,
        **{f"Q_{name}": constant for name, constant in q_rope.items()},
        **{f"K_{name}": constant for name, constant in k_rope.items()},
        HAS_Q=has_q, HAS_K=has_k, HAS_V=has_v, CENTER_K=center_key, CENTER_V=center_value,
        GUESS_K=guess[1], GUESS_V=guess[2],
        HADAMARD_QK=operands.hadamard_qk, INTERPRET=interpreted(), num_warps=8,
    )  # fmt: skip
    if found.v_mean is not None and operands.hadamard_v:
        launch.transform_means((x.shape[0] * value.shape[1],), found.v_mean, D=dim_v, num_warps=8)
    return found


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
        out.q_descale = _empty(operands.query, lambda t: (*t.shape[:3], 1))
        out.k_descale = _empty(
            operands.key,
            lambda t: (*t.shape[:3], 1) if int8 else (*t.shape[:2], _entries(t)),
        )
        out.v_descale = _empty(operands.value, lambda t: (*t.shape[:2], _entries(t)))
    scales = static_descales or (1.0, 1.0, 1.0)
    for part in [operands] if cut is not None else parts_of(operands):
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
        center_value: subtract the mean of a sample of tokens, which is returned, with what rounding
            took from all of them on average (but where a guessed scale was too small).
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
    )  # fmt: skip
    out = Quantized(v_mean=samples.v_mean)
    out.query, out.key, out.value = _storage(operands, qk_dtype, transpose_value)
    out.q_descale = _empty(
        operands.query,
        lambda t: (*t.shape[:3], 1) if query_rows else (t.shape[0], t.shape[1] // group_size),
    )
    out.k_descale = _empty(operands.key, lambda t: (*t.shape[:3], 1) if key_rows else t.shape[:2])
    out.v_descale = _empty(operands.value, lambda t: t.shape[:2])
    whole = cut or choose_cut(operands, False)
    partials = [
        _empty(t, lambda t, tile=tile: (*t.shape[:2], _entries(t, tile)))
        for t, tile in (
            (None if query_rows else operands.query, whole.q_tokens),
            (None if key_rows else operands.key, whole.k_tokens),
            (operands.value, whole.v_tokens),
        )
    ]
    lost = None
    if samples.v_mean is not None:
        lost = _empty(
            operands.value,
            lambda t: (*t.shape[:2], _entries(t, whole.v_tokens), padded_lanes(t.shape[3])),
        )
    more: dict[str, Any] = {
        "partials": partials, "lost": lost, "group": group_size, "transpose": transpose_value
    }  # fmt: skip
    modes = (ROW if query_rows else GUESSED, ROW if key_rows else GUESSED, GUESSED)
    for part in [operands] if cut is not None else parts_of(operands, transpose_value):
        _launch(part, out, modes, samples, cut=cut, **more)
    guessed = replace(operands, query=None, q_rope=None) if query_rows else operands
    if key_rows:
        guessed = replace(guessed, key=None, k_rope=None, hadamard_qk=False)
    if guessed.key is not None or guessed.value is not None or guessed.query is not None:
        _launch(guessed, out, modes, samples, splits=_SPLITS, cut=cut, **more)
    return _as_operands(operands, out, transpose_value)


def _entries(x: Tensor, tokens: int = TOKEN_BLOCK) -> Any:
    """Numbers kept for the blocks of a head: one more, so that no guard asks whether it is one."""
    return cdiv(x.shape[2], tokens) + 1


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
    samples: Samples,
    *,
    cut: Cut | None = None,
    lost: Tensor | None = None,
    given: tuple[float, float, float] = (1.0, 1.0, 1.0),
    partials: Sequence[Tensor | None] = (None, None, None),
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
    cut = cut or choose_cut(operands, BLOCK in modes)
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
        samples.k_mean, samples.v_mean, out.query, out.key, out.value,
        out.q_descale, out.k_descale, out.v_descale, *partials, *samples.guesses, lost,
    )  # fmt: skip
    v_guesses = cdiv(value.shape[3], _V_LANES)
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
        HADAMARD_QK=operands.hadamard_qk, HADAMARD_V=operands.hadamard_v,
        INT8=torch.int8 in (t.dtype for t in (out.query, out.key) if t is not None),
        TRANSPOSE=transpose, LOST=lost is not None, GROUP=group, GROUP_PADDED=_power(group),
        V_GUESSES=v_guesses, V_GUESSES_PADDED=_power(v_guesses), KEEP=cut.keep,
        SPLITS=splits, NUM_STAGES=cut.stages, INTERPRET=interpreted(), num_warps=cut.warps,
    )  # fmt: skip


def _power(count: int) -> int:
    """The least power of two that is not smaller."""
    return 1 << (count - 1).bit_length()
