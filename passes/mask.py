"""What a materialised attention mask says, proved from the graph that builds it.

``MaskProver.prove`` asks for the mask's element (b, h, i, j) and walks backwards through the
graph, with batch, head, query token and key token as symbols. Before (what a padded causal mask
looks like after AOTAutograd) and after::

    rows = unsqueeze(iota(S), 1); columns = unsqueeze(iota(S), 0)
    keep = arg0_1                                  # b1[B, S]      form: MaskForm(upper=0), "causal"
    mask = le(columns, rows) & keep[:, None, None]                 rest: KeyMask, keep[b, j]

Nothing of size S x S is made, and sizes may be symbolic. Limits: the form is one band, perhaps cut
into chunks, for all batches and heads; masks are made of bools, integers that provably do not
wrap, and floats that are small integers, zero or the lowest value. The graph must be functional,
with nothing written in place.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import sympy
import torch
from torch.fx import Node

from lp_inductor.passes.indexing import BATCH, HEAD, KEY, QUERY, at_zero
from lp_inductor.passes.mask_arithmetic import Arithmetic, NotProved
from lp_inductor.passes.mask_elements import Elements
from lp_inductor.passes.mask_forms import (
    MaskForm,
    every_query_sees_a_key,
    split,
    tests_of,
)
from lp_inductor.passes.mask_keys import KeyMask, plan_keys, symbol_sources
from lp_inductor.passes.mask_ops import nonzero
from lp_inductor.passes.mask_rules import FILLS, RULES, baked_number
from lp_inductor.passes.mask_values import (
    HIDDEN,
    ONE,
    ZERO,
    Leaf,
    Region,
    Value,
    broadcast,
    leaves_of,
    lift,
)
from lp_inductor.passes.movement import shape_of, value_of
from lp_inductor.passes.result import Miss, MissCode
from lp_inductor.passes.values import ValueNumbers

__all__ = ["KeyMask", "MaskForm", "MaskProof", "MaskProver"]


@dataclass(frozen=True)
class MaskProof:
    """What is known of a mask, for every batch, head, query and key.

    Attributes:
        form: what is outside of it is hidden.
        rest: None: the mask is ``form``, exactly. A :class:`KeyMask`: the mask is ``form`` and
            those keys. "whole": inside the form only the mask tensor itself knows.
        rows_visible: every query provably sees at least one key.
        why: where ``rest`` is not None, what a caller says that can serve nothing but forms.
    """

    form: MaskForm
    rest: KeyMask | Literal["whole"] | None
    rows_visible: bool
    why: Miss | None = field(default=None, compare=False)

    def describe(self) -> str:
        """The proof in a few words, for reports: "causal", "causal + keys", "full + mask"."""
        if self.rest is None:
            return self.form.describe()
        rest = "mask" if self.rest == "whole" else self.rest.describe()
        return f"{self.form.describe()} + {rest}"


class MaskProver:
    """Proves the masks of one graph; what masks are built from must not change meanwhile.

    Masks, and tensors that masks are built from, are proved once however many sites use them.
    """

    def __init__(self, values: ValueNumbers | None = None) -> None:
        self._values = values or ValueNumbers()
        self._arithmetic = Arithmetic()
        self._elements = Elements(self._values, self._arithmetic, RULES)
        self._answers: dict[tuple[Any, ...], MaskProof | Miss] = {}
        self._symbols: frozenset[sympy.Symbol] | None = None

    def prove(
        self,
        mask: Node,
        batch: sympy.Expr,
        heads: sympy.Expr,
        query_len: sympy.Expr,
        key_len: sympy.Expr,
    ) -> MaskProof | Miss:
        """What is known of ``mask``, which broadcasts to (batch, heads, query_len, key_len).

        The mask is of bools, or of floats that are added to the scores. A :class:`Miss` says that
        nothing is known: MASK_IS_DATA where the mask depends on a graph input or another run-time
        tensor, else MASK_NOT_PROVED.
        """
        sizes = tuple(sympy.sympify(size) for size in (batch, heads, query_len, key_len))
        key = (self._values(mask), *sizes)
        if key not in self._answers:
            try:
                self._answers[key] = self._prove(mask, sizes)
            except NotProved as reason:
                self._answers[key] = _miss(mask, str(reason))
        return self._answers[key]

    def _prove(self, mask: Node, sizes: tuple[sympy.Expr, ...]) -> MaskProof:
        if any(size.is_zero for size in sizes):
            raise NotProved("the attention has no elements")
        axes = (BATCH, HEAD, QUERY, KEY)
        whole = tuple(at_zero(axis, size) for axis, size in zip(axes, sizes, strict=True))
        index = broadcast(whole, sizes, shape_of(mask))
        region = Region(tuple(zip(axes, sizes, strict=True)), arithmetic=self._arithmetic)
        self._elements.start()
        value = self._elements.value(mask, index, region)
        if value_of(mask).dtype == torch.bool:
            return self._prove_visible(mask, region, value, lift(region, nonzero, [value]))
        return self._prove_additive(mask, region, value)

    def _prove_visible(self, mask: Node, region: Region, value: Value, visible: Value) -> MaskProof:
        if visible == ZERO:
            raise NotProved("it hides every key")
        form, tree = split(self._elements, region, visible)
        rows_visible = every_query_sees_a_key(self._elements, region, visible)
        if tree == ONE:
            return MaskProof(form, None, rows_visible)
        why = _miss(mask, self._why_no_form(visible))
        if tree is not None:
            try:
                keys = plan_keys(self._elements, region, tree, self._known_symbols(mask))
                return MaskProof(form, keys, rows_visible, why)
            except NotProved:
                pass  # nothing but the mask itself can say it
        if form.is_full and isinstance(value, Leaf):  # the mask is one unknown element
            raise NotProved(self._why_no_form(visible))
        return MaskProof(form, "whole", rows_visible, why)

    def _prove_additive(self, mask: Node, region: Region, value: Value) -> MaskProof:
        """A mask of floats: 0 where a key is visible, and lowest or minus infinity elsewhere.

        The lowest finite value hides a key only beside a visible one: a query all of whose scores
        are the lowest value weighs all keys alike, while one that sees no key has no weights.
        """
        dtype = value_of(mask).dtype
        if not dtype.is_floating_point:
            raise NotProved(f"a mask of {dtype}")
        lowest = sympy.Integer(int(torch.finfo(dtype).min))
        leaves = {leaf for _, leaf in leaves_of(region, value)}
        biases = [str(leaf) for leaf in leaves if leaf != 0 and not hides(leaf, lowest)]
        if biases:
            raise NotProved(f"an additive mask of {dtype} with values {', '.join(biases)[:200]}")
        if any(self._elements.atoms_of(test) for test in tests_of(value)):
            raise NotProved(f"an additive mask of {dtype}; {self._why_no_form(value)}")
        visible = lift(region, lambda _, leaf: ONE if leaf == 0 else ZERO, [value])
        proof = self._prove_visible(mask, region, value, visible)
        if leaves - {sympy.S.Zero, HIDDEN} and not proof.rows_visible:
            raise NotProved(f"an additive mask of {dtype} that may hide every key of a query")
        return proof

    def _known_symbols(self, mask: Node) -> frozenset[sympy.Symbol]:
        if self._symbols is None:
            self._symbols = frozenset(symbol_sources(mask.graph))
        return self._symbols

    def _why_no_form(self, visible: Value) -> str:
        tests = list(dict.fromkeys(tests_of(visible)))
        for test in tests:
            for atom in self._elements.atoms_of(test).values():
                return atom.reason
        return f"no band; it turns on {', '.join(f'{test} >= 0' for test in tests)[:200]}"


def hides(leaf: sympy.Expr, lowest: sympy.Expr) -> bool:
    """Whether a constant added to a score leaves its key no weight beside a visible key."""
    return bool(leaf == HIDDEN or (leaf.is_Integer and leaf <= lowest))


def _miss(mask: Node, reason: str) -> Miss:
    source = _data_source(mask)
    if source is None:
        return Miss(MissCode.MASK_NOT_PROVED, reason)
    return Miss(MissCode.MASK_IS_DATA, f"{source.op} {source.name}")


def _data_source(mask: Node) -> Node | None:
    """A tensor that ``mask`` depends on and that no index determines; None if there is none."""
    pending, seen = [mask], set()
    while pending:
        node = pending.pop()
        if node in seen or not isinstance(value_of(node), torch.Tensor | list | tuple):
            continue
        seen.add(node)
        if baked_number(node) is not None:
            continue
        if node.op != "call_function" or _is_unpredictable(node):
            return node
        if node.target not in FILLS:
            pending.extend(node.all_input_nodes)
    return None


def _is_unpredictable(node: Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and (
        torch.Tag.nondeterministic_seeded in target.tags or "empty" in target._schema.name
    )
