"""The "lp_fp8" backend of torch.compile, and compile_with_fp8_fusion.

Both hand Inductor two passes through its configuration of one compile: the attention pass behind
AOTAutograd and the lowering pass behind post-grad. Nothing outside that compile changes.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, GraphModule

import lp_inductor.ops  # noqa: F401  (registers the operators)
from lp_inductor import _compat
from lp_inductor.config import ConfigError, Fp8Config, make_config
from lp_inductor.decide import Decider, PackageRules
from lp_inductor.kernels import get_kernel, registered_kernels
from lp_inductor.lowerings.attention import lower_graph, register_fallbacks
from lp_inductor.passes import capture as capture_module
from lp_inductor.passes import pipeline
from lp_inductor.passes.result import Miss
from lp_inductor.passes.site import Site

log = logging.getLogger("lp_inductor")

#: Receives the sites of every graph that is compiled.
SiteSink = Callable[[Sequence[Site]], None]


class MissError(RuntimeError):
    """A site was not rewritten, and the configuration says ``on_miss="raise"``."""


class AttentionPass(CustomGraphPass):
    """Match, prove, decide, rewrite or expand: ``joint_custom_pre_pass``.

    With ``rules`` the graph becomes a package.
    """

    def __init__(
        self, config: Fp8Config, sink: SiteSink, rules: PackageRules | None = None
    ) -> None:
        self._config = config
        self._sink = sink
        self._rules = rules

    def __call__(self, graph: Graph) -> None:
        """Run the pipeline on one functional ATen graph."""
        config, rules = self._config, self._rules
        options = pipeline.PipelineOptions(config.fuse_rope, keep_open=rules is not None)
        self._sink(pipeline.run_passes(graph, options, Decider(config, rules)))

    def uuid(self) -> str:
        """See :func:`cache_key`."""
        return cache_key(self._config, self._rules)


class LoweringPass(CustomGraphPass):
    """Lower what the attention pass wrote: ``post_grad_custom_pre_pass``.

    With ``rules`` for a package.
    """

    def __init__(self, config: Fp8Config, rules: PackageRules | None = None) -> None:
        self._config = config
        self._rules = rules

    def __call__(self, graph: Graph) -> None:
        """Lower every operator of ours in ``graph``."""
        lower_graph(graph, package=self._rules is not None)

    def uuid(self) -> str:
        """See :func:`cache_key`."""
        return cache_key(self._config, self._rules)


def source_files() -> list[Path]:
    """Every module of the package, passes and lowerings included."""
    import lp_inductor.lowerings
    import lp_inductor.passes

    rooms = (lp_inductor, lp_inductor.passes, lp_inductor.lowerings)
    folders = sorted({Path(folder) for room in rooms for folder in room.__path__})
    return sorted({path for folder in folders for path in folder.rglob("*.py")})


@functools.cache
def _source_hash() -> str:
    digest = hashlib.sha256()
    for path in source_files():
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def cache_key(config: Fp8Config, rules: PackageRules | None = None) -> str:
    """Everything that a compiled graph depends on and Inductor does not know of.

    sha256 over the package's sources, the configuration, the rules of a package, each kernel's
    name, version and availability, the versions of torch and triton, the GPU, and the enabled
    SDPA backends.
    """
    parts = [
        _source_hash(),
        config.canonical(),
        repr(rules),
        *(_kernel_identity(kernel) for kernel in registered_kernels()),
        torch.__version__,
        _compat.triton_version(),
        _compat.device_identity(),
        # A site that stays stock traces to a backend that is enabled now; Inductor's keys do
        # not say which are.
        *sorted(capture_module.enabled_backends()),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _kernel_identity(kernel: Any) -> str:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    available = not isinstance(kernel.availability(device), Miss)
    return f"{type(kernel).__module__}.{type(kernel).__qualname__} {kernel.identity()} {available}"


class Fp8Backend:
    """A torch.compile backend for one configuration, mode and set of Inductor options.

    Two backends built from equal arguments are equal, so compiling again with the same ones
    reuses what was compiled.
    """

    def __init__(
        self,
        config: Fp8Config,
        mode: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        if config.kernel != "auto":
            get_kernel(config.kernel)  # raises for an unknown name
        self.config = config
        # Inductor's own wrapper checks modes and options and knows what each mode means.
        self._inductor = torch._TorchCompileInductorWrapper(mode, dict(options or {}), None)
        self.__name__ = "lp_fp8"

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Any:
        """Compile one Dynamo graph."""
        from torch._inductor.compile_fx import compile_fx

        refused = capture_module.capture(gm)
        self.report(refused)
        return compile_fx(gm, example_inputs, config_patches=self.patches(self.report))

    def patches(self, sink: SiteSink, rules: PackageRules | None = None) -> dict[str, Any]:
        """Inductor's configuration for one compile: the user's options and our two passes.

        With ``rules`` for the compile of a package.
        """
        from torch._inductor import config as inductor_config

        register_fallbacks()
        patches = dict(self._inductor.config)
        hooks = {
            "joint_custom_pre_pass": AttentionPass(self.config, sink, rules),
            "post_grad_custom_pre_pass": LoweringPass(self.config, rules),
        }
        for name, ours in hooks.items():
            theirs = patches.get(name, getattr(inductor_config, name))
            patches[name] = _compat.chain_passes(ours, theirs)
        return patches

    def report(self, sites: Sequence[Site]) -> None:
        """Do what ``on_miss`` says about the sites of one graph."""
        if self.config.on_miss == "ignore":
            return
        missed = [(site, site.miss) for site in sites if site.miss is not None]
        if missed and self.config.on_miss == "raise":
            raise MissError("; ".join(f"{site.module}: {miss}" for site, miss in missed))
        _warn("stay as they are", missed)
        rotated = [(site, site.rope_miss) for site in sites if site.rope_miss is not None]
        _warn("leave a rotation to the model", rotated)

    def reset(self) -> None:
        """Forget CUDA graphs; called by ``torch.compiler.reset``."""
        self._inductor.reset()

    def __eq__(self, other: object) -> bool:
        """Equal configurations, modes and options compile the same code."""
        return (
            isinstance(other, Fp8Backend)
            and self.config == other.config
            and self._inductor == other._inductor
        )

    def __hash__(self) -> int:
        """By configuration; Inductor's options are not hashable."""
        return hash(self.config)


