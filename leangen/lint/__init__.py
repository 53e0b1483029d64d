"""`leangen lint`: what ONNX Runtime runs slowly or wrongly on a CPU, and the mend; any ONNX file.

Rules know nothing of leangen's bundles; a bundle is its graphs. The fixes change nothing but float
rounding unless the rule says so in `changes`.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leangen import calibrate
from leangen.bundle import Bundle, create
from leangen.console import Progress
from leangen.errors import BundleError, StorageError
from leangen.files import atomic_file
from leangen.graph_edit import Graph, attributes, tensor_names
from leangen.lint import conv, cost, matmul, precision
from leangen.lint.cost import Cost
from leangen.lint.rules import Hit, Rule

RULES: Sequence[Rule] = (*matmul.RULES, *conv.RULES, *precision.RULES)
"""In the order in which they are fixed: zero points before the level that depends on them."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A trap that a graph has."""

    rule: Rule
    graph: str
    """The file, or the role in a bundle."""
    node: str
    """The node's name; empty for the graph as a whole."""
    what: str
    fixable: bool
    cost: Cost | None
    """On this machine; None where it was not or could not be timed."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "rule": self.rule.name,
            "graph": self.graph,
            "node": self.node,
            "what": self.what,
            "why": self.rule.why,
            "fixable": self.fixable,
            "changes": self.rule.changes if self.fixable else None,
            "remedy": self.rule.remedy or None,
            "cost": None if self.cost is None else self.cost.to_json(),
            "cost_of": "opening" if self.rule.at_opening else "run",
        }


def lint(
    path: Path,
    name: str,
    *,
    timed: bool = True,
    progress: Progress,
    fp32: Collection[str] = (),
) -> list[Finding]:
    """What the rules find in one ONNX file, called `name` in the findings.

    fp32: nodes that are meant to compute in it. A pattern of the same shapes is timed once. Raises
    BundleError for a file that is no ONNX graph or whose weights are missing.
    """
    graph = _open(path)
    hits = [(rule, hit) for rule in RULES for hit in _found(rule, graph, fp32)]
    known = cost.tensors(graph) if timed and hits else {}
    measured: dict[Any, Cost | None] = {}
    found = []
    for done, (rule, hit) in enumerate(hits):
        progress(done, len(hits), f"{name}: {rule.name}")
        key = (rule.name, _signature(graph, hit, known))
        if timed and key not in measured:
            measured[key] = cost.measure(graph, hit, rule, known)
        fixable = rule.fix is not None and hit.fixable
        node = hit.nodes[0].name if hit.nodes else ""
        found.append(Finding(rule, name, node, hit.what, fixable, measured.get(key)))
    return found


def lint_bundle(bundle: Bundle, *, timed: bool = True, progress: Progress) -> list[Finding]:
    """As `lint`, over all graphs of a bundle."""
    return [
        finding
        for role in bundle.graphs
        for finding in lint(
            bundle.graph(role), role, timed=timed, progress=progress, fp32=_exact(bundle, role)
        )
    ]


def _exact(bundle: Bundle, role: str) -> set[str]:
    """Nodes whose activations stay fp32 because the bundle's manifest wants it."""
    return {
        name.removeprefix(f"{role}:")
        for name, entry in bundle.quantization.get("nodes", {}).items()
        if entry.get("activations") == "fp32" or entry.get("treatment", "").endswith("-wo")
    }


def _found(rule: Rule, graph: Graph, fp32: Collection[str]) -> Iterator[Hit]:
    for hit in rule.find(graph):
        if rule.name != matmul.LEVEL or _name(hit) not in fp32:
            yield hit


