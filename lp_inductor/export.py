"""Exported programs: packages that run without Python, and what would become of their attention.

AOTInductor runs Inductor's custom passes as torch.compile does, but hands over no graph to capture
in first. So capture is a pass too, of the one hook in front of AOTAutograd::

    pre_grad_custom_pass         CapturePass     aten.scaled_dot_product_attention -> sdpa
    joint_custom_pre_pass        AttentionPass   sdpa -> quantised attention, or stock attention
    post_grad_custom_pre_pass    LoweringPass    what Inductor compiles; nothing of ours is left
                                 PortabilityPass checks that

All are part of the configuration of one compile. AOTInductor copies that configuration for each
compile, passes included, so that a dictionary of it may be used again.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node

from lp_inductor import _compat
from lp_inductor.backend import Fp8Backend, SiteSink, cache_key
from lp_inductor.config import ConfigError, Fp8Config, make_config
from lp_inductor.decide import PackageRules
from lp_inductor.kernels import registered_kernels
from lp_inductor.package import PackageError, describe_package
from lp_inductor.passes.capture import capture
from lp_inductor.passes.result import Ok
from lp_inductor.passes.site import Site
from lp_inductor.toolchain import linked_libraries

_METADATA = "aot_inductor.metadata"
_LINKED = "aot_inductor.custom_op_libs"
_SHIMS = "aot_inductor.custom_ops_to_c_shims"


class CapturePass(CustomGraphPass):
    """Capture in front of AOTAutograd: ``pre_grad_custom_pass``."""

    def __init__(self, config: Fp8Config, record: PackageRecord, rules: PackageRules) -> None:
        self._config = config
        self._record = record
        self._rules = rules

    def __call__(self, graph: Graph) -> None:
        """Capture in one graph; Inductor comes with subgraphs before those that call them."""
        assert graph.owning_module is not None
        self._record.observe(graph)
        self._record.add(capture(graph.owning_module, exported=True))

    def uuid(self) -> str:
        """See :func:`lp_inductor.backend.cache_key`."""
        return cache_key(self._config, self._rules)


class PortabilityPass(CustomGraphPass):
    """Refuse to package what would fail when it runs; behind the lowering pass."""

    def __init__(self, adapted: Collection[Any] = ()) -> None:
        """``adapted``: operators of ours that the package calls in C++."""
        self._adapted = frozenset(adapted)

    def __call__(self, graph: Graph) -> None:
        """Look at every call of one lowered graph."""
        for node in graph.nodes:
            reason = None if node.target in self._adapted else _needs_python(node)
            if reason is not None:
                raise PackageError(f"{node.target} cannot be packaged: {reason}")

    def uuid(self) -> str:
        """It changes nothing."""
        return "lp_inductor.PortabilityPass"


def _needs_python(node: Node) -> str | None:
    """Why a call cannot work in a process without Python; None for one that can."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return None
    if target.namespace == "lp_inductor":
        return "the operator is implemented in Python"
    if target is torch.ops.aten._scaled_dot_product_flash_attention.quantized:
        return "PyTorch implements it through Python only, and AOTInductor does not call that"
    return None


class PackageRecord:
    """The sites of one compile, which AOTInductor writes into the package as they become known."""

    def __init__(self, backend: Fp8Backend, listener: SiteSink | None) -> None:
        """``listener`` is told of the sites; None: do what the configuration's ``on_miss`` says."""

        # Functions, unlike objects, stay the same when AOTInductor copies its configuration.
        def tell(sites: Sequence[Site]) -> None:
            (listener or backend.report)(sites)

        self.sites: list[Site] = []
        self._device = torch.device("cpu")
        self._tell: SiteSink = tell

    def observe(self, graph: Graph) -> None:
        """Learn for which device a graph is."""
        for node in graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, torch.Tensor) and value.device.type == "cuda":
                self._device = value.device

    def add(self, sites: Sequence[Site]) -> None:
        """Take the sites of one graph."""
        from torch._inductor import config as inductor_config

        self.sites += sites
        inductor_config.aot_inductor.metadata.update(describe_package(self.sites, self._device))
        self._tell(sites)


def aoti_inductor_configs(
    config: Fp8Config | Mapping[str, Any] | None = None,
    inductor_configs: Mapping[str, Any] | None = None,
    *,
    libraries: Collection[str] = (),
) -> dict[str, Any]:
    """Inductor's configuration for a package with FP8 attention.

    For those who call ``torch._inductor.aoti_compile_and_package(program, inductor_configs=...)``
    or ``torch._inductor.aot_compile(module, args, options=...)`` themselves.

    Args:
        config: an :class:`Fp8Config`, a mapping of its fields, or None for the default.
        inductor_configs: what else to tell Inductor; custom passes among it run behind ours.
        libraries: names of the shared libraries that the package may need loaded before it; see
            :class:`lp_inductor.Library`. Kernels that need others are not used.

    Returns:
        a dictionary that may be used for any number of compiles.

    Raises:
        ConfigError: for a wrong configuration.
    """
    from torch._inductor import config as inductor_config

    configs = _configs(make_config(config), inductor_configs or {}, _rules(libraries), None)
    if linked := linked_libraries():
        theirs = configs.get(_LINKED, inductor_config.aot_inductor.custom_op_libs)
        configs[_LINKED] = [*(theirs or ()), *linked]
    return configs


