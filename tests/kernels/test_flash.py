"""Kernels of flash-attention libraries, through stand-ins with the libraries' arguments."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import lp_inductor
from lp_inductor import (
    Fp8Config,
    KernelError,
    MaskPart,
    Miss,
    MissCode,
    Ok,
    backend,
)
from lp_inductor.kernels import choose_kernel
from lp_inductor.kernels.fa3 import LIBRARIES, Fa3Kernel, Fa3Library
from lp_inductor.kernels.flash import window_of
from lp_inductor.visibility import Visibility
from tests import models, near_misses
from tests.helpers import compile_fp8, sqnr
from tests.kernels.flash_checks import CUDA, capability, expected, quantized, reason, run
from tests.kernels.flash_standins import SCHEMA, Operator, Packages, hidden_keys, operator_in
from tests.test_kernels import call
from tests.test_rewrites import MIN_DB, qkv

NAMESPACE = "standin_fa3"


@pytest.fixture
def operator() -> Iterator[Operator]:
    """FA3's operator under a name of its own."""
    with operator_in(NAMESPACE) as made:
        yield made


# --- windows --------------------------------------------------------------------------------------


@pytest.mark.parametrize("query_len", [1, 2, 5])
@pytest.mark.parametrize("key_len", [1, 3, 5, 8])
def test_every_band_is_a_window(query_len: int, key_len: int) -> None:
    """Exhaustively: the window shows each query exactly the keys of the band."""
    bounds = [None, *range(-9, 10)]
    for lower, upper in itertools.product(bounds, bounds):
        visible = Visibility(lower, upper)
        wanted = visible.band(query_len, key_len, torch.device("cpu"))
        window = window_of(visible, query_len, key_len)
        (first, last), (start, stop) = window.rows, window.keys
        found = torch.zeros_like(wanted)
        if not window.is_empty:
            assert (window.left or 0) >= 0 and (window.right or 0) >= 0
            sides = [-1 if side is None else side for side in (window.left, window.right)]
            found[first:last, start:stop] = ~hidden_keys(last - first, stop - start, *sides)
            assert wanted[first:last].any(-1).all()
        assert torch.equal(found, wanted), (visible, window)


@pytest.mark.parametrize(
    ("visible", "lengths", "kind"),
    [
        (Visibility(), (5, 9), "full"),
        (Visibility(upper=0), (7, 7), "causal"),
        (Visibility(upper=0), (5, 9), "causal"),  # the last keys are never seen
        (Visibility(upper=4), (5, 9), "causal"),  # aligned at the last query and key
        (Visibility(upper=0), (9, 5), "local"),
        (Visibility(lower=-2, upper=0), (9, 9), "local"),
        (Visibility(lower=-8, upper=0), (9, 9), "causal"),
        (Visibility(lower=-8, upper=8), (9, 9), "full"),
    ],
)
def test_windows_are_asked_for_only_where_needed(
    visible: Visibility, lengths: tuple[int, int], kind: str
) -> None:
    window = window_of(visible, *lengths)
    assert (window.is_causal, window.is_local) == (kind == "causal", kind == "local")


@pytest.mark.parametrize(
    "visible", [Visibility(chunk=4), Visibility(tensor=torch.ones(1, 1, 1, 4))]
)
def test_a_window_is_no_other_mask(visible: Visibility) -> None:
    with pytest.raises(ValueError, match="chunks and mask tensors"):
        window_of(visible, 4, 4)


# --- FA3: the call --------------------------------------------------------------------------------

BANDS = {
    "full": Visibility(),
    "causal": Visibility(upper=0),
    "bottom_right": Visibility(upper=4),
    "window": Visibility(lower=-3, upper=0),
    "both_sides": Visibility(lower=-3, upper=5),
    "hides_queries": Visibility(upper=-3),
    "hides_the_last_queries": Visibility(lower=3),
    "hides_all": Visibility(lower=40),
}


