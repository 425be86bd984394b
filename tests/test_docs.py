"""The documentation is true: snippets run, print what the page says, and links lead somewhere.

Conventions of the pages:

* every ```` ```python ```` block runs, in order, in one namespace for each page;
* a block that prints is followed by an ```` ```output ```` block with exactly what it prints; a
  line ``...`` in it stands for any number of lines. A block that prints nothing has none.
* other languages (``text``, ``sh``, ``toml``) are not run.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import io
import re
import sys
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import lp_inductor
from lp_inductor import Fp8Config, MissCode

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
LANGUAGES = {"python", "output", "text", "sh", "toml"}
ANY_LINES = "..."


@dataclass(frozen=True)
class Block:
    """One fenced block; ``line`` is where its first line of text stands, counted from 1."""

    language: str
    line: int
    text: str


@dataclass(frozen=True)
class Page:
    """A page as prose, one entry a line (empty inside fences), and its fenced blocks."""

    path: Path
    prose: tuple[str, ...]
    blocks: tuple[Block, ...]

    def snippets(self) -> Iterator[tuple[Block, str]]:
        """Every python block and what it must print."""
        following = [*self.blocks[1:], None]
        for block, after in zip(self.blocks, following, strict=False):
            if block.language == "python":
                is_output = after is not None and after.language == "output"
                yield block, after.text if after is not None and is_output else ""

    def headings(self) -> list[str]:
        """The text of every heading."""
        return [line.lstrip("#").strip() for line in self.prose if re.match("#+ ", line)]

    def links(self) -> Iterator[tuple[int, str]]:
        """Every link that is not to another site, with its line."""
        for number, line in enumerate(self.prose, 1):
            for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", line)):
                if not re.match(r"[a-z]+:", target):
                    yield number, target


def read_page(path: Path) -> Page:
    """Split a page into prose and fenced blocks."""
    prose: list[str] = []
    blocks: list[Block] = []
    opened: tuple[str, int] | None = None
    inside: list[str] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        is_fence = line.startswith("```")
        if opened is None:
            assert is_fence or "```" not in line, f"{path}:{number}: an indented or inline fence"
        if is_fence and opened is None:
            opened, inside = (line[3:], number + 1), []
        elif is_fence and opened is not None:
            assert line == "```", f"{path}:{number}: a fence ends with three backquotes only"
            blocks.append(Block(*opened, "\n".join(inside)))
            opened = None
        elif opened is not None:
            inside.append(line)
        prose.append("" if is_fence or opened is not None else line)
    assert opened is None, f"{path}: the last fence is not closed"
    return Page(path, tuple(prose), tuple(blocks))


def name_of(path: Path) -> str:
    """The path of a page as tests name it."""
    return path.relative_to(ROOT).as_posix()


def every_page(with_snippets: bool = False) -> Any:
    """A parameter for every page, or for every page that has something to run."""
    paths = PAGES
    if with_snippets:
        paths = [path for path in PAGES if any(True for _ in read_page(path).snippets())]
    return pytest.mark.parametrize("path", paths, ids=map(name_of, paths))


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder to write to; what a page registers or switches goes when the page ends."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    before = lp_inductor.registered_kernels()
    with torch.set_grad_enabled(True):
        yield
    for kernel in lp_inductor.registered_kernels():
        if kernel not in before:
            lp_inductor.unregister_kernel(kernel.name)


def run_block(block: Block, path: Path, namespace: dict[str, Any]) -> str:
    """Run one block and return what it prints. Tracebacks show the lines of the page."""
    tree = ast.parse(block.text, filename=str(path))
    ast.increment_lineno(tree, block.line - 1)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, str(path), "exec"), namespace)
    return printed.getvalue().rstrip("\n")


def matches(expected: str, printed: str) -> bool:
    """Whether ``printed`` is ``expected``, whose lines ``...`` stand for any lines."""
    lines = expected.splitlines()
    parts = [r"(.*\n)*" if line == ANY_LINES else re.escape(line) + r"\n" for line in lines]
    return re.fullmatch("".join(parts), printed + "\n" * bool(printed)) is not None


@every_page(with_snippets=True)
@pytest.mark.usefixtures("workplace")
def test_snippets_run_and_print_what_the_page_says(path: Path) -> None:
    namespace: dict[str, Any] = {"__name__": "__docs__"}
    for block, expected in read_page(path).snippets():
        printed = run_block(block, path, namespace)
        where = f"{name_of(path)}:{block.line}"
        assert matches(expected, printed), f"{where} prints\n\n{printed}\n\nnot\n\n{expected}"


@every_page()
def test_blocks_follow_the_conventions(path: Path) -> None:
    blocks = read_page(path).blocks
    for before, block in zip([None, *blocks], blocks, strict=False):
        where = f"{name_of(path)}:{block.line}"
        assert block.language in LANGUAGES, f"{where}: {block.language!r} is not in {LANGUAGES}"
        if block.language == "output":
            assert before is not None and before.language == "python", f"{where}: output of what?"


def github_anchor(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    kept = re.sub(r"[^\w\- ]", "", heading.lower())
    return kept.replace(" ", "-")


def mkdocs_anchor(heading: str) -> str:
    """The anchor that MkDocs gives a heading."""
    ascii_only = unicodedata.normalize("NFKD", heading).encode("ascii", "ignore").decode()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", ascii_only).strip().lower())


@every_page()
def test_links_lead_somewhere(path: Path) -> None:
    page = read_page(path)
    for number, link in page.links():
        where = f"{name_of(path)}:{number}: {link}"
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), where
        # A site is built from docs/ alone.
        assert path.is_relative_to(DOCS) <= target.is_relative_to(DOCS), f"{where} leaves docs/"
        if anchor:
            headings = read_page(target).headings()
            for make in (github_anchor, mkdocs_anchor):
                assert [make(h) for h in headings].count(anchor) == 1, where


@every_page()
def test_headings_are_told_apart(path: Path) -> None:
    page = read_page(path)
    headings = page.headings()
    assert len(set(map(github_anchor, headings))) == len(headings)
    assert sum(line.startswith("# ") for line in page.prose) == 1


def test_the_site_shows_every_page() -> None:
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    shown = set(re.findall(r"[\w/-]+\.md", site))
    assert shown == {path.relative_to(DOCS).as_posix() for path in PAGES[1:]}


def table_rows(path: Path) -> dict[str, list[str]]:
    """Rows of a page's tables whose first cell is one word of code: that word, other cells."""
    rows = {}
    for line in read_page(path).prose:
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("|") and re.fullmatch(r"`\w+`", cells[0]):
            rows[cells[0].strip("`")] = cells[1:]
    return rows


