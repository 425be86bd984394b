"""The registered kernels, and which of them serves a call."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping

import torch

from lp_inductor.config import ConfigError, Fp8Config
from lp_inductor.kernels.activated import ActivatedKernel
from lp_inductor.kernels.base import AttentionCall, Kernel, MaskPart
from lp_inductor.kernels.crossovers import Curve, measured_curves
from lp_inductor.kernels.fa3 import Fa3Kernel
from lp_inductor.kernels.fa4 import Fa4Kernel
from lp_inductor.kernels.installed import capability_of
from lp_inductor.kernels.measured import SPEEDUPS
from lp_inductor.kernels.reference import ReferenceKernel
from lp_inductor.kernels.triton.kernel import TritonKernel
from lp_inductor.passes.result import OK, Miss, MissCode, Ok
from lp_inductor.quantization import HADAMARD_DIMS

#: In the order in which "auto" asks. The reference kernel is asked on CPUs only.
_KERNELS: dict[str, Kernel] = {
    k.name: k
    for k in (ActivatedKernel(), Fa3Kernel(), Fa4Kernel(), TritonKernel(), ReferenceKernel())
}
_BUILT_IN = frozenset(_KERNELS)


class KernelError(RuntimeError):
    """A kernel that the configuration names cannot run on this machine."""


def register_kernel(kernel: Kernel) -> None:
    """Make a kernel available by its name; "auto" asks it before the built-in ones.

    Raises:
        ConfigError: if the name is empty, "auto", or taken.
    """
    if not isinstance(kernel, Kernel):
        raise ConfigError(f"expected a Kernel, got {type(kernel).__name__}")
    if not kernel.name or kernel.name == "auto" or kernel.name in _KERNELS:
        raise ConfigError(f"kernel name {kernel.name!r} is empty, reserved or taken")
    others = dict(_KERNELS)
    _KERNELS.clear()
    _KERNELS.update({kernel.name: kernel, **others})


def unregister_kernel(name: str) -> None:
    """Take back a registration. Compiled models that use the kernel fail from then on."""
    if name in _BUILT_IN:
        raise ConfigError(f"{name!r} is built in")
    get_kernel(name)
    del _KERNELS[name]


def registered_kernels() -> tuple[Kernel, ...]:
    """All kernels, in the order in which "auto" asks them."""
    return tuple(_KERNELS.values())


def get_kernel(name: str) -> Kernel:
    """The kernel of that name.

    Raises:
        ConfigError: if there is none; it names the near matches.
    """
    if name not in _KERNELS:
        near = difflib.get_close_matches(name, _KERNELS)
        hint = f"did you mean {near[0]!r}?" if near else f"registered: {', '.join(_KERNELS)}"
        raise ConfigError(f"no kernel {name!r}: {hint}")
    return _KERNELS[name]


def candidates(config: Fp8Config, call: AttentionCall) -> tuple[Kernel, ...]:
    """The kernels to ask for a call.

    The reference kernel on a GPU is slow by construction, and so are kernels for GPUs that are
    interpreted on a CPU: there they must be asked for by name.
    """
    if config.kernel != "auto":
        return (get_kernel(config.kernel),)
    if call.device.type == "cpu":
        return tuple(k for k in _KERNELS.values() if k.measured_as is None)
    return tuple(k for k in _KERNELS.values() if k.name != ReferenceKernel.name)


def allow_all(kernel: Kernel, call: AttentionCall) -> Ok | Miss:
    """No kernel is ruled out."""
    return OK


def serving_kernels(
    config: Fp8Config,
    call: AttentionCall,
    allowed: Callable[[Kernel, AttentionCall], Ok | Miss] = allow_all,
) -> tuple[Kernel, ...] | Miss:
    """The kernels that serve ``call`` in the order in which to ask, or why none does.

    ``allowed`` rules out kernels that could run, for the place where their code is to be used.

    Raises:
        KernelError: if the configuration names a kernel that cannot run on the call's device.
    """
    serving: list[Kernel] = []
    unsupported: Miss | None = None
    unavailable: list[str] = []
    for kernel in candidates(config, call):
        available = kernel.availability(call.device)
        if isinstance(available, Miss):
            if config.kernel != "auto":
                raise KernelError(f"kernel {kernel.name!r} cannot run here: {available.detail}")
            unavailable.append(f"{kernel.name}: {available.detail}")
            continue
        supported = allowed(kernel, call)
        if not isinstance(supported, Miss):
            supported = check_call(kernel, config, call)
        if isinstance(supported, Miss):
            unsupported = unsupported or supported
        else:
            serving.append(kernel)
    if serving:
        return tuple(serving)
    return unsupported or Miss(MissCode.NO_KERNEL, "; ".join(unavailable))


def choose_kernel(config: Fp8Config, call: AttentionCall) -> Kernel | Miss:
    """The kernel that serves ``call``, whether or not it pays, or why none does.

    Raises:
        KernelError: if the configuration names a kernel that cannot run on the call's device.
    """
    serving = serving_kernels(config, call)
    return serving if isinstance(serving, Miss) else prefer(serving, config, call)


def measured_as(kernel: Kernel, config: Fp8Config) -> str | None:
    """The kernel's name in the table of measured speed-ups, for the number format asked for."""
    if kernel.measured_as is None or config.qk_dtype == "fp8":
        return kernel.measured_as
    return f"{kernel.measured_as} {config.qk_dtype}"


