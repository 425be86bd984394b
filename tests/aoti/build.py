"""Compile what the tests run, in a process of its own: ``python -m tests.aoti.build WHAT FOLDER``.

A package is loaded by another process than the one that compiled it, as its users do.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import lp_inductor
from lp_inductor import AttentionCall, Kernel, Library, Miss, Ok, PackageError, Visibility, cli
from lp_inductor.demo import run as demo_run
from lp_inductor.demo.model import load_language_model, logits_of
from lp_inductor.demo.result import DemoResult
from lp_inductor.demo.run import DemoOptions, Tools, compile_fp8, run_demo
from lp_inductor.demo.text import load_text
from lp_inductor.kernels import get_kernel
from lp_inductor.kernels.fa3 import Fa3Kernel, Fa3Library
from lp_inductor.reference import per_head
from lp_inductor.toolchain import linked_libraries
from tests import models
from tests.test_rewrites import qkv

#: Batch sizes and lengths at which the dynamic model is run; it is exported with the first.
SIZES = ((2, 16), (3, 40), (1, 7))
#: Tokens of the two texts that language models are run with; they are exported with the first.
LENGTHS = (64, 97)
#: Tokens on which the demo measures the perplexity of a language model.
WINDOW = 512
#: The code around the kernels is long; optimising it takes longer than running it here.
QUICKLY = {"aot_inductor.compile_wrapper_opt_level": "O0"}
TEST_LIBRARY = Library("lp_test", ("lp_test::attention",))


class Layer(nn.Module):
    """A layer with weights that want gradients, as those of a model that was trained."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(64, 3 * 64, dtype=torch.bfloat16)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Causal attention over ``x``; ``y`` and a dictionary are there for their structure."""
        heads = self.proj(x).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
        return {"out": out, "sum": out.sum(-1) + y}


class LibraryKernel(Kernel):
    """Attention from the shared library of ``library.cpp``."""

    name = "library"
    portable = True
    libraries = (TEST_LIBRARY,)

    def availability(self, device: torch.device) -> Ok | Miss:
        """On a CPU."""
        assert device.type == "cpu"
        return Ok()

    def supports(self, call: AttentionCall) -> Ok | Miss:
        """Everything that ``masks`` admits."""
        return Ok()

    def run(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        q_descale: Tensor,
        k_descale: Tensor,
        v_descale: Tensor,
        *,
        v_mean: Tensor | None,
        visible: Visibility,
        scale: float | None,
        out_dtype: torch.dtype,
    ) -> Tensor:
        """Dequantise and call the library."""
        q = query.float() * per_head(q_descale, query.shape[1])
        k = key.float() * per_head(k_descale, key.shape[1])
        v = value.float() * per_head(v_descale, value.shape[1])
        out: Tensor = torch.ops.lp_test.attention(q, k, v, visible.is_causal, scale)
        return out.to(out_dtype)


class AdaptedKernel(Fa3Kernel):
    """FA3's kernel on a CPU, with the operator of ``library.cpp`` that has FA3's signature."""

    name = "adapted"
    measured_as = None
    portable = True

    def __init__(self) -> None:
        module = "lp_test_fa3_interface"
        super().__init__((Fa3Library("lp-test-fa3", module, "lp_test_fa3", "lp_test_fa3_config"),))

    def availability(self, device: torch.device) -> Ok | Miss:
        """Where the operator takes what it must."""
        library = self.library()
        assert library is not None and device.type == "cpu"
        return self._check_build(library)


