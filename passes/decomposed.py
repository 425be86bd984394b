"""Attention that models write out: ``softmax(Q K^T * scale + mask) V``.

Runs on the functional ATen graph, where all spellings (``@``, matmul, einsum, bmm, baddbmm) are
two batched products with a softmax between them::

    bmm = bmm(view(q), view(permute(k)))
    add = add(mul(view_1(bmm), 0.125), mask)
    amax, sub, exp, sum_1, div = ...        # softmax(add)
    out = bmm(view_2(div), view_3(v))
    view_4 = view(out)
                                        |
                                        v
    view_4 = lp_inductor.sdpa(q, k, v, mask, False, 0.125, False)

Nothing is replaced until a site is known to be rewritten. :meth:`Candidate.raise_` only inserts
an attention node that nobody uses, for the matcher to match; then either
:meth:`Candidate.accept` lets it take the place of what is written out, or
:meth:`Candidate.discard` takes it away again and the graph is, node for node, what it was.

Limits: the softmax is over the keys; nothing else uses scores or probabilities; there is no
dropout; scale is a positive constant. A row whose keys are all hidden by -inf is NaN as written
out, and 0 in attention; where a finite number hides them all, the row is their mean in both, up
to rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import sympy
import torch
from torch.fx import Graph, Node

from lp_inductor.passes.digits import (
    LANE,
    ScoreAxes,
    Split,
    can_write,
    dims_of,
    find_split,
    radix,
)
from lp_inductor.passes.emit import Emitter, size_nodes
from lp_inductor.passes.indexing import HeadLanes, Lanes
from lp_inductor.passes.lanes import cast_source
from lp_inductor.passes.movement import Element, pull, shape_of, value_of
from lp_inductor.passes.raising import Candidate, Dims, WrittenOperand
from lp_inductor.passes.result import Miss, MissCode
from lp_inductor.passes.score_axes import (
    SoftmaxProduct,
    check_product,
    find_product,
    match_product,
    strangers,
    with_axes,
)
from lp_inductor.passes.scores import (
    PRODUCTS,
    Scores,
    Term,
    form_miss,
    match_scores,
    nodes_fed_by_products,
    scaled_source,
)
from lp_inductor.passes.site import FLOAT_DTYPES, REFUSED_META, Site, module_of, shape_for_report
from lp_inductor.passes.softmax import Softmax, match_softmax

aten = torch.ops.aten

_SOFTMAX_ENDS = (aten.div.Tensor, aten._softmax.default, aten.softmax.int)
#: How often an axis may turn out to be two.
_MAX_SPLITS = 4


def find_decomposed(graph: Graph) -> list[Candidate | Site]:
    """Every written-out attention of ``graph``: a candidate, or the record of why it is none.

    A softmax that is not between two batched products is no attention and not reported.
    """
    ends = [n for t in _SOFTMAX_ENDS for n in graph.find_nodes(op="call_function", target=t)]
    softmaxes = [s for s in (match_softmax(node) for node in ends) if s is not None]
    if not softmaxes:
        return []
    fed = nodes_fed_by_products(graph)
    softmaxes = [s for s in softmaxes if s.scores in fed and not _is_refused_sdpa(s)]
    training = any("tangents" in node.name for node in graph.find_nodes(op="placeholder"))
    sizes: Mapping[sympy.Expr, Node] | None = None
    found: list[Candidate | Site] = []
    for softmax in softmaxes:
        reached = find_product(softmax)
        if reached is None:
            continue
        if sizes is None:
            sizes = size_nodes(Emitter(graph, softmax.result))
        match = _Matcher(softmax, fed, sizes).match(*reached)
        if training:
            match = Miss(MissCode.NEEDS_GRAD)
        found.append(
            _refused(softmax, reached[0], fed, match) if isinstance(match, Miss) else match
        )
    return found


def _is_refused_sdpa(softmax: Softmax) -> bool:
    """Whether PyTorch wrote this: SDPA's own decomposition, where capture refused the call."""
    meta = softmax.result.meta
    refused = (meta.get("custom") or {}).get(REFUSED_META, False)
    return bool(refused) or meta.get("original_aten") is aten._safe_softmax.default