def prefer(serving: tuple[Kernel, ...], config: Fp8Config, call: AttentionCall) -> Kernel:
    """The first of the kernels; of measured ones, that which is the fastest on long sequences."""
    first = serving[0]
    if first.measured_as is None:
        return first
    curves = curves_of(call)
    measured = {kernel: curves.get(measured_as(kernel, config) or "", {}) for kernel in serving}
    known = {kernel: curve[max(curve)] for kernel, curve in measured.items() if curve}
    return max(known, key=known.__getitem__) if known else first


def curves_of(call: AttentionCall) -> Mapping[str, Curve]:
    """The measured speed-ups of calls like this one on its device."""
    capability = capability_of(call.device)
    return {} if capability is None else measured_curves(capability, call, SPEEDUPS)


def check_call(kernel: Kernel, config: Fp8Config, call: AttentionCall) -> Ok | Miss:
    """Whether an available kernel serves ``call`` as the configuration wants it quantised."""
    quantized = check_quantization(kernel, config, call)
    if isinstance(quantized, Miss):
        return quantized
    masks = check_mask_parts(kernel, call)
    return masks if isinstance(masks, Miss) else kernel.supports(call)


def granularity_of(kernel: Kernel, config: Fp8Config) -> str | None:
    """What one scale covers where the kernel serves the configuration; None if it does not."""
    wanted = config.granularity
    if wanted == "auto":
        return kernel.granularities[0]
    return wanted if wanted in kernel.granularities else None


def check_quantization(kernel: Kernel, config: Fp8Config, call: AttentionCall) -> Ok | Miss:
    """Whether the kernel takes the scales and numbers asked for, and the head size a transform."""
    if granularity_of(kernel, config) is None:
        has = " and ".join(kernel.granularities)
        return Miss(MissCode.KERNEL_UNSUPPORTED, f"{kernel.name} has {has} scales")
    if config.qk_dtype == "int8" and torch.int8 not in kernel.qk_dtypes:
        return Miss(MissCode.KERNEL_UNSUPPORTED, f"{kernel.name} takes no int8 query and key")
    dims = {"qk": call.head_dim, "v": call.value_head_dim}
    for operands, dim in dims.items():
        if operands in config.hadamard and dim not in HADAMARD_DIMS:
            return Miss(
                MissCode.HEAD_DIM, f"no Hadamard transform of {dim} lanes, only of {HADAMARD_DIMS}"
            )
    return OK


def check_mask_parts(kernel: Kernel, call: AttentionCall) -> Ok | Miss:
    """Whether the kernel takes every part of the call's mask."""
    missing = call.mask - kernel.masks
    if not missing:
        return OK
    names = " and ".join(sorted(part.value for part in missing))
    tensors = {MaskPart.KEYS, MaskPart.BOOL, MaskPart.BIAS}
    code = MissCode.MASK_IS_DATA if missing & tensors else MissCode.MASK_FORM
    return Miss(code, f"{kernel.name} takes no mask with {names}")