@pytest.mark.parametrize("page", ["README.md", "docs/configuration.md"])
def test_every_field_is_documented_with_its_default(page: str) -> None:
    rows = table_rows(ROOT / page)
    for field in dataclasses.fields(Fp8Config):
        assert field.name in rows, field.name
        default = repr(field.default).replace("'", '"')
        assert rows[field.name][0] == f"`{default}`", field.name


def test_every_code_has_a_section_and_no_other_has() -> None:
    headings = read_page(DOCS / "misses.md").headings()
    codes = [h.strip("`") for h in headings if re.fullmatch(r"`[A-Z_]+`", h)]
    assert codes == [code.name for code in MissCode]


def test_conventions_catch_what_they_should(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text("# Page\n\n```python\nprint(1)\n1 / 0\n```\n\n```output\n1\n```\n")
    ((block, expected),) = read_page(path).snippets()
    assert (block.line, expected) == (4, "1")
    with pytest.raises(ZeroDivisionError) as caught:
        run_block(block, path, {})
    assert caught.traceback[-1].lineno == 4  # counted from 0
    assert matches("1", "1") and not matches("1", "1\n2") and not matches("", "1")
    assert matches("1\n...\n3", "1\n2\n2\n3") and matches("1\n...", "1") and matches("", "")
    assert not matches("1\n...\n3", "1\n23") and not matches("1.3", "123")
