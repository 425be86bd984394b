"""The quantisation kernels against the reference, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from lp_inductor import reference
from tests.kernels.cases import INTERPRETED, ROTATIONS, Rotation, fp8_distance

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="needs Triton and TRITON_INTERPRET=1")

#: Sums in another order may move a number across a rounding boundary.
MAX_SHARE = 2e-3


@pytest.mark.parametrize("rotation", ROTATIONS, ids=lambda r: r.name)
def test_rotated(rotation: Rotation) -> None:
    """Rotated, centred where asked, with scales shared in groups of heads."""
    from lp_inductor.kernels.triton.quantize import Rope, quantize_triton

    r = rotation
    x = torch.randn(2, 70, 4, r.head_dim, dtype=r.dtype).transpose(1, 2) + 1
    cos, sin = r.tables(2, 4, 70, x.device)
    if r.per_head:  # the reference takes tables for all heads alike
        heads = [
            reference.rotate(x[:, h : h + 1].float(), cos[:, h], sin[:, h], r.interleaved, r.start, r.width)
            for h in range(4)
        ]  # fmt: skip
        want, want_descale = reference.quantize(
            torch.cat(heads, 1), None, None, False, 0, 0, r.group_size, r.center
        )
    else:
        want, want_descale = reference.quantize(
            x, cos, sin, r.interleaved, r.start, r.width, r.group_size, r.center
        )
    got, descale = quantize_triton(
        x,
        Rope(cos, sin, r.interleaved, r.start, r.width),
        group_size=r.group_size,
        center=r.center,
    )
    torch.testing.assert_close(descale, want_descale, rtol=1e-5, atol=0)
    share, ulps = fp8_distance(got, want)
    assert share <= MAX_SHARE
    assert ulps <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 1, 16), (2, 4, 70, 40), (1, 2, 96, 128), (1, 3, 33, 256)])
@pytest.mark.parametrize("center", [False, True])
def test_not_rotated(shape: tuple[int, ...], dtype: torch.dtype, center: bool) -> None:
    """Without tables; head sizes that are no power of two, one token."""
    from lp_inductor.kernels.triton.quantize import quantize_triton

    x = torch.randn(shape).to(dtype) + 2
    want, want_descale = reference.quantize(x, None, None, False, 0, 0, 1, center)
    got, descale = quantize_triton(x, center=center)
    torch.testing.assert_close(descale, want_descale, rtol=1e-5, atol=1e-9)
    share, ulps = fp8_distance(got, want)
    assert share <= MAX_SHARE
    assert ulps <= 1
    assert got.transpose(1, 2).stride(-1) == 1


@pytest.mark.parametrize("shape", [(1, 1, 1, 16), (2, 4, 70, 40), (1, 2, 96, 128), (1, 3, 33, 256)])
def test_value(shape: tuple[int, ...]) -> None:
    """The mean comes back; storage is transposed and padded with zeros."""
    from lp_inductor.kernels.triton.attention import transpose_value
    from lp_inductor.kernels.triton.quantize import quantize_value_triton

    x = torch.randn(shape).transpose(1, 2).contiguous().transpose(1, 2) + 3
    want, want_descale, want_mean = reference.quantize_centered(x)
    got, descale, mean = quantize_value_triton(x)
    torch.testing.assert_close(descale, want_descale, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(mean, want_mean, rtol=1e-5, atol=1e-6)
    share, ulps = fp8_distance(got, want)
    assert share <= MAX_SHARE
    assert ulps <= 1
    stored = transpose_value(got)
    assert stored.data_ptr() == got.data_ptr()
    assert (stored[..., shape[2] :].float() == 0).all()


def test_strided_input() -> None:
    """An element stride other than one, and a broadcast batch."""
    from lp_inductor.kernels.triton.quantize import quantize_triton

    x = torch.randn(1, 4, 64, 50).mT.expand(2, -1, -1, -1)
    want, want_descale = reference.quantize(x, None, None, False, 0, 0, 2, False)
    got, descale = quantize_triton(x, group_size=2)
    torch.testing.assert_close(descale, want_descale)
    assert fp8_distance(got, want)[1] <= 1


def test_all_zeros() -> None:
    """A head of zeros has scale one, and no NaN."""
    from lp_inductor.kernels.triton.quantize import quantize_triton, quantize_value_triton

    x = torch.zeros(1, 2, 20, 32)
    got, descale = quantize_triton(x)
    assert (descale == 1).all()
    assert (got.float() == 0).all()
    got, descale, mean = quantize_value_triton(x + 5)
    assert (descale == 1).all()
    assert (got.float() == 0).all()
    assert (mean == 5).all()


def test_centred_heads_share_no_scale() -> None:
    """Keys have one scale each; asking for both is an error."""
    from lp_inductor.kernels.triton.quantize import quantize_triton

    with pytest.raises(ValueError, match="do not share scales"):
        quantize_triton(torch.zeros(1, 2, 20, 32), group_size=2, center=True)
