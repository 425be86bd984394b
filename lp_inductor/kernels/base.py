"""The interface every attention kernel stands behind."""

from __future__ import annotations

import abc
from dataclasses import dataclass

import torch
from torch import Tensor

from lp_inductor.kernels.adapters import Adapter
from lp_inductor.passes.result import OK, Miss, Ok
from lp_inductor.passes.site import AttentionCall, MaskPart
from lp_inductor.visibility import Visibility

__all__ = ["Adapter", "AttentionCall", "Kernel", "Library", "MaskPart", "Visibility"]


@dataclass(frozen=True)
class Library:
    """A shared library of C++ operators that code needs loaded before it runs.

    Attributes:
        name: what users call it, such as the package that carries it.
        operators: those of its operators that are called, ``"namespace::name"``. Each is defined
            and implemented in C++. AOTInductor itself calls those that return one tensor.
        adapters: for operators that it does not call.
    """

    name: str
    operators: tuple[str, ...]
    adapters: tuple[Adapter, ...] = ()


class Kernel(abc.ABC):
    """An FP8 attention kernel: its name, where it can run, what it can serve, and how to call it.

    Subclass it and pass an instance to :func:`lp_inductor.register_kernel`.
    """

    #: The name a configuration chooses it by.
    name: str
    #: Changes whenever results may change: part of every cache key.
    version: str = "1"
    #: What one quantisation scale may cover, the preferred first: "per_head" or "per_block"
    #: (:class:`lp_inductor.quantization.Quantization`).
    granularities: tuple[str, ...] = ("per_head",)
    #: The number formats of query and key it takes.
    qk_dtypes: frozenset[torch.dtype] = frozenset({torch.float8_e4m3fn})
    #: Fewest key tokens at which the kernel pays against bf16 attention.
    min_seq_len: int = 0
    #: The name under which the table of measured crossovers has the kernel, which then counts
    #: instead of ``min_seq_len``.
    measured_as: str | None = None
    #: Whether calls go through ``aten._scaled_dot_product_flash_attention.quantized`` where that
    #: can say what is meant; it cannot carry the mean of the values.
    aten_overload: bool = True
    #: The parts of masks it takes, in any combination.
    masks: frozenset[MaskPart] = frozenset({MaskPart.CAUSAL})
    #: Whether ``run`` adds ``v_mean`` itself; otherwise that happens behind it, in float32.
    adds_mean: bool = False
    #: Whether ``run`` may be traced into a graph whose code then runs without Python: tensor
    #: operations, Triton kernels, and operators of ``libraries``; nothing that looks at data.
    #: Each class says so for itself: what a subclass changes may not be.
    portable: bool = False

    def __init_subclass__(cls, **kwargs: object) -> None:
        """Let ``portable`` be False unless the class itself says otherwise."""
        super().__init_subclass__(**kwargs)
        if "portable" not in vars(cls):
            cls.portable = False

    @property
    def libraries(self) -> tuple[Library, ...]:
        """What a package that embeds ``run`` needs loaded; it gets that only if it is allowed."""
        return ()

    def embeds(self, call: AttentionCall) -> Ok | Miss:
        """Whether ``run``, if ``portable``, may be traced for this call with its open sizes."""
        return OK

    @abc.abstractmethod
    def availability(self, device: torch.device) -> Ok | Miss:
        """Whether the kernel can run on ``device`` at all: packages, architecture."""

    def supports(self, call: AttentionCall) -> Ok | Miss:
        """Whether the kernel serves this call: shapes and dtypes. Masks are checked before."""
        return OK

    @abc.abstractmethod
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
        """Attention over quantised operands.

        Args:
            query: (batch, heads, query_tokens, head_dim), of a dtype in ``qk_dtypes``.
            key: (batch, kv_heads, key_tokens, head_dim), likewise; kv_heads divides heads.
            value: (batch, kv_heads, key_tokens, value_head_dim), float8_e4m3fn.
            q_descale, k_descale, v_descale: float32. With scales per head (batch, kv_heads); those
                of other granularities in :func:`lp_inductor.reference.expand_descale`.
            v_mean: (batch, kv_heads, 1, value_head_dim), float32, to be added to the result of
                every query that sees a key; None unless ``adds_mean``.
            visible: which keys each query sees, of the parts that ``masks`` names.
            scale: of the scores; None: head_dim ** -0.5.
            out_dtype: of the result.

        Returns:
            (batch, heads, query_tokens, value_head_dim) in ``out_dtype``, any strides; zeros for
            queries that see no key.
        """

    def identity(self) -> str:
        """Name and version, for cache keys."""
        return f"{self.name}@{self.version}"