def aoti_compile_and_package(
    exported_program: ExportedProgram | Mapping[str, ExportedProgram],
    *,
    package_path: str | os.PathLike[str] | None = None,
    config: Fp8Config | Mapping[str, Any] | None = None,
    inductor_configs: Mapping[str, Any] | None = None,
    libraries: Collection[str] = (),
) -> str:
    """Compile exported programs with FP8 attention into a package that runs without Python.

    As ``torch._inductor.aoti_compile_and_package``, which see. The package also holds a report of
    its attention sites: ``python -m lp_inductor explain model.pt2``.

    Args:
        exported_program: from ``torch.export.export``, before any ``run_decompositions``; or
            several of them by name, for one package with several models.
        package_path: where to write, ending in ".pt2"; None: into Inductor's cache (one program
            only).
        config, inductor_configs, libraries: as for :func:`aoti_inductor_configs`. One
            configuration serves all programs.

    Returns:
        the path of the package.

    Raises:
        ConfigError: for a wrong configuration.
        MissError: if a site stays as it was and the configuration says ``on_miss="raise"``.
        PackageError: for a program that calls operators which work in Python only.
    """
    import torch._inductor as inductor

    patches = aoti_inductor_configs(config, inductor_configs, libraries=libraries)
    path = None if package_path is None else os.fspath(package_path)
    if isinstance(exported_program, ExportedProgram):
        with _own_errors():
            packaged: str = inductor.aoti_compile_and_package(
                exported_program, package_path=path, inductor_configs=patches
            )
        return packaged
    if path is None:
        raise ConfigError("several programs in one package need a package_path")
    from torch._inductor.package.package import package_aoti

    patches["aot_inductor.package"] = True
    with _own_errors():
        files = {name: _compile(program, patches) for name, program in exported_program.items()}
    return str(package_aoti(path, files))


@contextlib.contextmanager
def _own_errors() -> Iterator[None]:
    """Raise an error of ours as itself: Inductor wraps what its passes raise."""
    from torch._inductor.exc import InductorError

    try:
        yield
    except InductorError as error:
        if isinstance(error.inner_exception, PackageError | _compat.NewGuardError):
            raise error.inner_exception from error
        raise


def _compile(program: ExportedProgram, patches: dict[str, Any]) -> Any:
    """The files of one model of a package."""
    if program.example_inputs is None:
        raise ConfigError("an exported program needs its example_inputs to be compiled")
    args, kwargs = program.example_inputs
    module = program.module(check_guards=False)
    assert isinstance(module, GraphModule)
    return torch._inductor.aot_compile(module, args, kwargs, options=patches)


def run_exported(
    program: ExportedProgram,
    config: Fp8Config,
    inner_compile: Callable[..., Any],
    libraries: Collection[str] = (),
) -> list[Site]:
    """Run every pass on an exported program and hand the graph to ``inner_compile``.

    The program itself stays as it is. Shapes are the program's own, dynamic ones included.
    """
    from torch._inductor.compile_fx import _aoti_flatten_inputs, compile_fx_aot

    def stop(gm: GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Any:
        inner_compile(gm, example_inputs)
        raise _Done

    compile_and_stop: Any = stop
    sites: list[Site] = []
    gm = program.module(check_guards=False)
    assert isinstance(gm, GraphModule)
    assert program.example_inputs is not None
    patches = _configs(config, {}, _rules(libraries), sites.extend)
    flat_inputs, patches = _aoti_flatten_inputs(gm, *program.example_inputs, options=patches)
    try:
        compile_fx_aot(gm, flat_inputs, inner_compile=compile_and_stop, config_patches=patches)
    except _Done:
        return sites
    raise AssertionError("AOTInductor compiles exactly one graph")


class _Done(Exception):
    """There is no code to generate."""


def _configs(
    config: Fp8Config,
    inductor_configs: Mapping[str, Any],
    rules: PackageRules,
    listener: SiteSink | None,
) -> dict[str, Any]:
    from torch._inductor import config as inductor_config

    backend = Fp8Backend(config, options=inductor_configs)
    record = PackageRecord(backend, listener)
    patches = backend.patches(record.add, rules)
    theirs = patches.get("pre_grad_custom_pass", inductor_config.pre_grad_custom_pass)
    capturing = CapturePass(config, record, rules)
    patches["pre_grad_custom_pass"] = _compat.chain_passes(capturing, theirs)
    shims = _shims(rules)
    lowering = patches["post_grad_custom_pre_pass"]
    patches["post_grad_custom_pre_pass"] = _compat.chain_passes(lowering, PortabilityPass(shims))
    if shims:
        theirs = patches.get(_SHIMS, inductor_config.aot_inductor.custom_ops_to_c_shims)
        patches[_SHIMS] = {**theirs, **shims}
    patches[_METADATA] = dict(patches.get(_METADATA, inductor_config.aot_inductor.metadata))
    return patches


def _shims(rules: PackageRules) -> dict[Any, list[str]]:
    """C functions for the operators that kernels with an allowed library call through adapters."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    adapters = [
        adapter
        for kernel in registered_kernels()
        for library in kernel.libraries
        if library.name in rules.libraries and isinstance(kernel.availability(device), Ok)
        for adapter in library.adapters
    ]
    return {_overload(adapter.operator): adapter.shims() for adapter in adapters}


def _overload(name: str) -> torch._ops.OpOverload:
    """The default overload of an operator, ``"namespace::name"``."""
    namespace, _, operator = name.partition("::")
    overload = getattr(getattr(torch.ops, namespace), operator).default
    assert isinstance(overload, torch._ops.OpOverload)
    return overload


def _rules(libraries: Collection[str]) -> PackageRules:
    if isinstance(libraries, str):
        raise ConfigError(f"libraries={libraries!r}: expected a collection of names")
    return PackageRules(tuple(sorted(libraries)))
