"""Attention written out by hand, as models write it, and lookalikes that are no SDPA.

Each takes query, key and value of (batch, heads, tokens, head_dim), and a mask where it says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

SCALE = 0.25
LOWEST = torch.finfo(torch.float32).min


def matmul(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(torch.matmul(q, k.transpose(-2, -1)) * SCALE, dim=-1).matmul(v)


def operator_divided(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=3) @ v


def unscaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


def scaled_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q * SCALE) @ k.mT).softmax(-1) @ v


def scaled_both(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    root = math.sqrt(SCALE)
    return ((q * root) @ (k * root).transpose(2, 3)).softmax(-1) @ v


def scaled_key_after_transpose(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ (k.mT * SCALE)).softmax(-1) @ v


def scaled_by_tensor_constant(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    root = torch.full([], q.shape[-1] ** 0.5, dtype=q.dtype)
    return (q @ k.mT / root).softmax(-1) @ v


def einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * SCALE
    return torch.einsum("bhqk,bhkd->bhqd", scores.softmax(-1), v)


def einsum_tokens_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q * SCALE, k)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).transpose(1, 2)


def einsum_keys_in_the_middle(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhqd,bhkd->bhkq", q, k) * SCALE
    return torch.einsum("bhkq,bhkd->bhqd", scores.softmax(2), v)


def key_times_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (k @ q.mT).mT * SCALE
    return scores.softmax(-1) @ v


def value_times_probabilities(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    probabilities = (q @ k.mT * SCALE).softmax(-1)
    return (v.mT @ probabilities.mT).mT


def grouped_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, heads, tokens, dim = q.shape
    k, v = k[:, :2], v[:, :2]
    q = q.reshape(batch, 2, heads // 2, tokens, dim)
    scores = torch.einsum("bkgqd,bksd->bkgqs", q, k) * SCALE
    out = torch.einsum("bkgqs,bksd->bkgqd", scores.softmax(-1), v)
    return out.reshape(batch, heads, tokens, v.shape[-1])


def grouped_matmul(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q.unflatten(1, (2, -1))
    k, v = (t[:, :2].unsqueeze(2) for t in (k, v))
    return ((q @ k.mT * SCALE).softmax(-1) @ v).flatten(1, 2)


def grouped_repeat(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (t[:, :2].repeat_interleave(q.shape[1] // 2, dim=1) for t in (k, v))
    return (q @ k.mT * SCALE).softmax(-1) @ v


def tiled_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Query head h reads key head h % 2."""
    q = q.unflatten(1, (-1, 2))
    scores = torch.einsum("bgkqd,bksd->bgkqs", q, k[:, :2]) * SCALE
    return torch.einsum("bgkqs,bksd->bgkqd", scores.softmax(-1), v[:, :2]).flatten(1, 2)


def one_key_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhqd,bkd->bhqk", q, k[:, 0]) * SCALE
    return torch.einsum("bhqk,bkd->bhqd", scores.softmax(-1), v[:, 0])


