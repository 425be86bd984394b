"""The mask of one site: what is proved of it, and the tensor that has to say the rest.

A mask that is proved whole needs no tensor. Where only a bound is proved ("causal, and something
that run-time data says"), the bound lets a kernel skip what it hides, and the tensor, or only the
part of it that says which keys count, is handed to the kernel. A mask of which nothing is proved
is handed over as it is: that is always right, and only slower.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy
import torch
from torch.fx import Node

from lp_inductor.passes.emit import Emitter, can_size
from lp_inductor.passes.indexing import shape_exprs, to_expr
from lp_inductor.passes.mask import KeyMask, MaskForm, MaskProof, MaskProver
from lp_inductor.passes.movement import shape_of, value_of
from lp_inductor.passes.result import Miss, MissCode
from lp_inductor.passes.site import MaskPart, Sdpa, values

aten = torch.ops.aten

_BIAS_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class SiteMask:
    """Query i sees key j where ``form`` allows it and ``tensor`` does.

    Attributes:
        form: proved for every batch entry, head, query and key.
        tensor: what says the rest; None where the form says all.
        parts: what the mask asks of a kernel.
        rows_visible: every query provably sees a key.
        unproved: why the form does not say all; None where it does.
    """

    form: MaskForm
    tensor: KeyMask | Node | None
    parts: frozenset[MaskPart]
    rows_visible: bool
    unproved: Miss | None = None

    def describe(self) -> str:
        """For reports: the form, then what is left to a tensor."""
        names = [] if self.form.is_full else [self.form.describe()]
        tensors = (MaskPart.KEYS, MaskPart.BOOL, MaskPart.BIAS)
        names += [part.value for part in tensors if part in self.parts]
        return " + ".join(names) or "none"

    def emit_tensor(self, emitter: Emitter) -> Node | None:
        """The tensor with four dimensions, each of its full size or of size 1."""
        if self.tensor is None:
            return None
        if isinstance(self.tensor, KeyMask):
            return self.tensor.emit(emitter)
        node = self.tensor
        while len(shape_of(node)) < 4:
            node = emitter.call(aten.unsqueeze.default, node, 0)
        return node


def match_mask(sdpa: Sdpa, prover: MaskProver) -> SiteMask | Miss:
    """What the site's mask, or its is_causal flag, lets each query see."""
    batch, heads, query_len, _ = shape_exprs(values(sdpa)["query"])
    key_len = to_expr(values(sdpa)["key"].shape[2])
    sizes = (batch, heads, query_len, key_len)
    if sdpa.mask is None:
        form = MaskForm(upper=to_expr(0)) if sdpa.is_causal else MaskForm()
        return SiteMask(form, None, _parts(form, None, query_len, key_len), rows_visible=True)
    if sdpa.is_causal:
        return Miss(MissCode.MASK_NOT_PROVED, "both attn_mask and is_causal are given")
    dtype = value_of(sdpa.mask).dtype
    if dtype != torch.bool and dtype not in _BIAS_DTYPES:
        return Miss(MissCode.DTYPE, f"a mask of {dtype}")
    proof = prover.prove(sdpa.mask, *sizes)
    unproved = proof if isinstance(proof, Miss) else proof.why
    if isinstance(proof, Miss):
        proof = MaskProof(MaskForm(), "whole", rows_visible=False)
    elif not all(can_size(sdpa.node.graph, bound) for bound in _bounds(proof.form)):
        proof = MaskProof(MaskForm(), "whole", proof.rows_visible)  # a size that only exists later
    tensor = _without_copies(sdpa.mask) if proof.rest == "whole" else proof.rest
    if isinstance(tensor, Node) and not _broadcasts(tensor, sizes):
        return Miss(MissCode.RANK, f"a mask {list(shape_of(tensor))} for scores {list(sizes)}")
    parts = _parts(proof.form, tensor, query_len, key_len)
    return SiteMask(proof.form, tensor, parts, proof.rows_visible, unproved)


def _bounds(form: MaskForm) -> list[sympy.Expr]:
    return [bound for bound in (form.lower, form.upper, form.chunk) if bound is not None]


def _parts(
    form: MaskForm, tensor: KeyMask | Node | None, query_len: sympy.Expr, key_len: sympy.Expr
) -> frozenset[MaskPart]:
    parts = set()
    if form.is_causal and query_len == key_len:
        parts.add(MaskPart.CAUSAL)
    elif form.lower is not None or form.upper is not None:
        parts.add(MaskPart.BAND)
    if form.chunk is not None:
        parts.add(MaskPart.CHUNK)
    if isinstance(tensor, KeyMask):
        parts.add(MaskPart.KEYS)
    elif tensor is not None:
        parts.add(_part_of(tensor))
    return frozenset(parts)


def _part_of(tensor: Node) -> MaskPart:
    if value_of(tensor).dtype != torch.bool:
        return MaskPart.BIAS
    shape = shape_of(tensor)
    return MaskPart.KEYS if len(shape) < 2 or shape[-2] == 1 else MaskPart.BOOL


def _without_copies(mask: Node) -> Node:
    """The mask before it was expanded: the kernel broadcasts without reading it twice."""
    while mask.op == "call_function" and mask.target in (aten.expand.default, aten.clone.default):
        source = mask.args[0]
        assert isinstance(source, Node)
        mask = source
    return mask


def _broadcasts(mask: Node, sizes: tuple[sympy.Expr, ...]) -> bool:
    """Each dimension is provably of size 1 or of the scores' size."""
    shape = shape_of(mask)
    offset = len(sizes) - len(shape)
    return offset >= 0 and all(
        size in (1, wanted) for size, wanted in zip(shape, sizes[offset:], strict=True)
    )
