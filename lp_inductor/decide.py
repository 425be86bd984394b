"""Decide whether a matched site is rewritten, and by which kernel."""

from __future__ import annotations

import functools
import logging

from lp_inductor.config import Fp8Config
from lp_inductor.kernels import choose_kernel, granularity_of
from lp_inductor.passes.pipeline import Decision
from lp_inductor.passes.result import OK, Miss, MissCode, Ok
from lp_inductor.passes.site import AttentionCall

log = logging.getLogger("lp_inductor")


class Decider:
    """Decides for one configuration."""

    def __init__(self, config: Fp8Config) -> None:
        self._config = config

    def __call__(self, module: str, call: AttentionCall) -> Decision | Miss:
        """The kernel that serves ``call``, or why the site is left alone."""
        if self._config.skips(module):
            return Miss(MissCode.SKIPPED, f"skip={self._config.skip}")
        kernel = choose_kernel(self._config, call)
        if isinstance(kernel, Miss):
            return kernel
        for verdict in (self._check_decode(call), self._check_length(call, kernel.min_seq_len)):
            if isinstance(verdict, Miss):
                return verdict
        if kernel.name == "reference" and self._config.kernel == "auto":
            _tell_about_reference(call.device.type)
        granularity = granularity_of(kernel, self._config)
        assert granularity is not None
        return Decision(kernel.name, self._config.quantization(module, granularity))

    def _check_decode(self, call: AttentionCall) -> Ok | Miss:
        """A single query reads each key once: quantising the keys would read them twice.

        A symbolic length is never one (torch.compile compiles lengths of one apart).
        """
        if self._config.force or not isinstance(call.query_len, int) or call.query_len != 1:
            return OK
        return Miss(MissCode.DECODE, f"{call.key_len} key tokens")

    def _check_length(self, call: AttentionCall, measured: int) -> Ok | Miss:
        """Compare the key length with the bound; a symbolic length becomes a guard on it."""
        configured = self._config.min_seq_len
        bound = measured if configured is None else configured
        if self._config.force or bound <= 1 or call.key_len >= bound:
            return OK
        return Miss(MissCode.SHORT_SEQUENCE, f"{call.key_len} key tokens, min_seq_len={bound}")


@functools.cache
def _tell_about_reference(device_type: str) -> None:
    """Say once that a CPU gets FP8's numerics, not its speed."""
    log.warning(
        "%s has no FP8 units: attention runs through the reference kernel, with the rewrites "
        "and the numerics of FP8 but not its speed",
        device_type,
    )
