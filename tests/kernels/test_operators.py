"""The quantise operators as a GPU computes them outside compiled code, in Triton's interpreter."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from lp_inductor import reference
from lp_inductor.kernels.triton import operators
from tests.helpers import sqnr
from tests.kernels.cases import INTERPRETED
from tests.kernels.quantize_checks import sampled_mean, value_samples

interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs Triton and TRITON_INTERPRET=1")

FP8, INT8 = torch.float8_e4m3fn, torch.int8
#: scales, dtype, group size, centred: those that the kernels have and those left to the reference.
FORMS: list[tuple[str, torch.dtype, int, bool]] = [
    (scales, dtype, group, center)
    for scales, dtype, group, center in itertools.product(
        ("head", "block", "token"), (FP8, INT8), (1, 2), (False, True)
    )
    if not (group == 2 and (scales != "head" or center))
]


@interpreted
@pytest.mark.parametrize(("scales", "dtype", "group", "center"), FORMS)
@pytest.mark.parametrize("rotated", [False, True])
def test_query_and_key(
    scales: str, dtype: torch.dtype, group: int, center: bool, rotated: bool
) -> None:
    """Numbers, scales and strides as the reference has them, but for what is subtracted."""
    torch.manual_seed(0)
    x = torch.randn(2, 150, 4, 32).transpose(1, 2) + 1
    tables = [torch.randn(1, 1, 150, 8) for _ in range(2)] if rotated else [None, None]
    arguments = (x, *tables, rotated, 16 if rotated else 0, 16 if rotated else 0, group, center)
    options: dict[str, Any] = {"scales": scales, "dtype": dtype}
    (got, descale), (want, expected) = (
        function(*arguments, **options)  # type: ignore[operator]
        for function in (operators.quantize, reference.quantize)
    )
    assert got.dtype == want.dtype == dtype and got.shape == want.shape
    assert got.transpose(1, 2).is_contiguous()
    assert descale.shape == expected.shape and descale.dtype == torch.float32
    ours, theirs = reference.dequantize(got, descale), reference.dequantize(want, expected)
    if center:  # about another constant for each channel, which attention does not see
        ours, theirs = (t - t.mean(dim=2, keepdim=True) for t in (ours, theirs))
    assert sqnr(theirs, ours) > 25


@interpreted
@pytest.mark.parametrize("hadamard", [False, True])
@pytest.mark.parametrize("scales", ["head", "block"])
@pytest.mark.parametrize("static", [None, 0.02])
def test_value(hadamard: bool, scales: str, static: float | None) -> None:
    """What was quantised and the mean together are the value."""
    x = torch.randn(2, 3, 150, 32) + 2
    if static is not None:
        scales = "head"
    options: dict[str, Any] = {"scales": scales, "hadamard": hadamard, "static_descale": static}
    got, descale, mean = operators.quantize_centered(x, **options)
    spread = reference.hadamard(x) if hadamard else x
    assert got.dtype == FP8 and mean.shape == (2, 3, 1, 32)
    assert sqnr(spread, reference.dequantize(got, descale) + mean) > 28
    if scales == "head" and static is None:  # the kernel's, which estimates it
        torch.testing.assert_close(
            mean, sampled_mean(spread, value_samples(150)), atol=1e-4, rtol=1e-4
        )
    else:  # the reference's, with which rounding does not move the mean
        again = reference.dequantize(got, descale).mean(dim=2, keepdim=True) + mean
        torch.testing.assert_close(again, spread.mean(dim=2, keepdim=True), atol=1e-4, rtol=1e-4)


@interpreted
@pytest.mark.parametrize("dtype", [FP8, INT8])
def test_given_scales(dtype: torch.dtype) -> None:
    x = torch.randn(1, 4, 40, 16)
    got, descale = operators.quantize(
        x, None, None, False, 0, 0, 2, False, dtype=dtype, static_descale=0.03
    )
    assert got.dtype == dtype and descale.shape == (1, 2) and (descale == 0.03).all()
    assert sqnr(x, reference.dequantize(got, descale)) > 25


@interpreted
def test_nothing_to_quantise() -> None:
    got, descale = operators.quantize(
        torch.empty(2, 4, 0, 16), None, None, False, 0, 0, 1, False, scales="token"
    )
    assert got.shape == (2, 4, 0, 16) and descale.shape == (2, 4, 0, 1)
