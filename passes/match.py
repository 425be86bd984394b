"""Match one attention site: what its operands are, which RoPE they carry, what its mask says.

Nothing here changes the graph. A :class:`SiteMatch` holds proved facts only. Doubt about the call
or its heads is a :class:`~lp_inductor.passes.result.Miss` and the site stays as it is. Doubt about
a rotation only keeps the rotation where it is, in the model's code: the rotated query and key are
then quantised as they come, and the match says why in ``rope_miss``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from lp_inductor.passes.coefficients import CoefficientKeys
from lp_inductor.passes.emit import asks_metadata_only
from lp_inductor.passes.indexing import KEY, QUERY, shape_exprs, to_expr
from lp_inductor.passes.joins import is_overwritten
from lp_inductor.passes.mask import MaskProver
from lp_inductor.passes.placement import Axes, match_placement
from lp_inductor.passes.raising import REPLACES_META
from lp_inductor.passes.result import OK, Miss, MissCode, Ok
from lp_inductor.passes.rope import NoRope, RopeMatch, RopeMatcher
from lp_inductor.passes.site import AttentionCall, Sdpa, check_dtypes, check_operands, values
from lp_inductor.passes.site_mask import SiteMask, match_mask
from lp_inductor.passes.sources import Source
from lp_inductor.passes.values import ValueNumbers


@dataclass(frozen=True)
class Operand:
    """Query, key or value: where it lives, and the rotation to be fused if there is one."""

    source: Source
    rope: RopeMatch | None = None

    @property
    def head_count(self) -> int:
        """Heads of the source, before any grouped-query copies."""
        return self.source.head_count


@dataclass(frozen=True)
class SiteMatch:
    """Everything a rewrite needs to know, proved."""

    sdpa: Sdpa
    query: Operand
    key: Operand
    value: Operand
    mask: SiteMask
    group_size: int
    rope_miss: Miss | None = None

    def describe_rope(self) -> str | None:
        """The rotations that are fused, for reports; None: none is."""
        query, key = self.query.rope, self.key.rope
        if query is not None:
            return query.describe() + ("" if key is not None else " (query)")
        return None if key is None else key.describe() + " (key)"

    def attention_call(self) -> AttentionCall:
        """The call as a kernel is asked to serve it."""
        q, k, v = (values(self.sdpa)[name] for name in ("query", "key", "value"))
        return AttentionCall(
            device=q.device,
            dtype=q.dtype,
            batch=q.shape[0],
            heads=int(q.shape[1]),
            kv_heads=int(q.shape[1]) // self.group_size,
            query_len=q.shape[2],
            key_len=k.shape[2],
            head_dim=int(q.shape[3]),
            value_head_dim=int(v.shape[3]),
            mask=self.mask.parts,
        )


class SiteMatcher:
    """Matches the sites of one graph; proofs that layers share are made once."""

    def __init__(self, fuse_rope: bool) -> None:
        numbers = ValueNumbers()
        self._fuse_rope = fuse_rope
        self._ropes = RopeMatcher(CoefficientKeys(numbers))
        self._masks = MaskProver(numbers)

    def match_mask(self, sdpa: Sdpa) -> SiteMask | Miss:
        """What the site's mask, or its is_causal flag, lets each query see."""
        return match_mask(sdpa, self._masks)

    def match_site(self, sdpa: Sdpa, mask: SiteMask | Miss) -> SiteMatch | Miss:
        """All facts about a site, given those about its mask."""
        operands = values(sdpa)
        for verdict in (check_operands(operands), check_dtypes(_qkv(sdpa)), check_shapes(sdpa)):
            if isinstance(verdict, Miss):
                return verdict
        if isinstance(mask, Miss):
            return mask
        axes = operand_axes(sdpa)
        symbolic = [name for name, a in axes.items() if not a.heads.is_Integer]
        if symbolic:
            return Miss(MissCode.RANK, f"the number of heads of {symbolic[0]} is symbolic")
        heads = int(axes["query"].heads)
        query, key, rope_miss = self._match_ropes(sdpa, axes, 1)
        value = _placed(sdpa.value, axes["value"], 1)
        kv_heads = max(key.head_count, value.head_count)
        if key.head_count != kv_heads:
            query, key, rope_miss = self._match_ropes(sdpa, axes, kv_heads)
        if value.head_count != kv_heads:
            value = _placed(sdpa.value, axes["value"], kv_heads)
        counts = {key.head_count, value.head_count}
        if counts != {kv_heads} or heads % kv_heads:
            return Miss(MissCode.GQA, f"{heads} query heads, key/value heads {sorted(counts)}")
        return SiteMatch(sdpa, query, key, value, mask, heads // kv_heads, rope_miss)

    def _match_ropes(
        self, sdpa: Sdpa, axes: dict[str, Axes], kv_heads: int
    ) -> tuple[Operand, Operand, Miss | None]:
        """Query and key with the rotations that may be fused, and why another may not.

        ``kv_heads``: the heads that the key's source must have at least.
        """
        nodes = {"query": sdpa.query, "key": sdpa.key}
        min_heads = {"query": int(axes["query"].heads), "key": kv_heads}
        found: dict[str, RopeMatch | Miss | NoRope] = {}
        for name, node in nodes.items():
            rope: RopeMatch | Miss | NoRope = NoRope()
            if self._fuse_rope:
                rope = self._ropes.match_rope(node, axes[name], min_heads[name])
            if isinstance(rope, RopeMatch):
                free = check_output_free(name, rope, sdpa)
                rope = rope if isinstance(free, Ok) else free
            found[name] = rope
        ropes, miss = settle_ropes(found["query"], found["key"])
        operands = {}
        for name, node in nodes.items():
            fused = ropes[name]
            operands[name] = (
                _placed(node, axes[name], min_heads[name])
                if fused is None
                else Operand(fused.source, fused)
            )
        return operands["query"], operands["key"], miss


def settle_ropes(
    query: RopeMatch | Miss | NoRope, key: RopeMatch | Miss | NoRope
) -> tuple[dict[str, RopeMatch | None], Miss | None]:
    """Which rotations are fused, and why one that was seen is not.

    Each operand is rotated by its own proved tables, so one of them may be fused alone: the key of
    a cache is rotated before it is stored. Of two rotations that are not the same neither is
    fused, unless one of them turns some tokens only: then the other is. A rotation that also moves
    lanes needs the other to move them alike: the scores do not see that, and the lanes are then
    left in their order.
    """
    found = {"query": query, "key": key}
    ropes = {name: r if isinstance(r, RopeMatch) else None for name, r in found.items()}
    misses = [r for r in found.values() if isinstance(r, Miss)]
    partial = [name for name, rope in ropes.items() if rope is not None and rope.tokens is not None]
    if len(partial) == 1 and all(ropes.values()):
        rope = ropes[partial[0]]
        assert rope is not None
        detail = f"only tokens {rope.tokens} of the {partial[0]} turn"
        misses.append(Miss(MissCode.ROPE_TABLES_DIFFER, detail))
        ropes[partial[0]] = None
    verdict = _check_pair(ropes["query"], ropes["key"])
    if isinstance(verdict, Miss):
        misses.append(verdict)
        ropes = dict.fromkeys(ropes)
    return ropes, misses[0] if misses else None


def _check_pair(query: RopeMatch | None, key: RopeMatch | None) -> Ok | Miss:
    if query is not None and key is not None:
        return check_same_rope(query, key)
    if any(rope is not None and rope.permuted for rope in (query, key)):
        return Miss(MissCode.ROPE_FORM, "only one of query and key has its lanes moved")
    return OK


def _placed(node: Node, axes: Axes, min_heads: int) -> Operand:
    placement = match_placement(node, axes.index, axes, min_heads)
    assert placement is not None, "an operand is always placed at itself"
    return Operand(placement)


def _qkv(sdpa: Sdpa) -> list[torch.Tensor]:
    return [values(sdpa)[name] for name in ("query", "key", "value")]


def operand_axes(sdpa: Sdpa) -> dict[str, Axes]:
    """The axes of query, key and value."""
    axes = {}
    for name, tensor in zip(("query", "key", "value"), _qkv(sdpa), strict=True):
        batch, heads, tokens, lanes = shape_exprs(tensor)
        symbol = QUERY if name == "query" else KEY
        axes[name] = Axes(batch, heads, tokens, symbol, int(lanes))
    return axes


def check_shapes(sdpa: Sdpa) -> Ok | Miss:
    """Shapes fit each other without broadcasting, heads group, and nothing is empty."""
    q, k, v = _qkv(sdpa)
    if any(size == 0 for t in (q, k, v) for size in shape_exprs(t)):
        return Miss(MissCode.EMPTY)
    same_batch = same_size(q.shape[0], k.shape[0]) and same_size(q.shape[0], v.shape[0])
    same_rest = same_size(k.shape[2], v.shape[2]) and same_size(q.shape[3], k.shape[3])
    if not (same_batch and same_rest):
        return Miss(MissCode.RANK, f"query {q.shape}, key {k.shape}, value {v.shape} broadcast")
    hq, hk, hv = (int(t.shape[1]) for t in (q, k, v))
    grouped = sdpa.enable_gqa or hk == 1  # one head broadcasts to all without being asked
    if hk != hv or (hq != hk and not grouped) or hq % hk:
        return Miss(MissCode.GQA, f"{hq} query, {hk} key and {hv} value heads")
    return OK


def same_size(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """Whether two sizes are equal; symbolic ones may be guarded on, as attention itself would.

    After export guards are no longer checked, so there only what is known counts.
    """
    if to_expr(a) == to_expr(b):
        return True
    symbolic = next((s for s in (a, b) if isinstance(s, torch.SymInt)), None)
    if symbolic is None or symbolic.node.shape_env.frozen:
        return False
    return bool(a == b)


def check_same_rope(query: RopeMatch, key: RopeMatch) -> Ok | Miss:
    """Query and key carry one rotation."""
    windows = [(r.interleaved, r.start, r.width) for r in (query, key)]
    if windows[0] != windows[1]:
        return Miss(MissCode.ROPE_TABLES_DIFFER, f"query {query.describe()}, key {key.describe()}")
    if query.permutation != key.permutation:
        return Miss(MissCode.ROPE_FORM, "query and key have their lanes in different orders")
    if query.keys != key.keys:
        return Miss(MissCode.ROPE_TABLES_DIFFER, lambda: _table_names(query, key))
    return OK


def check_output_free(name: str, rope: RopeMatch, sdpa: Sdpa) -> Ok | Miss:
    """Nothing but the attention needs the rotated tensor, or anything between."""
    for node in rope.region:
        strangers = [
            user
            for user in node.users
            if user not in rope.region and user is not sdpa.node
            if user not in sdpa.node.meta.get(REPLACES_META, ())
            if not asks_metadata_only(user) and not is_overwritten(user)
        ]
        if strangers:
            return Miss(MissCode.ROPE_OUTPUT_USED, f"the rotated {name} is used by {strangers[0]}")
    return OK


def _table_names(query: RopeMatch, key: RopeMatch) -> str:
    tables = (query.cos, query.sin, key.cos, key.sin)
    return "query reads {} and {}, key reads {} and {}".format(*(t.describe() for t in tables))
