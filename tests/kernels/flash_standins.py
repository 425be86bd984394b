"""Stand-ins for flash-attention packages: files that Python finds, and operators that compute.

An operator has FA3's arguments and obeys its documented rules (masks aligned at the last query
and key, negative distances are no bound), in float32 and with nothing of ours in it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lp_inductor.kernels.fa3 import Fa3Library

SCHEMA = (
    "fwd(Tensor q, Tensor k, Tensor v, Tensor? q_descale=None, Tensor? k_descale=None, "
    "Tensor? v_descale=None, float? softmax_scale=None, bool is_causal=False, "
    "int window_size_left=-1, int window_size_right=-1, int num_splits=0) "
    "-> (Tensor, Tensor)"
)


class Operator:
    """FA3's forward operator on a CPU, which keeps what it was called with."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_descale: Tensor | None = None,
        k_descale: Tensor | None = None,
        v_descale: Tensor | None = None,
        softmax_scale: float | None = None,
        is_causal: bool = False,
        window_size_left: int = -1,
        window_size_right: int = -1,
        num_splits: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Attention over (batch, tokens, heads, head_dim), bfloat16."""
        self.calls.append(dict(locals()))
        assert {t.dtype for t in (q, k, v)} == {torch.float8_e4m3fn}
        assert all(t.stride(-1) == 1 for t in (q, k, v))
        assert not any(s % 16 for t in (q, k, v) for s in t.stride()[:-1])
        q_descale, k_descale, v_descale = (
            per_head(scale, k) for scale in (q_descale, k_descale, v_descale)
        )
        group = q.shape[2] // k.shape[2]
        queries = q.float() * q_descale.repeat_interleave(group, 2)
        keys, values = (
            (t.float() * scale).repeat_interleave(group, 2)
            for t, scale in ((k, k_descale), (v, v_descale))
        )
        scale = q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale
        scores = torch.einsum("bihd,bjhd->bhij", queries, keys) * scale
        right = 0 if is_causal else window_size_right
        hidden = hidden_keys(q.shape[1], k.shape[1], window_size_left, right)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num()
        out = torch.einsum("bhij,bjhd->bihd", weights, values)
        return out.bfloat16().contiguous(), scores.logsumexp(-1)


def per_head(scale: Tensor | None, keys: Tensor) -> Tensor:
    """(batch, kv_heads), float32 -> (batch, 1, kv_heads, 1)."""
    assert scale is not None and scale.dtype == torch.float32
    assert scale.shape == (keys.shape[0], keys.shape[2])
    return scale[:, None, :, None]


def hidden_keys(queries: int, keys: int, left: int, right: int) -> Tensor:
    """(queries, keys), bool: what a window hides, by the libraries' documentation."""
    diagonal = torch.arange(queries)[:, None] + keys - queries
    j = torch.arange(keys)[None, :]
    hidden = torch.zeros(queries, keys, dtype=torch.bool)
    if left >= 0:
        hidden |= j < diagonal - left
    if right >= 0:
        hidden |= j > diagonal + right
    return hidden


@contextmanager
def operator_in(namespace: str, schema: str = SCHEMA) -> Iterator[Operator]:
    """An operator ``namespace::fwd`` for a while."""
    operator = Operator()
    library = torch.library.Library(namespace, "FRAGMENT")
    try:
        library.define(schema)
        library.impl("fwd", operator, "CPU")
        yield operator
    finally:
        library._destroy()
        if hasattr(getattr(torch.ops, namespace), "fwd"):
            delattr(getattr(torch.ops, namespace), "fwd")


class Packages:
    """A folder on ``sys.path`` for packages; what they leave in ``sys.modules`` can be taken back."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self._before = set(sys.modules)
        monkeypatch.syspath_prepend(str(folder))

    def module(self, name: str, text: str = "") -> None:
        """A module ``name`` with this text."""
        path = self.folder.joinpath(*name.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        # Finders look at a folder again when its time has changed, and clocks of files are coarse.
        importlib.invalidate_caches()

    def distribution(self, name: str, version: str, contents: str = "") -> None:
        """What pip leaves of an installed package with one extension module."""
        folder = self.folder / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        folder.joinpath("METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
        extension = self.folder / name / "_C.abi3.so"
        extension.parent.mkdir(exist_ok=True)
        extension.touch()  # a record counts for files that are there
        folder.joinpath("RECORD").write_text(f"{name}/{extension.name},sha256={contents},0\n")
        importlib.invalidate_caches()

    def forget(self) -> None:
        """Leave ``sys.modules`` as it was."""
        for name in set(sys.modules) - self._before:
            if str(self.folder) in str(getattr(sys.modules[name], "__file__", "")):
                del sys.modules[name]

    def fa3(self, name: str = "standin_fa3", **flags: bool) -> Fa3Library:
        """A package of FA3, built with these flags; its operator is not there yet."""
        self.module(f"{name}_interface")
        self.module(f"{name}_config", f"CONFIG = {{'build_flags': {flags!r}}}")
        return Fa3Library(name, f"{name}_interface", name, f"{name}_config")
