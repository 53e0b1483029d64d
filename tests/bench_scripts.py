"""The scripts of bench/ as modules, for tests.

Under names of their own: bench/coverage.py must not stand in for the package `coverage`.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

BENCH = Path(__file__).parent.parent / "bench"


def load(name: str) -> ModuleType:
    """bench/NAME.py as the module `NAME`, or `bench_NAME` where the name is taken by a package."""
    module_name = f"bench_{name}" if name == "coverage" else name
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, BENCH / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        spec.loader.exec_module(module)
    return sys.modules[module_name]
