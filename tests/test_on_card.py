"""What needs an NVIDIA card: `pytest -m gpu`; without one, skips say what is missing."""

import draws
import numpy as np
import pytest
import tiny_bundles
from cuda_cases import CASES
from gguf_fixtures import Tiny, write
from leangen_kernels.cuda import driver

from leangen import devices
from leangen.engine import Engine
from leangen.errors import DependencyError, UnknownSchemeError
from leangen.exporters import gguf
from leangen.families import language
from leangen.families.batch import Batch, Sequence
from leangen.families.language import Request
from leangen.quantize import quantize
from leangen.session import Session

pytestmark = pytest.mark.gpu
DEVICE = "cuda"


@pytest.fixture(scope="module")
def card():
    try:
        return driver.Card()
    except driver.CudaError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def device():
    try:
        return devices.choose(DEVICE).name
    except DependencyError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("case", CASES)
def test_every_kernel_is_its_twin(card, case):
    assert CASES[case](card, draws.rng()) is None


@pytest.mark.parametrize("family", tiny_bundles.BUILDERS)
@pytest.mark.parametrize("scheme", ["fp32", "int8"])
def test_every_family_generates_what_it_does_on_the_cpu(tmp_path, device, family, scheme):
    bundle = tiny_bundles.BUILDERS[family](tmp_path)
    if scheme != "fp32":
        try:
            bundle = quantize(bundle, scheme, tmp_path / scheme)
        except UnknownSchemeError as error:
            pytest.skip(str(error))
    made = []
    for where in ("cpu", device):
        session = Session(bundle, device=where, activations="fp32")
        result = Engine(session, baseline_s=0).generate(**tiny_bundles.OPTIONS[family])
        assert session.device.name == where
        made.append(np.asarray(result.tokens if result.array is None else result.array))
    assert made[0].shape == made[1].shape
    if made[0].dtype.kind == "f" and not family.startswith("autoregressive"):
        assert np.linalg.norm(made[1] - made[0]) <= 1e-2 * np.linalg.norm(made[0])


def decoder(folder, scheme):
    """A tiny llama with heads of 64, which our kernels take."""
    source = write(folder / "tiny.gguf", Tiny(tied=False, head_dim=64))
    return quantize(gguf.export(source, folder / "fp32"), scheme, folder / scheme)


@pytest.mark.parametrize("kv", ["fp16", "int8"])
@pytest.mark.parametrize("activations", ["int8", "fp32"])
@pytest.mark.parametrize("scheme", ["int8", "int4", "nf4"])
def test_our_operators_make_the_same_logits_as_on_the_cpu(
    tmp_path, device, scheme, activations, kv
):
    bundle = decoder(tmp_path, scheme)
    tokens = draws.rng().integers(0, 250, 20).tolist()
    made = []
    for where in ("cpu", device):
        session = Session(bundle, device=where, activations=activations, kv=kv)
        made.append(language.logits(session, tokens))
    assert "on a card; nodes replaced" in session.reasons["kernels"]
    # Each rounds activations at places of its own: halves on a card are bytes on the CPU.
    far = 3e-3 if activations == "fp32" and kv == "fp16" else 5e-2
    assert np.linalg.norm(made[1] - made[0]) <= far * np.linalg.norm(made[0] - made[0].mean())


def test_a_text_does_not_depend_on_who_runs_beside_it(tmp_path, device):
    session = Session(decoder(tmp_path, "int4"), device=device)
    wanted = [
        Request(tokens=tokens, ignore_eos=True, max_new_tokens=6)
        for tokens in ([3, 4, 5], [3, 4, 6, 7], [8], [3, 4, 5, 9])
    ]
    texts = []
    for together in (1, 4):
        batch = Batch(session, rows=together, capacity=64)
        sequences = [Sequence(session, request, 64) for request in wanted]
        left = list(sequences)
        while any(sequence.output is None for sequence in sequences):
            while left and batch.size < together:
                batch.add(left.pop(0))
            batch.step()
        texts.append([sequence.output.tokens for sequence in sequences])
    assert texts[0] == texts[1]


def test_its_counter_measures_a_generation(tmp_path, device):
    session = Session(tiny_bundles.diffusion(tmp_path), device=device)
    engine = Engine(session, baseline_s=0.2)
    receipt = engine.repeat(200, **tiny_bundles.OPTIONS["diffusion"]).receipt
    [window] = [one for one in receipt.energy.meters if one.sensor.startswith("nvml")]
    assert window.source in ("measured", "integrated") and window.energy_uj > 0
    assert "gpu-0" in receipt.energy.scope and receipt.energy.u_j > 0
