"""What the demo measures: perplexity over windows, and a greedy continuation."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lp_inductor.demo.errors import DemoError
from lp_inductor.demo.model import LogitsFn
from lp_inductor.demo.progress import Advance


def _ignore(done: int, total: int) -> None:
    """An :data:`Advance` that shows nothing."""


def split_windows(ids: Tensor, window: int, count: int) -> tuple[Tensor, ...]:
    """The first ``count`` windows of ``window`` tokens, side by side; what is left is not used.

    Args:
        ids: token ids, (1, tokens).
        window: tokens in a window, at least 2: a token is predicted from those before it.
        count: how many windows, at least 1.

    Returns:
        ``count`` tensors (1, window). Each owns its memory, so that no two differ in offset.

    Raises:
        DemoError: if there are not enough tokens.
    """
    available = ids.shape[1] // window
    if count > available:
        raise DemoError(
            f"the text has {ids.shape[1]} tokens, which is {available} windows of {window}, "
            f"not {count}"
        )
    return tuple(ids[:, n * window : (n + 1) * window].clone() for n in range(count))


def negative_log_likelihood(logits: Tensor, ids: Tensor) -> float:
    """The sum over tokens 1.. of -ln p(token | the tokens before it), in nats.

    Args:
        logits: (1, tokens, vocabulary), any floating dtype.
        ids: (1, tokens), int64.
    """
    return float(F.cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="sum"))


def perplexity(
    logits_fn: LogitsFn, windows: tuple[Tensor, ...], advance: Advance = _ignore
) -> float:
    """exp of the mean negative log-likelihood of every token but the first of each window.

    Args:
        logits_fn: the model.
        windows: token ids, each (1, tokens) with at least 2 tokens.
        advance: called after each window.
    """
    total = 0.0
    for done, ids in enumerate(windows, start=1):
        total += negative_log_likelihood(logits_fn(ids), ids)
        advance(done, len(windows))
    return math.exp(total / sum(ids.shape[1] - 1 for ids in windows))


def continue_greedily(
    logits_fn: LogitsFn,
    prompt: Tensor,
    steps: int,
    stop: int | None = None,
    advance: Advance = _ignore,
) -> Tensor:
    """Append the likeliest next token ``steps`` times, reading the whole sequence each time.

    Args:
        logits_fn: the model.
        prompt: token ids, (1, tokens).
        steps: how many tokens to append at most.
        stop: a token that ends the continuation early; it is not appended.
        advance: called after each token.

    Returns:
        the appended tokens, (1, at most ``steps``).
    """
    ids = prompt
    for done in range(1, steps + 1):
        token = logits_fn(ids)[:, -1:].argmax(dim=-1)
        if stop is not None and token.item() == stop:
            break
        ids = torch.cat((ids, token), dim=1)
        advance(done, steps)
    return ids[:, prompt.shape[1] :]
