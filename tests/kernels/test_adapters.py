"""Adapters: which operators they join, and what is refused. That they run: ``tests/aoti``."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lp_inductor import Adapter, AttentionCall, MaskPart, Miss, MissCode, Ok
from lp_inductor.decide import PackageRules
from lp_inductor.kernels.fa3 import Fa3Kernel
from tests.kernels.flash_standins import Packages

TARGET = (
    "target(Tensor q, Tensor(out!)? out=None, Tensor? descale=None, float? scale=None, "
    "bool causal=False, int left=-1, float cap=0.5, int? splits=3) -> (Tensor(out!), Tensor)"
)


@pytest.fixture
def operators() -> Iterator[torch.library.Library]:
    """A library of operators that lasts for a test."""
    library = torch.library.Library("lp_adapter_test", "DEF")
    library.define(TARGET)
    yield library
    library._destroy()


def adapter(own: str, target: str = "target") -> Adapter:
    return Adapter(f"lp_adapter_test::{own}", f"lp_adapter_test::{target}")


def test_what_is_handed_on_and_what_keeps_its_default(operators: torch.library.Library) -> None:
    operators.define("own(Tensor q, Tensor descale, float? scale, bool causal, int left) -> Tensor")
    cpu, cuda = adapter("own").shims()
    assert "AOTITorchError aoti_torch_cuda_own(" in cuda
    assert cuda.replace("aoti_torch_cuda_own", "aoti_torch_cpu_own") == cpu
    parameters = "AtenTensorHandle q, AtenTensorHandle descale, double* scale, int32_t causal"
    assert f"({parameters}, int64_t left, AtenTensorHandle* result)" in cpu
    assert 'aoti_torch_call_dispatcher("lp_adapter_test::target", "", stack)' in cpu
    assert "stack[1]" not in cpu.partition("call_dispatcher")[0], "no out: zero is None"
    assert "double number = 0.5" in cpu, "cap"
    assert "*reinterpret_cast<StableIValue*>(stack[7]) = static_cast<StableIValue>(3)" in cpu
    assert cpu.count("aoti_torch_delete_tensor_object") == 1, "the second result"


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ("bad(Tensor q, int other) -> Tensor", "does not take other"),
        ("bad(Tensor descale) -> Tensor", "q has no default"),
        ("bad(Tensor q, int scale) -> Tensor", "scale: int does not become"),
        ("bad(Tensor q, int? left) -> Tensor", r"left: Optional\[int\] does not become"),
        ("bad(Tensor q, Tensor[] out) -> Tensor", r"hands on no List\[Tensor\]"),
    ],
)
def test_what_is_refused(operators: torch.library.Library, own: str, message: str) -> None:
    operators.define(own)
    with pytest.raises(ValueError, match=message):
        adapter("bad").shims()


def test_a_target_that_is_not_loaded(operators: torch.library.Library) -> None:
    operators.define("own(Tensor q) -> Tensor")
    with pytest.raises(ValueError, match="there is no operator lp_adapter_test::absent"):
        adapter("own", "absent").shims()


# --- FA3 in a package -----------------------------------------------------------------------------


def call(mask: frozenset[MaskPart], tokens: int | torch.SymInt = 256) -> AttentionCall:
    return AttentionCall(
        torch.device("cuda"), torch.bfloat16, 1, 4, 2, tokens, tokens, 64, 64, mask
    )  # fmt: skip


def test_fa3_is_in_a_package_only_where_its_library_is_allowed(packages: Packages) -> None:
    kernel = Fa3Kernel((packages.fa3(),))
    (library,) = kernel.libraries
    assert (library.name, library.operators) == ("standin_fa3", ("standin_fa3::fwd",))
    refused = PackageRules().check_kernel(kernel, call(frozenset()))
    assert isinstance(refused, Miss) and refused.code is MissCode.NOT_PORTABLE
    assert "libraries=('standin_fa3',) allows that" in str(refused.detail)
    allowed = PackageRules(("standin_fa3",))
    assert isinstance(allowed.check_kernel(kernel, call(frozenset())), Ok)


def test_fa3_in_a_package_has_windows_of_known_lengths(packages: Packages) -> None:
    kernel, rules = Fa3Kernel((packages.fa3(),)), PackageRules(("standin_fa3",))
    shape_env = torch.fx.experimental.symbolic_shapes.ShapeEnv()
    tokens = shape_env.create_unbacked_symint()
    for parts, size, verdict in (
        ({MaskPart.CAUSAL}, tokens, Ok),
        ({MaskPart.BAND}, 256, Ok),
        ({MaskPart.BAND}, tokens, Miss),
    ):
        found = rules.check_kernel(kernel, call(frozenset(parts), size))
        assert isinstance(found, verdict), (parts, size)
    assert isinstance(found, Miss) and found.code is MissCode.DYNAMIC_DIM


def test_no_package_of_fa3_no_library() -> None:
    assert Fa3Kernel(()).libraries == ()