@dataclass(frozen=True)
class _Matcher:
    """Matches one softmax."""

    softmax: Softmax
    fed: set[Node]
    sizes: Mapping[sympy.Expr, Node]

    def match(self, node: Node, operand: Node) -> Candidate | Miss:
        """The attention around the softmax whose probabilities reach ``operand`` of ``node``."""
        product = match_product(self.softmax, node, operand)
        if isinstance(product, Miss):
            return product
        for _ in range(_MAX_SPLITS):
            found = self._attempt(product)
            if not isinstance(found, Split):
                return found
            axes = product.axes.split(found)
            if axes is None:
                break
            product = with_axes(product, axes)
        return form_miss("the axes of the operands are not told apart")

    def _attempt(self, product: SoftmaxProduct) -> Candidate | Miss | Split:
        scores = match_scores(self.softmax.scores, product.axes, self.fed)
        if isinstance(scores, Miss):
            return scores
        path = check_product(product, self.softmax)
        if isinstance(path, Miss):
            return path
        others = strangers({*self.softmax.inner, *scores.nodes, *path}, product.node)
        if others:
            return Miss(MissCode.SCORES_USED, f"by {others[0]}")
        if scores.softcap is not None:
            return Miss(MissCode.SOFTCAP, f"tanh, times {scores.softcap:g}")
        operands = _operand_elements(scores, product)
        if isinstance(operands, Miss):
            return operands
        for element in operands:
            split = _find_rows_split(element, product.axes)
            if split is not None:
                return split
        if product.axes.having("rows"):
            product = with_axes(product, product.axes.decided())
            return self._attempt(product)
        return self._candidate(product, scores, operands)

    def _candidate(
        self, product: SoftmaxProduct, scores: Scores, elements: tuple[Element, Element, Element]
    ) -> Candidate | Miss | Split:
        written = _operands(elements, product.axes)
        if isinstance(written, Miss):
            return written
        (query, key, value), scale = written
        terms: list[tuple[Term, Dims]] = []
        for term in scores.terms:
            dims = dims_of(term.element, product.axes)
            if dims is None:
                split = find_split(term.element.index, product.axes)
                return split or form_miss(f"a mask is laid out in an unknown way: {term.element}")
            terms.append((term, dims))
        candidate = Candidate(product, query, key, value, scores.scale * scale, terms, self.sizes)
        miss = self._check_axes(candidate)
        return candidate if miss is None else miss

    def _check_axes(self, candidate: Candidate) -> Miss | None:
        """Query varies over all heads and tokens, keys and values over leading heads and keys."""
        batch, heads, token, key = candidate.groups()
        query, keys, value = candidate.query, candidate.key, candidate.value
        if not all(query.has(digit) for digit in (*batch, *heads, *token)):
            return Miss(MissCode.GQA, "the query is shared by heads or tokens")
        if any(query.has(d) for d in key) or any(o.has(d) for o in (keys, value) for d in token):
            return form_miss("a product is not of queries and keys, or of probabilities and values")
        kv_heads = [digit for digit in heads if keys.has(digit)]
        if heads[: len(kv_heads)] != kv_heads:
            return Miss(MissCode.GQA, "key heads are tiled, not grouped")
        if not all(o.has(d) for o in (keys, value) for d in (*batch, *key)):
            return form_miss("keys or values are shared by the batch")
        if any(value.has(d) and d not in kv_heads for d in heads):
            return Miss(MissCode.GQA, "values have more heads than keys")
        if not all(digit.size.is_Integer for digit in heads):
            return Miss(MissCode.RANK, "the number of heads is symbolic")
        rows = [*candidate.product.batch_digits, *candidate.product.row_digits, LANE]
        for groups in ([batch, heads, token, key], [[digit] for digit in (*rows, *key)]):
            if not can_write(groups, self.sizes):
                return Miss(MissCode.RANK, "several sizes are symbolic and no inputs of the graph")
        return None


def _operand_elements(
    scores: Scores, product: SoftmaxProduct
) -> tuple[Element, Element, Element] | Miss:
    """Query, key and value as the products read them: every lane of one row."""
    first, second = (arg for arg in scores.product.node.args[-2:] if isinstance(arg, Node))
    batch, row, column = scores.product.index
    assert not isinstance(row, Lanes | HeadLanes)
    width = shape_of(first)[2]
    value_width = shape_of(product.value)[1 if product.transposed else 2]
    if not (width.is_Integer and value_width.is_Integer):
        return Miss(MissCode.HEAD_DIM, "the head dimension is symbolic")
    query = Element(first, (batch, row, Lanes(range(int(width)))))
    key = Element(second, (batch, Lanes(range(int(width))), column))
    if any(digit.symbol in row.free_symbols for digit in product.axes.having("key")):
        query, key = key, query  # K Q^T, transposed later
    rows, keys = radix(product.batch_digits), radix(product.digits(product.key_dim))
    lanes = Lanes(range(int(value_width)))
    index = (rows, lanes, keys) if product.transposed else (rows, keys, lanes)
    return query, key, Element(product.value, index)


