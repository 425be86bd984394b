"""The text on which the demo measures perplexity."""

from __future__ import annotations

import importlib.resources

TEXT_FILE = "moby_dick_sermon.txt"


def load_text() -> str:
    """Two chapters of a novel in the public domain; ``data/README.md`` names the source."""
    folder = importlib.resources.files("lp_inductor.demo").joinpath("data")
    return folder.joinpath(TEXT_FILE).read_text(encoding="utf-8")