@pytest.mark.parametrize("lengths", [(12, 12), (8, 12), (12, 8)])
@pytest.mark.parametrize("band", BANDS)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_fa3_gets_what_it_needs(
    packages: Packages, operator: Operator, band: str, lengths: tuple[int, int], kv_heads: int
) -> None:
    kernel = Fa3Kernel((packages.fa3(),))
    operands, visible = quantized(*lengths, kv_heads=kv_heads), BANDS[band]
    out = run(kernel, operands, visible)
    wanted = expected(operands, visible)
    assert out.shape == wanted.shape and out.dtype == torch.bfloat16
    assert out.transpose(1, 2).is_contiguous()
    assert torch.equal(out == 0, wanted == 0)
    if band != "hides_all":
        assert sqnr(wanted, out) > 45


def test_fa3_is_called_by_the_libraries_conventions(packages: Packages, operator: Operator) -> None:
    operands = quantized(heads=4, kv_heads=2, query_len=8, key_len=12)
    run(Fa3Kernel((packages.fa3(),)), operands, Visibility(upper=4), scale=0.3)
    (got,) = operator.calls
    q, k, v = (got[name] for name in "qkv")
    assert (q.shape, k.shape, v.shape) == ((2, 8, 4, 16), (2, 12, 2, 16), (2, 12, 2, 16))
    assert q.data_ptr() == operands[0].data_ptr(), "operands are not copied"
    for name, wanted in zip(("q_descale", "k_descale", "v_descale"), operands[3:6], strict=True):
        assert got[name].data_ptr() == wanted.data_ptr()
    assert (got["is_causal"], got["window_size_left"], got["window_size_right"]) == (True, -1, 0)
    assert got["softmax_scale"] == pytest.approx(0.3)


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("with_mean", [True, False])
def test_fa3_answers_in_the_dtype_asked_for(
    packages: Packages, operator: Operator, out_dtype: torch.dtype, with_mean: bool
) -> None:
    *operands, mean = quantized()
    given = (*operands, mean + 100 if with_mean else None)
    kernel = Fa3Kernel((packages.fa3(),))
    out = run(kernel, given, Visibility(upper=0), out_dtype=out_dtype)
    assert out.dtype == out_dtype
    wanted = expected(given, Visibility(upper=0))
    # The mean is added in float32: rounded once, at the end.
    rounding = {torch.bfloat16: 50, torch.float16: 65, torch.float32: 85}[out_dtype]
    assert sqnr(wanted, out) > (rounding if with_mean else 45)


@pytest.mark.parametrize("layout", ["bhsd", "dim_outside", "odd_head_stride", "odd_address"])
def test_fa3_takes_any_strides(packages: Packages, operator: Operator, layout: str) -> None:
    *tensors, mean = quantized()

    def stored(x: Tensor) -> Tensor:
        if layout == "bhsd":
            return x.contiguous()
        if layout == "dim_outside":
            return x.transpose(2, 3).contiguous().transpose(2, 3)
        wider = x.new_empty(*x.shape[:3], x.shape[3] + (8 if layout == "odd_head_stride" else 16))
        start = 0 if layout == "odd_head_stride" else 8
        view = wider[..., start : start + x.shape[3]]
        view.copy_(x)
        return view

    moved = (*(stored(t) for t in tensors[:3]), *tensors[3:], mean)
    kernel = Fa3Kernel((packages.fa3(),))
    visible = Visibility(upper=0)
    assert torch.equal(run(kernel, moved, visible), run(kernel, (*tensors, mean), visible))


# --- FA3: where it is available -------------------------------------------------------------------


