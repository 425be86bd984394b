"""Fp8Config: everything a user may choose, validated when it is built."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lp_inductor.quantization import FP8, Quantization

_CHOICES: dict[str, tuple[str, ...]] = {
    "granularity": ("auto", "per_head", "per_block"),
    "qk_dtype": ("fp8", "int8"),
    "hadamard": ("none", "v", "qk", "qkv"),
    "on_miss": ("ignore", "warn", "raise"),
}


class ConfigError(ValueError):
    """A configuration field has a wrong name, type or value."""


@dataclass(frozen=True)
class Fp8Config:
    """How attention is rewritten to FP8. Immutable and hashable: part of every cache key.

    Args:
        kernel: "auto", or the name of a registered kernel (``lp_inductor.registered_kernels()``).
            "auto" takes the first that can serve; a named kernel that cannot run on the machine
            raises when the model is compiled.
        granularity: what shares one quantisation scale: "per_head" (one per batch entry and
            key/value head), "per_block" (one per token of a query and per 128 keys and values) or
            "auto", which chooses by kernel.
        qk_dtype: number format of query and key: "fp8" (float8_e4m3fn), or "int8" with a scale for
            each token: more accurate, slower, and not with every kernel.
        smooth_k: centre keys over the sequence before quantisation. Exact in real arithmetic.
        smooth_v: centre values likewise, and add their mean back to the output. Exact likewise.
        fuse_rope: fuse a proved rotary embedding into quantisation. A rotation that is not proved
            stays the model's own code, as all do with False.
        hadamard: operands to multiply by a Hadamard matrix before quantisation, against outliers:
            "none", "v", "qk" or "qkv". For head_dim 16, 32, 64, 128 and 256; sites with another
            are left alone.
        static_descales: scales that are given instead of measured: tuples of a glob pattern of
            module names and the scales of query, key and value, ``x ~ quantised * descale``. The
            first pattern that fits decides; what is out of range is clamped.
        min_seq_len: rewrite only sites with at least this many key tokens; None: as measured for
            the kernel (0 for the reference kernel).
        skip: glob patterns of module names, such as ``"*.layers.0.*"``, to leave alone.
        force: rewrite wherever it is possible, even where it is not expected to pay.
        on_miss: what a site that is not rewritten does: "ignore", "warn" (once per code and
            graph, through the ``lp_inductor`` logger; a graph that comes out of Inductor's cache
            is not looked at again) or "raise" (:class:`MissError`).

    Raises:
        ConfigError: for a wrong field, type or value.
    """

    kernel: str = "auto"
    granularity: str = "auto"
    qk_dtype: str = "fp8"
    smooth_k: bool = True
    smooth_v: bool = True
    fuse_rope: bool = True
    hadamard: str = "none"
    static_descales: tuple[tuple[str, float, float, float], ...] = ()
    min_seq_len: int | None = None
    skip: tuple[str, ...] = ()
    force: bool = False
    on_miss: str = "ignore"

    def __post_init__(self) -> None:
        """Check every field, so that a wrong configuration never reaches a compiler."""
        object.__setattr__(self, "skip", _as_patterns(self.skip))
        for name in ("smooth_k", "smooth_v", "fuse_rope", "force"):
            _require_type(name, getattr(self, name), bool, "a bool")
        _require_type("kernel", self.kernel, str, "a kernel's name")
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            _require_type(name, value, str, "a string")
            if value not in choices:
                raise ConfigError(f"{name}={value!r}: {_expected(value, choices)}")
        _check_count("min_seq_len", self.min_seq_len)
        object.__setattr__(self, "static_descales", _as_descales(self.static_descales))

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> tuple[Fp8Config, dict[str, Any]]:
        """Split torch.compile's ``options`` into our fields and Inductor's own.

        Returns:
            the configuration, and the options that are Inductor's.

        Raises:
            ConfigError: for a key that neither knows; it names the near matches of both.
        """
        from torch._inductor import config as inductor_config

        fields = field_names()
        ours: dict[str, Any] = {}
        inductors: dict[str, Any] = {}
        known = inductor_config.get_config_copy()
        for key, value in options.items():
            if key in fields:
                ours[key] = value
            elif key.replace("-", "_") in known:
                inductors[key] = value
            else:
                raise ConfigError(f"unknown option {key!r}: {_expected(key, fields, known)}")
        return cls(**ours), inductors

    def skips(self, module: str) -> bool:
        """Whether a skip pattern names ``module``."""
        return any(fnmatch.fnmatchcase(module, pattern) for pattern in self.skip)

    def quantization(self, module: str, granularity: str) -> Quantization:
        """What happens to the operands of a site in ``module``, at a kernel's granularity."""
        static = None
        for pattern, *descales in self.static_descales:
            if fnmatch.fnmatchcase(module, pattern):
                static = (descales[0], descales[1], descales[2])
                break
        return Quantization(
            granularity,
            torch.int8 if self.qk_dtype == "int8" else FP8,
            self.smooth_k,
            self.smooth_v,
            "qk" in self.hadamard,
            "v" in self.hadamard,
            static,
        )

    def canonical(self) -> str:
        """One string that two configurations share exactly when they are equal."""
        return repr(sorted(dataclasses.asdict(self).items()))


