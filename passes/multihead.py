"""Attention inside PyTorch's own multi-head operators.

Dynamo keeps ``F.multi_head_attention_forward``, which ``nn.MultiheadAttention`` calls, as one
call; SDPA is inside of it and would appear only when AOTAutograd runs it::

    out, _ = F.multi_head_attention_forward(q, k, v, ..., need_weights=False)
                                        |
                                        v
    out, _ = attend_captured(q, k, v, ..., need_weights=False)

``attend_captured`` is the same function, in which SDPA is ``lp_inductor::sdpa``. With
``need_weights=True`` PyTorch writes attention out and returns its probabilities; that is left to
:mod:`lp_inductor.passes.decomposed`, which says so. The fused operators of the encoder's fast
path contain attention in C++, out of reach.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from lp_inductor.passes.movement import value_of
from lp_inductor.passes.result import OK, Miss, MissCode, Ok

aten = torch.ops.aten

_FAST_PATH = (
    torch._transformer_encoder_layer_fwd,
    torch._native_multi_head_attention,
    aten._transformer_encoder_layer_fwd.default,
    aten._native_multi_head_attention.default,
)
_SIGNATURE = inspect.signature(F.multi_head_attention_forward)


def is_multihead(node: Node) -> bool:
    """Whether a node is one of PyTorch's multi-head operators."""
    if node.op != "call_function":
        return False
    return node.target is F.multi_head_attention_forward or node.target in _FAST_PATH


def capture_multihead(node: Node) -> Ok | Miss:
    """Let the operator's SDPA be captured when AOTAutograd runs it, or say why not.

    ``Ok`` where it is captured, or where other passes will find and report what it becomes.
    """
    if node.target in _FAST_PATH:
        return Miss(MissCode.FAST_PATH, f"{getattr(node.target, '__name__', node.target)}")
    bound = _SIGNATURE.bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    arguments = bound.arguments
    if arguments["need_weights"] is not False:
        return OK
    if arguments["training"] is not False and arguments["dropout_p"] != 0:
        return Miss(MissCode.DROPOUT, f"dropout_p={arguments['dropout_p']}")
    out = value_of(node)
    out = out[0] if isinstance(out, list | tuple) else out
    if isinstance(out, torch.Tensor) and out.requires_grad:
        return Miss(MissCode.NEEDS_GRAD)
    node.target = attend_captured
    return OK


def attend_captured(*args: Any, **kwargs: Any) -> Any:
    """``F.multi_head_attention_forward`` with an opaque SDPA."""
    return _with_opaque_sdpa()(*args, **kwargs)


@functools.cache
def _with_opaque_sdpa() -> Callable[..., Any]:
    """PyTorch's function over other globals, in which SDPA is ours; nothing global changes.

    A torch function mode could not do this: it is off inside of the function that it sees first.
    """
    original = F.multi_head_attention_forward
    scope = dict(original.__globals__)
    function = types.FunctionType(original.__code__, scope, original.__name__)
    function.__defaults__ = original.__defaults__
    function.__kwdefaults__ = original.__kwdefaults__
    scope["scaled_dot_product_attention"] = _opaque
    # A mode that is active is handed this name, and calls it.
    scope["multi_head_attention_forward"] = function
    return function


def _opaque(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    if dropout_p != 0:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    out: torch.Tensor = torch.ops.lp_inductor.sdpa.default(
        query, key, value, attn_mask, is_causal, scale, enable_gqa
    )
    return out
