"""What was measured decides: lengths, head sizes, cards, and calls that are not square."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lp_inductor import AttentionCall, Fp8Config, Kernel, Miss, MissCode, Ok
from lp_inductor.decide import Decider, PackageRules
from lp_inductor.kernels import crossovers, registry
from lp_inductor.kernels.base import MaskPart
from lp_inductor.kernels.measured import HEADS, SPEEDUPS
from lp_inductor.passes.site import Decision

CARD = (9, 0)
TABLE: dict[crossovers.Key, dict[str, dict[int, float]]] = {
    (CARD, 64, False, False): {"one": {1024: 0.9, 4096: 0.99}},
    (CARD, 128, False, False): {
        "one": {1024: 0.8, 2048: 1.05, 4096: 1.1, 16384: 1.15},
        "two": {1024: 0.7, 2048: 1.0, 4096: 1.05, 16384: 1.3},
    },
    (CARD, 128, True, False): {"one": {1024: 0.8, 4096: 1.1}},
    (CARD, 128, False, True): {"one": {1024: 1.1}},
}


class Stub(Kernel):
    """Serves everything; never run."""

    masks = frozenset(MaskPart)

    def __init__(self, name: str, measured: bool = True, min_seq_len: int = 0) -> None:
        self.name = name
        self.measured_as = name if measured else None
        self.min_seq_len = min_seq_len

    def availability(self, device: torch.device) -> Ok | Miss:
        """Everywhere."""
        return Ok()

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Never."""
        raise AssertionError


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card of the table with the kernels "one" and "two"."""
    monkeypatch.setattr(registry, "_KERNELS", {n: Stub(n) for n in ("one", "two")})
    monkeypatch.setattr(registry, "SPEEDUPS", TABLE)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: CARD)


def call(
    query_len: Any, key_len: Any = None, *, batch: Any = 1, heads: int = 32, kv_heads: int = 32,
    dim: int = 128, mask: frozenset[MaskPart] = frozenset(),
) -> AttentionCall:  # fmt: skip
    """A call on the card; square unless ``key_len`` is given."""
    return AttentionCall(
        torch.device("cuda"), torch.bfloat16, batch, heads, kv_heads, query_len,
        query_len if key_len is None else key_len, dim, dim, mask,
    )  # fmt: skip


def chosen(of: AttentionCall, **config: Any) -> str:
    """The kernel's name, or the code of the miss."""
    decision = Decider(Fp8Config(**config))("", of)
    return decision.kernel if isinstance(decision, Decision) else decision.code.name


@pytest.mark.parametrize(
    ("tokens", "want"),
    [(512, "SHORT_SEQUENCE"), (1024, "SHORT_SEQUENCE"), (2047, "SHORT_SEQUENCE"), (2048, "one"),
     (16383, "one"), (16384, "two"), (10**6, "two")],
)  # fmt: skip
def test_the_fastest_by_length(card: None, tokens: int, want: str) -> None:
    assert chosen(call(tokens)) == want


def test_each_kind_of_call_has_its_own_bound(card: None) -> None:
    for part in (MaskPart.CAUSAL, MaskPart.BAND, MaskPart.CHUNK):
        assert chosen(call(2048, mask=frozenset({part}))) == "SHORT_SEQUENCE"
        assert chosen(call(4096, mask=frozenset({part}))) == "one"
    assert chosen(call(1024, kv_heads=8)) == "one"
    assert chosen(call(2048, dim=96)) == "one"
    assert chosen(call(2048, mask=frozenset({MaskPart.BOOL}))) == "one"


@pytest.mark.parametrize("dim", [16, 32, 64, 136, 256])
def test_what_was_not_measured_or_is_slower_is_left_alone(card: None, dim: int) -> None:
    assert chosen(call(10**6, dim=dim)) == "NOT_FASTER"


def test_other_cards_are_left_alone(card: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 9))
    assert chosen(call(10**6)) == "NOT_FASTER"
    assert chosen(call(10**6), force=True) == "one"


def test_what_the_user_says_counts_more(card: None) -> None:
    assert chosen(call(64), force=True) == "two"
    assert chosen(call(64), min_seq_len=64) == "two"
    assert chosen(call(64), min_seq_len=65) == "SHORT_SEQUENCE"
    assert chosen(call(64), min_seq_len=0) == "two"
    assert chosen(call(16384), kernel="one") == "one"
    assert chosen(call(1024), kernel="one") == "SHORT_SEQUENCE"


