"""Match one attention site: what its operands are, which RoPE they carry, what its mask says.

Nothing here changes the graph. A :class:`SiteMatch` holds proved facts only; any doubt is a
:class:`~lp_inductor.passes.result.Miss`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from lp_inductor.passes.coefficients import CoefficientKeys
from lp_inductor.passes.emit import asks_metadata_only
from lp_inductor.passes.indexing import KEY, QUERY, shape_exprs, to_expr
from lp_inductor.passes.joins import is_overwritten
from lp_inductor.passes.mask import MaskForm, MaskProver
from lp_inductor.passes.placement import Axes, match_placement
from lp_inductor.passes.result import OK, Miss, MissCode, Ok
from lp_inductor.passes.rope import RopeMatch, RopeMatcher
from lp_inductor.passes.site import AttentionCall, Sdpa, check_dtypes, check_operands, values
from lp_inductor.passes.sources import Source
from lp_inductor.passes.values import ValueNumbers


@dataclass(frozen=True)
class Operand:
    """Query, key or value: where it lives, and how it is rotated if it is."""

    source: Source
    rope: RopeMatch | None = None


@dataclass(frozen=True)
class SiteMatch:
    """Everything a rewrite needs to know, proved."""

    sdpa: Sdpa
    query: Operand
    key: Operand
    value: Operand
    is_causal: bool
    group_size: int

    @property
    def rope(self) -> RopeMatch | None:
        """The rotation of query and key; None where they are not rotated."""
        return self.query.rope

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
            is_causal=self.is_causal,
        )


class SiteMatcher:
    """Matches the sites of one graph; proofs that layers share are made once."""

    def __init__(self, fuse_rope: bool) -> None:
        numbers = ValueNumbers()
        self._fuse_rope = fuse_rope
        self._ropes = RopeMatcher(CoefficientKeys(numbers))
        self._masks = MaskProver(numbers)

    def match_mask(self, sdpa: Sdpa) -> MaskForm | Miss:
        """What the site's mask, or its is_causal flag, lets each query see."""
        batch, heads, query_len, _ = shape_exprs(values(sdpa)["query"])
        key_len = to_expr(values(sdpa)["key"].shape[2])
        if sdpa.mask is not None:
            if sdpa.is_causal:
                return Miss(MissCode.MASK_NOT_PROVED, "both attn_mask and is_causal are given")
            return self._masks.prove(sdpa.mask, batch, heads, query_len, key_len)
        return MaskForm(upper=to_expr(0)) if sdpa.is_causal else MaskForm()

    def match_site(self, sdpa: Sdpa, mask: MaskForm | Miss) -> SiteMatch | Miss:
        """All facts about a site, given those about its mask."""
        operands = values(sdpa)
        for verdict in (check_operands(operands), check_dtypes(_qkv(sdpa)), check_shapes(sdpa)):
            if isinstance(verdict, Miss):
                return verdict
        is_causal = check_mask(sdpa, mask)
        if isinstance(is_causal, Miss):
            return is_causal
        return self._match_operands(sdpa, is_causal)

    def _match_operands(self, sdpa: Sdpa, is_causal: bool) -> SiteMatch | Miss:
        axes = operand_axes(sdpa)
        heads = int(axes["query"].heads)
        query = self._rotated(sdpa.query, axes["query"], heads)
        key = self._rotated(sdpa.key, axes["key"], 1)
        for found in (query, key):
            if isinstance(found, Miss):
                return found
        assert isinstance(query, Operand) and isinstance(key, Operand)
        same_rope = check_same_rope(query.rope, key.rope, sdpa)
        if isinstance(same_rope, Miss):
            return same_rope
        value = _placed(sdpa.value, axes["value"], 1)
        kv_heads = max(key.source.head_count, value.source.head_count)
        if key.source.head_count != kv_heads:
            again = self._rotated(sdpa.key, axes["key"], kv_heads)
            if isinstance(again, Miss):
                return again
            key = again
        if value.source.head_count != kv_heads:
            value = _placed(sdpa.value, axes["value"], kv_heads)
        counts = {key.source.head_count, value.source.head_count}
        if counts != {kv_heads} or heads % kv_heads or (key.rope is None) != (query.rope is None):
            return Miss(MissCode.GQA, f"{heads} query heads, key/value heads {sorted(counts)}")
        return SiteMatch(sdpa, query, key, value, is_causal, heads // kv_heads)

    def _rotated(self, node: Node, axes: Axes, min_heads: int) -> Operand | Miss:
        """A query or key: before its rotation if it has one, else as it comes."""
        if self._fuse_rope:
            rope = self._ropes.match_rope(node, axes, min_heads)
            if isinstance(rope, Miss):
                return rope
            if isinstance(rope, RopeMatch):
                return Operand(rope.source, rope)
        return _placed(node, axes, min_heads)


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
    if hk != hv or (hq != hk and not sdpa.enable_gqa) or hq % hk:
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


def check_mask(sdpa: Sdpa, mask: MaskForm | Miss) -> bool | Miss:
    """Whether the call is causal; a Miss where it is neither causal nor full."""
    if isinstance(mask, Miss):
        return mask
    if mask.is_full:
        return False
    if not mask.is_causal:
        return Miss(MissCode.MASK_FORM, mask.describe())
    query, key = shape_exprs(values(sdpa)["query"])[2], shape_exprs(values(sdpa)["key"])[2]
    if query != key:
        return Miss(MissCode.CAUSAL_ALIGNMENT, f"{query} query and {key} key tokens")
    return True


def check_same_rope(query: RopeMatch | None, key: RopeMatch | None, sdpa: Sdpa) -> Ok | Miss:
    """Query and key carry one rotation, and nothing else needs the rotated tensors."""
    if query is None and key is None:
        return OK
    if query is None or key is None:
        which = "query" if key is None else "key"
        return Miss(MissCode.ROPE_ONE_SIDED, f"only the {which} is rotated")
    if (query.tokens is None) != (key.tokens is None):
        which, part = ("query", query) if key.tokens is None else ("key", key)
        return Miss(MissCode.ROPE_ONE_SIDED, f"only tokens {part.tokens} of the {which} turn")
    windows = [(r.interleaved, r.start, r.width) for r in (query, key)]
    if windows[0] != windows[1]:
        return Miss(MissCode.ROPE_TABLES_DIFFER, f"query {query.describe()}, key {key.describe()}")
    if query.permutation != key.permutation:
        return Miss(MissCode.ROPE_FORM, "query and key have their lanes in different orders")
    if query.keys != key.keys:
        return Miss(MissCode.ROPE_TABLES_DIFFER, lambda: _table_names(query, key))
    for name, rope in (("query", query), ("key", key)):
        for node in rope.region:
            strangers = [
                user
                for user in node.users
                if user not in rope.region and user is not sdpa.node
                if not asks_metadata_only(user) and not is_overwritten(user)
            ]
            if strangers:
                return Miss(
                    MissCode.ROPE_OUTPUT_USED, f"the rotated {name} is used by {strangers[0]}"
                )
    return OK


def _table_names(query: RopeMatch, key: RopeMatch) -> str:
    tables = (query.cos, query.sin, key.cos, key.sin)
    return "query reads {} and {}, key reads {} and {}".format(*(t.describe() for t in tables))
