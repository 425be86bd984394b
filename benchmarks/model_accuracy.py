"""How far FP8 attention moves the logits of a real language model, by its options, on a CPU.

    python -m benchmarks.model_accuracy --tokens 1024 4096 6037 8192

SmolLM2-135M-Instruct in float32 reads a novel, in eager mode, its attention through the reference
kernel. Printed and recorded: the SQNR of the logits of the last 64 tokens against the same model
with exact attention, and the share of them whose most likely next token is the same. The bundled
text has 6037 tokens; what is longer reads it again from the start, and then mostly copies.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import gpu, smollm2
from lp_inductor import Fp8Config, scaled_dot_product_attention_fp8

LAST = 64
#: What is compared, by name.
CONFIGS: dict[str, dict[str, Any]] = {
    "per head": {"granularity": "per_head"},
    "per block": {"granularity": "per_block"},
    "hadamard": {"hadamard": "qk"},
    "int8": {"qk_dtype": "int8"},
}


@contextlib.contextmanager
def fp8_attention(config: Fp8Config) -> Iterator[None]:
    """Send every call of F.scaled_dot_product_attention through FP8."""
    exact = F.scaled_dot_product_attention

    def attend(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        assert options.pop("attn_mask", None) is None and not options.pop("dropout_p", 0.0)
        with mock.patch.object(F, "scaled_dot_product_attention", exact):  # the kernel's own
            return scaled_dot_product_attention_fp8(query, key, value, config=config, **options)

    with mock.patch.object(F, "scaled_dot_product_attention", attend):
        yield


@torch.no_grad()
def main() -> None:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 6037, 8192])
    parser.add_argument("--gguf", type=Path, help="SmolLM2's model file")
    parser.add_argument("--json", type=Path, help="write the raw numbers here")
    arguments = parser.parse_args()
    model, text = smollm2.load(arguments.gguf)
    model = model.float()
    rows: list[dict[str, Any]] = []
    for tokens in arguments.tokens:
        ids = smollm2.first_tokens(text, tokens)

        def logits(ids: Tensor = ids) -> Tensor:
            return model(ids, use_cache=False, logits_to_keep=LAST).logits.double()

        exact = logits()
        for name, options in CONFIGS.items():
            with fp8_attention(Fp8Config(**options)):
                found = logits()
            same = (exact.argmax(-1) == found.argmax(-1)).double().mean()
            rows.append({
                "tokens": tokens, "config": name,
                "sqnr_db": round(gpu.sqnr(found, exact), 2),
                "same_next_token": round(same.item(), 3),
            })  # fmt: skip
            print(*(f"{k} {v}" for k, v in rows[-1].items()), sep=" | ", flush=True)
            if arguments.json:
                about = {"date": datetime.now(UTC).strftime("%Y-%m-%d"), "torch": torch.__version__}
                arguments.json.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
