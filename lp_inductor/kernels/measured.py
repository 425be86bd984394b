"""Measured speed-ups over bfloat16; written by ``python -m benchmarks.crossovers``, not by hand."""

from __future__ import annotations

#: Query heads of the calls that were measured, times their batch.
HEADS = 32

#: (compute capability, head_dim, causal, grouped heads) -> kernel -> tokens -> speed-up.
SPEEDUPS: dict[tuple[tuple[int, int], int, bool, bool], dict[str, dict[int, float]]] = {}
