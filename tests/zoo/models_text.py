"""Language models of transformers, tiny, with random weights: builders of module and call.

``causal_lm(family, call)`` names a family below and one of ``CALLS``, the ways in which language
models are called. 16 tokens (two rows), head_dim 64 unless the family says otherwise, two layers
unless it alternates over more.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import transformers

from tests.zoo.building import padding, randomize, tokens
from tests.zoo.measure import Built

BATCH, LENGTH, WINDOW = 2, 16, 8

#: Sizes that nearly every family names alike.
_SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_SLIDING = ["sliding_attention", "full_attention"]
_LONG_FACTORS = {"short_factor": [1.0 + 0.1 * n for n in range(32)], "long_factor": [4.0] * 32}

#: What each family needs beyond the sizes; its classes are ``<family>Config`` and
#: ``<family>ForCausalLM``, or those named.
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 64},
    "Mistral": {"sliding_window": WINDOW},
    "Mixtral": {"num_local_experts": 2, "sliding_window": None},
    "Gemma3": {
        "config": "Gemma3TextConfig",
        "head_dim": 64,
        "sliding_window": WINDOW,
        "layer_types": _SLIDING,
        "query_pre_attn_scalar": 64,
    },
    "Phi3": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.75,
        },
    },
    "Phi3LongRope": {
        "config": "Phi3Config",
        "model": "Phi3ForCausalLM",
        "original_max_position_embeddings": 32,
        "rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0, **_LONG_FACTORS},
    },
    "GPTNeoX": {},
    "GPTJ": {"rotary_dim": 32, "bos_token_id": 1, "eos_token_id": 2},
    "Glm4": {"head_dim": 64},
    "Cohere2": {"sliding_window": WINDOW, "layer_types": _SLIDING},
    "Olmo2": {},
    "SmolLM3": {"no_rope_layers": [1, 0]},
    "Llama4": {
        "config": "Llama4TextConfig",
        "head_dim": 64,
        "intermediate_size_mlp": 256,
        "attention_chunk_size": WINDOW,
        "num_local_experts": 2,
        "no_rope_layers": [1, 0],
        "layer_types": ["chunked_attention", "full_attention"],
    },
    "Llama4NoNorm": {
        "config": "Llama4TextConfig",
        "model": "Llama4ForCausalLM",
        "head_dim": 64,
        "intermediate_size_mlp": 256,
        "attention_chunk_size": WINDOW,
        "num_local_experts": 2,
        "no_rope_layers": [1, 1],
        "layer_types": ["chunked_attention", "full_attention"],
        "use_qk_norm": False,
    },
    "Gemma2": {"head_dim": 64, "sliding_window": WINDOW, "layer_types": _SLIDING},
    "GptOss": {
        "head_dim": 64,
        "sliding_window": WINDOW,
        "layer_types": _SLIDING,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "DeepseekV3": {
        "num_key_value_heads": 4,
        "moe_intermediate_size": 64,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 64,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 32,
        "v_head_dim": 32,
    },
}


@functools.cache
def _model(family: str) -> tuple[Any, Any]:
    """The configuration and the model, made once: calls do not change them."""
    options = {**_SIZES, **FAMILIES[family]}
    config_class = options.pop("config", f"{family}Config")
    model_class = options.pop("model", f"{family}ForCausalLM")
    config = getattr(transformers, config_class)(**options)
    model = getattr(transformers, model_class)._from_config(config, dtype=torch.bfloat16)
    return config, randomize(model)


def causal_lm(family: str, call: str) -> Callable[[], Built]:
    """A builder for one family, called in one way."""

    def build() -> Built:
        config, model = _model(family)
        return model, (), CALLS[call](config, model)

    return build


def _plain(config: Any, model: Any) -> dict[str, Any]:
    return {"input_ids": tokens(BATCH, LENGTH), "use_cache": False}


def _default(config: Any, model: Any) -> dict[str, Any]:
    """As one calls a model that one has loaded: it makes a cache and returns it."""
    return {"input_ids": tokens(BATCH, LENGTH)}


def _padded(side: str, config: Any, model: Any) -> dict[str, Any]:
    return {**_plain(config, model), "attention_mask": padding(BATCH, LENGTH, 5, side)}


def _positions(config: Any, model: Any) -> dict[str, Any]:
    """Given positions, as for packed sequences: the second starts anew after ten tokens."""
    positions = torch.arange(LENGTH).repeat(BATCH, 1)
    positions[1, 10:] -= 10
    return {**_plain(config, model), "position_ids": positions}


def _dynamic_prefill(config: Any, model: Any) -> dict[str, Any]:
    cache = transformers.DynamicCache(config=config)
    return {"input_ids": tokens(BATCH, LENGTH), "past_key_values": cache, "use_cache": True}


def _static_prefill(config: Any, model: Any) -> dict[str, Any]:
    return {
        "input_ids": tokens(BATCH, LENGTH),
        "past_key_values": _static_cache(config),
        "use_cache": True,
    }


def _static_cache(config: Any) -> Any:
    cache = transformers.StaticCache(config=config, max_cache_len=2 * LENGTH)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache.early_initialization(
        BATCH, config.num_key_value_heads, head_dim, torch.bfloat16, torch.device("cpu")
    )
    return cache


def _next(count: int, prefill: Callable[..., dict[str, Any]], config: Any, model: Any) -> Any:
    """The call behind a prefill: ``count`` more tokens."""
    call = prefill(config, model)
    model(**call)
    return {**call, "input_ids": tokens(BATCH, count, seed=3)}


CALLS: dict[str, Callable[..., dict[str, Any]]] = {
    "no cache": _plain,
    "default": _default,
    "right padding": functools.partial(_padded, "right"),
    "left padding": functools.partial(_padded, "left"),
    "position_ids": _positions,
    "DynamicCache, prefill": _dynamic_prefill,
    "DynamicCache, decode": functools.partial(_next, 1, _dynamic_prefill),
    "DynamicCache, 4 more tokens": functools.partial(_next, 4, _dynamic_prefill),
    "StaticCache, prefill": _static_prefill,
    "StaticCache, decode": functools.partial(_next, 1, _static_prefill),
    "StaticCache, 4 more tokens": functools.partial(_next, 4, _static_prefill),
}