def test_fewer_heads_need_longer_sequences(card: None) -> None:
    assert chosen(call(2048, heads=16, kv_heads=16)) == "SHORT_SEQUENCE"
    assert chosen(call(4096, heads=16, kv_heads=16)) == "one"
    assert chosen(call(2048, heads=16, kv_heads=16, batch=2)) == "one"
    assert chosen(call(2047, heads=64, kv_heads=64)) == "SHORT_SEQUENCE"


def test_few_queries_count_as_a_shorter_sequence(card: None) -> None:
    assert chosen(call(64, 65536)) == "SHORT_SEQUENCE"
    assert chosen(call(65536, 1024)) == "SHORT_SEQUENCE"
    assert chosen(call(4096, 8192)) == "one"
    # L + 2 S tokens to quantise for L S pairs: with very many keys, L queries are worth 1.5 L.
    assert chosen(call(1400, 10**6, batch=8)) == "one"
    assert chosen(call(1300, 10**6, batch=8)) == "SHORT_SEQUENCE"


def test_work_is_compared_with_a_square_call() -> None:
    """Against brute arithmetic: quantisation by tokens, attention by pairs of tokens."""
    for length in (100, 700, 2000, 5000):
        for keys in (100, 700, 2000, 5000):
            for kv_heads in (32, 8, 1):
                c = call(length, keys, kv_heads=kv_heads)
                tokens_for_pair = (length * 32 + 2 * keys * kv_heads) / (length * keys * 32)
                square = (1000 * 32 + 2 * 1000 * kv_heads) / (1000 * 1000 * 32)
                want = keys >= 1000 and tokens_for_pair <= square and length >= 1000 * HEADS / 32
                got = all(crossovers.work_conditions(c, 1000))
                assert got == want, (length, keys, kv_heads)


def test_kernels_of_others_go_first_by_their_own_bound(
    card: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = {"mine": Stub("mine", measured=False, min_seq_len=100), "one": Stub("one")}
    monkeypatch.setattr(registry, "_KERNELS", kernels)
    assert chosen(call(100)) == "mine"
    assert chosen(call(99)) == "SHORT_SEQUENCE"


def test_symbolic_lengths_are_guarded(card: None) -> None:
    """One guard for each change of kernel that is asked about, and none where nothing changes."""
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

    for hint, want, guards in ((5000, "one", 2), (20000, "two", 1), (100, "SHORT_SEQUENCE", 3)):
        env = ShapeEnv()
        symbol = env.create_symbol(hint, ConstantSource("s"), dynamic_dim=DimDynamic.DYNAMIC)
        size = env.create_symintnode(symbol, hint=hint)
        assert chosen(call(size)) == want
        assert len(env.guards) == guards, env.guards


def test_packages_ask_the_range_of_a_length(card: None) -> None:
    """They have no guards: every length that may come must pay, and else the export says how."""
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

    for least, want in ((4096, "one"), (2, "SHORT_SEQUENCE")):
        env = ShapeEnv()
        symbol = env.create_symbol(5000, ConstantSource("s"), dynamic_dim=DimDynamic.DYNAMIC)
        size = env.create_symintnode(symbol, hint=5000)
        env.constrain_symbol_range(symbol, least, 8192)
        portable = Stub("one")
        portable.portable = True  # type: ignore[misc]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(registry, "_KERNELS", {"one": portable})
            decision = Decider(Fp8Config(), PackageRules())("", call(size))
        name = decision.kernel if isinstance(decision, Decision) else decision.code.name
        assert name == want and not env.guards
        if isinstance(decision, Miss):
            assert "torch.export.Dim(..., min=2048)" in decision.detail


def test_lengths_that_only_data_tell_are_left_alone(card: None) -> None:
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    env = ShapeEnv()
    size = env.create_unbacked_symint()
    assert chosen(call(size)) == "SHORT_SEQUENCE"
    assert not env.guards


def test_the_table_makes_sense() -> None:
    """Known kernels, ascending lengths, and speed-ups that are speed-ups of something."""
    names = {k.measured_as for k in registry.registered_kernels() if k.measured_as}
    for (capability, dim, _, _), kernels in SPEEDUPS.items():
        assert capability >= (8, 9) and dim in (64, 128, 256)
        formats = {f"{kernel} int8" for kernel in names}
        assert kernels and set(kernels) <= names | {"fa3"} | formats
        for curve in kernels.values():
            assert list(curve) == sorted(curve) and all(0.1 < s < 10 for s in curve.values())


def test_not_faster_is_in_the_table_of_reasons() -> None:
    assert "measured" in MissCode.NOT_FASTER.value
