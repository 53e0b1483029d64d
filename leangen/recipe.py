"""A recipe: the treatment of every node of one model, as a file that replays bit for bit.

    {"schema": "leangen.recipe/1", "model": "terrain", "source": "sha256:...",
     "method": "rtn", "nodes": {"/down/conv": "w8a8", "/mid/conv": "w4", ...}, "found": {...}}

`source` is the digest of the fp32 bundle that it is for, `method` says how linear layers of few
bits are rounded (`rtn` where it is missing), `run` with how many `threads` and `steps` it is best
run here and for how many microseconds idle threads spin, `found` how the recipe came about.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from leangen.bundle import Bundle
from leangen.errors import RequestError
from leangen.files import write_atomic

SCHEMA = "leangen.recipe/1"
SCHEME = "tuned"
"""The scheme of a bundle that was made by a recipe."""


@dataclass(frozen=True, slots=True)
class NodeRecipe:
    """Which treatment each node gets; nodes that it does not name stay fp32."""

    model: str
    source: str
    """Digest of the fp32 bundle."""
    nodes: Mapping[str, str]
    found: Mapping[str, Any] = field(default_factory=dict)
    method: str = "rtn"
    run: Mapping[str, int] = field(default_factory=dict)
    """`threads`, `spin_us` and `steps`, where they were looked for."""

    def config(self) -> dict[str, Any]:
        """What a bundle made by the recipe has in its config beyond the fp32 one's."""
        settings = dict(self.run)
        steps = settings.pop("steps", None)
        return ({"run": settings} if settings else {}) | ({} if steps is None else {"steps": steps})

    def save(self, path: Path) -> None:
        """Write the file."""
        document = {
            "schema": SCHEMA,
            "model": self.model,
            "source": self.source,
            "method": self.method,
            "run": dict(self.run),
            "nodes": dict(self.nodes),
            "found": dict(self.found),
        }
        write_atomic(path, (json.dumps(document, indent=1) + "\n").encode())

    def check(self, bundle: Bundle) -> None:
        """RequestError unless the recipe was made for this very bundle."""
        if bundle.digest != self.source:
            raise RequestError(
                f"the recipe is for {self.model} ({self.source[:19]}...), given "
                f"{bundle.name}:{bundle.scheme} ({bundle.digest[:19]}...): tune this model, or "
                "give the fp32 bundle that the recipe was made from"
            )


def read(path: Path) -> NodeRecipe:
    """Read a recipe; RequestError for a file that is none."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise RequestError(
            f"{path} is not a recipe ({error}): make one with `leangen tune`"
        ) from None
    match document:
        case {"schema": str(schema)} if schema != SCHEMA:
            raise RequestError(f"{path} has schema {schema!r}, this leangen reads {SCHEMA!r}")
        case {"model": str(model), "source": str(source), "nodes": dict(nodes)} if all(
            isinstance(value, str) for value in nodes.values()
        ):
            found, method = document.get("found"), document.get("method", "rtn")
            found = found if isinstance(found, dict) else {}
            run = document.get("run", {})
            if isinstance(run, dict) and all(isinstance(value, int) for value in run.values()):
                return NodeRecipe(model, source, nodes, found, str(method), run)
    raise RequestError(
        f"{path} is not a recipe: expected model, source and nodes; make one with `leangen tune`"
    )