def field_names() -> tuple[str, ...]:
    """The fields of Fp8Config."""
    return tuple(field.name for field in dataclasses.fields(Fp8Config))


def make_config(config: Fp8Config | Mapping[str, Any] | None) -> Fp8Config:
    """A configuration from itself, from a mapping of its fields, or the default from None."""
    if config is None:
        return Fp8Config()
    if isinstance(config, Fp8Config):
        return config
    if not isinstance(config, Mapping):
        raise ConfigError(f"expected an Fp8Config, a mapping or None, got {type(config).__name__}")
    for key in config:
        if key not in field_names():
            raise ConfigError(f"unknown field {key!r}: {_expected(key, field_names())}")
    return Fp8Config(**config)


def _as_patterns(skip: object) -> tuple[str, ...]:
    if isinstance(skip, str) or not isinstance(skip, Iterable):
        raise ConfigError(f"skip={skip!r}: expected a tuple of glob patterns")
    patterns = tuple(skip)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise ConfigError(f"skip={skip!r}: every pattern must be a string")
    return patterns


def _as_descales(given: object) -> tuple[tuple[str, float, float, float], ...]:
    expected = "expected tuples of a glob pattern and three positive scales"
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise ConfigError(f"static_descales={given!r}: {expected}")
    entries = [tuple(entry) if isinstance(entry, list | tuple) else entry for entry in given]
    for entry in entries:
        if not isinstance(entry, tuple) or len(entry) != 4 or not isinstance(entry[0], str):
            raise ConfigError(f"static_descales has {entry!r}: {expected}")
        if not all(isinstance(scale, int | float) and 0 < scale < math.inf for scale in entry[1:]):
            raise ConfigError(f"static_descales has {entry!r}: {expected}")
    return tuple((pattern, float(q), float(k), float(v)) for pattern, q, k, v in entries)


def _check_count(name: str, value: object) -> None:
    is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    if value is not None and not is_count:
        raise ConfigError(f"{name}={value!r}: expected None or an int >= 0 (tokens)")


def _require_type(name: str, value: object, expected: type, wording: str) -> None:
    if not isinstance(value, expected):
        raise ConfigError(f"{name}={value!r}: expected {wording}, got {type(value).__name__}")


def _expected(word: str, *vocabularies: Iterable[str]) -> str:
    vocabulary = [known for known_words in vocabularies for known in known_words]
    near = difflib.get_close_matches(str(word), vocabulary, n=3)
    if near:
        return "did you mean " + " or ".join(repr(match) for match in near) + "?"
    return "expected one of " + ", ".join(repr(known) for known in list(vocabularies[0]))