def _warn(what: str, missed: Sequence[tuple[Site, Miss]]) -> None:
    """One warning for each code."""
    for code in dict.fromkeys(miss.code for _, miss in missed):
        named = [(site, miss) for site, miss in missed if miss.code is code]
        site, miss = named[0]
        log.warning("%d attention sites %s: %s (first: %s)", len(named), what, miss, site.module)


class _LpFp8:
    """The entry point: ``torch.compile(model, backend="lp_fp8", options=..., mode=...)``."""

    __name__ = "lp_fp8"

    def __call__(
        self,
        gm: GraphModule,
        example_inputs: Sequence[Any],
        *,
        mode: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Any:
        config, inductor_options = Fp8Config.from_options(options or {})
        return Fp8Backend(config, mode, inductor_options)(gm, example_inputs)

    def reset(self) -> None:
        """Forget CUDA graphs; called by ``torch.compiler.reset``."""
        if torch.cuda.is_available():
            from torch._inductor.cudagraph_trees import reset_cudagraph_trees

            reset_cudagraph_trees()


lp_fp8 = _LpFp8()


def compile_with_fp8_fusion(
    model: Callable[..., Any],
    config: Fp8Config | Mapping[str, Any] | None = None,
    **torch_compile_kwargs: Any,
) -> Callable[..., Any]:
    """``torch.compile`` with attention rewritten to FP8.

    Args:
        model: a module or function, used for inference.
        config: an :class:`Fp8Config`, a mapping of its fields, or None for the default.
        torch_compile_kwargs: ``fullgraph``, ``dynamic``, ``mode``, ``options`` (Inductor's) and
            whatever else torch.compile takes; unlike in torch.compile, mode and options may be
            given together.

    Returns:
        the compiled model.

    Raises:
        ConfigError: for a wrong configuration, or if a backend is given.
    """
    if "backend" in torch_compile_kwargs:
        raise ConfigError("compile_with_fp8_fusion chooses the backend; do not pass one")
    mode = torch_compile_kwargs.pop("mode", None)
    options = torch_compile_kwargs.pop("options", None)
    backend = Fp8Backend(make_config(config), mode, options)
    compiled: Callable[..., Any] = torch.compile(model, backend=backend, **torch_compile_kwargs)
    return compiled