def _find_rows_split(element: Element, axes: ScoreAxes) -> Split | None:
    """How the views behind an operand divide an axis that is batch and heads in one."""
    current: Element | None = element
    while current is not None and axes.having("rows"):
        split = find_split(current.index, axes, "rows")
        if split is not None:
            return split
        current = pull(current, axes.bounds)
    return None


def _operands(
    elements: tuple[Element, Element, Element], axes: ScoreAxes
) -> tuple[list[WrittenOperand], float] | Miss:
    """The operands, taken from before constant scales of query and key and widening casts.

    Returns the product of these scales too.
    """
    traced = [_trace(element, axes, scaled=n < 2) for n, element in enumerate(elements)]
    for steps in traced:
        if not steps:
            return form_miss("an operand is laid out in an unknown way")
    narrow = [steps[-1] for steps in traced]
    if len({step.dtype for step in narrow}) != 1:
        wide = {steps[0].dtype for steps in traced}
        if len(wide) != 1:
            return Miss(MissCode.DTYPE, f"dtypes {sorted(map(str, wide))}")
        narrow = [[s for s in steps if s.dtype in wide][-1] for steps in traced]
    if narrow[0].dtype not in FLOAT_DTYPES:
        return Miss(MissCode.DTYPE, f"dtype {narrow[0].dtype}")
    return [step.operand for step in narrow], narrow[0].scale * narrow[1].scale


@dataclass(frozen=True)
class _Step:
    """A place behind an operand that it can be taken from: the operand is ``scale`` times it."""

    operand: WrittenOperand
    scale: float

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = value_of(self.operand.node).dtype
        return dtype


def _trace(element: Element, axes: ScoreAxes, scaled: bool) -> list[_Step]:
    """The operand itself, and the inputs of the scales and casts that it is seen through."""
    steps: list[_Step] = []
    scale = 1.0
    current: Element | None = element
    crossed = True
    while current is not None:
        if crossed:
            _append_step(steps, current, axes, scale)
        source, factor = scaled_source(current.node) if scaled else (None, 1.0)
        if source is None:
            source = _widened(current.node)
        crossed = source is not None
        if source is None:
            current = pull(current, axes.bounds)
        elif shape_of(source) == shape_of(current.node):
            scale *= factor
            current = Element(source, current.index)
        else:
            break
    return steps


def _append_step(steps: list[_Step], element: Element, axes: ScoreAxes, scale: float) -> None:
    dims = dims_of(element, axes)
    if dims is None or sum(dim == [LANE] for dim in dims) != 1:
        return
    operand = WrittenOperand(element.node, dims)
    if not steps or all(operand.has(d) for dim in steps[0].operand.dims for d in dim):
        steps.append(_Step(operand, scale))


def _widened(node: Node) -> Node | None:
    """The input of a cast that loses nothing."""
    source = cast_source(node)
    if source is None or value_of(source).dtype.itemsize >= value_of(node).dtype.itemsize:
        return None
    return source


def _refused(softmax: Softmax, product: Node, fed: set[Node], miss: Miss) -> Site:
    """The record of written-out attention that stays as it is."""
    shapes: list[tuple[int | str, ...]] = [(), (), shape_for_report(value_of(product))]
    first = _first_product(softmax.scores, fed)
    if first is not None:
        operands = (arg for arg in first.args[-2:] if isinstance(arg, Node))
        shapes[:2] = [shape_for_report(value_of(operand)) for operand in operands]
    miss = Miss(miss.code, miss.detail)
    query, key, value = shapes
    return Site(module_of(product), False, None, "unknown", None, None, miss, query, key, value)


def _first_product(node: Node, fed: set[Node]) -> Node | None:
    while node.target not in PRODUCTS:
        node = next(source for source in node.all_input_nodes if source in fed)
    return node