def three_dimensional(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch = q.shape[0]
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    out = torch.bmm(torch.bmm(q * SCALE, k.transpose(1, 2)).softmax(-1), v)
    return out.unflatten(0, (batch, -1))


def fairseq(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Tokens first, batch and heads folded, as in fairseq and nn.MultiheadAttention."""
    batch, heads, tokens = q.shape[:3]

    def fold(t: Tensor) -> Tensor:
        t = t.permute(2, 0, 1, 3).reshape(t.shape[2], batch * heads, t.shape[3])
        return t.transpose(0, 1)

    probabilities = torch.bmm(fold(q), fold(k).transpose(1, 2)).softmax(-1)
    out = torch.bmm(probabilities, fold(v))
    out = out.transpose(0, 1).contiguous().view(tokens, batch, heads * v.shape[3])
    return out.view(tokens, batch, heads, v.shape[3]).permute(1, 2, 0, 3)


def diffusers_processor(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, heads = q.shape[:2]
    q, k, v = (t.reshape(-1, *t.shape[2:]) for t in (q, k, v))
    empty = torch.empty(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype)
    scores = torch.baddbmm(empty, q, k.transpose(-1, -2), beta=0, alpha=SCALE)
    out = torch.bmm(scores.softmax(dim=-1).to(v.dtype), v)
    return out.reshape(batch, heads, *out.shape[1:])


def softmax_by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * SCALE
    exp = (scores - scores.max(dim=-1, keepdim=True).values).exp()
    return (exp / exp.sum(-1, keepdim=True)) @ v


def softmax_without_maximum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    exp = torch.exp(q @ k.mT * SCALE)
    return (exp / exp.sum(-1, keepdim=True)) @ v


def dropout_in_eval(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    probabilities = F.softmax(q @ k.mT * SCALE, dim=-1, dtype=torch.float32).to(q.dtype)
    return F.dropout(probabilities, p=0.1, training=False) @ v


def shifted_by_a_number(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * SCALE + 3.0).softmax(-1) @ v


def normalised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * 10.0).softmax(-1) @ v


def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One tensor, split as timm's ViT splits it; the result merged for the projection."""
    batch, heads, tokens, dim = q.shape
    together = torch.stack([q, k, v]).permute(1, 3, 0, 2, 4).reshape(batch, tokens, -1)
    q, k, v = together.reshape(batch, tokens, 3, heads, dim).permute(2, 0, 3, 1, 4).unbind(0)
    out = ((q * SCALE) @ k.transpose(-2, -1)).softmax(dim=-1) @ v
    out = out.transpose(1, 2).reshape(batch, tokens, heads * dim)
    return out.unflatten(-1, (heads, dim)).transpose(1, 2)


def float32_inside(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.bfloat16() for t in (q, k, v))
    scores = q.float() @ k.float().mT * SCALE
    return scores.softmax(-1).to(v.dtype) @ v


#: spellings without a mask
PLAIN: list[Callable[[Tensor, Tensor, Tensor], Tensor]] = [
    matmul,
    operator_divided,
    unscaled,
    scaled_query,
    scaled_both,
    scaled_key_after_transpose,
    scaled_by_tensor_constant,
    einsum,
    einsum_tokens_first,
    einsum_keys_in_the_middle,
    key_times_query,
    value_times_probabilities,
    grouped_einsum,
    grouped_matmul,
    grouped_repeat,
    tiled_keys,
    one_key_head,
    three_dimensional,
    fairseq,
    diffusers_processor,
    softmax_by_hand,
    softmax_without_maximum,
    dropout_in_eval,
    shifted_by_a_number,
    normalised,
    packed,
    float32_inside,
]


def additive(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """transformers' eager attention."""
    scores = torch.matmul(q, k.transpose(2, 3)) * SCALE
    scores = scores + mask
    probabilities = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    probabilities = F.dropout(probabilities, p=0.0, training=False)
    return torch.matmul(probabilities, v).transpose(1, 2).contiguous().transpose(1, 2)


def t5(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """No scale, a bias of positions with the mask in it, float32 softmax."""
    scores = torch.matmul(q, k.transpose(3, 2))
    scores += mask
    return torch.matmul(F.softmax(scores.float(), dim=-1).type_as(scores), v)


def added_by_baddbmm(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """diffusers' processor with a mask, and BLOOM's with its ALiBi bias."""
    batch, heads, tokens = q.shape[:3]
    q, k, v = (t.reshape(batch * heads, *t.shape[2:]) for t in (q, k, v))
    mask = mask.expand(batch, heads, tokens, -1).reshape(batch * heads, tokens, -1)
    scores = torch.baddbmm(mask, q, k.transpose(1, 2), beta=1, alpha=SCALE)
    out = torch.bmm(scores.softmax(-1), v)
    return out.view(batch, heads, tokens, -1)


def added_before_scaling(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """A power of two scales the mask exactly."""
    return ((q @ k.mT + mask) * 0.25).softmax(-1) @ v


def subtracted(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.mT * SCALE - -mask).softmax(-1) @ v


def two_masks(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """BART and Swin add a bias and a mask."""
    bias = torch.linspace(0, 1, k.shape[2])[None, None, None]
    return (bias + (q @ k.mT * SCALE) + mask).softmax(-1) @ v


def windows(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Swin folds windows into the batch, and unfolds them for a mask of windows."""
    batch, heads = q.shape[:2]
    scores = q @ k.mT * SCALE
    scores = scores.view(1, batch, heads, *scores.shape[2:]) + mask[None]
    return scores.view(batch, heads, *scores.shape[3:]).softmax(-1) @ v


def grouped_with_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    q = q.unflatten(1, (2, -1))
    k, v = k[:, :2], v[:, :2]
    scores = torch.einsum("bkgqd,bksd->bkgqs", q, k) * SCALE + mask.unsqueeze(1)
    return torch.einsum("bkgqs,bksd->bkgqd", scores.softmax(-1), v).flatten(1, 2)


#: spellings with an additive mask of (batch or 1, heads or 1, tokens or 1, keys)
ADDITIVE: list[Callable[..., Tensor]] = [
    additive,
    t5,
    added_by_baddbmm,
    added_before_scaling,
    subtracted,
    two_masks,
]


def filled(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    scores = (q @ k.mT * SCALE).masked_fill(~keep, float("-inf"))
    return scores.softmax(-1) @ v


def filled_where_zero(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """The annotated Transformer."""
    scores = (q @ k.mT * SCALE).masked_fill(keep == 0, -1e9)
    return scores.softmax(-1) @ v


def chosen(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """GPT-2's eager attention."""
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    lowest = torch.full([], torch.finfo(scores.dtype).min, dtype=scores.dtype)
    return torch.where(keep, scores, lowest).softmax(-1) @ v


def chosen_before_scaling(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    scores = torch.where(keep, q @ k.mT, float("-inf")) * 0.3
    return scores.softmax(-1) @ v


def filled_twice(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    causal = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    scores = (q @ k.mT * SCALE).masked_fill(~causal, float("-inf"))
    return scores.masked_fill(keep.logical_not(), float("-inf")).softmax(-1) @ v


def filled_and_added(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    distance = torch.arange(k.shape[2]) - torch.arange(q.shape[2])[:, None]
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625]).view(-1, 1, 1)
    scores = q @ k.mT * SCALE + slopes * distance  # ALiBi
    return scores.masked_fill(~keep, float("-inf")).softmax(-1) @ v


#: spellings with a boolean mask, True where a key may be seen
BOOLEAN: list[Callable[..., Tensor]] = [
    filled,
    filled_where_zero,
    chosen,
    chosen_before_scaling,
    filled_twice,
    filled_and_added,
]


# Lookalikes. Each is some attention, but not softmax(Q K^T * scale + mask) V.


def over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * SCALE).softmax(-2) @ v


def over_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * SCALE).softmax(1) @ v


def scores_returned(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    scores = q @ k.mT
    return (scores * SCALE).softmax(-1) @ v, scores


def probabilities_returned(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    probabilities = (q @ k.mT * SCALE).softmax(-1)
    return probabilities @ v, probabilities


def probabilities_averaged(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    probabilities = (q @ k.mT * SCALE).softmax(-1)
    return probabilities @ v, probabilities.mean(1)


def sum_used(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    exp = torch.exp(q @ k.mT * SCALE)
    total = exp.sum(-1, keepdim=True)
    return (exp / total) @ v, total.log()


def dropout_active(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout((q @ k.mT * SCALE).softmax(-1), 0.3, training=True) @ v


def multiplied_after_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    causal = torch.ones(q.shape[2], k.shape[2]).tril()
    return ((q @ k.mT * SCALE).softmax(-1) * causal) @ v


def multiplied_before_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    causal = torch.ones(q.shape[2], k.shape[2]).tril()
    return (q @ k.mT * SCALE * causal).softmax(-1) @ v


def added_after_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT * SCALE).softmax(-1) + torch.eye(q.shape[2], k.shape[2])) @ v


def head_temperature(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * torch.tensor([0.1, 0.2, 0.3, 0.4]).view(-1, 1, 1)).softmax(-1) @ v


def scale_from_data(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * q.mean()).softmax(-1) @ v


def two_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * SCALE + q @ k.flip(1).mT * SCALE).softmax(-1) @ v


def softcap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Gemma 2."""
    scores = torch.tanh(q @ k.mT * SCALE / 5.0) * 5.0
    return scores.softmax(-1) @ v


def mask_inside_softcap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = torch.linspace(0, 1, k.shape[2])
    return (torch.tanh((q @ k.mT + bias) / 5.0) * 5.0).softmax(-1) @ v


def mask_scaled_inexactly(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = torch.linspace(0, 1, k.shape[2])
    return ((q @ k.mT + bias) * 0.3).softmax(-1) @ v


def weakly_filled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    causal = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    return (q @ k.mT * SCALE).masked_fill(~causal, -100.0).softmax(-1) @ v


def filled_with_other_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    causal = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    return torch.where(causal, q @ k.mT, k.sum(-1).unsqueeze(2)).softmax(-1) @ v


def negative_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * -SCALE).softmax(-1) @ v


def clamped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * SCALE).clamp(max=1.0).softmax(-1) @ v


def squared(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * SCALE).square().softmax(-1) @ v


def sink(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """gpt-oss: one more column of scores takes its share and is dropped."""
    scores = torch.cat([q @ k.mT * SCALE, torch.ones(*q.shape[:3], 1)], dim=-1)
    return scores.softmax(-1)[..., :-1] @ v


def kept_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Probabilities of all keys, values of some."""
    return (q @ k.mT * SCALE).softmax(-1)[..., 1:] @ v[:, :, 1:]


def last_key_dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * SCALE).softmax(-1)[..., :-1] @ v[:, :, :-1]


def last_score_dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * SCALE)[..., :-1].softmax(-1) @ v[:, :, :-1]


def last_query_dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * SCALE).softmax(-1)[:, :, :-1] @ v


def flipped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * SCALE).softmax(-1).flip(-1) @ v


#: lookalikes that are reported, with the names of their codes
REPORTED: dict[Callable[..., object], str] = {
    over_queries: "SCORE_FORM",
    flipped: "SCORE_FORM",
    over_heads: "SCORE_FORM",
    scores_returned: "SCORES_USED",
    probabilities_returned: "SCORES_USED",
    probabilities_averaged: "SCORES_USED",
    sum_used: "SCORES_USED",
    dropout_active: "DROPOUT",
    multiplied_after_softmax: "SCORE_FORM",
    multiplied_before_softmax: "SCORE_FORM",
    added_after_softmax: "SCORE_FORM",
    head_temperature: "SCORE_FORM",
    scale_from_data: "SCORE_FORM",
    two_keys: "SCORE_FORM",
    softcap: "SOFTCAP",
    mask_inside_softcap: "SCORE_FORM",
    mask_scaled_inexactly: "SCORE_FORM",
    weakly_filled: "SCORE_FORM",
    filled_with_other_scores: "SCORE_FORM",
    negative_scale: "SCORE_FORM",
    kept_keys: "SCORE_FORM",
    last_key_dropped: "SCORE_FORM",
    last_score_dropped: "SCORE_FORM",
    last_query_dropped: "SCORE_FORM",
    clamped: "SCORE_FORM",
    squared: "SCORE_FORM",
    sink: "SCORE_FORM",
}


def relu(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * SCALE).relu() @ v


def sigmoid(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * SCALE).sigmoid() @ v


def l1_normalised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.mT).abs()
    return (scores / scores.sum(-1, keepdim=True)) @ v


def other_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Divided by the sum of other exponentials."""
    exp = torch.exp(q @ k.mT * SCALE)
    return (exp / torch.exp(q @ k.mT).sum(-1, keepdim=True)) @ v


def other_axis_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    exp = torch.exp(q @ k.mT * SCALE)
    return (exp / exp.sum((-1, -2), keepdim=True)) @ v


def base_two(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    exp = torch.exp2(q @ k.mT * SCALE)
    return (exp / exp.sum(-1, keepdim=True)) @ v


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.softmax(-1) @ (k.softmax(-2).mT @ v)


def off_by_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax with one more in the denominator."""
    exp = torch.exp(q @ k.mT * SCALE)
    return (exp / (exp.sum(-1, keepdim=True) + 1)) @ v


def pooled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Probabilities that meet no values."""
    return (q @ k.mT * SCALE).softmax(-1).sum(-2)


#: lookalikes that are no attention at all, or none with a softmax
SILENT: list[Callable[..., object]] = [
    relu,
    sigmoid,
    l1_normalised,
    other_sum,
    other_axis_sum,
    base_two,
    linear_attention,
    off_by_one,
    pooled,
]
