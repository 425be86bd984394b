"""Whole layers against float64 attention, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.cases import INTERPRETED
from tests.kernels.quantize_checks import LAYERS, Layer, check_layer

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="needs Triton and TRITON_INTERPRET=1")
CPU = torch.device("cpu")


@pytest.mark.parametrize("layer", LAYERS, ids=lambda c: c.name)
def test_layer(layer: Layer) -> None:
    """Rotated, quantised and attended to, whatever is asked for."""
    got = check_layer(layer, CPU)
    assert got.transpose(1, 2).is_contiguous()


def outliers(tokens: int, heads: int) -> list[torch.Tensor]:
    """N(0, 1) + N(0, 100) * Bernoulli(0.001)."""
    return [
        torch.randn(1, heads, tokens, 64)
        + 10 * torch.randn(1, heads, tokens, 64) * (torch.rand(1, heads, tokens, 64) < 0.001)
        for _ in range(3)
    ]


def test_finer_steps_help_with_outliers() -> None:
    """Each of INT8 scores and a Hadamard matrix brings outliers nearer to float64."""
    from lp_inductor.kernels.triton.layer import attention_layer

    query, key, value = outliers(256, 1)
    want = torch.nn.functional.scaled_dot_product_attention(
        query.double(), key.double(), value.double()
    )

    def rmse(**options: object) -> float:
        out = attention_layer(query, key, value, out_dtype=torch.float32, **options)  # type: ignore[arg-type]
        return float((out - want).square().mean().sqrt())

    plain, spread = rmse(), rmse(hadamard_qk=True)
    assert rmse(qk_dtype=torch.int8, hadamard_qk=True) < 0.8 * spread
    assert spread < 0.9 * plain
