"""Fixtures for the tests of kernels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernels.flash_standins import Packages


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Packages]:
    """A folder for packages."""
    made = Packages(tmp_path, monkeypatch)
    yield made
    made.forget()
