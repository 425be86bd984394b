"""Exported programs: the same passes in front of torch.export's consumers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule

from lp_inductor.backend import Fp8Backend
from lp_inductor.config import Fp8Config
from lp_inductor.passes.capture import capture
from lp_inductor.passes.site import Site


def run_exported(
    program: ExportedProgram, config: Fp8Config, inner_compile: Callable[..., Any]
) -> list[Site]:
    """Run every pass on an exported program and hand the graph to ``inner_compile``.

    The program itself stays as it is. Shapes are the program's own, dynamic ones included.
    """
    from torch._functorch import config as functorch_config
    from torch._inductor.compile_fx import compile_fx

    gm = program.module(check_guards=False)
    assert isinstance(gm, GraphModule)
    sites = list(capture(gm))
    inputs = [n.meta["val"] for n in gm.graph.nodes if n.op == "placeholder"]
    with functorch_config.patch(enable_autograd_cache=False), torch.no_grad():
        compile_fx(
            gm,
            inputs,
            inner_compile=inner_compile,
            config_patches=Fp8Backend(config).patches(sites.extend),
        )
    return sites
