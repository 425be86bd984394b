"""FlashAttention-4 in FP8, from the package flash-attn-4.

Not run: FlashAttention-4 takes FP8 on compute capability 10.x alone, and no such card was there.
The call follows the source of flash-attn-4 4.0.0b36, and it is tested against a stand-in of the
same signature. It is therefore kept to what that package's own FP8 benchmark checks: head sizes 64
and 128, no mask or a causal one. "auto" does not choose it: no measurement speaks for it.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lp_inductor.kernels.base import AttentionCall
from lp_inductor.kernels.flash import FlashKernel, Window
from lp_inductor.kernels.installed import ABSENT, capability_of, version_of
from lp_inductor.passes.result import OK, Miss, MissCode, Ok

_DISTRIBUTION = "flash-attn-4"
#: The package's public function takes no descales; this one, which it calls, does.
_MODULE, _FUNCTION = "flash_attn.cute.interface", "_flash_attn_fwd"
_ARGUMENTS = frozenset(
    {"q", "k", "v", "softmax_scale", "causal", "q_descale", "k_descale", "v_descale"}
)
_MAJOR = 10
_HEAD_DIMS = (64, 128)


class Fa4Kernel(FlashKernel):
    """FlashAttention-4's FP8 forward pass. Not run on a GPU yet.

    Compute capability 10.x. Head sizes 64 and 128, of values as of queries. Any grouping of
    heads. No mask, or a causal one. Scales per (batch, key/value head). Results are bfloat16,
    converted where another dtype is asked for.
    """

    name = "fa4"
    measured_as = "fa4"

    def availability(self, device: torch.device) -> Ok | Miss:
        """On compute capability 10.x, with a flash-attn-4 whose forward pass takes descales."""
        if device.type != "cuda":
            return _unavailable(f"FA4 needs compute capability 10.x, not {device.type}")
        # Its metadata, and not its modules: looking for flash_attn.cute imports flash_attn, which
        # may be FlashAttention-2 with all its kernels.
        if version_of(_DISTRIBUTION) is None:
            return _unavailable(f"{_DISTRIBUTION} is not installed")
        capability = capability_of(device)
        if capability is None or capability[0] != _MAJOR:
            return _unavailable(f"FA4 takes FP8 on compute capability 10.x, not {capability}")
        try:
            parameters = inspect.signature(_function()).parameters
        except Exception as error:  # its compiler raises what it likes on import
            return _unavailable(f"{_MODULE} does not load: {error}")
        missing = _ARGUMENTS - set(parameters)
        if missing:
            return _unavailable(f"{_MODULE}.{_FUNCTION} does not take {sorted(missing)}")
        return OK

    def supports(self, call: AttentionCall) -> Ok | Miss:
        """Head sizes 64 and 128, of values as of queries."""
        if call.head_dim in _HEAD_DIMS and call.value_head_dim == call.head_dim:
            return OK
        return Miss(
            MissCode.HEAD_DIM,
            f"FA4 is used for head_dim 64 and 128, not {call.head_dim} with {call.value_head_dim}",
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        q_descale: Tensor,
        k_descale: Tensor,
        v_descale: Tensor,
        *,
        scale: float | None,
        window: Window,
    ) -> Tensor:
        """Call the function behind ``flash_attn.cute.flash_attn_func``."""
        if window.is_local:
            raise ValueError("FA4 is not called with windows")
        out: Tensor = _function()(
            query, key, value,
            softmax_scale=scale,
            causal=window.is_causal,
            q_descale=q_descale, k_descale=k_descale, v_descale=v_descale,
        )[0]  # fmt: skip
        return out

    def identity(self) -> str:
        """Name, version, and the package's version."""
        version = version_of(_DISTRIBUTION)
        return f"{super().identity()}+{ABSENT if version is None else version}"


def _unavailable(detail: str) -> Miss:
    return Miss(MissCode.KERNEL_UNAVAILABLE, detail)


def _function() -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(importlib.import_module(_MODULE), _FUNCTION)
    return function
