"""Compiles the kernels ahead of time: Numba -> LLVM -> objects -> one shared library with C.

    python -m leangen_kernels.build FOLDER [--machine aarch64] [--cc COMPILER]

Each variant is compiled in a process of its own, as Numba bakes its host's instruction set into
the code: there NUMBA_CPU_NAME and NUMBA_CPU_FEATURES name the variant instead. Objects are cached
by what they are made from. The result needs neither Python nor Numba.
"""

from __future__ import annotations

import argparse
import functools
import gc
import hashlib
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from leangen_kernels import toolchain, variants

LIBRARY = "libleangen_kernels.so"
SOURCES = (
    "variants", "vectors", "simd", "dots", "unroll", "units", "layout", "cache_layout",
    "conv_layout", "linear", "rows", "attention", "build", "conv_simd", "conv", "conv_attention",
)  # fmt: skip
_TYPES = {"i": "int64_t", "d": "double"}
_TRIPLES = {"x86_64": "x86_64-unknown-linux-gnu", "aarch64": "aarch64-unknown-linux-gnu"}


class BuildError(Exception):
    """The library cannot be built here; the message says why."""


def build(
    folder: Path,
    native: Path,
    cache: Path,
    *,
    machine: str | None = None,
    compiler: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Write the shared library of an architecture into `folder`, or raise BuildError.

    `native` holds the C sources, `cache` keeps objects between builds; `say` is told of each step.
    Another `machine` than this one needs its cross compiler.
    """
    machine = machine or platform.machine()
    refusal = toolchain.why_not(machine, compiler)
    if refusal is not None:
        raise BuildError(refusal)
    try:
        digest = _digest()
    except ImportError as error:
        raise BuildError(
            f"Numba cannot be imported where leangen is built ({error}): "
            "install it there, then leangen again"
        ) from error
    wanted = variants.of(machine)
    cache.mkdir(parents=True, exist_ok=True)
    objects = _objects(wanted, cache, digest, say)
    table = cache / f"table-{machine}-{digest}.inc"
    table.write_text(_table(wanted, objects))
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / LIBRARY
    unfinished = library.with_suffix(".new")
    command = [
        *toolchain.compiler_command(compiler),
        "-std=c11", "-O2", "-Wall", "-Wextra", "-fvisibility=hidden",
        "-shared", "-fPIC", "-pthread", f'-DTABLE="{table}"', "-I", str(native),
        *map(str, sorted(native.glob("*.c"))), *map(str, objects),
        "-Wl,-z,noexecstack,-z,nodelete", "-Wl,--no-undefined", "-s", "-lm", "-ldl",
        "-o", str(unfinished),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{command[0]} failed: {_complaint(done.stderr)}")
    unfinished.replace(library)
    say(f"linked {library.name}, {library.stat().st_size / 1e3:.0f} kB")
    return library


def _objects(
    wanted: list[variants.Variant], cache: Path, digest: str, say: Callable[[str], None]
) -> list[Path]:
    """The object file of each variant, those not in the cache compiled, one process a core."""
    paths = {v: cache / f"{v.machine}-{v.name}-{digest}.o" for v in wanted}
    missing = [v for v, path in paths.items() if not path.exists()]
    failures = []
    with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
        running = {pool.submit(_compile, v, paths[v]): v for v in missing}
        for count, future in enumerate(as_completed(running), 1):
            name, (seconds, failure) = running[future].name, future.result()
            say(f"{name}: {failure or f'{seconds:.1f} s'} ({count} of {len(missing)})")
            if failure is not None:
                failures.append(f"Numba did not compile the {name} kernels: {failure}")
    if failures:
        raise BuildError("; ".join(failures))
    return list(paths.values())


def _compile(variant: variants.Variant, path: Path) -> tuple[float, str | None]:
    """Compile one variant in a process of its own: seconds, and why it failed or None."""
    native_machine = variant.machine == platform.machine()
    environment = {
        **os.environ,
        variants.BUILD_VARIABLE: f"{variant.machine}/{variant.name}",
        # For another machine Numba compiles to x86-64-v3, which has every operation that the
        # kernels ask of plain LLVM, and `compile_object` makes the code over.
        "NUMBA_OPT": "0",  # optimized once, by `compile_object`
        "NUMBA_CPU_NAME": variant.cpu if native_machine else "x86-64-v3",
        "NUMBA_CPU_FEATURES": variant.features if native_machine else "",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path]),
    }
    command = [sys.executable, "-m", "leangen_kernels.build", "--object", str(path)]
    begin = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    failure = None
    if done.returncode:
        failure = _complaint(done.stderr) or f"exit status {done.returncode}"
    return time.perf_counter() - begin, failure


def _complaint(stderr: str) -> str:
    """The line of a compiler's output that says what is wrong: the first `error`, else the last."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    line = next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "")
    return line.removeprefix("error: ")


@functools.cache
def _digest() -> str:
    """A hash of everything that the objects depend on."""
    import llvmlite
    import numba

    parts = [numba.__version__.encode(), llvmlite.__version__.encode()]
    parts += [(Path(__file__).parent / f"{name}.py").read_bytes() for name in SOURCES]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def kernels() -> dict[str, tuple[Any, str]]:
    """Name of every kernel of this process's variant -> its maker, C types of its arguments."""
    from leangen_kernels import attention, conv, conv_attention, linear, rows

    modules = (rows, linear, attention, conv, conv_attention)
    return {name: made for module in modules for name, made in module.kernels().items()}


def _table(wanted: list[variants.Variant], objects: list[Path]) -> str:
    """C: declares the kernels of every variant, and a table of them by name."""
    lines, rows = [], []
    for variant, path in zip(wanted, objects, strict=True):
        for line in _names(path).read_text().splitlines():
            name, types = line.split()
            arguments = ", ".join(_TYPES[letter] for letter in types)
            symbol = f"leangen_{variant.name}_{name}"
            lines.append(f"int {symbol}(void *, void **, {arguments});")
            rows.append(f'  {{"{variant.name}", "{name}", (void (*)(void)){symbol}}},')
    return "\n".join([*lines, "static const struct entry entries[] = {", *rows, "};", ""])


def _names(path: Path) -> Path:
    """Beside an object: the names and types of its kernels, which differ between variants."""
    return path.with_suffix(".txt")


def compile_object(path: Path) -> None:
    """Compile this process's variant to one object file."""
    import llvmlite.binding as llvm

    from leangen_kernels import dots

    gc.disable()  # a tenth of the time, and the process ends soon
    variant = variants.current()
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    llvm.add_symbol(dots.NEON_DOT, 1)  # never called: Numba's host cannot run it
    triple = _TRIPLES[variant.machine]
    machine = llvm.Target.from_triple(triple).create_target_machine(
        cpu=variant.cpu, features=variant.features, opt=3, reloc="pic", codemodel="default"
    )
    whole = llvm.parse_assembly(f'target triple = "{triple}"')
    whole.data_layout = str(machine.target_data)
    for name, (make, types) in kernels().items():
        module = _module(make(), types, f"leangen_{variant.name}_{name}", whole)
        _optimize(module, machine)
        whole.link_in(module)
    whole.verify()
    undefined = [
        function.name
        for function in whole.functions
        if function.is_declaration and not function.name.startswith("llvm.")
    ]
    if undefined:
        raise BuildError(f"the kernels need {', '.join(sorted(undefined))}")
    names = "".join(f"{name} {types}\n" for name, (_, types) in kernels().items())
    _names(path).write_text(names)
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_bytes(machine.emit_object(whole))
    unfinished.replace(path)


def _module(function: Any, types: str, symbol: str, like: Any) -> Any:
    """The LLVM module of one kernel, with nothing in it but the exported function."""
    import llvmlite.binding as llvm
    import numba

    from leangen_kernels import dots

    numba_types = tuple({"i": numba.int64, "d": numba.float64}[letter] for letter in types)
    # Neither wrappers nor rewrites of array expressions, which kernels have none of.
    dispatcher = numba.njit(
        error_model="numpy", no_rewrites=True, no_cpython_wrapper=True, no_cfunc_wrapper=True
    )(function)
    dispatcher.compile(numba_types)
    compiled = dispatcher.overloads[numba_types]
    text = dispatcher.inspect_llvm(numba_types)
    text = text.replace(f"@{dots.NEON_DOT}(", "@llvm.aarch64.neon.sdot.v4i32.v16i8(")
    lines = [line for line in text.splitlines() if not line.startswith("target ")]
    module = llvm.parse_assembly("\n".join(lines))
    module.triple, module.data_layout = like.triple, like.data_layout
    kept = module.get_function(compiled.fndesc.llvm_func_name)
    for value in [*module.functions, *module.global_variables]:
        if not value.is_declaration and value.name != kept.name:
            value.linkage = "internal"
    kept.name = symbol
    kept.linkage = "external"
    kept.visibility = "hidden"
    return module


def _optimize(module: Any, machine: Any) -> None:
    """LLVM's usual passes; without its own vectorizers, as the kernels are written in vectors."""
    import llvmlite.binding as llvm

    options = llvm.create_pipeline_tuning_options(speed_level=2)
    options.loop_vectorization = options.slp_vectorization = False
    options.loop_unrolling = False
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)


def main() -> int:
    """Build for this machine or another; prints the library's path."""
    parser = argparse.ArgumentParser(prog="leangen_kernels.build")
    parser.add_argument("folder", type=Path, nargs="?", default=Path(__file__).parent)
    parser.add_argument("--machine", choices=_TRIPLES)
    parser.add_argument("--cc", help="C compiler, else $CC or cc")
    parser.add_argument("--native", type=Path, default=Path(__file__).parents[1] / "native")
    parser.add_argument("--cache", type=Path, default=Path("build/kernels"))
    parser.add_argument("--object", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    try:
        if options.object:
            compile_object(options.object)
        else:
            print(build(
                options.folder, options.native, options.cache.resolve(),
                machine=options.machine, compiler=options.cc,
                say=lambda line: print(line, file=sys.stderr),
            ))  # fmt: skip
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
