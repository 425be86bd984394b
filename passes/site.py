"""One attention site: the call as the graph has it, and what became of it."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from lp_inductor.passes.indexing import shape_exprs
from lp_inductor.passes.movement import value_of
from lp_inductor.passes.result import OK, Miss, MissCode, Ok
from lp_inductor.quantization import Quantization

#: Key in ``node.meta["custom"]``, which AOTAutograd hands on to what a node is traced to, of
#: attention calls that capture refused.
REFUSED_META = "lp_inductor_refused"

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class MaskPart(enum.Enum):
    """What a mask may ask of a kernel; a mask is the conjunction of its parts."""

    CAUSAL = "causal"  #: key j where j <= i, as many queries as keys
    BAND = "band"  #: key j where lower <= j - i <= upper
    CHUNK = "chunk"  #: key j where j // chunk == i // chunk
    KEYS = "keys"  #: a bool tensor (batch or 1, heads or 1, 1, key_len)
    BOOL = "bool"  #: a bool tensor that varies over queries
    BIAS = "bias"  #: a floating-point tensor that is added to the scores


@dataclass(frozen=True)
class AttentionCall:
    """What a kernel is asked to serve. Sizes may be symbolic (``torch.SymInt``)."""

    device: torch.device
    dtype: torch.dtype
    batch: int | torch.SymInt
    heads: int
    kv_heads: int
    query_len: int | torch.SymInt
    key_len: int | torch.SymInt
    head_dim: int
    value_head_dim: int
    mask: frozenset[MaskPart] = frozenset()

    @property
    def is_causal(self) -> bool:
        """The mask is causal, and nothing but causal."""
        return self.mask == {MaskPart.CAUSAL}


@dataclass(frozen=True)
class Decision:
    """A kernel that is to serve a site, and how its operands are quantised.

    ``aten_overload``: the ATen overload is to be called where it can say what is meant.
    """

    kernel: str
    quantization: Quantization
    aten_overload: bool = True


@dataclass(frozen=True)
class Site:
    """What became of one attention call; the entries of a :class:`lp_inductor.Report`.

    Attributes:
        module: qualified name of the module that calls attention, "" where unknown.
        fused: whether the call was rewritten to FP8.
        rope: the rotary embedding fused into quantisation, such as "half[0:64]"; with " (query)"
            or " (key)" where that is the only one; None: none is fused.
        mask: "none", "causal" or the form that was proved, then what is left to a tensor: "keys"
            (which keys count), "bool" (any bool mask) or "bias" (added to the scores).
        kernel: the kernel that serves it; None where not rewritten.
        granularity: what one quantisation scale covers, such as "per_head", and then what is not
            the default: "int8" (query and key), "hadamard qk"; None where not rewritten.
        miss: why the call was not rewritten; None where it was.
        rope_miss: why a rotation that was seen is left to the model's own code; None where all
            that was seen is fused.
        query_shape, key_shape, value_shape: (batch, heads, tokens, head_dim); symbolic sizes as
            strings. Heads of key and value as before any grouped-query expansion, where known.
    """

    module: str
    fused: bool
    rope: str | None
    mask: str
    kernel: str | None
    granularity: str | None
    miss: Miss | None
    query_shape: tuple[int | str, ...]
    key_shape: tuple[int | str, ...]
    value_shape: tuple[int | str, ...]
    rope_miss: Miss | None = None


@dataclass(frozen=True)
class Sdpa:
    """The arguments of an ``lp_inductor::sdpa`` node."""

    node: Node
    query: Node
    key: Node
    value: Node
    mask: Node | None
    is_causal: bool
    scale: float | None
    enable_gqa: bool

    @classmethod
    def of(cls, node: Node) -> Sdpa:
        """Read the arguments off the node."""
        return cls(node, *node.args)  # type: ignore[arg-type]


def module_of(node: Node) -> str:
    """The qualified name of the innermost module that a node belongs to."""
    stack: dict[str, Any] = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    for prefix in ("L['self']", "L['fn']", "L['model']", "L__self__", "self"):
        path = path.removeprefix(prefix)
    # Dynamo reaches the submodules of some modules through their dictionaries.
    path = path.replace(".__dict__['_modules']", "").replace("._modules", "")
    path = path.replace("['", ".").replace("']", "").replace("[", ".").replace("]", "")
    return path.lstrip("._")


def shape_for_report(value: torch.Tensor) -> tuple[int | str, ...]:
    """A shape with symbolic sizes as text."""
    exprs = shape_exprs(value)
    return tuple(int(expr) if expr.is_Integer else str(expr) for expr in exprs)


def check_operands(operands: dict[str, Any]) -> Ok | Miss:
    """Whether fake query, key and value are such as any FP8 rewrite could serve.

    ``operands`` maps "query", "key" and "value" to fake tensors, and "attn_mask" to one or None.
    """
    tensors = {name: t for name, t in operands.items() if t is not None}
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            return Miss(MissCode.RANK, f"{name} is not a tensor")
        if _is_subclass(tensor):
            return Miss(MissCode.SUBCLASS, f"{name} is a {type(tensor).__name__}")
    qkv = [operands[name] for name in ("query", "key", "value")]
    if any(t.dim() != 4 for t in qkv):
        return Miss(MissCode.RANK, f"ranks {[t.dim() for t in qkv]}")
    devices = {t.device for t in tensors.values()}
    if len(devices) != 1 or next(iter(devices)).type not in ("cpu", "cuda"):
        return Miss(MissCode.DEVICE, f"devices {sorted(map(str, devices))}")
    return OK


def check_dtypes(qkv: list[torch.Tensor]) -> Ok | Miss:
    """Query, key and value share one dtype that can be quantised."""
    dtypes = {t.dtype for t in qkv}
    if len(dtypes) != 1 or not dtypes <= set(FLOAT_DTYPES):
        return Miss(MissCode.DTYPE, f"dtypes {sorted(map(str, dtypes))}")
    return OK


def _is_subclass(tensor: torch.Tensor) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor

    return type(tensor) not in (torch.Tensor, FakeTensor, torch.nn.Parameter)


def values(sdpa: Sdpa) -> dict[str, Any]:
    """The fake values of a site's tensor operands."""
    return {
        "query": value_of(sdpa.query),
        "key": value_of(sdpa.key),
        "value": value_of(sdpa.value),
        "attn_mask": None if sdpa.mask is None else value_of(sdpa.mask),
    }
