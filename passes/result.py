"""What a matcher, prover or kernel answers: a match, :class:`Ok`, or a :class:`Miss` with a code.

Codes are part of the public interface: they appear in reports, are documented one by one in
``docs/misses.md`` and keep their meaning between releases.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field


class MissCode(enum.Enum):
    """Why an attention site, or the RoPE in front of it, was left as it was."""

    # The call itself
    NEEDS_GRAD = "a gradient must flow through the attention; FP8 attention is forward only"
    DROPOUT = "dropout_p is not the constant 0"
    RANK = "query, key and value are not all 4-dimensional (batch, heads, tokens, head_dim)"
    DTYPE = "query, key and value do not share one of the dtypes bfloat16, float16, float32"
    DEVICE = "query, key and value do not live on one CPU or CUDA device"
    SUBCLASS = "an operand is a tensor subclass, or batched by torch.vmap"
    SUBGRAPH = "the call sits in a higher-order operator whose subgraphs are not open to capture"
    BACKEND_FORCED = "an sdpa_kernel(...) context chooses the attention backend"
    FAST_PATH = "a fused operator of PyTorch's transformer fast path holds the attention"
    # Attention that is written out as matmul, softmax, matmul
    SCORE_FORM = "scores or probabilities are changed in a way that SDPA has not"
    SCORES_USED = "scores or probabilities are needed elsewhere too"
    SOFTCAP = "scores are capped by tanh, which no kernel serves"
    # Shapes
    HEAD_DIM = "the kernel does not serve this head_dim"
    GQA = "key/value heads are not a grouped broadcast of fewer heads"
    EMPTY = "an operand has no elements"
    # RoPE: something rotates lanes of Q or K, and stays where it is (Site.rope_miss)
    ROPE_FORM = "lanes are mixed, but not as one half-split or interleaved rotation"
    ROPE_TABLES_DIFFER = "query and key are rotated with different tables"
    ROPE_HALVES_DIFFER = "the two lanes of a pair are rotated by different angles"
    ROPE_TABLE_AXES = "no tensor holds the table over its lanes and over batch, heads or tokens"
    ROPE_OUTPUT_USED = "the rotated tensor is needed elsewhere too"
    # Masks
    MASK_IS_DATA = "the mask depends on run-time data, and the kernel takes no mask tensor"
    MASK_NOT_PROVED = "the mask's form is not proved, and the kernel takes no mask tensor"
    MASK_FORM = "the mask is a known form that the kernel does not serve"
    # Decision
    SKIPPED = "the configuration's skip patterns name this module"
    DECODE = "one query token: reading the cache is all the work there is, and FP8 saves none of it"
    SHORT_SEQUENCE = "fewer key tokens than min_seq_len: FP8 would not pay"
    DYNAMIC_DIM = "an exported program leaves a size open that the rewrite would have to fix"
    NOT_PORTABLE = "the kernel cannot be part of a package that runs without Python"
    NOT_FASTER = "FP8 was not measured to be faster for such calls on this card"
    NO_KERNEL = "no registered kernel serves this device"
    KERNEL_UNAVAILABLE = "the kernel cannot run here"
    KERNEL_UNSUPPORTED = "the kernel does not serve this call"


@dataclass(frozen=True)
class Ok:
    """A check passed."""


OK = Ok()


@dataclass(frozen=True)
class Miss:
    """A check failed: the stable ``code`` says why, ``detail`` says where.

    ``detail`` may be given as a callable; it is evaluated only when somebody reads it.
    """

    code: MissCode
    _detail: str | Callable[[], str] = field(default="", repr=False)

    @property
    def detail(self) -> str:
        """What exactly was found, in words."""
        return self._detail() if callable(self._detail) else self._detail

    def __str__(self) -> str:
        detail = self.detail
        return f"{self.code.name}: {detail}" if detail else f"{self.code.name}: {self.code.value}"
