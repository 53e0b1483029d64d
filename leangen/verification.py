"""Whether a bundle is what was exported and computes what its reference computes.

Four checks, each a line of what was found: every file's hash, the lowered models', the graphs, and
the numeric probe. BundleError names the first place that is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator

from leangen import bundle as bundles
from leangen import probe
from leangen.bundle import Bundle
from leangen.errors import BundleError
from leangen.graph_edit import Graph
from leangen.lowering import cache
from leangen.session import Kernels, Session

DOMAINS = ("", "ai.onnx", "com.microsoft")
"""Of the operators that a portable bundle may use."""


def verify(bundle: Bundle, *, kernels: Kernels = "auto") -> Iterator[str]:
    """Say what was checked, one line at a time; BundleError where something is not right."""
    bundles.verify(bundle)
    lowered = cache.verify(bundle)
    also = f", {lowered} lowered ones as they were written" if lowered else ""
    yield f"{len(bundle.files)} files as the manifest says{also}"
    for role in bundle.graphs:
        nodes = check_graph(bundle, role)
        yield f"graph {role}: {nodes} nodes, standard operators, weights inside the bundle"
    session = Session(bundle, kernels=kernels)
    found = probe.check(session)
    if not found:
        yield "no numeric probe: it was exported by an older leangen, or its family has none"
    for deviation in found:
        if not deviation.passed:
            raise BundleError(
                f"bundle {bundle.path}: graph {deviation.role!r} is {deviation.error:.3g} off its "
                f"reference (relative RMS, on {session.kernels}), expected at most "
                f"{deviation.limit:.3g}: kernels or ONNX Runtime compute something else; compare "
                "with --kernels ort"
            )
        yield (
            f"graph {deviation.role}: {deviation.error:.2g} off its fp32 reference, at export "
            f"{deviation.at_export:.2g} (relative RMS, on {session.kernels})"
        )


def check_graph(bundle: Bundle, role: str) -> int:
    """Its count of nodes; BundleError where ONNX's checker or a portable bundle's rules object."""
    import onnx

    graph = Graph(bundle.graph(role))
    graph.check_files()
    model = graph.model
    for node in model.graph.node:
        if node.domain not in DOMAINS:
            raise BundleError(
                f"bundle {bundle.path}: graph {role!r} has {node.op_type} of domain "
                f"{node.domain!r}, which not every ONNX Runtime runs: export the model again"
            )
    # The checker wants weight files beside it and refuses hard links, as copies of a store are: it
    # gets stored weights as inputs.
    weights = model.graph.initializer
    for tensor in [t for t in weights if t.data_location == onnx.TensorProto.EXTERNAL]:
        model.graph.input.append(
            onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        )
        weights.remove(tensor)
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        detail = str(error).strip().splitlines()[0]
        raise BundleError(f"bundle {bundle.path}: graph {role!r} is not valid: {detail}") from error
    return len(model.graph.node)
