"""Decide whether a matched site is rewritten, and by which kernel."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass

import torch
from torch.fx.experimental.symbolic_shapes import guard_or_false, statically_known_true

from lp_inductor.config import Fp8Config
from lp_inductor.kernels import Kernel, granularity_of
from lp_inductor.kernels.crossovers import fastest_by_length, work_conditions
from lp_inductor.kernels.measured import HEADS
from lp_inductor.kernels.registry import (
    allow_all,
    curves_of,
    measured_as,
    prefer,
    serving_kernels,
)
from lp_inductor.passes.result import OK, Miss, MissCode, Ok
from lp_inductor.passes.site import AttentionCall, Decision

log = logging.getLogger("lp_inductor")


@dataclass(frozen=True)
class PackageRules:
    """What may go into a package.

    Attributes:
        libraries: names of the shared libraries that the package may need (``Library.name``).
    """

    libraries: tuple[str, ...] = ()

    def check_kernel(self, kernel: Kernel, call: AttentionCall) -> Ok | Miss:
        """Whether a package may embed the kernel, for this call."""
        if not kernel.portable:
            return Miss(MissCode.NOT_PORTABLE, f"{kernel.name} is called through Python")
        for library in kernel.libraries:
            if library.name not in self.libraries:
                return Miss(
                    MissCode.NOT_PORTABLE,
                    f"{kernel.name} needs the library {library.name!r} wherever the package is "
                    f"loaded; libraries=({library.name!r},) allows that",
                )
        return kernel.embeds(call)


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
        serving = serving_kernels(self._config, call, allowed)
        if isinstance(serving, Miss):
            return serving
        decode = self._check_decode(call)
        if isinstance(decode, Miss):
            return decode
        kernel = self._choose(serving, call)
        if isinstance(kernel, Miss):
            return kernel
        if kernel.name == "reference" and self._config.kernel == "auto":
            _tell_about_reference(call.device.type)
        granularity = granularity_of(kernel, self._config)
        assert granularity is not None
        quantization = self._config.quantization(module, granularity)
        return Decision(kernel.name, quantization, kernel.aten_overload)

    def _check_decode(self, call: AttentionCall) -> Ok | Miss:
        """A single query reads each key once: quantising the keys would read them twice.

        A symbolic length is never one (torch.compile compiles lengths of one apart).
        """
        if self._config.force or not isinstance(call.query_len, int) or call.query_len != 1:
            return OK
        return Miss(MissCode.DECODE, f"{call.key_len} key tokens")

    def _choose(self, serving: tuple[Kernel, ...], call: AttentionCall) -> Kernel | Miss:
        """The kernel that pays most, or why none pays.

        What the configuration says of lengths counts more than what was measured.
        """
        preferred = prefer(serving, self._config, call)
        if self._config.force:
            return preferred
        bound = self._config.min_seq_len
        if bound is None and preferred.measured_as is not None:
            return self._choose_measured(serving, call)
        bound = preferred.min_seq_len if bound is None else bound
        if bound <= 1 or self._holds(call.key_len >= bound):
            return preferred
        if self._rules is not None and isinstance(call.key_len, torch.SymInt):
            return _too_short_to_export(call.key_len, bound)
        return Miss(MissCode.SHORT_SEQUENCE, f"{call.key_len} key tokens, min_seq_len={bound}")

    def _choose_measured(self, serving: tuple[Kernel, ...], call: AttentionCall) -> Kernel | Miss:
        names = {kernel: measured_as(kernel, self._config) for kernel in reversed(serving)}
        by_name = {name: kernel for kernel, name in names.items() if name is not None}
        curves = curves_of(call)
        if not any(name in curves for name in by_name):
            return Miss(
                MissCode.NOT_FASTER, f"{', '.join(map(str, by_name))} not measured for such calls"
            )
        segments = fastest_by_length(curves, [name for name in by_name if name in curves])
        for tokens, name in reversed(segments):
            if all(self._holds(condition) for condition in work_conditions(call, tokens)):
                if name is not None:
                    return by_name[name]
                break
        paying = [tokens for tokens, name in segments if name is not None]
        if not paying:
            return Miss(
                MissCode.NOT_FASTER,
                f"{', '.join(by_name)} measured no faster than bfloat16 at any length; "
                "force=True rewrites all the same",
            )
        if self._rules is not None and isinstance(call.key_len, torch.SymInt):
            return _too_short_to_export(call.key_len, paying[0])
        return Miss(
            MissCode.SHORT_SEQUENCE,
            f"{call.batch} x {call.heads} heads, {call.query_len} queries, {call.key_len} keys: "
            f"FP8 pays from {paying[0]} tokens of {HEADS} heads on",
        )

    def _holds(self, condition: bool | torch.SymBool) -> bool:
        """Whether a comparison of sizes holds; one of symbolic sizes becomes a guard.

        A package has no guards: there only what holds of every size does. Of sizes that only
        run-time data tell nothing holds.
        """
        if self._rules is not None:
            return statically_known_true(condition)
        return guard_or_false(condition)


def _too_short_to_export(length: torch.SymInt, bound: int) -> Miss:
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
