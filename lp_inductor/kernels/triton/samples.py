"""Launching the look at a sample of tokens that comes before quantisation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lp_inductor.kernels.triton.operands import Operands, new_float32
from lp_inductor.kernels.triton.rope import rope_arguments
from lp_inductor.kernels.triton.sizes import cdiv, interpreted, padded_lanes

#: Tokens that the mean of a key is estimated from, by which attention does not change, and the
#: scales of queries and keys.
SAMPLES = 64
#: Lanes of a value that one program looks at, and tokens at a time, which are the fewest.
_V_LANES, _V_TOKENS = 32, 128


@dataclass
class Samples:
    """What a look at some tokens says.

    Attributes:
        k_mean, v_mean: (batch, kv_heads, 1, dim), float32; None for what is not centred.
        guesses: largest absolute numbers beside the mean, float32, of query and key (batch, heads),
            of the value (batch, kv_heads, parts) of its lanes; None where not asked for.
        seen: where the bits of the largest absolute number of all tokens are to be collected,
            int32, zeros so far: of the query (batch, heads / group), of key and value (batch,
            kv_heads); None without a guess.
    """

    k_mean: Tensor | None = None
    v_mean: Tensor | None = None
    guesses: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
    seen: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)


def sample(
    operands: Operands,
    *,
    center_key: bool,
    center_value: bool,
    exact_mean: bool = False,
    guess: Sequence[bool] = (False, False, False),
    group: int = 1,
) -> Samples:
    """Means and largest numbers over evenly spread tokens of the operands that are rounded.

    Args:
        operands: those to look at.
        center_key: by the mean of at most 64 tokens.
        center_value: by that of one token in 32, but 128 at least.
        exact_mean: by that of all from 32768 tokens on, and of ever fewer below. For kernels that
            add the products of all tokens in the matrix unit, where a sum of one sign loses bits.
        guess: whether the largest numbers of query, key and value are asked for.
        group: query heads that share a scale.
    """
    center_key = center_key and operands.key is not None
    center_value = center_value and operands.value is not None
    has_q, has_k, has_v = guess[0], guess[1] or center_key, guess[2] or center_value
    if not (has_q or has_k or has_v):
        return Samples()
    x = operands.any
    query, key, value = (
        x if t is None else t for t in (operands.query, operands.key, operands.value)
    )
    dim, dim_v = key.shape[3], value.shape[3]
    found = Samples(
        new_float32(key, lambda t: (*t.shape[:2], 1, dim)) if center_key else None,
        new_float32(value, lambda t: (*t.shape[:2], 1, dim_v)) if center_value else None,
        (
            new_float32(query, lambda t: t.shape[:2]) if guess[0] else None,
            new_float32(key, lambda t: t.shape[:2]) if guess[1] else None,
            new_float32(value, lambda t: (*t.shape[:2], cdiv(dim_v, _V_LANES)))
            if guess[2]
            else None,
        ),
        (
            _new_seen(query, group) if guess[0] else None,
            _new_seen(key) if guess[1] else None,
            _new_seen(value) if guess[2] else None,
        ),
    )
    q_tables, q_strides, q_rope = rope_arguments(operands.q_rope, query)
    k_tables, k_strides, k_rope = rope_arguments(operands.k_rope, key)
    pointers = (
        query if has_q else None, key if has_k else None, value if has_v else None,
        *q_tables, *k_tables, found.k_mean, found.v_mean, *found.guesses, *found.seen,
    )  # fmt: skip
    from lp_inductor.kernels.triton import launch

    programs = query.shape[1] * has_q
    programs += key.shape[1] * has_k + value.shape[1] * cdiv(dim_v, _V_LANES) * has_v
    launch.sample_operands(
        (programs, x.shape[0]),
        *(x if t is None else t for t in pointers),
        *query.stride(), *key.stride(), *value.stride(), *q_strides, *k_strides,
        query.shape[1], key.shape[1], query.shape[2], key.shape[2],
        D=dim, DV=dim_v, DP=padded_lanes(dim), TILE=SAMPLES,
        LANES=_V_LANES, V_TILE=_V_TOKENS, V_LEAST=_V_TOKENS, V_EXACT=exact_mean,
        **{f"Q_{name}": constant for name, constant in q_rope.items()},
        **{f"K_{name}": constant for name, constant in k_rope.items()},
        HAS_Q=has_q, HAS_K=has_k, HAS_V=has_v, CENTER_K=center_key, CENTER_V=center_value,
        GUESS_K=guess[1], GUESS_V=guess[2], GROUP=group,
        HADAMARD_QK=operands.hadamard_qk, INTERPRET=interpreted(), num_warps=4,
    )  # fmt: skip
    if found.v_mean is not None and operands.hadamard_v:
        launch.transform_means((x.shape[0] * value.shape[1],), found.v_mean, D=dim_v, num_warps=8)
    return found


def _new_seen(x: Tensor, group: int = 1) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1] // group), dtype=torch.int32)
