"""What is asserted of every case, and where its measurement is kept."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import canonical
from tests.zoo.measure import Measurement, measure, stock_graphs
from tests.zoo.outcomes import ZooCase, outcomes

#: Least SQNR of a rewritten site, in dB, against float64 from its own operands.
SITE_FLOOR = 22.0
#: Least SQNR of what Dynamo captured against the model in eager: AOTAutograd's decompositions
#: round in other places than the operators they stand for.
CAPTURE_FLOOR = 35.0
#: Set to a folder, in which every case then leaves its measurement.
DATA_VARIABLE = "LP_INDUCTOR_ZOO_DATA"


def as_parameters(cases: Iterable[ZooCase], long: Collection[str]) -> list[Any]:
    """The cases for ``parametrize``; those named in ``long`` are left to ``make test-long``."""
    cases = list(cases)
    assert {case.name for case in cases} >= set(long)
    return [
        pytest.param(case, id=case.name, marks=pytest.mark.long if case.name in long else [])
        for case in cases
    ]


def check(case: ZooCase) -> Measurement:
    """Measure a case and assert what must hold of it."""
    measured = measure(case.build, dynamo=case.dynamo)
    found = outcomes(measured.sites)
    folder = os.environ.get(DATA_VARIABLE)
    if folder:
        keep(case, measured, Path(folder))
    misses = [str(miss) for site in measured.sites for miss in (site.miss, site.rope_miss) if miss]
    assert Counter(found) == Counter(case.expected), (found, misses)
    assert len(measured.records) == case.graphs
    assert measured.capture_db >= CAPTURE_FLOOR
    assert all(record.same_elsewhere for record in measured.records)
    assert len(measured.decibels) == sum(site.fused for site in measured.sites)
    assert all(db >= SITE_FLOOR for db in measured.decibels), measured.decibels
    assert measured.output_db >= case.output_floor
    if not measured.decibels:
        check_stock(case, measured)
    return measured


def check_stock(case: ZooCase, measured: Measurement) -> None:
    """With nothing rewritten, the rest of Inductor gets the graphs that it would without us."""
    stock = stock_graphs(case.build, case.dynamo)
    ours = [record.text for record in measured.records]
    assert list(map(canonical, ours)) == list(map(canonical, stock))


def keep(case: ZooCase, measured: Measurement, folder: Path) -> None:
    """Write the measurement of a case into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(summary(case, measured), indent=1)
    (folder / file_name(case)).write_text(text, encoding="utf-8")


def file_name(case: ZooCase) -> str:
    """The name of the file that holds a case's measurement."""
    return "".join(letter if letter.isalnum() else "_" for letter in case.name) + ".json"


def summary(case: ZooCase, measured: Measurement) -> dict[str, Any]:
    """What the table and its readers need of one measurement."""
    return {
        "architecture": case.architecture,
        "variant": case.variant,
        "outcomes": [vars(kind) for kind in outcomes(measured.sites)],
        "graph_breaks": measured.breaks,
        "site_db": [round(db, 1) for db in measured.decibels],
        "output_db": round(measured.output_db, 1) if measured.decibels else None,
        "trace_seconds": round(measured.seconds, 2),
        "graphs": [
            {"nodes": record.nodes, "sites": len(record.sites), "seconds": round(record.seconds, 3)}
            for record in measured.records
        ],
    }
