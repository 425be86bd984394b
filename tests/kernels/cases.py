"""One matrix of attention calls and rotations for the interpreter and for the GPU."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lp_inductor import reference
from lp_inductor.visibility import Visibility

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"

#: Rounding the probabilities to FP8, which the reference does not do, costs this much at least.
MIN_DB = 40.0


@dataclass(frozen=True)
class Case:
    """An attention call; ``mask`` makes its mask from the shapes and the device."""

    name: str
    query_len: int
    key_len: int
    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 64
    value_head_dim: int = 64
    lower: int | None = None
    upper: int | None = None
    chunk: int | None = None
    mask: Callable[[Case, torch.device], Tensor] | None = None
    scale: float | None = None
    centered: bool = True
    dtype: torch.dtype = torch.float32

    def visible(self, device: torch.device) -> Visibility:
        """The whole mask of the call."""
        tensor = None if self.mask is None else self.mask(self, device)
        return Visibility(self.lower, self.upper, self.chunk, tensor)


@dataclass(frozen=True)
class Operands:
    """Quantised operands of a call, as the reference quantises them."""

    query: Tensor
    key: Tensor
    value: Tensor
    q_descale: Tensor
    k_descale: Tensor
    v_descale: Tensor
    v_mean: Tensor | None


def operands(case: Case, device: torch.device) -> Operands:
    """Random operands; keys and values have a mean per channel."""
    b, h, g = case.batch, case.heads, case.kv_heads
    query = torch.randn(b, h, case.query_len, case.head_dim, device=device)
    key = torch.randn(b, g, case.key_len, case.head_dim, device=device)
    value = torch.randn(b, g, case.key_len, case.value_head_dim, device=device) + 1
    q, q_descale = reference.quantize(query, None, None, False, 0, 0, h // g, False)
    k, k_descale = reference.quantize(key, None, None, False, 0, 0, 1, True)
    if case.centered:
        v, v_descale, v_mean = reference.quantize_centered(value)
        return Operands(q, k, v, q_descale, k_descale, v_descale, v_mean)
    v, v_descale = reference.quantize(value, None, None, False, 0, 0, 1, False)
    return Operands(q, k, v, q_descale, k_descale, v_descale, None)


def expected(case: Case, o: Operands, visible: Visibility) -> Tensor:
    """What the specification says, in float32."""
    return reference.sdpa_quantized(
        o.query, o.key, o.value, o.q_descale, o.k_descale, o.v_descale, o.v_mean, visible.tensor,
        visible.lower, visible.upper, visible.chunk, case.scale, torch.float32,
    )  # fmt: skip


def key_padding(case: Case, device: torch.device) -> Tensor:
    """(batch, 1, 1, key_len): each sequence has its own length, the last none at all."""
    lengths = torch.linspace(case.key_len, 0, case.batch + 1, device=device)[1:].round()
    return (torch.arange(case.key_len, device=device) < lengths[:, None])[:, None, None, :]


def random_bool(case: Case, device: torch.device) -> Tensor:
    """(batch, heads, query_len, key_len), sparse enough to leave rows without a key."""
    shape = (case.batch, case.heads, case.query_len, case.key_len)
    mask = torch.rand(shape, device=device) < 0.2
    mask[..., ::7, :] = False
    return mask


def shared_bool(case: Case, device: torch.device) -> Tensor:
    """(1, 1, query_len, key_len), a view with rows further apart than they are long."""
    wide = torch.rand(case.query_len, case.key_len + 16, device=device) < 0.5
    return wide[None, None, :, : case.key_len]


def transposed_bool(case: Case, device: torch.device) -> Tensor:
    """(1, heads, query_len, key_len) whose keys are not contiguous."""
    return (torch.rand(1, case.heads, case.key_len, case.query_len, device=device) < 0.5).mT


def bias(case: Case, device: torch.device) -> Tensor:
    """(1, heads, query_len, key_len), bfloat16, with some keys hidden."""
    values = torch.randn(1, case.heads, case.query_len, case.key_len, device=device)
    return values.masked_fill(values > 1.5, -torch.inf).to(torch.bfloat16)


def bias_of_keys(case: Case, device: torch.device) -> Tensor:
    """(1, heads, 1, key_len), float32, as ALiBi's."""
    slopes = torch.linspace(0.01, 0.1, case.heads, device=device)
    return -(slopes[:, None] * torch.arange(case.key_len, device=device).flip(0))[None, :, None, :]


def lowest_bias(case: Case, device: torch.device) -> Tensor:
    """(batch, 1, query_len, key_len): the lowest number hides keys, in some rows every key."""
    lowest = torch.finfo(torch.float32).min
    hidden = torch.rand(case.batch, 1, case.query_len, case.key_len, device=device) < 0.5
    hidden[..., 1::3, :] = True
    return torch.zeros(hidden.shape, device=device).masked_fill(hidden, lowest)


