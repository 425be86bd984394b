"""On an NVIDIA GPU: the Triton kernels with their real tiles, over the matrix of tests/kernels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lp_inductor import reference
from lp_inductor.visibility import Visibility
from tests.helpers import sqnr
from tests.kernels.cases import (
    INTERPRETED,
    MIN_DB,
    ROTATIONS,
    Case,
    Rotation,
    attention_cases,
    expected,
    fp8_distance,
    operands,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or INTERPRETED, reason="needs an NVIDIA GPU"),
]
CUDA = torch.device("cuda")


@pytest.mark.parametrize("case", attention_cases(256), ids=lambda c: c.name)
def test_attention_matches_the_reference(case: Case) -> None:
    """Every mask, length, head size and output type, twice with the same bits."""
    from lp_inductor.kernels.triton.kernel import TritonKernel

    o, visible = operands(case, CUDA), case.visible(CUDA)
    want = expected(case, o, visible)
    first, second = (
        TritonKernel().run(
            o.query, o.key, o.value, o.q_descale, o.k_descale, o.v_descale,
            v_mean=o.v_mean, visible=visible, scale=case.scale, out_dtype=case.dtype,
        )
        for _ in range(2)
    )  # fmt: skip
    assert first.dtype == case.dtype
    assert torch.equal(first, second)
    blind = (want == 0).all(-1)
    assert (first[blind] == 0).all()
    if not blind.all():
        assert sqnr(first, want) > MIN_DB


@pytest.mark.parametrize("rotation", ROTATIONS, ids=lambda r: r.name)
@pytest.mark.parametrize("tokens", [300, 4096])
def test_rotation_matches_the_reference(rotation: Rotation, tokens: int) -> None:
    """FP8 bytes as the reference has them, but for ties."""
    from lp_inductor.kernels.triton.quantize import Rope, quantize_triton

    r = rotation
    x = torch.randn(2, tokens, 4, r.head_dim, dtype=r.dtype, device=CUDA).transpose(1, 2) + 1
    cos, sin = r.tables(2, 4, tokens, CUDA)
    tables = (cos, sin)
    if r.per_head:
        rotated = [
            reference.rotate(
                x[:, h : h + 1].float(), cos[:, h], sin[:, h], r.interleaved, r.start, r.width
            )
            for h in range(4)
        ]
        want, want_descale = reference.quantize(
            torch.cat(rotated, 1), None, None, False, 0, 0, r.group_size, r.center
        )
    else:
        want, want_descale = reference.quantize(
            x, *tables, r.interleaved, r.start, r.width, r.group_size, r.center
        )
    got, descale = quantize_triton(
        x,
        Rope(*tables, r.interleaved, r.start, r.width),
        group_size=r.group_size,
        center=r.center,
    )
    torch.testing.assert_close(descale, want_descale, rtol=1e-5, atol=0)
    share, ulps = fp8_distance(got, want)
    assert share < 2e-3
    # A number whose rotation or mean cancels may land on another of the tiny numbers around zero.
    assert ulps <= 1 or share < 1e-4


@pytest.mark.parametrize("shape", [(2, 4, 300, 40), (1, 3, 4096, 128), (1, 2, 1000, 256)])
def test_value_matches_the_reference(shape: tuple[int, ...]) -> None:
    """Centred, transposed, padded with zeros."""
    from lp_inductor.kernels.triton.attention import transpose_value
    from lp_inductor.kernels.triton.quantize import quantize_value_triton

    x = torch.randn(shape, device=CUDA, dtype=torch.bfloat16) + 3
    want, want_descale, want_mean = reference.quantize_centered(x)
    got, descale, mean = quantize_value_triton(x)
    torch.testing.assert_close(descale, want_descale, rtol=1e-5, atol=0)
    torch.testing.assert_close(mean, want_mean, rtol=1e-5, atol=1e-5)
    share, ulps = fp8_distance(got, want)
    assert share < 2e-3
    assert ulps <= 1 or share < 1e-4
    stored = transpose_value(got)
    assert stored.data_ptr() == got.data_ptr()
    assert (stored[..., shape[2] :].float() == 0).all()


def test_logsumexp() -> None:
    """Natural logarithms, -inf for rows that see no key."""
    from lp_inductor.kernels.triton.attention import attention_triton, transpose_value

    case = Case("lse", 300, 300, batch=2, lower=-50, upper=-2)
    o = operands(case, CUDA)
    _, lse = attention_triton(
        o.query, o.key, transpose_value(o.value), o.q_descale, o.k_descale, o.v_descale,
        visible=case.visible(CUDA), return_lse=True,
    )  # fmt: skip
    query, key = (
        t.double() * d[..., None, None] for t, d in ((o.query, o.q_descale), (o.key, o.k_descale))
    )
    hidden = ~case.visible(CUDA).band(300, 300, CUDA)
    scores = (query @ key.mT * case.head_dim**-0.5).masked_fill(hidden, -torch.inf)
    assert lse is not None
    assert (lse[..., :2] == -torch.inf).all()
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-3, atol=1e-3)


def test_nan_stays_in_its_row() -> None:
    """A NaN in a query is a NaN in its row, and in no other."""
    from lp_inductor.kernels.triton.attention import attention_triton, transpose_value

    case = Case("nan", 200, 200)
    o = operands(case, CUDA)
    o.query.view(torch.uint8)[0, 1, 5, 3] = 0x7F
    got, _ = attention_triton(
        o.query, o.key, transpose_value(o.value), o.q_descale, o.k_descale, o.v_descale
    )
    assert got[0, 1, 5].isnan().all()
    assert got.isnan().sum() == case.value_head_dim


@pytest.mark.parametrize("tokens", [4096, 65536])
def test_accuracy_does_not_depend_on_length(tokens: int) -> None:
    """Values of mean one: sums of many terms of one sign do not lose their bits."""
    from lp_inductor.kernels.triton.attention import attention_triton
    from lp_inductor.kernels.triton.quantize import quantize_triton, quantize_value_triton

    query, key, value = (torch.randn(1, 1, tokens, 128, device=CUDA) for _ in range(3))
    value += 1
    query = query[:, :, :256]
    q, q_descale = quantize_triton(query)
    k, k_descale = quantize_triton(key, center=True)
    v, v_descale, v_mean = quantize_value_triton(value)
    storage = v.as_strided((1, 1, 128, tokens), (128 * tokens, 128 * tokens, tokens, 1))
    got, _ = attention_triton(
        q, k, storage, q_descale, k_descale, v_descale, v_mean=v_mean, out_dtype=torch.float32
    )
    want = F.scaled_dot_product_attention(query.double(), key.double(), value.double())
    assert sqnr(got, want) > 45


def test_inside_a_triton_op() -> None:
    """Traced into a graph by torch.compile, the kernels compute the same."""
    from lp_inductor.kernels.triton.attention import attention_triton
    from lp_inductor.kernels.triton.quantize import quantize_triton, quantize_value_triton

    @torch.library.triton_op("lp_inductor_test::attention", mutates_args={})
    def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        q, q_descale = quantize_triton(query)
        k, k_descale = quantize_triton(key, center=True)
        v, v_descale, v_mean = quantize_value_triton(value)
        out, _ = attention_triton(
            q, k, v.transpose(2, 3), q_descale, k_descale, v_descale, v_mean=v_mean,
            visible=Visibility(upper=0),
        )  # fmt: skip
        return out

    args = [torch.randn(1, 4, 512, 64, device=CUDA, dtype=torch.bfloat16) for _ in range(3)]
    eager = attention(*args)
    compiled = torch.compile(lambda *t: attention(*t) * 1, fullgraph=True)(*args)
    assert torch.equal(eager, compiled)
    want = F.scaled_dot_product_attention(*(t.double() for t in args), is_causal=True)
    assert sqnr(eager, want) > 24


@pytest.mark.parametrize("dim", [40, 64, 96, 128, 192, 256])
@pytest.mark.parametrize("hadamard", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_one_pass(dim: int, hadamard: bool, transposed: bool) -> None:
    """Scales per row and block, a sampled mean, grouped heads: attention over what was rotated."""
    from lp_inductor.kernels.triton.attention import attention_triton
    from lp_inductor.kernels.triton.quantize import Rope
    from lp_inductor.kernels.triton.quantize_fine import (
        key_block,
        quantize_key_blocks,
        quantize_rows,
        quantize_value_blocks,
    )

    if hadamard and dim not in (64, 128, 256):
        pytest.skip("there is no Hadamard matrix of this size")
    tokens = 777
    query, key, value = (
        torch.randn(2, tokens, heads, dim, device=CUDA, dtype=torch.bfloat16) for heads in (8, 2, 2)
    )
    key += 3 * torch.randn(2, 1, 2, dim, device=CUDA)
    value += 1
    query, key, value = (t.transpose(1, 2) for t in (query, key, value))
    if not transposed:
        query, key, value = (t.contiguous() for t in (query, key, value))
    angle = torch.randn(1, tokens, dim, device=CUDA)
    rope = Rope(angle.cos(), angle.sin(), False, 0, dim)
    q, q_descale = quantize_rows(query, rope, hadamard=hadamard)
    k, k_descale = quantize_key_blocks(key, rope, hadamard=hadamard)
    v, v_descale, v_mean = quantize_value_blocks(value, center=dim > 128)
    got, _ = attention_triton(
        q, k, v, q_descale, k_descale, v_descale, v_mean=v_mean, visible=Visibility(upper=0),
        key_block=key_block(), out_dtype=torch.float32,
    )  # fmt: skip
    rotated = [
        reference.rotate(t.float(), angle.cos(), angle.sin(), False, 0, dim) for t in (query, key)
    ]
    want = F.scaled_dot_product_attention(
        *(t.double() for t in (*rotated, value)), is_causal=True, enable_gqa=True
    )
    assert sqnr(got, want) > 26


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("tokens", [100, 5000])
def test_sampled_mean(dim: int, tokens: int) -> None:
    """What is taken off a value comes back exactly, and is the mean over evenly spread tokens."""
    from lp_inductor.kernels.triton.quantize_fine import quantize_value_blocks

    x = torch.randn(1, 3, tokens, dim, device=CUDA) + 2
    _, _, mean = quantize_value_blocks(x, center=True)
    step = -(-tokens // 128)
    assert mean is not None
    torch.testing.assert_close(mean, x[:, :, ::step].mean(2, keepdim=True), rtol=1e-5, atol=1e-5)
