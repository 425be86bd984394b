#!/bin/sh
# Builds run_package without CMake:   build.sh OUTPUT [PYTHON]
#
# For machines where CMake's package of a PyTorch with CUDA asks for a CUDA toolkit that is not
# there: neither this program nor a package needs one. PYTHON tells where PyTorch is installed.
set -eu
output=$1
python=${2:-python3}
here=$(cd "$(dirname "$0")" && pwd)
torch=$("$python" -c 'import os, torch; print(os.path.dirname(torch.__file__))')

libraries="-ltorch -ltorch_cpu -lc10"
if [ -e "$torch/lib/libtorch_cuda.so" ]; then
    libraries="$libraries -ltorch_cuda -lc10_cuda"
fi
# Where a machine has the shared C++ library for running only, the linker takes the static one, which
# crashes beside PyTorch's.
probe='#include <string>
std::string text(int number) { return std::to_string(number); }'
echo "$probe" | "${CXX:-g++}" -shared -fPIC -x c++ - -o "$output.probe"
if ! grep -q 'libstdc++\.so' "$output.probe"; then
    libraries="$libraries -l:libstdc++.so.6"
fi
rm "$output.probe"

# Without --no-as-needed the linker drops libtorch_cuda, which registers its operators by being there.
# shellcheck disable=SC2086
exec "${CXX:-g++}" -std=c++20 ${CXXFLAGS:--O2} -Wall -Wextra \
    "$here/main.cpp" "$here/package_check.cpp" -o "$output" \
    -isystem "$torch/include" -isystem "$torch/include/torch/csrc/api/include" \
    -L"$torch/lib" -Wl,-rpath,"$torch/lib" -Wl,--allow-shlib-undefined,--no-as-needed $libraries -ldl
