"""What Inductor writes around the Triton kernels: its own code for a GPU that need not be there.

Read, not run: which buffers there are, what is launched and with which arguments.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from lp_inductor.lowerings.attention import lower_graph
from tests.lowerings.test_triton import attend, compiled, hopper, quantised

__all__ = ["hopper"]

Model = Callable[..., Tensor]

H200 = SimpleNamespace(
    name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, warp_size=32,
    total_memory=140 * 2**30, regs_per_multiprocessor=65536, max_threads_per_block=1024,
    max_threads_per_multi_processor=2048, L2_cache_size=50 * 2**20,
    shared_memory_per_block=48 * 2**10, shared_memory_per_block_optin=227 * 2**10,
)  # fmt: skip


@pytest.fixture(autouse=True)
def inductor_sees_a_gpu(hopper: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inductor asks for the properties of the GPU while it plans its kernels."""
    if torch.cuda.is_available():
        yield
        return
    from torch._dynamo.device_interface import CudaInterface
    from torch.utils._triton import has_triton

    def properties(device: Any = None) -> Any:
        return H200

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(CudaInterface, "is_available", staticmethod(lambda: True))
    monkeypatch.setattr(CudaInterface, "get_device_properties", staticmethod(properties))
    monkeypatch.setattr(CudaInterface.Worker, "get_device_properties", staticmethod(properties))
    has_triton.cache_clear()
    yield
    has_triton.cache_clear()


def inductor_code(model: Model, make_operands: Callable[[], list[Tensor]]) -> str:
    """The Python that Inductor writes for ``model``, whose operators of ours are lowered.

    No buffer is used twice, so that each that is needed can be counted.
    """
    from torch._dispatch.python import enable_python_dispatcher
    from torch._inductor import config
    from torch._inductor.debug import DebugContext
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes.post_grad import post_grad_passes
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V
    from torch._subclasses.functional_tensor import dispatch_functionalize

    mode = FakeTensorMode(shape_env=ShapeEnv())
    with mode, enable_python_dispatcher(), torch.no_grad():
        operands = make_operands()
        trace = make_fx(dispatch_functionalize(model), decomposition_table=select_decomp_table())
        graph = trace(*operands)
    lower_graph(graph.graph)
    graph.recompile()
    with V.set_fake_mode(mode), config.patch(allow_buffer_reuse=False):
        post_grad_passes(graph, True)
        lowering = GraphLowering(
            graph, example_inputs=operands, shape_env=mode.shape_env, is_inference=True
        )
        with V.set_graph_handler(lowering), V.set_debug_handler(DebugContext()):
            lowering.run(*operands)
            return str(lowering.codegen()[0].value)


def operands() -> list[Tensor]:
    """Query of 4 heads, two keys and values of 2, cosines and sines."""
    q, *others = (
        torch.empty(1, 200, heads, 32, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        for heads in (4, 2, 2, 2, 2)
    )
    return [q, *others, *(torch.empty(1, 1, 200, 8, device="cuda") for _ in range(2))]


def two_sites(q: Tensor, k: Tensor, k2: Tensor, v: Tensor, v2: Tensor, *tables: Tensor) -> Tensor:
    """Two layers with the same rotation, the second's query being the first's result."""
    first = attend(*quantised(q, k, v, *tables))
    return attend(*quantised(first, k2, v2, *tables))


@functools.cache
def code_of_two_sites() -> str:
    """Written once for all tests."""
    return inductor_code(two_sites, operands)


def launches(code: str) -> list[tuple[str, str]]:
    """Name and arguments of every kernel that is started."""
    return re.findall(r"^\s+(\w+?)(?:_\d+)?\.run\((.*)\)$", code, re.MULTILINE)


def buffers(code: str) -> int:
    """How many tensors are allocated."""
    return len(re.findall(r"= empty_strided_cuda\(", code))


@compiled
def test_operands_are_stored_once() -> None:
    """What the graph computes is not computed again for each of a site's launches, or each site."""

    def computed(*tensors: Tensor) -> Tensor:
        return two_sites(*(t * 3 for t in tensors))

    found = inductor_code(computed, operands)
    assert buffers(found) == buffers(code_of_two_sites()) + 7


@compiled
def test_nothing_but_our_kernels_runs() -> None:
    """Four launches a site, and no copy between them."""
    names = [name for name, _ in launches(code_of_two_sites())]
    assert names == 2 * ["sample_operands", *["quantize_operands"] * 2, "attention_forward"]


@compiled
def test_launches_read_memory_and_no_views() -> None:
    """A view is made anew for each launch and argument: no launch needs one."""
    found = launches(inductor_code(projected, projections))
    assert [name for name, _ in found].count("attention_forward") == 2
    assert not [name for name, arguments in found if "reinterpret_tensor(" in arguments]


def projected(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, wo: Tensor, *tables: Tensor) -> Tensor:
    """Two layers of 4 heads, two of them of keys: products seen as heads, tables without heads."""
    for _ in range(2):
        q, k, v = (torch.mm(x, w).view(1, 200, -1, 32).transpose(1, 2) for w in (wq, wk, wv))
        cos, sin = ((table * 2).unsqueeze(1) for table in tables)
        x = torch.mm(attend(*quantised(q, k, v, cos, sin)).transpose(1, 2).reshape(200, 128), wo)
    return x


def projections() -> list[Tensor]:
    """For :func:`projected`."""
    widths = (128, 64, 64, 128)
    weights = (torch.empty(128, w, device="cuda", dtype=torch.bfloat16) for w in widths)
    x = torch.empty(200, 128, device="cuda", dtype=torch.bfloat16)
    return [x, *weights, *(torch.empty(1, 200, 8, device="cuda") for _ in range(2))]


@compiled
def test_memory_lies_as_the_kernel_is_told() -> None:
    """Inductor pads what it makes for a product; a launch gets other memory then, not that."""

    def model(q: Tensor, k: Tensor, v: Tensor, *tables: Tensor) -> tuple[Tensor, Tensor]:
        k = k * 3
        product = torch.bmm(v.squeeze(0).transpose(1, 2), k.squeeze(0))
        return attend(*quantised(q, k, v, *tables)), product

    def make() -> list[Tensor]:
        heads = [torch.empty(1, 4, 1301, 80, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
        return [*heads, *(torch.empty(1, 1, 1301, 40, device="cuda") for _ in range(2))]

    code = inductor_code(model, make)
    strides = dict(re.findall(r"(buf\d+) = empty_strided_cuda\(\(.*?\), (\(.*?\)), ", code))
    if torch.__version__ >= (2, 13):  # 2.11 stores what we ask for before anybody pads it
        assert "(416512, 104128, 80, 1)" in strides.values()
    reading = [a for name, a in launches(code) if name in ("sample_operands", "quantize_operands")]
    keys = [arguments.split(", ")[1] for arguments in reading]
    assert [strides[key] for key in keys] == 3 * ["(416320, 104080, 80, 1)"]
    assert [arguments.count("416320, 104080, 80, 1") for arguments in reading] == 3 * [3]