def save(path: Path, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    """What the C++ program reads."""
    both = {"inputs": inputs, "outputs": outputs}
    # Clones have none of the marks that Dynamo leaves on tensors.
    torch.save({key: [t.detach().clone() for t in ts] for key, ts in both.items()}, path)


def llama_inputs(batch: int, tokens: int) -> list[Tensor]:
    """Query, key and value for the dynamic model."""
    torch.manual_seed(tokens)
    heads = (4, 2, 2)
    return [torch.randn(batch, n, tokens, 64, dtype=torch.bfloat16) for n in heads]


def shape_env_of(program: ExportedProgram) -> Any:
    """Where the sizes of a program are; None if no input is a tensor."""
    for node in program.graph.nodes:
        if isinstance(value := node.meta.get("val"), Tensor):
            return value.fake_mode.shape_env  # type: ignore[attr-defined]
    return None


def build_models(folder: Path) -> None:
    """Two models in one package, with the results of torch.compile beside it."""
    llama, layer = models.Attention(models.llama), Layer()
    dims = {0: Dim("batch", min=1, max=8), 2: Dim("tokens", min=2, max=8192)}
    dynamic = torch.export.export(
        llama, tuple(llama_inputs(*SIZES[0])), dynamic_shapes=((dims, dims, dims),), strict=True
    )
    guards = list(shape_env_of(dynamic).guards)
    x, y = torch.randn(2, 16, 64, dtype=torch.bfloat16), torch.randn(16, dtype=torch.bfloat16)
    static = torch.export.export(layer, (x,), {"y": y}, strict=False)
    lp_inductor.aoti_compile_and_package(
        {"dynamic": dynamic, "static": static},
        package_path=folder / "models.pt2",
        inductor_configs=QUICKLY,
    )
    # A package has no guards: one that is added would fix a size, or its range, without a word.
    assert list(shape_env_of(dynamic).guards) == guards
    compiled = lp_inductor.compile_with_fp8_fusion(llama)
    with torch.no_grad():
        for n, sizes in enumerate(SIZES):
            operands = llama_inputs(*sizes)
            exact = llama(*(t.double() for t in operands))
            save(folder / f"exact{n}.pt", operands, [exact])
            if sizes[0] == 1:
                continue  # torch.compile would make code of its own for it
            for tensor in operands:
                torch._dynamo.mark_dynamic(tensor, 0)
                torch._dynamo.mark_dynamic(tensor, 2)
            save(folder / f"dynamic{n}.pt", operands, [compiled(*operands)])
        result = lp_inductor.compile_with_fp8_fusion(layer)(x, y=y)
        save(folder / "static0.pt", [x, y], [result["out"], result["sum"]])


def build_library(folder: Path) -> None:
    """A package that needs a library, through PyTorch's own function and our configuration."""
    torch.ops.load_library(folder / "lp_test.so")
    lp_inductor.register_kernel(LibraryKernel())
    program = torch.export.export(models.Attention(models.no_rope), tuple(qkv()))
    torch._inductor.aoti_compile_and_package(
        program,
        package_path=str(folder / "library.pt2"),
        inductor_configs=lp_inductor.aoti_inductor_configs(
            {"kernel": "library"}, {"aot_inductor.metadata": {"ours": "too"}}, libraries=["lp_test"]
        ),
    )
    exact = models.no_rope(*(t.double() for t in qkv()))
    save(folder / "library.pt", qkv(), [exact])


def build_adapted(folder: Path) -> None:
    """A package that calls an operator with the signature of FA3's, by an adapter."""
    # Importing a package of FA3 loads its operator.
    interface = "import torch; torch.ops.load_library(__file__.replace(MODULE, 'lp_test.so'))\n"
    interface = interface.replace("MODULE", "'lp_test_fa3_interface.py'")
    (folder / "lp_test_fa3_interface.py").write_text(interface)
    sys.path.insert(0, str(folder))
    lp_inductor.register_kernel(AdaptedKernel())
    dims = {0: Dim("batch", min=1, max=8), 2: Dim("tokens", min=2, max=8192)}
    program = torch.export.export(
        models.Attention(models.llama),
        tuple(llama_inputs(*SIZES[0])),
        dynamic_shapes=((dims, dims, dims),),
        strict=True,
    )
    guards = list(shape_env_of(program).guards)
    lp_inductor.aoti_compile_and_package(
        program,
        package_path=folder / "adapted.pt2",
        config={"kernel": "adapted"},
        inductor_configs=QUICKLY,
        libraries=["lp-test-fa3"],
    )
    assert list(shape_env_of(program).guards) == guards
    for n, sizes in enumerate(SIZES):
        operands = llama_inputs(*sizes)
        save(folder / f"exact{n}.pt", operands, [models.llama(*(t.double() for t in operands))])


def build_language_model(folder: Path) -> None:
    """SmolLM2-135M: what the demo prints, a package for any number of tokens, and logits.

    The logits are those of the model that the demo has compiled.
    """
    model = load_language_model()
    compiled: list[Any] = []

    def compile_once(module: nn.Module) -> Any:
        assert not compiled
        compiled.append(compile_fp8(module))
        return compiled[0]

    def short_demo(options: DemoOptions, **arguments: Any) -> DemoResult:
        tools = Tools(load=lambda: model, compile=compile_once)
        return run_demo(replace(options, window=WINDOW), tools=tools, **arguments)

    with (
        (folder / "demo.json").open("w") as printed,
        contextlib.redirect_stdout(printed),
        mock.patch.object(demo_run, "run_demo", short_demo),
    ):
        # One half window and a short continuation show the same as the whole demo.
        assert cli.main(["demo", "--json", "--windows", "1", "--tokens", "8"]) == cli.EXIT_OK
    ids = model.tokens(load_text())
    save(folder / "text.pt", [ids], [])
    run = logits_of(compiled[0])
    with torch.no_grad():
        with torch.compiler.set_stance("fail_on_recompile"):
            for n, tokens in enumerate(ids[:, : sum(LENGTHS)].split(LENGTHS, dim=1)):
                save(folder / f"logits{n}.pt", [tokens], [run(tokens)])
        lp_inductor.aoti_compile_and_package(
            export_prefill(model.module, ids[:, : LENGTHS[0]]),
            package_path=folder / "model.pt2",
            inductor_configs=QUICKLY,
        )


def build_gpu(folder: Path) -> None:
    """For each kernel that a package may hold on this GPU: a package, and what JIT returns.

    Strict export: with torch 2.11, grouped heads of an open length cannot be exported otherwise.
    """
    stock_program = torch.export.export(
        models.Attention(models.no_rope), tuple(t.cuda() for t in qkv())
    )
    package_stock(stock_program, folder / "stock.pt2")
    for name in gpu_kernels():
        dims = {2: Dim("tokens", min=2, max=8192)}
        operands = [t.cuda() for t in llama_inputs(2, 256)]
        config = {"kernel": name, "force": True}
        program = torch.export.export(
            models.Attention(models.llama),
            tuple(operands),
            dynamic_shapes=((dims,) * 3,),
            strict=True,
        )
        guards = list(shape_env_of(program).guards)
        lp_inductor.aoti_compile_and_package(
            program,
            package_path=folder / f"{name}.pt2",
            config=config,
            libraries=[library.name for library in get_kernel(name).libraries],
        )
        assert list(shape_env_of(program).guards) == guards
        compiled = lp_inductor.compile_with_fp8_fusion(models.llama, config)
        for n, tokens in enumerate((256, 1024)):
            inputs = llama_inputs(2, tokens)
            on_gpu = [t.cuda() for t in inputs]
            for tensor in on_gpu:
                torch._dynamo.mark_dynamic(tensor, 2)
            with torch.no_grad():
                result = compiled(*on_gpu)
            save(folder / f"{name}{n}.pt", inputs, [result.cpu()])
            save(folder / f"exact{n}.pt", inputs, [models.llama(*(t.double() for t in inputs))])


def package_stock(program: ExportedProgram, path: Path) -> None:
    """A package without us."""
    linked = {"aot_inductor.custom_op_libs": linked_libraries()}
    torch._inductor.aoti_compile_and_package(
        program, package_path=str(path), inductor_configs=linked
    )


def gpu_kernels() -> list[str]:
    """The registered kernels that a package may hold on this GPU, with a library or without."""
    device = torch.device("cuda")
    return [
        kernel.name
        for kernel in lp_inductor.registered_kernels()
        if kernel.portable and isinstance(kernel.availability(device), Ok)
    ]


def library_files(kernel: str) -> list[str]:
    """The shared libraries of a kernel that this process has loaded, as a package wants them."""
    operators = [op for library in get_kernel(kernel).libraries for op in library.operators]
    return [sys.modules[f"{op.partition('::')[0]}._C"].__file__ or "" for op in operators]


def build_upstream(folder: Path) -> None:
    """PyTorch's FP8 attention in a package, without us, on a GPU: its first run throws."""

    class Upstream(nn.Module):
        def forward(self, q: Tensor, descale: Tensor) -> Tensor:
            out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention.quantized(
                q, q, q, descale, descale, descale, 0.0, True, False
            )[0]
            return out

    q = torch.randn(2, 4, 128, 64).cuda().to(torch.float8_e4m3fn)
    operands = (q, torch.ones(2, 4).cuda())
    torch.save({"inputs": list(operands), "outputs": []}, folder / "upstream.pt")
    program = torch.export.export(Upstream(), operands)
    try:
        lp_inductor.aoti_compile_and_package(program, package_path=folder / "ours.pt2")
    except PackageError as error:
        (folder / "error.txt").write_text(str(error))
    package_stock(program, folder / "upstream.pt2")


def export_prefill(model: nn.Module, ids: Tensor) -> ExportedProgram:
    """A language model without its cache, for every number of tokens."""
    lengths = ({1: Dim("tokens", min=2, max=8192)},)
    # Tracing by Dynamo takes twice as long. With torch 2.11, grouped heads of an open length cannot
    # be exported otherwise.
    strict = torch.__version__ < (2, 13)
    return torch.export.export(Prefill(model), (ids,), dynamic_shapes=lengths, strict=strict)


class Prefill(nn.Module):
    """A language model from token ids (1, tokens) to logits (1, tokens, vocabulary)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        """Without a cache."""
        logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits


BUILDS: dict[str, Callable[[Path], Any]] = {
    "packages": lambda folder: (build_models(folder), build_library(folder)),
    "adapted": build_adapted,
    "language-model": build_language_model,
    "gpu": build_gpu,
    "upstream": build_upstream,
}

if __name__ == "__main__":
    torch.manual_seed(0)
    BUILDS[sys.argv[1]](Path(sys.argv[2]))
