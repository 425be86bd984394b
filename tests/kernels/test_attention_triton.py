"""The attention kernel against the reference, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from lp_inductor.kernels.triton.blocks import Blocks, split_dim
from lp_inductor.visibility import Visibility
from tests.helpers import sqnr
from tests.kernels.cases import INTERPRETED, MIN_DB, Case, attention_cases, expected, operands

needs_interpreter = pytest.mark.skipif(
    not INTERPRETED, reason="needs Triton and TRITON_INTERPRET=1"
)
CPU = torch.device("cpu")


@pytest.mark.parametrize("case", attention_cases(32), ids=lambda c: c.name)
@needs_interpreter
def test_matches_the_reference(case: Case) -> None:
    """Every mask, length, head size and output type; rows that see no key are zeros."""
    from lp_inductor.kernels.triton.kernel import TritonKernel

    o, visible = operands(case, CPU), case.visible(CPU)
    want = expected(case, o, visible)
    got = TritonKernel().run(
        o.query, o.key, o.value, o.q_descale, o.k_descale, o.v_descale,
        v_mean=o.v_mean, visible=visible, scale=case.scale, out_dtype=case.dtype,
    )  # fmt: skip
    assert got.dtype == case.dtype
    assert got.shape == want.shape
    blind = (want == 0).all(-1)
    assert (got[blind] == 0).all()
    if not blind.all():
        assert sqnr(got, want) > MIN_DB


@needs_interpreter
def test_logsumexp() -> None:
    """Natural logarithms of the sums, -inf for rows that see no key."""
    from lp_inductor.kernels.triton.attention import attention_triton, transpose_value

    case = Case("lse", 50, 50, batch=2, lower=-5, upper=-2)
    o = operands(case, CPU)
    _, lse = attention_triton(
        o.query, o.key, transpose_value(o.value), o.q_descale, o.k_descale, o.v_descale,
        visible=case.visible(CPU), return_lse=True,
    )  # fmt: skip
    scores = (
        (o.query.float() * o.q_descale[..., None, None])
        @ (o.key.float() * o.k_descale[..., None, None]).mT
        * case.head_dim**-0.5
    )
    hidden = ~case.visible(CPU).band(50, 50, CPU)
    want = scores.masked_fill(hidden, -torch.inf).logsumexp(-1)
    assert lse is not None
    assert (lse[..., :2] == -torch.inf).all()
    torch.testing.assert_close(lse, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("per_block", [False, True])
@needs_interpreter
def test_finer_scales(per_block: bool) -> None:
    """A scale per row of the query, per block of keys, per channel or block of the value."""
    from lp_inductor.kernels.triton.attention import attention_triton, transpose_value

    tokens = 140
    query, key, value = (torch.randn(1, h, tokens, 64) for h in (2, 1, 1))
    q_scale = torch.rand(1, 2, tokens, 1) + 0.5
    k_scale = torch.tensor([[[0.6, 1.3]]])
    v_scale = torch.tensor([[[2.0, 0.25]]]) if per_block else torch.rand(1, 1, 1, 64) + 0.5
    q8, k8, v8 = (t.to(torch.float8_e4m3fn) for t in (query, key, value))
    got, _ = attention_triton(
        q8, k8, transpose_value(v8), q_scale, k_scale, v_scale,
        visible=Visibility(upper=0), out_dtype=torch.float32,
    )  # fmt: skip
    key_scale = by_token(k_scale, tokens)
    value_scale = by_token(v_scale, tokens) if per_block else v_scale
    want = torch.nn.functional.scaled_dot_product_attention(
        q8.float() * q_scale, k8.float() * key_scale, v8.float() * value_scale,
        is_causal=True, enable_gqa=True,
    )  # fmt: skip
    # Values with no mean are a smaller result beside the same rounding of the probabilities.
    assert sqnr(got, want) > MIN_DB - 7


def by_token(scale: torch.Tensor, tokens: int) -> torch.Tensor:
    """Scales of blocks of 128 tokens, one a token: (batch, heads, tokens, 1)."""
    return scale.repeat_interleave(128, dim=2)[:, :, :tokens, None]


@needs_interpreter
def test_int8_scores() -> None:
    """Query and key in INT8, a scale per row of each; both parts of a head of 80 lanes."""
    from lp_inductor.kernels.triton.attention import attention_triton, transpose_value

    tokens = 70
    q8, k8 = (torch.randint(-127, 128, (1, h, tokens, 80), dtype=torch.int8) for h in (2, 1))
    v8 = (torch.randn(1, 1, tokens, 64) + 1).to(torch.float8_e4m3fn)
    q_scale, k_scale = ((torch.rand(1, h, tokens, 1) + 0.5) / 64 for h in (2, 1))
    got, _ = attention_triton(
        q8, k8, transpose_value(v8), q_scale, k_scale, torch.full((1, 1), 0.5),
        visible=Visibility(upper=0), out_dtype=torch.float32,
    )  # fmt: skip
    want = torch.nn.functional.scaled_dot_product_attention(
        q8.float() * q_scale, k8.float() * k_scale, v8.float() * 0.5,
        is_causal=True, enable_gqa=True,
    )  # fmt: skip
    assert sqnr(got, want) > MIN_DB - 7


@pytest.mark.parametrize("keys", [32, 64])
@pytest.mark.parametrize("two_level", [True, False])
@pytest.mark.parametrize(
    "levels", [(0, -16), (0, -16, -20), (-16, 0, -16), (0, -60, 0), (-60, -16, 0), (30, -60, 30)]
)
@needs_interpreter
def test_keys_far_below_the_largest(levels: tuple[int, ...], two_level: bool, keys: int) -> None:
    """What tiles of tiny probabilities hold is not lost beside a key that takes them nearly all.

    Such a key, an attention sink, has a value near zero. Tiles follow each other at ``levels``
    (natural logarithm), the first key of the highest being the sink.
    """
    from lp_inductor.kernels.triton.attention import attention_triton, transpose_value

    width = 64
    tokens = width * len(levels)
    scores = torch.cat([level + 0.3 * torch.randn(width) for level in levels])
    sink = levels.index(max(levels)) * width
    scores[sink + 1 : sink + width] = -70.0
    key = torch.zeros(1, 1, tokens, 32)
    key[..., 0] = scores
    key[..., 1] = scores - key[..., 0].to(torch.float8_e4m3fn).float()[0, 0]  # the rest of it
    query = torch.zeros(1, 1, 5, 32)
    query[..., :2] = 1.0
    value = torch.randn(1, 1, tokens, 32)
    value[:, :, sink] = 0.0
    q8, k8, v8 = (t.to(torch.float8_e4m3fn) for t in (query, key, value))
    one = torch.ones(1, 1)
    got, lse = attention_triton(
        q8, k8, transpose_value(v8), one, one, one, scale=1.0, out_dtype=torch.float32,
        blocks=Blocks(32, keys, 4, 1, two_level), return_lse=True,
    )  # fmt: skip
    exact = q8.double() @ k8.double().mT
    want = exact.softmax(-1) @ v8.double()
    assert sqnr(got, want.float()) > 27.0
    assert lse is not None
    torch.testing.assert_close(lse, exact.logsumexp(-1).float(), rtol=1e-5, atol=1e-5)


@needs_interpreter
def test_strides() -> None:
    """Operands in any order of the dimensions but the last, and slices of larger tensors."""
    from lp_inductor.kernels.triton.kernel import TritonKernel

    case = Case("strides", 41, 41, batch=2, heads=4, kv_heads=2, upper=0)
    o = operands(case, CPU)
    want = expected(case, o, case.visible(CPU))
    query = o.query.contiguous()
    key = torch.cat([o.key, o.key], dim=1)[:, :2]
    value = o.value.mT.contiguous().mT
    got = TritonKernel().run(
        query, key, value, o.q_descale, o.k_descale, o.v_descale,
        v_mean=o.v_mean, visible=case.visible(CPU), scale=None, out_dtype=torch.float32,
    )  # fmt: skip
    assert sqnr(got, want) > MIN_DB


@needs_interpreter
def test_one_level_sums() -> None:
    """Without float32 sums over tiles the result is the same where precision suffices."""
    from lp_inductor.kernels.triton.attention import attention_triton, transpose_value

    case = Case("one-level", 70, 70, upper=0)
    o = operands(case, CPU)
    got, _ = attention_triton(
        o.query, o.key, transpose_value(o.value), o.q_descale, o.k_descale, o.v_descale,
        v_mean=o.v_mean, visible=case.visible(CPU), out_dtype=torch.float32,
        blocks=Blocks(32, 32, 4, 1, two_level=False),
    )  # fmt: skip
    assert sqnr(got, expected(case, o, case.visible(CPU))) > MIN_DB


@needs_interpreter
def test_transposed_values_are_not_copied() -> None:
    """What the quantisation kernel stores is read in place; anything else is copied."""
    from lp_inductor.kernels.triton.attention import transpose_value

    storage = torch.zeros(2, 3, 16, 48, dtype=torch.uint8).view(torch.float8_e4m3fn)
    value = storage.transpose(2, 3)[:, :, :45]
    assert transpose_value(value).data_ptr() == value.data_ptr()
    assert transpose_value(value).shape == storage.shape
    copied = transpose_value(value.contiguous())
    assert copied.data_ptr() != value.data_ptr()
    assert copied.shape == storage.shape


@pytest.mark.parametrize(
    ("dim", "parts"),
    [
        (16, (32, 0)), (32, (32, 0)), (33, (32, 32)), (40, (32, 32)), (64, (64, 0)), (80, (64, 32)),
        (96, (64, 32)), (112, (128, 0)), (128, (128, 0)), (144, (128, 32)), (192, (128, 64)),
        (224, (256, 0)), (256, (256, 0)),
    ],
)  # fmt: skip
def test_split_dim(dim: int, parts: tuple[int, int]) -> None:
    """Powers of two that cover the head size with the least padding."""
    assert split_dim(dim) == (parts if parts != (32, 32) else (64, 0))
