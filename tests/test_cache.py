"""Caches: a second process hits, a changed configuration never does."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from lp_inductor import Fp8Config, Kernel, backend, register_kernel, unregister_kernel
from lp_inductor._compat import PassChain, chain_passes
from lp_inductor.decide import PackageRules
from lp_inductor.kernels.reference import ReferenceKernel

CHILD = """
import json, sys, torch
import lp_inductor
from torch._dynamo.utils import counters
from tests import models
from tests.test_rewrites import qkv
config = json.loads(sys.argv[1])
with torch.no_grad():
    out = lp_inductor.compile_with_fp8_fusion(models.no_rope, config)(*qkv())
inductor, aot = counters["inductor"], counters["aot_autograd"]
print(json.dumps({
    "hit": inductor["fxgraph_cache_hit"], "miss": inductor["fxgraph_cache_miss"],
    "aot_hit": aot["autograd_cache_hit"], "sum": out.double().sum().item(),
}))
"""


def run_child(cache: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Compile and run in a process of its own, with its caches in ``cache``."""
    import os

    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(config)],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_second_process_hits_and_another_configuration_does_not(tmp_path: Path) -> None:
    first = run_child(tmp_path, {})
    second = run_child(tmp_path, {})
    changed = run_child(tmp_path, {"smooth_k": False})
    assert (first["hit"], first["miss"]) == (0, 1)
    assert (second["hit"], second["miss"], second["aot_hit"]) == (1, 0, 1)
    assert second["sum"] == first["sum"]
    assert (changed["hit"], changed["miss"]) == (0, 1)
    assert changed["sum"] != first["sum"]


OTHERS: dict[str, Any] = {
    "kernel": "reference",
    "granularity": "per_head",
    "qk_dtype": "int8",
    "smooth_k": False,
    "smooth_v": False,
    "fuse_rope": False,
    "hadamard": "qk",
    "static_descales": (("*", 1.0, 1.0, 1.0),),
    "min_seq_len": 7,
    "skip": ("layer.*",),
    "force": True,
    "on_miss": "warn",
}


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Fp8Config)])
def test_every_field_changes_the_key(field: str) -> None:
    changed = Fp8Config(**{field: OTHERS[field]})
    assert backend.cache_key(changed) != backend.cache_key(Fp8Config())
    assert backend.cache_key(changed) == backend.cache_key(Fp8Config(**{field: OTHERS[field]}))


@pytest.mark.parametrize(
    ("target", "name"),
    [
        (torch, "__version__"),
        (backend, "_source_hash"),
        (backend._compat, "triton_version"),
        (backend._compat, "device_identity"),
        (ReferenceKernel, "version"),
    ],
)
def test_the_environment_changes_the_key(
    monkeypatch: pytest.MonkeyPatch, target: Any, name: str
) -> None:
    before = backend.cache_key(Fp8Config())
    is_text = isinstance(getattr(target, name), str)
    monkeypatch.setattr(target, name, "other" if is_text else lambda: "other")
    assert backend.cache_key(Fp8Config()) != before


def test_kernels_and_enabled_backends_change_the_key() -> None:
    class Other(ReferenceKernel):
        name = "other"

    before = backend.cache_key(Fp8Config())
    kernel: Kernel = Other()
    register_kernel(kernel)
    try:
        assert backend.cache_key(Fp8Config()) != before
    finally:
        unregister_kernel("other")
    assert backend.cache_key(Fp8Config()) == before
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        assert backend.cache_key(Fp8Config()) != before


def test_sources_of_all_rooms_are_hashed() -> None:

    names = {path.name for path in backend.source_files()}
    assert {"backend.py", "rope.py", "attention.py", "reference.py"} <= names


def test_a_users_pass_without_uuid_turns_caching_off() -> None:
    ours = backend.AttentionPass(Fp8Config(), lambda sites: None)
    assert chain_passes(ours, None) is ours
    chained = chain_passes(ours, lambda graph: None)
    assert isinstance(chained, PassChain) and chained.uuid() is None
    both = chain_passes(ours, [ours])
    assert isinstance(both, PassChain) and both.uuid() == (ours.uuid(), ours.uuid())


def test_the_rules_of_a_package_change_the_key() -> None:
    rules = (None, PackageRules(), PackageRules(("a",)), PackageRules(("b",)))
    assert len({backend.cache_key(Fp8Config(), r) for r in rules}) == len(rules)
