"""Decide whether a matched site is rewritten, and by which kernel."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass

import torch

from lp_inductor.config import Fp8Config
from lp_inductor.kernels import Kernel, choose_kernel, get_kernel
from lp_inductor.kernels.registry import allow_all
from lp_inductor.passes.pipeline import Decision
from lp_inductor.passes.result import OK, Miss, MissCode, Ok
from lp_inductor.passes.site import AttentionCall

log = logging.getLogger("lp_inductor")


@dataclass(frozen=True)
class PackageRules:
    """What may go into a package.

    Attributes:
        libraries: names of the shared libraries that the package may need (``Library.name``).
    """

    libraries: tuple[str, ...] = ()

    def check_kernel(self, kernel: Kernel) -> Ok | Miss:
        """Whether a package may embed the kernel."""
        if not kernel.portable:
            return Miss(MissCode.NOT_PORTABLE, f"{kernel.name} is called through Python")
        for library in kernel.libraries:
            if library.name not in self.libraries:
                return Miss(
                    MissCode.NOT_PORTABLE,
                    f"{kernel.name} needs the library {library.name!r} wherever the package is "
                    f"loaded; libraries=({library.name!r},) allows that",
                )
        return OK


class Decider:
    """Decides for one configuration, and for the rules of a package where there is to be one."""

    def __init__(self, config: Fp8Config, rules: PackageRules | None = None) -> None:
        self._config = config
        self._rules = rules

    def __call__(self, module: str, call: AttentionCall) -> Decision | Miss:
        """The kernel that serves ``call``, or why the site is left alone."""
        if self._config.skips(module):
            return Miss(MissCode.SKIPPED, f"skip={self._config.skip}")
        allowed = allow_all if self._rules is None else self._rules.check_kernel
        kernel = choose_kernel(self._config, call, allowed)
        if isinstance(kernel, Miss):
            return kernel
        for verdict in (self._check_decode(call), self._check_length(call, kernel.min_seq_len)):
            if isinstance(verdict, Miss):
                return verdict
        if kernel.name == "reference" and self._config.kernel == "auto":
            _tell_about_reference(call.device.type)
        return Decision(kernel.name, get_kernel(kernel.name).granularity)

    def _check_decode(self, call: AttentionCall) -> Ok | Miss:
        """A single query reads each key once: quantising the keys would read them twice.

        A symbolic length is never one (torch.compile compiles lengths of one apart).
        """
        if self._config.force or not isinstance(call.query_len, int) or call.query_len != 1:
            return OK
        return Miss(MissCode.DECODE, f"{call.key_len} key tokens")

    def _check_length(self, call: AttentionCall, measured: int) -> Ok | Miss:
        """Compare the key length with the bound; a symbolic length becomes a guard on it.

        A package has no guards: there only the range of a symbolic length counts.
        """
        configured = self._config.min_seq_len
        bound = measured if configured is None else configured
        if self._config.force or bound <= 1:
            return OK
        if self._rules is not None and isinstance(call.key_len, torch.SymInt):
            return _check_range(call.key_len, bound)
        if call.key_len >= bound:
            return OK
        return Miss(MissCode.SHORT_SEQUENCE, f"{call.key_len} key tokens, min_seq_len={bound}")


def _check_range(length: torch.SymInt, bound: int) -> Ok | Miss:
    """Whether every value that an exported length may have reaches the bound."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    if statically_known_true(length >= bound):
        return OK
    return Miss(
        MissCode.SHORT_SEQUENCE,
        f"{length} key tokens may be fewer than min_seq_len={bound}: export with "
        f"torch.export.Dim(..., min={bound}), or set min_seq_len",
    )


@functools.cache
def _tell_about_reference(device_type: str) -> None:
    """Say once that a CPU gets FP8's numerics, not its speed."""
    log.warning(
        "%s has no FP8 units: attention runs through the reference kernel, with the rewrites "
        "and the numerics of FP8 but not its speed",
        device_type,
    )