def test_fa3_is_available(
    packages: Packages, operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    capability(monkeypatch, 9)
    assert isinstance(Fa3Kernel((packages.fa3(),)).availability(CUDA), Ok)


def test_fa3_says_why_not(packages: Packages, monkeypatch: pytest.MonkeyPatch) -> None:
    library = packages.fa3()
    kernel = Fa3Kernel((library,))
    assert "9.0, not cpu" in reason(kernel.availability(torch.device("cpu")))
    capability(monkeypatch, 10)
    assert "9.0, not (10, 0)" in reason(kernel.availability(CUDA))
    assert library.module not in sys.modules, "no package is imported for another card"
    capability(monkeypatch, 9)
    assert "has no operator standin_fa3::fwd" in reason(kernel.availability(CUDA))
    nothing = Fa3Kernel((Fa3Library("fa3-x", "no_such_module", "x", "no_such_config"),))
    assert reason(nothing.availability(CUDA)) == "none of its packages is installed: fa3-x"
    assert nothing.identity() == "fa3@1+none"
    with pytest.raises(RuntimeError, match="no package of FA3"):
        run(nothing, quantized(), Visibility())


def test_fa3_that_does_not_load(packages: Packages, monkeypatch: pytest.MonkeyPatch) -> None:
    library = packages.fa3()
    packages.module(library.module, "raise ImportError('undefined symbol: _ZN3c10')")
    capability(monkeypatch, 9)
    assert "undefined symbol" in reason(Fa3Kernel((library,)).availability(CUDA))


def test_fa3_of_other_arguments(packages: Packages, monkeypatch: pytest.MonkeyPatch) -> None:
    capability(monkeypatch, 9)
    with operator_in("standin_fa3", SCHEMA.replace("int num_splits=0", "int splits=0")):
        detail = reason(Fa3Kernel((packages.fa3(),)).availability(CUDA))
    assert detail == "standin_fa3::fwd does not take ['num_splits']"


def test_fa3_without_fp8(packages: Packages, monkeypatch: pytest.MonkeyPatch) -> None:
    capability(monkeypatch, 9)
    library = packages.fa3(FLASHATTENTION_DISABLE_FP8=True)
    assert "built without FP8" in reason(Fa3Kernel((library,)).availability(CUDA))


def test_the_official_package_comes_first(packages: Packages) -> None:
    first, second = packages.fa3("standin_official"), packages.fa3("standin_forward")
    assert Fa3Kernel((first, second)).library() is first
    absent = Fa3Library("x", "no_such_module", "x", "x_config")
    assert Fa3Kernel((absent, second)).library() is second
    assert [library.distribution for library in LIBRARIES] == ["flash_attn_3", "fa3-fwd"]


def test_forcing_fa3_raises_with_the_reason() -> None:
    with pytest.raises(KernelError, match=r"'fa3' cannot run here: FA3 needs .* 9\.0, not cpu"):
        choose_kernel(Fp8Config(kernel="fa3"), call())


# --- FA3: what it serves --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "sizes", "served"),
    [
        ({}, (64, 64), True),
        ({}, (80, 80), True),
        ({}, (256, 256), True),
        ({}, (192, 128), True),
        ({}, (144, 112), True),
        ({}, (72, 72), False),
        ({}, (272, 272), False),
        ({}, (64, 128), False),  # FA3 would run its kernel for 64 and 64
        ({}, (64, 512), False),
        ({}, (128, 64), False),
        ({}, (192, 64), False),
        ({}, (128, 136), False),
        ({"FLASHATTENTION_DISABLE_HDIM256": True}, (256, 256), False),
        ({"FLASHATTENTION_DISABLE_HDIM256": True}, (192, 192), True),
        ({"FLASHATTENTION_DISABLE_HDIM192": True}, (192, 192), True),  # padded to 256
        ({"FLASHATTENTION_DISABLE_HDIM192": True}, (192, 128), False),
        ({"FLASHATTENTION_DISABLE_HDIMDIFF192": True}, (192, 128), False),
        ({"FLASH_ATTENTION_DISABLE_HDIMDIFF192": True}, (192, 128), False),
    ],
)
def test_head_sizes_of_fa3(
    packages: Packages, flags: dict[str, bool], sizes: tuple[int, int], served: bool
) -> None:
    verdict = Fa3Kernel((packages.fa3(**flags),)).supports(
        call(head_dim=sizes[0], value_head_dim=sizes[1])
    )
    assert isinstance(verdict, Ok) is served
    assert isinstance(verdict, Ok) or verdict.code is MissCode.HEAD_DIM


def test_windows_are_served_where_the_build_has_them(packages: Packages) -> None:
    banded = call(mask=frozenset({MaskPart.BAND}))
    without = packages.fa3("standin_without", FLASHATTENTION_DISABLE_LOCAL=True)
    silent = packages.fa3("standin_silent")
    packages.folder.joinpath("standin_silent_config.py").unlink()
    for library in (without, silent):
        verdict = Fa3Kernel((library,)).supports(banded)
        assert isinstance(verdict, Miss) and verdict.code is MissCode.MASK_FORM
        assert "without local windows" in verdict.detail
        assert isinstance(Fa3Kernel((library,)).supports(call()), Ok)
    assert isinstance(Fa3Kernel((packages.fa3("standin_with"),)).supports(banded), Ok)


