#!/usr/bin/env bash
# Builds the wheels of both architectures into FOLDER (default dist). Run on x86-64 Linux with
# aarch64-linux-gnu-gcc installed; from the repository root.
set -euo pipefail
folder="${1:-dist}"
for machine in x86_64 aarch64; do
  rm -rf build/lib* build/bdist*
  CC="$machine-linux-gnu-gcc" LEANGEN_KERNELS_MACHINE="$machine" \
    python -m pip wheel --no-deps --wheel-dir "$folder" .
done