def mend(graph: Graph, *, exact: bool, fp32: Collection[str] = ()) -> Counter[str]:
    """Apply every fix to a graph in place: how often each rule's was, by its name.

    `exact` leaves out what changes more than float rounding. fp32: nodes that are meant to compute
    in it.
    """
    fixed: Counter[str] = Counter()
    for rule in RULES:
        if rule.fix is None or (exact and rule.changes):
            continue
        tried: set[str] = set()
        while hit := next(
            (h for h in _found(rule, graph, fp32) if h.fixable and _name(h) not in tried), None
        ):
            tried.add(_name(hit))
            rule.fix(graph, hit)
            fixed[rule.name] += 1
    if fixed:
        cost.tidy(graph)
    return fixed


def fix_file(path: Path, out: Path, *, exact: bool = False, replace: bool = False) -> Counter[str]:
    """Write the mended graph to the ONNX file `out`, weights beside it as `out.data`.

    Raises BundleError where nothing can be mended, StorageError when `out` exists.
    """
    graph = _open(path)
    fixed = _something(mend(graph, exact=exact), path)
    if out.exists() and not replace:
        raise StorageError(f"{out} exists already: choose another place or pass --force")
    with tempfile.TemporaryDirectory(prefix="leangen-") as folder:
        written = Path(folder) / out.name
        graph.save(written)
        _check(written)
        for part in sorted(Path(folder).iterdir(), reverse=True):  # weights first, then the graph
            with atomic_file(out.with_name(part.name)) as file, part.open("rb") as source:
                shutil.copyfileobj(source, file)
    return fixed


def fix_bundle(
    bundle: Bundle, out: Path, *, exact: bool = False, replace: bool = False
) -> Counter[str]:
    """Write the mended bundle to the folder `out`; errors as of `fix_file`."""
    fixed: Counter[str] = Counter()
    with create(out, replace=replace) as draft:
        weights: set[str] = set()
        for role, name in bundle.graphs.items():
            graph = _open(bundle.graph(role))
            weights |= {
                (Path(name).parent / location).as_posix() for location in graph.external_files()
            }
            fixed += mend(graph, exact=exact, fp32=_exact(bundle, role))
            target = draft.folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            graph.save(target)
            _check(target)
        _something(fixed, bundle.path)
        for name in bundle.files:
            if name not in weights and name not in bundle.graphs.values():
                (draft.folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(bundle.path / name, draft.folder / name)
        draft.name, draft.family, draft.scheme = bundle.name, bundle.family, bundle.scheme
        draft.graphs, draft.config = dict(bundle.graphs), dict(bundle.config)
        draft.source = dict(bundle.source)
        draft.quantization = {**bundle.quantization, "mended": dict(fixed)}
    return fixed


def _open(path: Path) -> Graph:
    if not path.is_file():
        raise BundleError(f"there is no ONNX file at {path}: give a file, a bundle or its name")
    graph = Graph(path)
    if not graph.nodes:
        raise BundleError(f"{path} is not an ONNX graph: it has no nodes")
    try:
        graph.check_files()
    except BundleError as error:
        raise BundleError(f"{path}: {error}") from error
    return graph


def _check(path: Path) -> None:
    """What was written must load, or it is not put in place."""
    try:
        calibrate.open_session(path)
    except Exception as error:  # ORT raises many unrelated types from its C++ side
        detail = str(error).splitlines()[0]
        raise BundleError(
            f"ONNX Runtime cannot load the mended graph ({detail}): lint it without --fix"
        ) from error


def _something(fixed: Counter[str], path: Path) -> Counter[str]:
    if not fixed:
        raise BundleError(f"{path} has nothing that lint can fix: use it as it is")
    return fixed


def _name(hit: Hit) -> str:
    return hit.nodes[0].name if hit.nodes else ""


def _signature(graph: Graph, hit: Hit, known: cost.Tensors) -> Any:
    """What decides a pattern's cost: operators, attributes, shapes; not the weights' values."""
    return tuple(
        (
            node.op_type,
            tuple(sorted((k, str(v)) for k, v in attributes(node).items())),
            tuple(
                graph.shape(name) if graph.has(name) else known.get(name)
                for name in tensor_names([node])
                if name
            ),
        )
        for node in hit.nodes
    )
