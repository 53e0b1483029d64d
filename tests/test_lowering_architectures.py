"""What leangen's operators take over of every architecture, and that it computes the same."""

from collections import Counter

import draws
import leangen_kernels
import lowered_graphs
import numpy as np
import pytest
from transformers_models import VARIANTS, VOCAB, checkpoint

from leangen import exporters, lowering
from leangen.families import language
from leangen.quantize import quantize
from leangen.session import Session

pytestmark = pytest.mark.skipif(
    leangen_kernels.library() is None, reason="no kernels: " + leangen_kernels.status()[1]
)
ALWAYS = {"Cast", "GatherBlockQuantized", "Slice"}  # the embedding, the positions that are wanted
SHAPING = {"Concat", "Reshape", "Shape"}
POSITIONS = {"Add", "Cast", "Range", "Squeeze", "Sub", "Unsqueeze"} | SHAPING
NORMED_AFTER = {"Add", "RMSNormalization"}
ROUTED = ("mixtral", "olmoe", "qwen3_moe")
TAKEN = {"GroupQueryAttention", "MatMulNBits", "MatMulBnb4"}
LEFT = {  # with ORT, beside ALWAYS
    "gemma2": NORMED_AFTER | SHAPING | {"GroupQueryAttention", "Mul", "Div", "Tanh"},  # caps scores
    "gemma3_text": NORMED_AFTER | {"Mul"},
    "gpt2": POSITIONS,
    "gpt_neox": {"Add"},  # attention and MLP side by side
    "llama": {"Split", "QuickGelu", "Mul"},  # a gated MLP with biases
    "olmo2": NORMED_AFTER,
    "opt": POSITIONS,
}


def lowered(folder, kind, scheme):
    """The operators of leangen's and of ORT's in the lowered graph, both counted."""
    checkpoint(folder / "saved", kind, VARIANTS[kind][0])
    bundle = quantize(exporters.export(folder / "saved", folder / "fp32"), scheme, folder / scheme)
    tokens = draws.rng().integers(0, VOCAB, 60).tolist()
    got, expected = (
        language.logits(Session(bundle, threads=1, activations="fp32", kernels=kernels), tokens)
        for kernels in ("auto", "ort")
    )
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    found, why = lowering.find(bundle, "model")
    assert found is not None, why
    nodes = lowered_graphs.nodes(found.path)
    ours = Counter(operator for domain, operator in nodes if domain == "leangen")
    return ours, Counter(operator for domain, operator in nodes if domain != "leangen")


@pytest.mark.parametrize("kind", VARIANTS)
def test_what_is_left_to_onnxruntime(tmp_path, kind):
    ours, theirs = lowered(tmp_path, kind, "int8")
    if kind in ROUTED:  # ORT chooses the experts
        assert not set(theirs) & TAKEN
    else:
        assert set(theirs) == ALWAYS | LEFT.get(kind, set())
    layers = VARIANTS[kind][0].get("num_hidden_layers", VARIANTS[kind][0].get("n_layer"))
    assert ours["Attention"] == (0 if kind == "gemma2" else layers)
    assert ours["Linear"] >= 4 * layers + 1


@pytest.mark.parametrize("scheme", ["int4", "nf4", "fp4", "int4-asym-g16"])
@pytest.mark.parametrize("kind", ["opt", "qwen3"])
def test_other_weights_are_taken_over_as_well(tmp_path, kind, scheme):
    _, theirs = lowered(tmp_path, kind, scheme)
    assert set(theirs) == ALWAYS | LEFT.get(kind, set())
