"""The quantisation kernels against their definition, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import sqnr
from tests.kernels.cases import INTERPRETED, ROTATIONS, Rotation
from tests.kernels.one_operand import (
    quantize_rows,
    quantize_triton,
    quantize_value_blocks,
    quantize_value_triton,
)
from tests.kernels.quantize_checks import (
    MIN_DB,
    by_token,
    check_dither,
    check_key_blocks,
    check_per_head,
    check_rows,
    check_settled,
    check_value,
    check_value_blocks,
    dithered,
    hadamard,
    mean_shift,
)

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="needs Triton and TRITON_INTERPRET=1")
CPU = torch.device("cpu")
FP8 = torch.float8_e4m3fn
SHAPES = [(1, 1, 1, 16), (2, 4, 70, 40), (1, 2, 140, 128), (1, 3, 33, 256)]


@pytest.mark.parametrize("rotation", ROTATIONS, ids=lambda r: r.name)
def test_per_head(rotation: Rotation) -> None:
    """Rotated, centred where asked, with scales shared in groups of heads."""
    check_per_head(rotation, 70, CPU)


@pytest.mark.parametrize("tokens", [399])
def test_guesses_that_do_not_hold(tokens: int) -> None:
    """What the sample did not show is found, and the head rounded again."""
    check_settled(tokens, CPU)


@pytest.mark.parametrize("rotation", ROTATIONS, ids=lambda r: r.name)
def test_rows(rotation: Rotation) -> None:
    """One scale a row."""
    check_rows(rotation, 70, CPU, torch.int8 if rotation.center else FP8)


@pytest.mark.parametrize("rotation", ROTATIONS[::3], ids=lambda r: r.name)
def test_key_blocks(rotation: Rotation) -> None:
    """One scale for 128 tokens, a sample of the tokens for the mean."""
    check_key_blocks(rotation, 140, CPU)


@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_value(shape: tuple[int, ...], transpose: bool) -> None:
    """One scale a head."""
    check_value(shape, CPU, transpose)


def test_dither() -> None:
    """Values in bfloat16, which a mean would turn all in one direction."""
    check_dither(300, CPU)


def test_what_dither_is_for() -> None:
    """Without it the few numbers of bfloat16 are shifted alike against FP8's, all in one direction.

    In the definition, which the kernel's bytes are compared with; for as many tokens as it takes.
    """
    torch.manual_seed(0)
    x = torch.randn(1, 1, 131072, 64, dtype=torch.bfloat16)
    mean = x[:, :, ::32].float().mean(2, keepdim=True)
    assert mean_shift(dithered(x) - mean, x - mean) < 1.4
    assert mean_shift(x - mean, x - mean) > 2


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_value_blocks(shape: tuple[int, ...], center: bool) -> None:
    """One scale for 128 tokens, transposed."""
    check_value_blocks(shape, CPU, center)


@pytest.mark.parametrize("dtype", [FP8, torch.int8])
@pytest.mark.parametrize("dim", [16, 64, 256])
def test_hadamard_is_an_orthogonal_matrix(dim: int, dtype: torch.dtype) -> None:
    """What is rounded is x times Sylvester's matrix over the root of its size."""
    x = torch.randn(1, 2, 40, dim)
    got, descale = quantize_rows(x, hadamard=True, dtype=dtype)
    assert sqnr(got.float() * descale, x @ hadamard(dim, CPU)) > MIN_DB[dtype]


def test_hadamard_of_values() -> None:
    """Mean and values come back in the transformed lanes."""
    x = torch.randn(1, 2, 70, 64) + 1
    got, descale, mean = quantize_value_blocks(x, center=True, hadamard=True)
    assert mean is not None
    restored = got[..., :70].float().mT * by_token(descale, 70) + mean
    assert sqnr(restored, x @ hadamard(64, CPU)) > MIN_DB[FP8]


@pytest.mark.parametrize("dim", [40, 96])
def test_hadamard_needs_a_power_of_two(dim: int) -> None:
    """There is no such matrix of other sizes here."""
    with pytest.raises(ValueError, match=f"head_dim {dim} is not a power of two"):
        quantize_rows(torch.zeros(1, 1, 8, dim), hadamard=True)
    with pytest.raises(ValueError, match=f"head_dim {dim} is not a power of two"):
        quantize_value_blocks(torch.zeros(1, 1, 8, dim), hadamard=True)


def test_static_scales_clamp() -> None:
    """What is beyond the range becomes the largest number; the rest is x over the scale."""
    from lp_inductor.kernels.triton.operands import Operands
    from lp_inductor.kernels.triton.quantize import quantize_fine

    x = torch.randn(1, 2, 40, 64)
    x[0, 0, 3, 5], x[0, 1, 7, 9] = 1000.0, -1000.0
    for dtype, largest in ((FP8, 448), (torch.int8, 127)):
        scales = (4 / largest, 8 / largest, 4 / 448)
        done = quantize_fine(
            Operands(x, x, x), qk_dtype=dtype, center_key=False, static_descales=scales
        )
        assert done.q_descale is None and done.k_descale is None and done.v_descale is None
        assert done.query is not None and done.key is not None and done.value is not None
        value = done.value[..., :40].mT
        for got, scale in zip((done.query, done.key, value), scales, strict=True):
            end = largest if got.dtype == torch.int8 else 448
            restored = got.float() * scale
            torch.testing.assert_close(
                restored, x.clamp(-end * scale, end * scale), rtol=0.07, atol=0.1
            )
            assert (float(got[0, 0, 3, 5]), float(got[0, 1, 7, 9])) == (end, -end)


def test_strided_input() -> None:
    """An element stride other than one, and a broadcast batch."""
    x = torch.randn(1, 4, 64, 50).mT.expand(2, -1, -1, -1)
    got, descale = quantize_triton(x, group_size=2)
    want, want_descale = quantize_triton(x.contiguous(), group_size=2)
    torch.testing.assert_close(descale, want_descale)
    assert torch.equal(got.float(), want.float())


def test_all_zeros() -> None:
    """A head of zeros has scale one, and no NaN."""
    x = torch.zeros(1, 2, 20, 32)
    for quantize in (quantize_triton, quantize_rows):
        got, descale = quantize(x)
        assert (descale == 1).all()
        assert (got.float() == 0).all()
    got, descale, mean = quantize_value_triton(x + 5)
    assert (descale == 1).all()
    assert (got.float() == 0).all()
    assert (mean == 5).all()


def test_nan_stays() -> None:
    """In INT8, which has none, the scale of its row carries it."""
    x = torch.randn(1, 1, 20, 32)
    x[0, 0, 3, 7] = torch.nan
    _, descale = quantize_rows(x, dtype=torch.int8)
    assert descale.isnan().nonzero().tolist() == [[0, 0, 3, 0]]


def test_centred_heads_share_no_scale() -> None:
    """Keys have one scale each; asking for both is an error."""
    with pytest.raises(ValueError, match="do not share scales"):
        quantize_triton(torch.zeros(1, 2, 20, 32), group_size=2, center=True)
