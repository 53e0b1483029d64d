"""Keep the plans of the store's quantized bundles for everyone: leangen/assets/plans.json.

    python bench/record_plans.py terrain:int8 terrain:int4 piper-joe:int8 piper-joe:int4

Quantizing these models then takes seconds: nothing is measured again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import leangen
from leangen import recorded
from leangen.store import Store


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", metavar="NAME:SCHEME")
    args = parser.parse_args()
    path, store = Path(leangen.__file__).parent / recorded.PLANS, Store()
    plans = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for text in args.models:
        exact, low = store.resolve(text.split(":")[0]), store.resolve(text)
        treatments: dict[str, list[str]] = {}
        for node, entry in low.quantization["nodes"].items():
            treatments.setdefault(entry["treatment"], []).append(node)
        plans.setdefault(recorded.digest(exact), {})[low.scheme] = treatments
    path.write_text(json.dumps(plans, separators=(",", ":"), sort_keys=True) + "\n", "utf-8")


if __name__ == "__main__":
    main()
