"""explain: what would be rewritten in a model, and why not the rest."""

from __future__ import annotations

import copy
import html
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule

from lp_inductor.backend import Fp8Backend
from lp_inductor.config import Fp8Config, make_config
from lp_inductor.passes.capture import capture
from lp_inductor.passes.result import Miss, MissCode
from lp_inductor.passes.site import Site

__all__ = ["Miss", "MissCode", "Report", "Site", "explain"]

_COLUMNS = ("#", "module", "fp8", "rope", "mask", "kernel", "scales", "query", "key", "miss")


@dataclass(frozen=True)
class Report:
    """The attention sites of a model. ``str(report)`` is a table.

    Attributes:
        sites: one :class:`Site` per attention call, graph by graph in the order of the calls.
        graphs: how many graphs the model was compiled to; more than one means graph breaks.
    """

    sites: tuple[Site, ...]
    graphs: int

    @property
    def fused(self) -> int:
        """How many sites were rewritten to FP8."""
        return sum(site.fused for site in self.sites)

    @property
    def rope_fused(self) -> int:
        """How many of those have their rotary embedding fused into quantisation."""
        return sum(site.rope is not None for site in self.sites)

    def misses(self) -> Counter[MissCode]:
        """How often each reason kept a site as it was."""
        return Counter(site.miss.code for site in self.sites if site.miss is not None)

    def rope_misses(self) -> Counter[MissCode]:
        """How often each reason left a rotation to the model's own code, at rewritten sites."""
        return Counter(site.rope_miss.code for site in self.sites if site.rope_miss is not None)

    def summary(self) -> str:
        """One line."""
        graphs = f"{self.graphs} graph" + ("s" if self.graphs != 1 else "")
        return (
            f"{self.fused}/{len(self.sites)} attention sites rewritten to FP8, "
            f"{self.rope_fused} with RoPE, {graphs}"
        )

    def __str__(self) -> str:
        """The table of sites, its summary, and what each reason means."""
        rows = [_COLUMNS, *(_row(n, site) for n, site in enumerate(self.sites))]
        widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        lines.insert(1, "  ".join("-" * width for width in widths))
        lines += ["", self.summary()]
        reasons = [*self.misses().items(), *self.rope_misses().items()]
        lines += [f"  {count} x {code.name}: {code.value}" for code, count in reasons]
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """The report as a JSON object; :meth:`from_json` reads it."""
        return {"graphs": self.graphs, "sites": [_site_as_json(site) for site in self.sites]}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Report:
        """A report from what :meth:`as_json` returned.

        Raises:
            KeyError, TypeError, ValueError: for anything else.
        """
        return cls(tuple(_site_from_json(site) for site in stored["sites"]), stored["graphs"])

    def to_html(self, path: str | Path) -> None:
        """Write the table as one self-contained HTML page to ``path``."""
        head = "".join(f"<th>{html.escape(name)}</th>" for name in _COLUMNS)
        body = "".join(_html_row(n, site) for n, site in enumerate(self.sites))
        page = (
            '<!doctype html><html lang="en"><meta charset="utf-8"><title>lp_inductor</title>'
            "<style>body{font:14px system-ui;margin:2em}table{border-collapse:collapse}"
            "td,th{padding:.3em .8em;border-bottom:1px solid #ccc;text-align:left}"
            ".miss{background:#fdecea}.fused{background:#eaf6ec}</style>"
            f"<h1>FP8 attention</h1><p>{html.escape(self.summary())}</p>"
            f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></html>"
        )
        Path(path).write_text(page, encoding="utf-8")


def _site_as_json(site: Site) -> dict[str, Any]:
    fields = dict(vars(site))
    for name in ("miss", "rope_miss"):
        miss = fields[name]
        fields[name] = None if miss is None else {"code": miss.code.name, "detail": miss.detail}
    return fields


def _site_from_json(stored: Mapping[str, Any]) -> Site:
    fields: dict[str, Any] = {}
    for key, value in stored.items():
        fields[key] = tuple(value) if isinstance(value, list) else value
    for name in ("miss", "rope_miss"):
        miss = fields[name]
        if miss is not None:
            fields[name] = Miss(MissCode[miss["code"]], miss["detail"])
    return Site(**fields)


def _row(number: int, site: Site) -> tuple[str, ...]:
    return (
        str(number),
        site.module or "-",
        "yes" if site.fused else "no",
        _rope(site),
        site.mask,
        site.kernel or "-",
        site.granularity or "-",
        _shape(site.query_shape),
        _shape(site.key_shape),
        "-" if site.miss is None else site.miss.code.name,
    )


def _rope(site: Site) -> str:
    """What is fused, and why the rest is not."""
    left = [] if site.rope_miss is None else [site.rope_miss.code.name]
    return " ".join([site.rope or "", *left]).strip() or "-"


def _shape(shape: Sequence[int | str]) -> str:
    return "x".join(str(size) for size in shape)


def _html_row(number: int, site: Site) -> str:
    title = "" if site.miss is None else html.escape(str(site.miss), quote=True)
    cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in _row(number, site))
    kind = "fused" if site.fused else "miss"
    return f'<tr class="{kind}" title="{title}">{cells}</tr>'


class _Explainer:
    """A backend that runs every pass, generates no code, and executes the original graph."""

    def __init__(self, config: Fp8Config) -> None:
        self._backend = Fp8Backend(config)
        self.sites: list[Site] = []
        self.graphs = 0

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        from torch._functorch import config as functorch_config
        from torch._inductor.compile_fx import compile_fx

        original = GraphModule(gm, copy.deepcopy(gm.graph))
        self.graphs += 1
        self.sites += capture(gm)
        with functorch_config.patch(enable_autograd_cache=False):
            compile_fx(
                gm,
                example_inputs,
                inner_compile=_no_code,
                config_patches=self._backend.patches(self.sites.extend),
            )
        return original.forward


def _no_code(gm: GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Any:
    return gm.forward


def explain(
    model: Callable[..., Any] | ExportedProgram,
    *args: Any,
    config: Fp8Config | Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Report:
    """Say for every attention call of ``model(*args, **kwargs)`` whether it becomes FP8.

    Of an exported program: what :func:`lp_inductor.aoti_compile_and_package` would do with it.

    Runs the whole compiler up to code generation with the gradient mode, autocast and shapes of
    this call; sites that need a gradient are reported as such, so call it under
    ``torch.no_grad()`` to ask about inference. Between graph breaks the original graphs run
    eagerly.

    Args:
        model: a module or function, or an exported program.
        args, kwargs: what to call it with; nothing for an exported program.
        config: as for :func:`compile_with_fp8_fusion`.

    Returns:
        a :class:`Report`.
    """
    if isinstance(model, ExportedProgram):
        return _explain_exported(model, make_config(config))
    explainer = _Explainer(make_config(config))
    with torch._dynamo.config.patch(recompile_limit=1 << 30, accumulated_recompile_limit=1 << 30):
        torch.compile(model, backend=explainer)(*args, **kwargs)
    return Report(tuple(explainer.sites), explainer.graphs)


def _explain_exported(program: ExportedProgram, config: Fp8Config) -> Report:
    from lp_inductor.export import run_exported

    return Report(tuple(run_exported(program, config, _no_code)), graphs=1)
