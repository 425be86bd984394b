"""The command line: ``python -m lp_inductor demo``, ``doctor`` and ``explain``.

A command is an entry of :data:`COMMANDS`: a name, a line of help, a function that adds its
arguments and one that runs it and returns the exit status. Commands import what they need when
they run, so that ``doctor`` and ``--help`` work where the demo's packages are missing.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import logging
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

EXIT_OK = 0
EXIT_FAILURE = 1
# argparse exits with 2 for wrong arguments; missing packages are neither that nor a failure.
EXIT_UNAVAILABLE = 3


@dataclass(frozen=True)
class Command:
    """One subcommand.

    Attributes:
        name: what the user types.
        help: one line for ``--help``.
        configure: adds the command's arguments to its parser.
        run: does the work and returns the exit status.
    """

    name: str
    help: str
    configure: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments after the program's name; ``sys.argv[1:]`` if None.

    Returns:
        the exit status: 0, 1 for a failure, 3 where the machine lacks what the command needs.

    Raises:
        SystemExit: from argparse, for wrong arguments (status 2), ``--help`` and ``--version``.
    """
    args = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    command: Command = args.command
    return command.run(args)


def build_parser() -> argparse.ArgumentParser:
    """The parser with every command of :data:`COMMANDS`."""
    parser = argparse.ArgumentParser(
        prog="python -m lp_inductor",
        description="FP8 attention for torch.compile.",
    )
    parser.add_argument("--version", action="version", version=f"lp_inductor {_version_of_self()}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        subparser = subparsers.add_parser(command.name, help=command.help, description=command.help)
        command.configure(subparser)
        subparser.set_defaults(command=command)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def _write(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _fail(error: Exception) -> None:
    sys.stderr.write(f"lp_inductor: error: {error}\n")


# --- demo -----------------------------------------------------------------------------------------


def _configure_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object and nothing else"
    )
    parser.add_argument(
        "--windows",
        type=_positive,
        default=5,
        metavar="N",
        help="measure perplexity on N windows of 1024 tokens (default: 5, all of the text)",
    )
    parser.add_argument(
        "--tokens",
        type=_positive,
        default=32,
        metavar="N",
        help="continue the prompt by N tokens (default: 32)",
    )
    parser.add_argument("--prompt", default=None, help="the prompt to continue")


def _run_demo(args: argparse.Namespace) -> int:
    from lp_inductor.demo.errors import DemoError, MissingPackageError
    from lp_inductor.demo.progress import make_progress
    from lp_inductor.demo.run import DemoOptions, run_demo

    options = DemoOptions(windows=args.windows, tokens=args.tokens)
    if args.prompt is not None:
        options = options.with_prompt(args.prompt)
    progress = make_progress(sys.stderr, bars=not args.json)
    try:
        # Whatever a library prints belongs beside the result, not into it.
        with contextlib.redirect_stdout(sys.stderr):
            result = run_demo(options, progress=progress)
    except MissingPackageError as error:
        _fail(error)
        return EXIT_UNAVAILABLE
    except DemoError as error:
        _fail(error)
        return EXIT_FAILURE
    _write(json.dumps(result.as_json()) if args.json else result.as_text())
    return EXIT_OK


# --- doctor ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KernelStatus:
    """Whether a kernel can run on a device; ``reason`` is empty where it can."""

    kernel: str
    device: str
    usable: bool
    reason: str


def _configure_doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object and nothing else"
    )


def _run_doctor(args: argparse.Namespace) -> int:
    versions = dict(_versions())
    devices = {str(device): describe_device(device) for device in _devices()}
    kernels = list(kernel_statuses())
    if args.json:
        report = {"versions": versions, "devices": devices, "kernels": [asdict(k) for k in kernels]}
        _write(json.dumps(report))
    else:
        rows = [*versions.items(), *devices.items()]
        width = max(len(name) for name, _ in rows)
        _write("\n".join(f"{name.ljust(width)}  {value}" for name, value in rows))
        _write("\nkernels, in the order in which kernel='auto' asks them:")
        _write("\n".join(_kernel_lines(kernels)))
    return EXIT_OK if any(kernel.usable for kernel in kernels) else EXIT_FAILURE


def _kernel_lines(kernels: Sequence[KernelStatus]) -> Iterator[str]:
    name_width = max((len(k.kernel) for k in kernels), default=0)
    device_width = max((len(k.device) for k in kernels), default=0)
    for k in kernels:
        state = "usable" if k.usable else f"not usable: {k.reason}"
        yield f"  {k.kernel.ljust(name_width)}  {k.device.ljust(device_width)}  {state}"


def _versions() -> Iterator[tuple[str, str]]:
    yield "lp_inductor", _version_of_self()
    yield "python", platform.python_version()
    yield "platform", platform.platform()
    for package in ("torch", "triton"):
        yield package, _installed_version(package) or "not installed"


def _version_of_self() -> str:
    return _installed_version("lp_inductor") or "not installed"


def _installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[torch.device]:
    import torch

    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return [*gpus, torch.device("cpu")]


def describe_device(device: torch.device) -> str:
    """Name and capability of a device: compute capability of a GPU, vector units of a CPU."""
    import torch

    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        memory = properties.total_memory / 2**30
        capability = f"{properties.major}.{properties.minor}"
        return f"{properties.name}, capability {capability}, {memory:.0f} GiB"
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()}, {capability}, {torch.get_num_threads()} threads"


def kernel_statuses() -> Iterator[KernelStatus]:
    """Every registered kernel on every device, in the order in which ``auto`` asks."""
    from lp_inductor.kernels import registered_kernels
    from lp_inductor.passes.result import Miss

    for device in _devices():
        for kernel in registered_kernels():
            answer = kernel.availability(device)
            missed = isinstance(answer, Miss)
            yield KernelStatus(kernel.name, str(device), not missed, str(answer) if missed else "")


# --- explain --------------------------------------------------------------------------------------


def _configure_explain(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("package", help="a package that lp_inductor compiled, model.pt2")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object and nothing else"
    )
    parser.add_argument("--model", default=None, help="only this model of the package")


def _run_explain(args: argparse.Namespace) -> int:
    from lp_inductor.package import PackageError, read_package

    try:
        models = read_package(args.package)
        if args.model is not None and args.model not in models:
            raise PackageError(f"{args.package} has no model {args.model!r}, but {sorted(models)}")
    except PackageError as error:
        _fail(error)
        return EXIT_FAILURE
    chosen = [info for name, info in models.items() if args.model in (None, name)]
    if args.json:
        _write(json.dumps({info.model: info.as_json() for info in chosen}))
    else:
        _write("\n\n".join(map(str, chosen)))
    return EXIT_OK


COMMANDS = (
    Command(
        "demo",
        "Compile a small language model to FP8 attention and compare it with bfloat16.",
        _configure_demo,
        _run_demo,
    ),
    Command(
        "doctor",
        "Show versions, devices, and which kernels can run here.",
        _configure_doctor,
        _run_doctor,
    ),
    Command(
        "explain",
        "Show what became of the attention of a package, without loading it.",
        _configure_explain,
        _run_explain,
    ),
)
