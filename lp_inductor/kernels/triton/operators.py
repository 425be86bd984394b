"""The quantise operators on GPUs, called outside compiled code: Triton where it has the form asked.

Compiled code does not come here: the lowerings put the kernels into it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lp_inductor import reference
from lp_inductor.quantization import FP8


def quantize(
    x: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    rope_start: int,
    rope_width: int,
    group_size: int,
    center: bool,
    *,
    scales: str = "head",
    hadamard: bool = False,
    dtype: torch.dtype | None = None,
    static_descale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`lp_inductor.reference.quantize`."""
    dtype = dtype or FP8
    if not _can_launch(x) or not _has_form(scales, dtype, group_size, center, static_descale):
        return reference.quantize(
            x, cos, sin, interleaved, rope_start, rope_width, group_size, center,
            scales=scales, hadamard=hadamard, dtype=dtype, static_descale=static_descale,
        )  # fmt: skip
    from lp_inductor.kernels.triton.operands import Operands
    from lp_inductor.kernels.triton.quantize import quantize_fine, quantize_per_head, used_blocks
    from lp_inductor.kernels.triton.rope import Rope

    rope = None
    if cos is not None and sin is not None:
        rope = Rope(cos, sin, interleaved, rope_start, rope_width)
    # A query is not centred and not cut into blocks; a key is not grouped.
    is_query = scales != "block" and not center
    if is_query:
        operands = Operands(query=x, q_rope=rope, hadamard_qk=hadamard)
    else:
        operands = Operands(key=x, k_rope=rope, hadamard_qk=hadamard)
    options: dict[str, Any] = {"center_key": center, "center_value": False}
    if scales == "head" and static_descale is None:
        done = quantize_per_head(operands, group_size=group_size, **options)
    else:
        given = None if static_descale is None else (static_descale,) * 3
        done = quantize_fine(operands, qk_dtype=dtype, static_descales=given, **options)
    quantized, descale = (done.query, done.q_descale) if is_query else (done.key, done.k_descale)
    assert quantized is not None
    if descale is None:
        descale = _given(x, group_size, static_descale)
    elif scales == "block":
        descale = used_blocks(descale, x)
    return quantized, descale


def quantize_centered(
    x: Tensor,
    *,
    scales: str = "head",
    hadamard: bool = False,
    static_descale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`lp_inductor.reference.quantize_centered`.

    With one scale a head, which the kernel guesses, the mean is one over a sample of the tokens.
    """
    if not _can_launch(x) or scales != "head" or static_descale is not None:
        return reference.quantize_centered(
            x, scales=scales, hadamard=hadamard, static_descale=static_descale
        )
    from lp_inductor.kernels.triton.operands import Operands
    from lp_inductor.kernels.triton.quantize import quantize_per_head

    operands = Operands(value=x, hadamard_v=hadamard)
    done = quantize_per_head(operands, center_key=False, transpose_value=False)
    assert done.value is not None and done.v_descale is not None and done.v_mean is not None
    return done.value, done.v_descale, done.v_mean


def _can_launch(x: Tensor) -> bool:
    from lp_inductor.kernels.triton.kernel import can_launch

    return x.numel() > 0 and can_launch(x.device)


def _has_form(
    scales: str, dtype: torch.dtype, group_size: int, center: bool, static: float | None
) -> bool:
    """Whether the kernels quantise one operand alone so."""
    if scales == "head":
        return (group_size == 1 or not center) and (dtype == FP8 or static is not None)
    if scales == "token":
        return dtype == torch.int8 or not center
    return dtype == FP8


def _given(x: Tensor, group_size: int, static: float | None) -> Tensor:
    assert static is not None
    shape = (x.shape[0], x.shape[1] // group_size)
    return torch.full(shape, static, dtype=torch.float32, device=x.device)
