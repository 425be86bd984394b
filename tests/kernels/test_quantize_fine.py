"""The one-pass quantisation against its definition, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lp_inductor import reference
from lp_inductor.visibility import Visibility
from tests.helpers import sqnr
from tests.kernels.cases import INTERPRETED, ROTATIONS, Rotation

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="needs Triton and TRITON_INTERPRET=1")

#: e4m3 keeps three bits of mantissa: a rounded number is this close to its own.
MIN_DB = 30.0


def rotated(x: torch.Tensor, r: Rotation, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The reference rotation, head by head where the tables are."""
    if not r.per_head:
        return reference.rotate(x.float(), cos, sin, r.interleaved, r.start, r.width)
    heads = [
        reference.rotate(
            x[:, h : h + 1].float(), cos[:, h], sin[:, h], r.interleaved, r.start, r.width
        )
        for h in range(x.shape[1])
    ]
    return torch.cat(heads, 1)


@pytest.mark.parametrize("rotation", ROTATIONS, ids=lambda r: r.name)
def test_rows(rotation: Rotation) -> None:
    """Every row spans the whole range of FP8, and is what was rotated."""
    from lp_inductor.kernels.triton.quantize import Rope
    from lp_inductor.kernels.triton.quantize_fine import quantize_rows

    r = rotation
    x = torch.randn(2, 70, 4, r.head_dim, dtype=r.dtype).transpose(1, 2)
    cos, sin = r.tables(2, 4, 70, x.device)
    got, descale = quantize_rows(x, Rope(cos, sin, r.interleaved, r.start, r.width))
    assert descale.shape == (2, 4, 70)
    assert (got.float().abs().amax(-1) == 448).all()
    assert sqnr(got.float() * descale[..., None], rotated(x, r, cos, sin)) > MIN_DB


@pytest.mark.parametrize("rotation", ROTATIONS, ids=lambda r: r.name)
def test_key_blocks(rotation: Rotation) -> None:
    """A constant per channel is missing, and the largest number of every block is 448."""
    from lp_inductor.kernels.triton.quantize import Rope
    from lp_inductor.kernels.triton.quantize_fine import key_block, quantize_key_blocks

    r = rotation
    x = torch.randn(2, 70, 4, r.head_dim, dtype=r.dtype).transpose(1, 2) + 2
    cos, sin = r.tables(2, 4, 70, x.device)
    got, descale = quantize_key_blocks(x, Rope(cos, sin, r.interleaved, r.start, r.width))
    assert descale.shape == (2, 4, 3)
    for block, part in enumerate(got.float().split(key_block(), dim=2)):
        assert (part.abs().amax((2, 3)) == 448).all(), block
    scale = descale.repeat_interleave(key_block(), dim=2)[:, :, :70, None]
    want = rotated(x, r, cos, sin)
    shift = want.mean(2, keepdim=True)  # up to 128 tokens are all sampled
    assert sqnr(got.float() * scale, want - shift) > MIN_DB


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1, 16), (2, 4, 70, 40), (1, 2, 300, 128)])
def test_value_blocks(shape: tuple[int, ...], center: bool) -> None:
    """Transposed, padded with zeros, with what was subtracted."""
    from lp_inductor.kernels.triton.quantize_fine import key_block, quantize_value_blocks

    x = torch.randn(shape) + 1
    got, descale, mean = quantize_value_blocks(x, center=center)
    tokens = shape[2]
    assert got.shape == (*shape[:2], shape[3], -(-tokens // 16) * 16)
    assert (got[..., tokens:].float() == 0).all()
    scale = descale.repeat_interleave(key_block(), dim=2)[:, :, None, :tokens]
    restored = (got[..., :tokens].float() * scale).mT
    assert (mean is not None) == center
    if mean is not None:
        step = -(-tokens // 128)
        torch.testing.assert_close(mean, x[:, :, ::step].mean(2, keepdim=True))
        restored = restored + mean
    assert sqnr(restored, x) > MIN_DB


@pytest.mark.parametrize("hadamard", [False, True])
def test_attention(hadamard: bool) -> None:
    """All of it together is attention; grouped heads, a strong mean in the key."""
    from lp_inductor.kernels.triton.attention import attention_triton
    from lp_inductor.kernels.triton.quantize_fine import (
        key_block,
        quantize_key_blocks,
        quantize_rows,
        quantize_value_blocks,
    )

    query = torch.randn(1, 4, 70, 64)
    key = torch.randn(1, 2, 70, 64) + 3 * torch.randn(1, 2, 1, 64)
    value = torch.randn(1, 2, 70, 64) + 1
    q, q_descale = quantize_rows(query, hadamard=hadamard)
    k, k_descale = quantize_key_blocks(key, hadamard=hadamard)
    v, v_descale, _ = quantize_value_blocks(value)
    got, _ = attention_triton(
        q, k, v, q_descale, k_descale, v_descale,
        visible=Visibility(upper=0), key_block=key_block(), out_dtype=torch.float32,
    )  # fmt: skip
    want = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    assert sqnr(got, want) > 27


@pytest.mark.parametrize("dim", [16, 64, 256])
def test_hadamard_is_an_orthogonal_matrix(dim: int) -> None:
    """What is rounded is x times Sylvester's matrix over the root of its size."""
    from lp_inductor.kernels.triton.quantize_fine import quantize_rows

    matrix = torch.ones(1, 1)
    while matrix.shape[0] < dim:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    x = torch.randn(1, 2, 40, dim)
    got, descale = quantize_rows(x, hadamard=True)
    assert sqnr(got.float() * descale[..., None], x @ matrix * dim**-0.5) > MIN_DB


@pytest.mark.parametrize("dim", [40, 96])
def test_hadamard_needs_a_power_of_two(dim: int) -> None:
    """There is no such matrix of other sizes here."""
    from lp_inductor.kernels.triton.quantize_fine import quantize_rows

    with pytest.raises(ValueError, match=f"head_dim {dim} is not a power of two"):
        quantize_rows(torch.zeros(1, 1, 8, dim), hadamard=True)
