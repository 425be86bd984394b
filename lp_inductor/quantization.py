"""How the operands of one attention call are quantised: formats, scales, what comes before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

FP8 = torch.float8_e4m3fn

#: Tokens that share a scale where scales are per block; the last block may be shorter.
TOKEN_BLOCK = 128

#: Head sizes for which there is a Hadamard transform here.
HADAMARD_DIMS = (16, 32, 64, 128, 256)

#: The largest magnitude of each number format; what is larger is clamped.
LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}


@dataclass(frozen=True)
class Quantization:
    """What happens to query, key and value of one call.

    Attributes:
        granularity: "per_head", one scale for a batch entry and key/value head, all its tokens; or
            "per_block", one for each token of a query and each block of 128 keys and values.
        qk_dtype: of query and key, float8_e4m3fn or int8; the value is always float8_e4m3fn. Int8
            has a scale for each token of query and key, whatever the granularity.
        smooth_k, smooth_v: centre keys and values over the tokens.
        hadamard_qk, hadamard_v: multiply by a Hadamard matrix before rounding.
        static_descales: of query, key and value, for a whole tensor, instead of measured ones.
    """

    granularity: str = "per_head"
    qk_dtype: torch.dtype = FP8
    smooth_k: bool = True
    smooth_v: bool = True
    hadamard_qk: bool = False
    hadamard_v: bool = False
    static_descales: tuple[float, float, float] | None = None

    @property
    def query_scales(self) -> str:
        """What shares a scale of the query: see :func:`lp_inductor.reference.quantize`."""
        return self._scales("token")

    @property
    def key_scales(self) -> str:
        """What shares a scale of the key."""
        return self._scales("block")

    @property
    def value_scales(self) -> str:
        """What shares a scale of the value."""
        return "block" if self.granularity == "per_block" and not self._is_static else "head"

    def _scales(self, fine: str) -> str:
        if self._is_static:
            return "head"
        if self.qk_dtype == torch.int8:
            return "token"
        return fine if self.granularity == "per_block" else "head"

    @property
    def _is_static(self) -> bool:
        return self.static_descales is not None

    def query_options(self) -> dict[str, Any]:
        """Keyword arguments of ``lp_inductor::quantize`` for a query, but for its defaults."""
        return self._options(0, self.query_scales, self.hadamard_qk, self.qk_dtype)

    def key_options(self) -> dict[str, Any]:
        """Those for a key."""
        return self._options(1, self.key_scales, self.hadamard_qk, self.qk_dtype)

    def value_options(self) -> dict[str, Any]:
        """Those for a value, which ``quantize_centered`` takes too."""
        return self._options(2, self.value_scales, self.hadamard_v, FP8)

    def _options(
        self, operand: int, scales: str, hadamard: bool, dtype: torch.dtype
    ) -> dict[str, Any]:
        options: dict[str, Any] = {}
        if scales != "head":
            options["scales"] = scales
        if hadamard:
            options["hadamard"] = True
        if dtype != FP8:
            options["dtype"] = dtype
        if self.static_descales is not None:
            options["static_descale"] = self.static_descales[operand]
        return options

    def describe(self) -> str:
        """For reports: the granularity, then whatever is not the default."""
        parts = ["static" if self.static_descales is not None else self.granularity]
        if self.qk_dtype == torch.int8:
            parts.append("int8")
        operands = "qk" * self.hadamard_qk + "v" * self.hadamard_v
        if operands:
            parts.append(f"hadamard {operands}")
        return ", ".join(parts)
