"""Differences between the supported versions of torch, each with its reason."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph

GraphPass = Callable[[Graph], None]


class PassChain(CustomGraphPass):
    """Runs graph passes one after another.

    torch 2.13 takes a list of custom passes per hook; torch 2.11 takes one.
    """

    def __init__(self, passes: Iterable[GraphPass]) -> None:
        self._passes = tuple(passes)

    def __call__(self, graph: Graph) -> None:
        """Run every pass on ``graph``."""
        for graph_pass in self._passes:
            graph_pass(graph)

    def uuid(self) -> Any | None:
        """All uuids; None, which turns caching off, where a pass has none, as in Inductor."""
        uuids = [p.uuid() if isinstance(p, CustomGraphPass) else None for p in self._passes]
        return None if None in uuids else tuple(uuids)


def chain_passes(ours: GraphPass, hook: Any) -> GraphPass:
    """Our pass, followed by the pass, or list of passes, a user has set for the same hook."""
    if hook is None:
        return ours
    theirs: list[GraphPass] = list(hook) if isinstance(hook, list | tuple) else [hook]
    return PassChain([ours, *theirs])


def triton_version() -> str:
    """The installed triton's version, or "none"."""
    try:
        import triton
    except ImportError:
        return "none"
    return str(triton.__version__)


def device_identity() -> str:
    """What of the machine decides about kernels: the GPU's name and compute capability."""
    if not torch.cuda.is_available():
        return "cpu"
    return f"{torch.cuda.get_device_name()} {torch.cuda.get_device_capability()}"


class NewGuardError(RuntimeError):
    """Something asked about a symbolic size what the size's range does not answer.

    ``too_late``: the size may have been fixed to the example's by now, so nothing can go on.
    """

    def __init__(self, guard: str, too_late: bool) -> None:
        super().__init__(f"an open size would be fixed: {guard}")
        self.too_late = too_late


@contextlib.contextmanager
def no_new_guards(shape_env: Any) -> Iterator[None]:
    """Raise :class:`NewGuardError` where a guard would be added to ``shape_env``.

    torch 2.13 can refuse guards; in torch 2.11 they can only be counted afterwards.
    """
    if shape_env is None:
        yield
    elif hasattr(shape_env, "error_on_new_guards"):
        from torch.fx.experimental.symbolic_shapes import _ShapeEnvGuardError

        try:
            with shape_env.error_on_new_guards():
                yield
        except _ShapeEnvGuardError as error:
            raise NewGuardError(str(error), too_late=False) from error
    else:
        before = len(shape_env.guards)
        yield
        if len(shape_env.guards) > before:
            raise NewGuardError(str(shape_env.guards[before].expr), too_late=True)
