"""The masks of real models, in the graphs that torch.compile makes of them."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch.aot_autograd import aot_module_simplified
from torch._inductor.decomposition import select_decomp_table
from torch.fx import GraphModule, Node

from lp_inductor.passes.mask import MaskProof, MaskProver
from lp_inductor.passes.movement import shape_of, value_of
from lp_inductor.passes.result import Miss
from tests.passes.mask_checks import Sizes, Traced, check

Model = tuple[Callable[..., Any], dict[str, Any]]


class _Traced(Exception):
    """The graph was kept, and the values of its inputs; nothing more needs to run."""


class Masks(NamedTuple):
    """The masks of a model's attention calls, and the values of their graph's placeholders."""

    traced: list[Traced]
    operands: list[Any]


def trace_masks(function: Callable[..., Any], inputs: dict[str, Any], dynamic: bool) -> Masks:
    """The masks in the first graph of ``function`` that has any."""
    found: list[Masks] = []

    def keep(gm: GraphModule, example_inputs: Any) -> Any:
        def run(*operands: Any) -> Any:
            (output,) = gm.graph.find_nodes(op="output")
            nodes = iter(output.args[0])
            traced = [
                Traced(mask, (*shape_of(query)[:3], shape_of(key)[2]))
                for mask, query, key in zip(nodes, nodes, nodes, strict=True)
            ]
            found.append(Masks(traced, [_copied(operand) for operand in operands]))
            raise _Traced

        return run

    def backend(gm: GraphModule, example_inputs: Any) -> Any:
        shown = [node for call in gm.graph.nodes for node in _mask_query_key(call)]
        if not shown:
            return gm.forward
        (output,) = gm.graph.find_nodes(op="output")
        output.args = (tuple(shown),)
        gm.graph.eliminate_dead_code()
        gm.recompile()
        table = select_decomp_table()
        return aot_module_simplified(gm, example_inputs, fw_compiler=keep, decompositions=table)

    torch._dynamo.reset()
    with torch.no_grad(), pytest.raises(_Traced):
        torch.compile(function, backend=backend, dynamic=dynamic)(**inputs)
    return found[0]


def _copied(operand: Any) -> Any:
    return operand.clone() if isinstance(operand, Tensor) else operand


def _mask_query_key(call: Node) -> tuple[Node, ...]:
    if call.target is not F.scaled_dot_product_attention:
        return ()
    given = dict(zip(("query", "key", "value", "attn_mask"), call.args, strict=False))
    given |= call.kwargs
    mask = given.get("attn_mask")
    return () if mask is None else (mask, given["query"], given["key"])


def concrete_sizes(traced: Traced) -> Sizes:
    """The sizes of the traced call, from the hints of symbols."""
    (output,) = traced.mask.graph.find_nodes(op="output")
    nodes = output.args[0]
    position = nodes.index(traced.mask)
    query, key = (value_of(node).shape for node in nodes[position + 1 : position + 3])
    sizes = (*query[:3], key[2])
    return Sizes(*(s if isinstance(s, int) else s.node.hint for s in sizes))


SMALL: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "max_position_embeddings": 64,
}


def language_model(config_name: str, inputs: dict[str, Any] | None = None, **more: Any) -> Model:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, config_name)(**{**SMALL, **more})
    config._attn_implementation = "sdpa"
    model = transformers.AutoModel.from_config(config).eval()
    ids = torch.ones(2, 16, dtype=torch.int64)
    return model, {"input_ids": ids, **({"use_cache": False} if inputs is None else inputs)}


def left_padding() -> Tensor:
    return (torch.arange(16) >= torch.tensor([[3], [0]])).long()


def right_padding() -> Tensor:
    return (torch.arange(16) < torch.tensor([[16], [11]])).long()


def padded(config_name: str, mask: Tensor, **more: Any) -> Model:
    return language_model(config_name, {"attention_mask": mask, "use_cache": False}, **more)


def encoder(config_name: str, mask: Tensor | None, **more: Any) -> Model:
    return language_model(config_name, {} if mask is None else {"attention_mask": mask}, **more)


def packed() -> Model:
    ids = torch.cat([torch.arange(9), torch.arange(7)])[None].expand(2, -1)
    return language_model("LlamaConfig", {"position_ids": ids, "use_cache": False})


def static_cache(queries: int, **more: Any) -> Model:
    """Decoding, or the next piece of a prefill, with a cache of fixed length."""
    transformers = pytest.importorskip("transformers")
    model, _ = language_model("LlamaConfig")
    cache = transformers.StaticCache(config=model.config, max_cache_len=24)
    with torch.no_grad():
        model(torch.ones(2, 6, dtype=torch.int64), past_key_values=cache)
    positions = torch.arange(6, 6 + queries)[None].expand(2, -1)
    ids = torch.ones(2, queries, dtype=torch.int64)
    return model, {
        "input_ids": ids,
        "position_ids": positions,
        "past_key_values": cache,
        **more,
    }


def llama4() -> Model:
    transformers = pytest.importorskip("transformers")
    config = transformers.Llama4TextConfig(
        **SMALL,
        head_dim=16,
        intermediate_size_mlp=32,
        num_local_experts=2,
        attention_chunk_size=8,
        layer_types=["chunked_attention", "full_attention"],
    )
    config._attn_implementation = "sdpa"
    model = transformers.Llama4TextModel(config).eval()
    ids = torch.ones(2, 16, dtype=torch.int64)
    return model, {"input_ids": ids, "use_cache": False}


def pixtral() -> Model:
    from transformers.models.pixtral.modeling_pixtral import generate_block_attention_mask

    def attend(x: Tensor) -> Tensor:
        mask = generate_block_attention_mask([4, 7, 5], x)
        q = x[:, None]
        return F.scaled_dot_product_attention(q, q, q, attn_mask=mask)

    return attend, {"x": torch.zeros(2, 16, 8, dtype=torch.bfloat16)}


def text_mask(tokens: int) -> Tensor:
    return torch.arange(tokens)[None] < tokens - 3


def hunyuan_video() -> Model:
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=2,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    ).eval()
    return model, {
        "hidden_states": torch.randn(1, 4, 1, 4, 6),
        "timestep": torch.tensor([5]),
        "encoder_hidden_states": torch.randn(1, 9, 16),
        "encoder_attention_mask": text_mask(9),
        "pooled_projections": torch.randn(1, 8),
        "guidance": torch.tensor([1.0]),
    }


def qwen_image() -> Model:
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    ).eval()
    return model, {
        "hidden_states": torch.randn(1, 16, 16),
        "encoder_hidden_states": torch.randn(1, 7, 16),
        "encoder_hidden_states_mask": text_mask(7),
        "timestep": torch.tensor([5.0]),
        "img_shapes": [(1, 4, 4)],
    }


def ltx() -> Model:
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=16,
    ).eval()
    return model, {
        "hidden_states": torch.randn(1, 12, 4),
        "encoder_hidden_states": torch.randn(1, 7, 16),
        "timestep": torch.tensor([5]),
        "encoder_attention_mask": text_mask(7),
        "num_frames": 1,
        "height": 3,
        "width": 4,
    }


def mochi() -> Model:
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.MochiTransformer3DModel(
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        pooled_projection_dim=16,
        in_channels=4,
        text_embed_dim=16,
        time_embed_dim=4,
        max_sequence_length=8,
    ).eval()
    return model, {
        "hidden_states": torch.randn(1, 4, 1, 4, 4),
        "encoder_hidden_states": torch.randn(1, 8, 16),
        "timestep": torch.tensor([5]),
        "encoder_attention_mask": text_mask(8),
    }


def lumina2() -> Model:
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=24,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(4, 4, 4),
        axes_lens=(32, 32, 32),
        cap_feat_dim=16,
    ).eval()
    return model, {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([5.0, 5.0]),
        "encoder_hidden_states": torch.randn(2, 7, 16),
        "encoder_attention_mask": text_mask(7).expand(2, -1),
    }


# Every model, with what is proved of the masks of its attention calls.
MODELS: dict[str, tuple[Callable[[], Model], set[str]]] = {
    "llama": (lambda: language_model("LlamaConfig"), {"causal"}),
    "llama, left padding": (lambda: padded("LlamaConfig", left_padding()), {"causal + keys"}),
    "llama, right padding": (lambda: padded("LlamaConfig", right_padding()), {"causal + keys"}),
    "llama, position ids": (packed, {"full + mask"}),
    "llama, static decode": (lambda: static_cache(1), {"full + keys"}),
    "llama, static prefill": (lambda: static_cache(4), {"full + mask"}),
    "llama, padded decode": (
        lambda: static_cache(1, attention_mask=torch.arange(7).expand(2, -1) > 2),
        {"full + keys"},
    ),
    "mistral": (lambda: language_model("MistralConfig", sliding_window=8), {"band[-7, 0]"}),
    "mistral, padded": (
        lambda: padded("MistralConfig", left_padding(), sliding_window=8),
        {"band[-7, 0] + keys"},
    ),
    "llama4": (llama4, {"causal, chunk[8]", "causal"}),
    "bert, padded": (lambda: encoder("BertConfig", right_padding()), {"full + keys"}),
    "modernbert": (
        lambda: encoder("ModernBertConfig", None, local_attention=8, global_attn_every_n_layers=2),
        {"band[-4, 4]"},
    ),
    "modernbert, padded": (
        lambda: encoder(
            "ModernBertConfig", right_padding(), local_attention=8, global_attn_every_n_layers=2
        ),
        {"band[-4, 4] + keys", "full + keys"},
    ),
    "pixtral": (pixtral, {"full + mask"}),
    "hunyuan video": (hunyuan_video, {"full + mask", "full + keys"}),
    "qwen image": (qwen_image, {"full + keys"}),
    "ltx": (ltx, {"MASK_IS_DATA"}),
    "mochi": (mochi, {"full + keys"}),
    "lumina2": (lumina2, {"full + keys"}),
}


@functools.cache
def masks_of(name: str, dynamic: bool) -> Masks:
    torch.manual_seed(0)
    return trace_masks(*MODELS[name][0](), dynamic)


#: Traced with symbolic sizes too: one of each kind, for each takes a quarter of a minute.
DYNAMIC = (
    "llama, position ids",
    "llama, static decode",
    "llama4",
    "mistral, padded",
    "modernbert, padded",
    "qwen image",
)


#: Of those, what each run of the tests traces, test_speed with them.
SHORT = ("llama, position ids", "mistral, padded")


@pytest.mark.parametrize(
    ("name", "dynamic"),
    [
        *((name, False) for name in MODELS),
        *(
            pytest.param(name, True, marks=[] if name in SHORT else pytest.mark.long)
            for name in DYNAMIC
        ),
    ],
)
def test_model(name: str, dynamic: bool) -> None:
    masks = masks_of(name, dynamic)
    prover = MaskProver()
    found = set()
    for traced in masks.traced:
        answer = prover.prove(traced.mask, *traced.sizes)
        if isinstance(answer, MaskProof):
            check(traced, answer, concrete_sizes(traced), masks.operands)
            found.add(answer.describe())
        else:
            found.add(answer.code.name)
    assert found == MODELS[name][1]


@pytest.mark.parametrize("name", [*SHORT, pytest.param("llama4", marks=pytest.mark.long)])
def test_speed(name: str) -> None:
    """A mask is proved in some ten milliseconds, and once however many layers share it."""
    traced = masks_of(name, True).traced[0]

    def seconds(prover: MaskProver) -> float:
        start = time.perf_counter()
        answer = prover.prove(traced.mask, *traced.sizes)
        assert not isinstance(answer, Miss)
        return time.perf_counter() - start

    provers = [MaskProver() for _ in range(5)]
    # Generous, for machines with other work to do.
    assert min(map(seconds, provers)) < 0.5
    assert min(map(seconds, provers)) < 0.01
