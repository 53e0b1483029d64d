"""Builds the kernel library into `leangen_kernels`, or leaves a note there of why it could not.

LEANGEN_BUILD_CUDA=1 adds those for NVIDIA cards, or fails; no card and no driver is needed.
LEANGEN_BUILD_KERNELS=0 leaves it out: the wheel is then for any platform.
LEANGEN_KERNELS_MACHINE=aarch64 with CC=aarch64-linux-gnu-gcc builds for another machine.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
PACKAGE = "leangen_kernels"
GPU_FILES = "leangen_cuda.*"
LIBRARY, NOTE = "libleangen_kernels.so", "libleangen_kernels.txt"
FOR_CARDS = os.environ.get("LEANGEN_BUILD_CUDA") == "1"
MACHINE = os.environ.get("LEANGEN_KERNELS_MACHINE") or platform.machine()


class BuildKernels(build_ext):
    """Compiles the library where an extension module would go."""

    def build_extension(self, ext: Extension) -> None:
        """Write the library or the note; leangen runs without it, so only a wish for more fails."""
        folder = Path(self.build_lib) / PACKAGE
        folder.mkdir(parents=True, exist_ok=True)
        for stale in (folder / LIBRARY, folder / NOTE, *folder.glob(f"cuda/{GPU_FILES}")):
            stale.unlink(missing_ok=True)
        sys.path.insert(0, str(ROOT / "kernels"))
        from leangen_kernels import build

        try:
            cache = ROOT / "build" / "kernels"
            native = ROOT / "kernels" / "native"
            build.build(folder, native, cache, machine=MACHINE, say=_say)
        except build.BuildError as error:
            _say(f"no library: {error}")
            if FOR_CARDS:
                raise SystemExit(f"LEANGEN_BUILD_CUDA=1: {error}") from error
            (folder / NOTE).write_text(f"{error}\n", encoding="utf-8")
        else:
            if FOR_CARDS:
                _build_cuda(folder / "cuda", cache)
        finally:
            sys.path.remove(str(ROOT / "kernels"))

    def copy_extensions_to_source(self) -> None:
        """For an editable installation: beside the sources."""
        for name in (LIBRARY, NOTE):
            built, beside = Path(self.build_lib) / PACKAGE / name, ROOT / "kernels" / PACKAGE / name
            beside.unlink(missing_ok=True)
            if built.exists():
                shutil.copy2(built, beside)
        cards = ROOT / "kernels" / PACKAGE / "cuda"
        for stale in cards.glob(GPU_FILES):  # for a library of another day
            stale.unlink()
        for built in (Path(self.build_lib) / PACKAGE / "cuda").glob(GPU_FILES):
            shutil.copy2(built, cards)

    def get_ext_filename(self, fullname: str) -> str:
        """Not named after a Python version: it is no extension module."""
        return os.path.join(*fullname.split(".")) + ".so"

    def get_outputs(self) -> list[str]:
        """What there is after building."""
        folder = Path(self.build_lib) / PACKAGE
        made = [folder / name for name in (LIBRARY, NOTE)]
        return [*(str(p) for p in made if p.exists()), *map(str, folder.glob(f"cuda/{GPU_FILES}"))]

    def get_output_mapping(self) -> dict[str, str]:
        """Nothing: `copy_extensions_to_source` does it."""
        return {}


def _build_cuda(folder: Path, cache: Path) -> None:
    """The kernels for NVIDIA cards; who asks for them and cannot have them is to know."""
    # NVIDIA's loader looks in site-packages, then in CUDA_HOME; pip's build environment is neither.
    for root in (place for path in sys.path for place in Path(path).glob("nvidia/cu[0-9]*")):
        os.environ.setdefault("CUDA_HOME", str(root))
    from leangen_kernels.cuda import build

    try:
        build.build(folder, cache, _say)
    except build.BuildError as error:
        raise SystemExit(f"LEANGEN_BUILD_CUDA=1: {error}") from error


def _say(line: str) -> None:
    print(f"leangen kernels: {line}", file=sys.stderr, flush=True)


class PlatformWheel(bdist_wheel):
    """One wheel for every Python 3 of a platform."""

    def get_tag(self) -> tuple[str, str, str]:
        """py3-none-PLATFORM"""
        _, _, tag = super().get_tag()
        return "py3", "none", tag.replace(platform.machine(), MACHINE)


if os.environ.get("LEANGEN_BUILD_KERNELS") == "0":
    setup()
else:
    setup(
        ext_modules=[Extension(f"{PACKAGE}.libleangen_kernels", sources=[], optional=True)],
        cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
    )
