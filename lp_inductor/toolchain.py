"""What a C++ compiler must be told so that PyTorch can load what it links.

PyTorch's libraries use the shared C++ library, libstdc++.so.6. Some machines have it for running
only: no libstdc++.so for the linker, which then takes the static library without a word. In one
process with the shared one, that ends in a crash as soon as a package is loaded (the two disagree
about locales, which ``std::regex`` reads).
"""

from __future__ import annotations

import functools
import subprocess
import sys
import tempfile
from pathlib import Path

_SHARED = ":libstdc++.so.6"  # for the linker's -l: a file of this name
_SOURCE = "#include <string>\nstd::string text(int number) { return std::to_string(number); }\n"


def linked_libraries() -> list[str]:
    """Libraries to name to the linker (``-l``) for a package; mostly none."""
    if sys.platform != "linux":
        return []
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        compiler = get_cpp_compiler()
    except InvalidCxxCompiler:  # whoever compiles says so
        return []
    return list(_linked_libraries(compiler))


@functools.cache
def _linked_libraries(compiler: str) -> tuple[str, ...]:
    if _links_shared(compiler) is False and _links_shared(compiler, f"-l{_SHARED}"):
        return (_SHARED,)
    return ()


def _links_shared(compiler: str, *flags: str) -> bool | None:
    """Whether what the compiler links needs libstdc++.so; None if it links nothing."""
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder, "text.cpp"), Path(folder, "text.so")
        source.write_text(_SOURCE)
        command = [compiler, "-shared", "-fPIC", str(source), "-o", str(output), *flags]
        try:
            subprocess.run(command, check=True, capture_output=True)
            return b"libstdc++.so" in output.read_bytes()
        except (OSError, subprocess.CalledProcessError):
            return None
