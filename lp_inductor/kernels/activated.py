"""Whatever flash-attention implementation the user has activated in PyTorch itself."""

from __future__ import annotations

import torch
from torch import Tensor

from lp_inductor.kernels.base import AttentionCall, Kernel, Visibility
from lp_inductor.passes.result import OK, Miss, MissCode, Ok

#: Head sizes the FA3 implementation behind the ATen overload takes.
_HEAD_DIM_MULTIPLE, _HEAD_DIM_MAX = 16, 256


class ActivatedKernel(Kernel):
    """``aten._scaled_dot_product_flash_attention.quantized`` as the dispatcher has it.

    The overload has no kernel of its own on CUDA: ``torch.nn.attention.
    activate_flash_attention_impl("FA3")`` plugs one in. In a compiled graph the ATen call stays
    as it is, with Inductor's own fallback lowering.
    """

    name = "activated"
    measured_as = "fa3"

    def availability(self, device: torch.device) -> Ok | Miss:
        """On CUDA devices of compute capability 9.0, once FA3 is activated."""
        if device.type != "cuda":
            return Miss(MissCode.KERNEL_UNAVAILABLE, f"no activated kernel serves {device.type}")
        active = _active_implementation()
        if active != "FA3":
            return Miss(
                MissCode.KERNEL_UNAVAILABLE,
                f'torch.nn.attention.activate_flash_attention_impl("FA3") was not called '
                f"(active: {active})",
            )
        if torch.cuda.get_device_capability(device) != (9, 0):
            return Miss(MissCode.KERNEL_UNAVAILABLE, "FA3 needs compute capability 9.0")
        return OK

    def supports(self, call: AttentionCall) -> Ok | Miss:
        """The output is bfloat16, and query, key and value share one head_dim."""
        if call.dtype != torch.bfloat16:
            return Miss(
                MissCode.KERNEL_UNSUPPORTED, f"the ATen overload returns bfloat16, not {call.dtype}"
            )
        if call.value_head_dim != call.head_dim:
            return Miss(
                MissCode.HEAD_DIM, f"value head_dim {call.value_head_dim} != {call.head_dim}"
            )
        if call.head_dim % _HEAD_DIM_MULTIPLE or call.head_dim > _HEAD_DIM_MAX:
            return Miss(
                MissCode.HEAD_DIM, f"head_dim {call.head_dim} is not a multiple of 16 up to 256"
            )
        return OK

    def run(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        q_descale: Tensor,
        k_descale: Tensor,
        v_descale: Tensor,
        *,
        v_mean: Tensor | None,
        visible: Visibility,
        scale: float | None,
        out_dtype: torch.dtype,
    ) -> Tensor:
        """Call the ATen overload."""
        out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention.quantized(
            query, key, value, q_descale, k_descale, v_descale, 0.0, visible.is_causal, False,
            scale=scale,
        )[0]  # fmt: skip
        return out.to(out_dtype)


def _active_implementation() -> str | None:
    from torch.nn import attention

    current = getattr(attention, "current_flash_attention_impl", None)
    return current() if current is not None else None
