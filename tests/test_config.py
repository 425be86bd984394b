"""Fp8Config: a wrong field, type or value raises at once and names the near matches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lp_inductor
from lp_inductor import ConfigError, Fp8Config
from lp_inductor.config import field_names, make_config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"smooth_k": 1}, "expected a bool, got int"),
        ({"force": "yes"}, "expected a bool"),
        ({"kernel": None}, "a kernel's name"),
        ({"granularity": "per_heads"}, "did you mean 'per_head'"),
        ({"granularity": 3}, "expected a string"),
        ({"qk_dtype": "fp4"}, "did you mean 'fp8'"),
        ({"hadamard": "all"}, "expected one of 'none'"),
        ({"on_miss": "rais"}, "did you mean 'raise'"),
        ({"min_seq_len": -1}, "int >= 0"),
        ({"min_seq_len": True}, "int >= 0"),
        ({"min_seq_len": "10"}, "int >= 0"),
        ({"skip": "layers.*"}, "tuple of glob patterns"),
        ({"skip": (1,)}, "must be a string"),
    ],
)
def test_wrong_values_raise(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Fp8Config(**fields)


def test_unknown_names_raise_with_near_matches() -> None:
    with pytest.raises(ConfigError, match="did you mean 'smooth_k'"):
        make_config({"smoothk": True})
    with pytest.raises(ConfigError, match="did you mean 'smooth_v'"):
        Fp8Config.from_options({"smooth_vv": True})
    with pytest.raises(ConfigError, match="max_autotune"):
        Fp8Config.from_options({"max_autotunes": True})
    with pytest.raises(ConfigError, match="expected an Fp8Config"):
        make_config(3)  # type: ignore[arg-type]


def test_options_are_split() -> None:
    config, inductor = Fp8Config.from_options({"smooth_k": False, "max_autotune": True})
    assert config == Fp8Config(smooth_k=False) and inductor == {"max_autotune": True}


def test_no_field_hides_an_inductor_option() -> None:
    assert not set(field_names()) & set(torch._inductor.config.get_config_copy())


def test_equal_hashable_and_canonical() -> None:
    a, b = Fp8Config(skip=["x.*"]), Fp8Config(skip=("x.*",))  # type: ignore[arg-type]
    assert a == b and hash(a) == hash(b) and a.canonical() == b.canonical()
    for field, value in [
        ("smooth_k", False),
        ("min_seq_len", 5),
        ("skip", ("y",)),
        ("force", True),
    ]:
        other = Fp8Config(**{field: value})
        assert other != Fp8Config() and other.canonical() != Fp8Config().canonical()
    with pytest.raises(AttributeError):
        a.kernel = "other"  # type: ignore[misc]


def test_wrong_options_reach_the_user_through_torch_compile() -> None:
    model = torch.compile(lambda x: x + 1, backend="lp_fp8", options={"smoth_k": True})
    with pytest.raises(Exception, match="did you mean 'smooth_k'"):
        model(torch.ones(2))


def test_unknown_kernel() -> None:
    with pytest.raises(ConfigError, match="did you mean 'reference'"):
        lp_inductor.compile_with_fp8_fusion(lambda x: x, Fp8Config(kernel="referense"))


def test_backend_cannot_be_passed() -> None:
    with pytest.raises(ConfigError, match="chooses the backend"):
        lp_inductor.compile_with_fp8_fusion(lambda x: x, backend="inductor")