def attention_cases(unit: int) -> list[Case]:
    """The matrix; lengths are about ``unit`` to three times that, and divide nothing."""
    n, long = unit + unit // 4 + 1, 2 * unit + 7
    plain = Case("plain", n, n)
    causal = replace(plain, name="causal", upper=0)
    cases = [
        plain,
        causal,
        replace(plain, name="multiple-of-tiles", query_len=2 * unit, key_len=2 * unit),
        replace(causal, name="causal-multiple", query_len=2 * unit, key_len=2 * unit),
        replace(plain, name="one-query", query_len=1),
        replace(plain, name="one-key", key_len=1),
        replace(plain, name="longer-keys", key_len=long),
        replace(plain, name="longer-queries", query_len=long),
        replace(causal, name="causal-longer-keys", key_len=long),
        replace(causal, name="causal-longer-queries", query_len=long),
        replace(causal, name="bottom-right", key_len=long, upper=long - n),
        replace(causal, name="bottom-right-short", query_len=long, upper=n - long),
        replace(causal, name="bottom-right-window", key_len=long, upper=long - n, lower=long - 2 * n),
        replace(causal, name="window", query_len=long, key_len=long, lower=-(unit // 3)),
        replace(plain, name="band", query_len=long, key_len=long, lower=-unit // 2, upper=unit // 4),
        replace(plain, name="only-lower", query_len=long, key_len=long, lower=-3),
        replace(plain, name="band-out-of-sight", lower=n + 1),
        replace(plain, name="huge-bounds", lower=-(2**40), upper=2**40),
        replace(plain, name="chunk", query_len=long, key_len=long, chunk=unit // 2 + 3),
        replace(causal, name="causal-chunk", query_len=long, key_len=long, chunk=unit + 1),
        replace(plain, name="huge-chunk", chunk=2**40),
        replace(plain, name="keys", batch=2, mask=key_padding),
        replace(causal, name="causal-keys", batch=2, mask=key_padding),
        replace(plain, name="bool", batch=2, mask=random_bool),
        replace(plain, name="bool-shared", mask=shared_bool, key_len=2 * unit),
        replace(causal, name="causal-bool", mask=shared_bool, query_len=long, key_len=long),
        replace(plain, name="bool-transposed", mask=transposed_bool),
        replace(plain, name="bias", mask=bias),
        replace(causal, name="causal-bias", mask=bias, query_len=long, key_len=long),
        replace(plain, name="bias-of-keys", mask=bias_of_keys),
        replace(plain, name="lowest-bias", mask=lowest_bias),
        replace(plain, name="window-chunk-keys", lower=-9, upper=9, chunk=21, mask=key_padding),
        replace(causal, name="gqa", heads=6, kv_heads=2, batch=2),
        replace(plain, name="mqa", heads=4, kv_heads=1, mask=random_bool),
        replace(plain, name="scale", scale=0.3),
        replace(plain, name="negative-scale", scale=-0.2),
        replace(plain, name="zero-scale", scale=0.0),
        replace(causal, name="not-centred", centered=False),
        replace(causal, name="float16", dtype=torch.float16),
        replace(causal, name="bfloat16", dtype=torch.bfloat16),
    ]  # fmt: skip
    dims = [(dim, dim) for dim in (16, 40, 80, 96, 128, 192, 256)]
    dims += [(192, 128), (64, 96), (128, 16), (96, 256)]
    cases += [
        replace(causal, name=f"dims-{dim}-{dim_v}", head_dim=dim, value_head_dim=dim_v)
        for dim, dim_v in dims
    ]
    return cases


@dataclass(frozen=True)
class Rotation:
    """A rotary embedding as a quantisation fuses it."""

    name: str
    interleaved: bool = False
    start: int = 0
    width: int = 64
    half_tables: bool = False
    per_head: bool = False
    shared_batch: bool = False
    head_dim: int = 64
    group_size: int = 1
    center: bool = False
    dtype: torch.dtype = torch.bfloat16

    def tables(self, batch: int, heads: int, tokens: int, device: torch.device) -> list[Tensor]:
        """Cosines and sines; the two lanes of a pair differ where the width is whole."""
        lanes = self.width // 2 if self.half_tables else self.width
        shape = [1 if self.shared_batch else batch, tokens, lanes]
        if self.per_head:
            shape.insert(1, heads)
        angle = torch.randn(shape, device=device)
        return [angle.cos(), angle.sin()]


ROTATIONS = [
    Rotation("half"),
    Rotation("half-tables", half_tables=True),
    Rotation("interleaved", interleaved=True),
    Rotation("interleaved-half-tables", interleaved=True, half_tables=True),
    Rotation("window", start=16, width=32, center=True),
    Rotation("window-interleaved", start=32, width=32, interleaved=True, half_tables=True),
    Rotation("odd-window", start=3, width=22, head_dim=40),
    Rotation("odd-window-interleaved", start=3, width=22, head_dim=40, interleaved=True),
    Rotation("per-head", per_head=True, group_size=2),
    Rotation("shared-batch", shared_batch=True, group_size=4, dtype=torch.float16),
    Rotation("centred", half_tables=True, center=True, dtype=torch.float32),
    Rotation("wide", width=256, head_dim=256, shared_batch=True, center=True),
]


def fp8_distance(a: Tensor, b: Tensor) -> tuple[float, int]:
    """The share of elements that differ, and by how many FP8 numbers at most."""
    x, y = (t.contiguous().view(torch.uint8).short() for t in (a, b))
    # Order the bit patterns as the numbers: sign and magnitude to a line.
    x, y = (torch.where(t >= 128, 128 - t, t) for t in (x, y))
    difference = (x - y).abs()
    return float((difference > 0).float().mean()), int(difference.max())
