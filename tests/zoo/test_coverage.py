"""The page docs/coverage.md and the cases say the same."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

import pytest

from tests.zoo.checks import SITE_FLOOR
from tests.zoo.coverage import CASES, DATA, PAGE, ROOT, kinds_of, render


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(DATA.read_text(encoding="utf-8"))
    return content


def test_page_is_what_the_data_say(data: dict[str, Any]) -> None:
    assert PAGE.read_text(encoding="utf-8") == render(data), "run `make coverage`"


def test_data_are_of_these_cases(data: dict[str, Any]) -> None:
    rows = {(row["architecture"], row["variant"]): row for row in data["cases"]}
    assert list(rows) == [(case.architecture, case.variant) for case in CASES]
    for case, row in zip(CASES, rows.values(), strict=True):
        assert Counter(kinds_of(row)) == Counter(case.expected), case.name
        assert len(row["graphs"]) == case.graphs, case.name
        assert all(db >= SITE_FLOOR for db in row["site_db"]), case.name


def test_names_are_distinct_and_many() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 40
    assert len({case.architecture for case in CASES}) >= 33


@pytest.mark.parametrize("package", ["torch", "transformers", "diffusers"])
def test_data_are_of_the_pinned_versions(package: str, data: dict[str, Any]) -> None:
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pinned = re.search(rf"^{package}==([\w.]+)", pins, re.MULTILINE)
    assert pinned is not None
    assert data["versions"][package].split("+")[0] == pinned[1]