def test_a_build_without_windows_is_never_asked_for_one(
    packages: Packages, operator: Operator
) -> None:
    kernel = Fa3Kernel((packages.fa3(FLASHATTENTION_DISABLE_LOCAL=True),))
    with pytest.raises(ValueError, match="without local windows"):
        run(kernel, quantized(), BANDS["window"])
    run(kernel, quantized(8, 12), BANDS["bottom_right"])
    assert len(operator.calls) == 1


# --- FA3: identity --------------------------------------------------------------------------------


def test_another_version_or_build_has_another_identity(packages: Packages) -> None:
    def identity(name: str, version: str | None, contents: str = "") -> str:
        library = packages.fa3(name)
        if version is not None:
            packages.distribution(name, version, contents)
        return Fa3Kernel((library,)).identity().replace(name, "x")

    identities = [
        identity("standin_a", "3.0.0", "abc"),
        identity("standin_b", "3.0.1", "abc"),
        identity("standin_c", "3.0.0", "abd"),
        identity("standin_d", None),
    ]
    assert len(set(identities)) == 4
    assert identity("standin_e", "3.0.0", "abc") == identities[0] == "fa3@1+x-3.0.0-abc"


def test_a_new_file_is_a_new_build(packages: Packages) -> None:
    """Where nothing is recorded, the file of the module counts."""
    library = packages.fa3()
    before = Fa3Kernel((library,)).identity()
    packages.module(library.module, "# built again")
    assert Fa3Kernel((library,)).identity() != before


class OnCpu(Fa3Kernel):
    """FA3 with its operator on a CPU."""

    name = "fa3-on-cpu"
    measured_as = None

    def availability(self, device: torch.device) -> Ok | Miss:
        """On CPUs."""
        return Ok() if device.type == "cpu" else Miss(MissCode.KERNEL_UNAVAILABLE, "CPUs only")


@pytest.fixture
def registered(packages: Packages, operator: Operator) -> Iterator[OnCpu]:
    """A registered kernel."""
    packages.distribution("standin_fa3", "1.0")
    kernel = OnCpu((packages.fa3(),))
    lp_inductor.register_kernel(kernel)
    yield kernel
    lp_inductor.unregister_kernel(kernel.name)


def test_another_version_changes_the_key(
    registered: OnCpu, packages: Packages, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = backend.cache_key(Fp8Config())
    assert backend.cache_key(Fp8Config()) == before
    (installed,) = packages.folder.glob("*.dist-info")
    installed.joinpath("METADATA").write_text(
        "Metadata-Version: 2.1\nName: standin_fa3\nVersion: 1.1\n"
    )
    assert backend.cache_key(Fp8Config()) != before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fa3_in_a_compiled_model(registered: OnCpu, operator: Operator, dtype: torch.dtype) -> None:
    operands = qkv(kv_heads=2, dtype=dtype)
    with torch.no_grad():
        (site,) = lp_inductor.explain(models.llama, *operands).sites
        result = compile_fp8(models.llama, fullgraph=True)(*operands)
    assert (site.kernel, site.mask) == ("fa3-on-cpu", "causal")
    assert result.dtype == dtype and operator.calls[-1]["is_causal"]
    assert sqnr(models.llama(*(t.double() for t in operands)), result) >= MIN_DB


def test_windows_of_a_compiled_model(registered: OnCpu, operator: Operator) -> None:
    operands = qkv()
    with torch.no_grad():
        (site,) = lp_inductor.explain(near_misses.sliding_window, *operands).sites
        result = compile_fp8(near_misses.sliding_window, fullgraph=True)(*operands)
    assert site.kernel == "fa3-on-cpu" and operator.calls[-1]["window_size_left"] >= 0
    doubles = (t.double() for t in operands)
    assert sqnr(near_misses.sliding_window(*doubles), result) >= MIN_DB


def test_nothing_is_imported_with_the_package() -> None:
    import subprocess

    code = (
        "import sys, lp_inductor; [k.identity() for k in lp_inductor.registered_kernels()]; "
        "print([n for n in sys.modules if n.startswith(('flash_attn', 'fa3', 'cudnn'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
