"""FlashAttention-3 in FP8, from whichever of its packages is installed.

==============  =====================  ==================================================
package         module, operator       what it is
==============  =====================  ==================================================
flash_attn_3    flash_attn_interface,  FlashAttention-3 as built from the folder hopper/ of
                flash_attn_3::fwd      the flash-attention repository
fa3-fwd         fa3_fwd_interface,     a wheel of its forward pass alone, built without
                fa3_fwd::fwd           windows. PyTorch's own activation refuses it
==============  =====================  ==================================================

The C++ operator is called by keyword, past the packages' Python: no autograd function and no
synchronisation with the host. So it runs inside CUDA graphs. A package calls it from C++, where
its library is allowed and loaded.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lp_inductor.kernels.adapters import Adapter
from lp_inductor.kernels.base import AttentionCall, Library, MaskPart
from lp_inductor.kernels.flash import FlashKernel, Window, is_traced
from lp_inductor.kernels.installed import ABSENT, capability_of, fingerprint, is_installed
from lp_inductor.passes.result import OK, Miss, MissCode, Ok

_CAPABILITY = (9, 0)
#: FP8 operands are loaded in units of 16 bytes.
_HEAD_DIM_MULTIPLE = 16
#: Head sizes that kernels are compiled for; sizes between are padded on the chip.
_HEAD_DIMS = (64, 96, 128, 192, 256)
#: Arguments of the operator that are given by name.
_ARGUMENTS = frozenset(
    {"q", "k", "v", "q_descale", "k_descale", "v_descale", "softmax_scale", "is_causal"}
    | {"window_size_left", "window_size_right", "num_splits"}
)


#: What a package calls in place of the library's operator, which also hands back what it is given.
#: Only an :class:`Adapter` implements it.
_OPERATOR = "lp_inductor::fa3_forward"
_lib = torch.library.Library("lp_inductor", "FRAGMENT")
_lib.define(
    "fa3_forward(Tensor q, Tensor k, Tensor v, Tensor q_descale, Tensor k_descale, "
    "Tensor v_descale, float? softmax_scale, bool is_causal, int window_size_left, "
    "int window_size_right) -> Tensor",
    tags=(torch.Tag.needs_exact_strides,),
)


def _fa3_forward_fake(query: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:
    return query.new_empty((*query.shape[:3], value.shape[3]), dtype=torch.bfloat16)


torch.library.register_fake(_OPERATOR, _fa3_forward_fake, lib=_lib)


@dataclass(frozen=True)
class Fa3Library:
    """One package of FA3.

    Attributes:
        distribution: its name to pip.
        module: top-level module whose import registers the operator.
        namespace: of the operator ``fwd``.
        config: module that says which parts the build has; written when it is built.
    """

    distribution: str
    module: str
    namespace: str
    config: str

    def flags(self) -> Mapping[str, Any] | None:
        """What the build was told to leave out; None where it does not say."""
        if not is_installed(self.config):
            return None
        try:
            flags = importlib.import_module(self.config).CONFIG["build_flags"]
        except (ImportError, AttributeError, KeyError, TypeError):
            return None
        return flags if isinstance(flags, Mapping) else None

    def operator(self) -> Any:
        """The C++ operator; importing the module loads it.

        Raises:
            ImportError, OSError, RuntimeError: if the package cannot be loaded.
            AttributeError: if it has no such operator.
        """
        importlib.import_module(self.module)
        return getattr(torch.ops, self.namespace).fwd.default


#: In order of preference: the official build may know windows.
LIBRARIES = (
    Fa3Library("flash_attn_3", "flash_attn_interface", "flash_attn_3", "flash_attn_config"),
    Fa3Library("fa3-fwd", "fa3_fwd_interface", "fa3_fwd", "fa3_fwd_config"),
)


class Fa3Kernel(FlashKernel):
    """FlashAttention-3's FP8 forward pass.

    Compute capability 9.0. Head sizes that are multiples of 16 up to 256; values of another size
    than queries only where FA3 has a kernel for the pair. Any grouping of heads. Causal masks
    and, where the build has them, windows; no mask tensors. Scales per (batch, key/value head).
    Results are bfloat16, converted where another dtype is asked for.
    """

    name = "fa3"
    measured_as = "fa3"
    masks = frozenset({MaskPart.CAUSAL, MaskPart.BAND})
    portable = True

    def __init__(self, libraries: tuple[Fa3Library, ...] = LIBRARIES) -> None:
        """Look for these packages, the first that is installed wins."""
        self._libraries = libraries
        self._loaded: tuple[Fa3Library, Any] | None = None

    def availability(self, device: torch.device) -> Ok | Miss:
        """On compute capability 9.0, with a package of FA3 that loads and has FP8."""
        library = self.library()
        if device.type != "cuda":
            return _unavailable(f"FA3 needs compute capability 9.0, not {device.type}")
        if library is None:
            names = " or ".join(library.distribution for library in self._libraries)
            return _unavailable(f"none of its packages is installed: {names}")
        if capability_of(device) != _CAPABILITY:
            return _unavailable(f"FA3 needs compute capability 9.0, not {capability_of(device)}")
        return self._check_build(library)

    @property
    def libraries(self) -> tuple[Library, ...]:
        """The package that is used, or where none is installed, would be."""
        library = self.library() or next(iter(self._libraries), None)
        if library is None:
            return ()
        target = f"{library.namespace}::fwd"
        return (Library(library.distribution, (target,), (Adapter(_OPERATOR, target),)),)

    def embeds(self, call: AttentionCall) -> Ok | Miss:
        """Where a window begins and ends is worked out from lengths, which a package must know."""
        lengths = (call.query_len, call.key_len)
        if MaskPart.BAND not in call.mask or all(isinstance(n, int) for n in lengths):
            return OK
        return Miss(MissCode.DYNAMIC_DIM, "FA3 in a package has windows over fixed lengths only")

    def _check_build(self, library: Fa3Library) -> Ok | Miss:
        if _is_off(library, "FP8"):
            return _unavailable(f"{library.distribution} was built without FP8")
        try:
            operator = library.operator()
        except (ImportError, OSError, RuntimeError) as error:
            return _unavailable(f"{library.module} does not load: {error}")
        except AttributeError:
            return _unavailable(f"{library.module} has no operator {library.namespace}::fwd")
        missing = _ARGUMENTS - {argument.name for argument in operator._schema.arguments}
        if missing:
            return _unavailable(f"{library.namespace}::fwd does not take {sorted(missing)}")
        return OK

    def supports(self, call: AttentionCall) -> Ok | Miss:
        """Head sizes that the build has kernels for, and windows only if it has them."""
        library = self.library()
        if library is None:
            return _unavailable("no package of FA3 is installed")
        if MaskPart.BAND in call.mask and not _has_windows(library):
            return Miss(
                MissCode.MASK_FORM, f"{library.distribution} was built without local windows"
            )
        return _check_head_dims(library, call.head_dim, call.value_head_dim)

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
        """Call ``fwd``. The library chooses the number of splits from shapes alone."""
        library, operator = self._load()
        if window.is_local and not _has_windows(library):
            # The operator would refuse, or, built from other sources, read it as it likes.
            raise ValueError(f"{library.distribution} was built without local windows")
        arguments: dict[str, Any] = {
            "q_descale": q_descale,
            "k_descale": k_descale,
            "v_descale": v_descale,
            "softmax_scale": scale,
            "is_causal": window.is_causal,
            "window_size_left": -1 if window.left is None else window.left,
            "window_size_right": -1 if window.right is None else window.right,
        }
        if is_traced():
            traced: Tensor = torch.ops.lp_inductor.fa3_forward(query, key, value, **arguments)
            return traced
        out: Tensor = operator(query, key, value, **arguments, num_splits=0)[0]
        return out

    def library(self) -> Fa3Library | None:
        """The package that is used; None where none is installed."""
        if self._loaded is not None:
            return self._loaded[0]
        return next((lib for lib in self._libraries if is_installed(lib.module)), None)

    def identity(self) -> str:
        """Name, version, and the package with its version and contents."""
        library = self.library()
        if library is None:
            return f"{super().identity()}+{ABSENT}"
        return f"{super().identity()}+{fingerprint(library.distribution, library.module)}"

    def _load(self) -> tuple[Fa3Library, Any]:
        if self._loaded is None:
            library = self.library()
            if library is None:
                raise RuntimeError("no package of FA3 is installed")
            self._loaded = library, library.operator()
        return self._loaded


def _unavailable(detail: str) -> Miss:
    return Miss(MissCode.KERNEL_UNAVAILABLE, detail)


def _is_off(library: Fa3Library, feature: str) -> bool:
    """Whether the build says that it leaves a feature out (the packages spell the flag twice)."""
    flags = library.flags() or {}
    spellings = (f"FLASHATTENTION_DISABLE_{feature}", f"FLASH_ATTENTION_DISABLE_{feature}")
    return any(bool(flags.get(spelling)) for spelling in spellings)


def _has_windows(library: Fa3Library) -> bool:
    """A build that does not say what it has is not trusted with windows."""
    return library.flags() is not None and not _is_off(library, "LOCAL")


def _check_head_dims(library: Fa3Library, head_dim: int, value_head_dim: int) -> Ok | Miss:
    sizes = [size for size in _HEAD_DIMS if not _is_off(library, f"HDIM{size}")]
    largest = max(sizes, default=0)
    for name, size in (("head_dim", head_dim), ("value head_dim", value_head_dim)):
        if size % _HEAD_DIM_MULTIPLE or size > largest:
            return Miss(MissCode.HEAD_DIM, f"{name} {size} is not a multiple of 16 up to {largest}")
    if head_dim == value_head_dim:
        return OK
    # The one pair of sizes that has an FP8 kernel. Of head_dim <= 64 with larger values the
    # library promises more than its FP8 dispatch has: it would run the kernel for 64 and 64.
    has_pair = 192 in sizes and not _is_off(library, "HDIMDIFF192")
    if has_pair and 128 < head_dim <= 192 and 96 < value_head_dim <= 128:
        return OK
    return Miss(
        MissCode.HEAD_DIM, f"FA3 has no FP8 kernel for head_dim {head_dim} with {value_head_dim}"
    )
