"""The page docs/coverage.md, from what the tests of the zoo measured.

``make coverage`` runs the tests, which leave a file for each case, and then this module::

    python -m tests.zoo.coverage build/zoo

It writes ``benchmarks/results/coverage_cpu.json`` and, from that alone, the page.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.zoo import cases_diffusion, cases_text, cases_vision
from tests.zoo.checks import SITE_FLOOR, file_name
from tests.zoo.outcomes import Outcome, ZooCase, describe, fused_count, site_count

ROOT = Path(__file__).parents[2]
DATA = ROOT / "benchmarks" / "results" / "coverage_cpu.json"
PAGE = ROOT / "docs" / "coverage.md"

#: Titles of the page's tables, and the cases in each.
SECTIONS: tuple[tuple[str, tuple[ZooCase, ...]], ...] = (
    ("Language models", cases_text.CASES),
    ("Encoders of text, image and sound", cases_vision.CASES),
    ("Diffusion models", cases_diffusion.CASES),
)
CASES = tuple(case for _, cases in SECTIONS for case in cases)

_COLUMNS = (
    "architecture", "variant", "sites", "rewritten", "RoPE fused", "masks of rewritten sites",
    "worst site, dB", "output, dB", "left",
)  # fmt: skip


def collect(folder: Path) -> dict[str, Any]:
    """What the tests left in ``folder``, in the order of the cases, with versions."""
    files = [folder / file_name(case) for case in CASES]
    return {
        "versions": {
            "date": datetime.now(UTC).date().isoformat(),
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "diffusers")},
        },
        "cases": [json.loads(file.read_text(encoding="utf-8")) for file in files],
    }


def kinds_of(row: Mapping[str, Any]) -> tuple[Outcome, ...]:
    """The outcomes of one case of the data."""
    return tuple(Outcome(**kind) for kind in row["outcomes"])


def render(data: Mapping[str, Any]) -> str:
    """The page."""
    rows = {(row["architecture"], row["variant"]): row for row in data["cases"]}
    parts = [_introduction(data)]
    for title, cases in SECTIONS:
        found = [rows[case.architecture, case.variant] for case in cases]
        parts += [f"## {title}", _table(found)]
    parts += ["## Not there yet", _gaps(), "## Remarks", _remarks()]
    return "\n\n".join(parts) + "\n"


def _introduction(data: Mapping[str, Any]) -> str:
    versions, rows = data["versions"], data["cases"]
    kinds = [kind for row in rows for kind in kinds_of(row)]
    graphs = [graph for row in rows for graph in row["graphs"]]
    spent = sum(graph["seconds"] for graph in graphs)
    traced = sum(row["trace_seconds"] for row in rows)
    return f"""# Coverage

{len(rows)} cases of {len({row["architecture"] for row in rows})} architectures, built from tiny configurations with random weights and called as their users call them: {fused_count(kinds)} of {site_count(kinds)} attention sites are rewritten. Taken on {versions["date"]} on a CPU with torch {versions["torch"]}, transformers {versions["transformers"]} and diffusers {versions["diffusers"]}; `make coverage` runs the tests under `tests/zoo/` and writes this page from what they measure (`benchmarks/results/{DATA.name}`).

- *sites* are calls of `scaled_dot_product_attention`, and attention written out in tensor operators, that reach the compiler; what runs in Python between graph breaks is none.
- *worst site* is the least SQNR of a rewritten site against attention in float64 over the site's own operands in the model, the errors of sites before it taken out. At least {SITE_FLOOR:g} dB is demanded of each.
- *output* is the SQNR of the model's output against the same model with stock attention. Random weights carry an error on as trained ones would not; it says that nothing is broken, and nothing about the quality of a trained model.
- *left* says why a site, or a rotation that was seen, stays as it was: see [misses](misses.md).

With stock attention's results put in place of those of rewritten sites, every model's output is bit by bit that of the same graph with stock attention; where nothing is rewritten, the graphs that go on to Inductor are stock's. Our passes took {spent:.1f} s of the {traced:.0f} s of processor time that Dynamo, AOTAutograd and they took together, code generation not included."""


def _table(rows: Iterable[Mapping[str, Any]]) -> str:
    lines = [_line(_COLUMNS), "|---|---|---:|---:|---|---|---:|---:|---|"]
    return "\n".join([*lines, *(_line(_cells(row)) for row in rows)])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    kinds = kinds_of(row)
    left = [describe(kinds, lambda kind: kind.miss), describe(kinds, lambda kind: kind.rope_miss)]
    return (
        row["architecture"],
        row["variant"],
        str(site_count(kinds)),
        str(fused_count(kinds)),
        describe(kinds, lambda kind: kind.rope) or "-",
        describe(kinds, lambda kind: kind.mask if kind.fused else None) or "-",
        f"{min(row['site_db']):.1f}" if row["site_db"] else "-",
        "-" if row["output_db"] is None else f"{row['output_db']:.1f}",
        "; ".join(text for text in left if text) or "-",
    )


def _gaps() -> str:
    lines = [
        f"- {case.name}: {_goal(case.goal)}. {case.note}".rstrip()
        for case in CASES
        if case.gap and case.goal is not None
    ]
    return "\n".join(["What is to become of these sites, and what keeps it from them:", "", *lines])


def _goal(kinds: Sequence[Outcome]) -> str:
    def words(kind: Outcome) -> str:
        if kind.miss:
            return kind.miss
        mask = "no mask" if kind.mask == "none" else f"mask {kind.mask}"
        rope = kind.rope_miss or (f"RoPE {kind.rope}" if kind.rope else "no RoPE")
        return f"{mask}, {rope}"

    return "; ".join(f"{kind.count}x {words(kind)}" for kind in kinds)


def _remarks() -> str:
    notes: dict[str, list[str]] = {}
    for case in CASES:
        if case.note and not case.gap:
            notes.setdefault(case.note, []).append(case.name)
    return "\n".join(f"- {'; '.join(names)}: {note}" for note, names in notes.items())


def main(folder: Path) -> None:
    """Write the data and the page."""
    data = collect(folder)
    DATA.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(render(data), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
