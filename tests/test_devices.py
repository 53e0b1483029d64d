"""Choosing a device: what is missing is said, with what to do about it."""

import ctypes
from dataclasses import dataclass

import numpy as np
import onnxruntime
import pytest
import tiny_bundles
from gguf_fixtures import Tiny, write
from leangen_kernels import layout
from leangen_kernels.cuda import driver, tiles
from leangen_kernels.cuda.driver import CudaError

from leangen import cli, devices, doctor, lowering
from leangen.errors import DependencyError, OutOfMemoryError, RequestError
from leangen.exporters import gguf
from leangen.families import key_values
from leangen.families.decoder import Decoder
from leangen.families.rows import Rows
from leangen.graph_edit import attributes
from leangen.lowering import cuda as on_card
from leangen.lowering import language, linear
from leangen.lowering.draft import Draft
from leangen.quantize import quantize
from leangen.session import Session

PLAIN = onnxruntime.InferenceSession
CUDA = ["CUDAExecutionProvider", "CPUExecutionProvider"]


@dataclass
class Card:
    index: int
    name: str
    memory_bytes: int = 0


def two():
    return [Card(0, "A"), Card(1, "B")]


def nothing(index):
    """Is missing."""


def no_cudnn(index):
    return f"card {index} lacks libcudnn.so.9: {devices.CUDA_PACKAGES}"


def no_driver():
    raise CudaError("no NVIDIA driver: libcuda.so.1 cannot be loaded")


def test_a_card_is_taken_where_all_is_there():
    chosen = devices.choose("cuda:1", providers=CUDA, cards=two, lacks=nothing)
    assert (chosen.name, chosen.kind) == ("cuda:1", "cuda")
    assert chosen.reason.startswith("B, asked for; written, but not yet run on a card")
    assert chosen.providers()[0][1]["device_id"] == 1
    assert devices.choose("auto", providers=CUDA, cards=two, lacks=nothing).name == "cuda:0"
    assert devices.choose("cpu", providers=CUDA, cards=two).providers() == CUDA[1:]


@pytest.mark.parametrize(
    ("given", "providers", "cards", "kind", "says"),
    [
        ("cuda", CUDA[1:], two, DependencyError, r"no CUDA provider.*pip install 'leangen\[gpu\]'"),
        ("cuda", CUDA, no_driver, DependencyError, "no NVIDIA driver.*install the NVIDIA driver"),
        ("cuda:2", CUDA, two, RequestError, "no such card; the driver lists cuda:0 A, cuda:1 B"),
        ("cuda", CUDA, list, RequestError, "no such card; the driver lists none"),
        ("gpu", CUDA, two, RequestError, "'gpu', expected cpu, cuda, cuda:N or auto"),
        ("cuda:1", CUDA, two, DependencyError, "--device cuda:1: card 1 lacks libcudnn.so.9: pip"),
    ],
)
def test_what_is_missing_is_said(given, providers, cards, kind, says):
    with pytest.raises(kind, match=says):
        devices.choose(given, providers=providers, cards=cards, lacks=no_cudnn)


@pytest.mark.parametrize(
    ("providers", "cards", "why"),
    [
        (CUDA[1:], two, "no CUDA provider"), (CUDA, no_driver, "driver"), (CUDA, list, "no card"),
        (CUDA, two, "no card to use: card 0 lacks libcudnn.so.9"),
    ],
)  # fmt: skip
def test_auto_falls_back_with_its_reason(providers, cards, why):
    chosen = devices.choose("auto", providers=providers, cards=cards, lacks=no_cudnn)
    assert chosen.name == "cpu" and why in chosen.reason


def preload(monkeypatch, prints="", starts=True):
    """ONNX Runtime as it is for a card: what it prints when it loads CUDA, and what it starts."""

    class Probe(PLAIN):
        def __init__(self, model, providers, enable_fallback):
            assert (providers, enable_fallback) == ([(CUDA[0], {"device_id": 3})], 0)
            if isinstance(starts, Exception):
                raise starts
            super().__init__(model, providers=CUDA[1:])

        def get_providers(self):
            return CUDA if starts else CUDA[1:]

    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: print(prints))
    monkeypatch.setattr(onnxruntime, "set_default_logger_severity", lambda level: None)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Probe)
    devices.lacks.cache_clear()


def test_what_the_provider_lacks_is_found_before_a_model_is_opened(monkeypatch, capsys):
    preload(monkeypatch)
    assert devices.lacks(3) is None
    preload(monkeypatch, starts=False)
    assert "does not start, its log says why" in devices.lacks(3)
    # As onnxruntime-gpu 1.31.1 has it with half a driver, and prints it where there is no CUDA.
    said = "Parse Failed: CUDA failure 36: API call is not supported ; GPU=-1 ; hostname=h"
    preload(monkeypatch, starts=RuntimeError(said))
    assert devices.lacks(3).endswith("start (CUDA failure 36: API call is not supported)")
    name = "libcublasLt.so.13"
    preload(monkeypatch, f"Failed to load {name}: {name}: cannot open shared object file: No such")
    assert f"lacks {name}: pip install 'onnxruntime-gpu[cuda,cudnn]'" in devices.lacks(3)
    assert capsys.readouterr().out == ""
    devices.lacks.cache_clear()


def test_the_command_line_says_what_is_missing(tmp_path, capsys):
    if devices.CUDA_PROVIDER in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime has a CUDA provider here")
    bundle = tiny_bundles.language(tmp_path)
    command = ["generate", str(bundle.path), "--prompt", "a", "--device", "cuda"]
    assert cli.main(command) == 2
    assert "--device cuda: this onnxruntime has no CUDA provider" in capsys.readouterr().err
    session = Session(bundle, device="auto")
    assert session.device.name == "cpu" and "no CUDA provider" in session.reasons["provider"]


def test_doctor_tells_of_cards(monkeypatch):
    def findings(cards):
        monkeypatch.setattr(driver, "devices", cards)
        return [(finding.status, finding.detail) for finding in doctor.gpu()]

    assert findings(no_driver) == [("note", "no NVIDIA driver: libcuda.so.1 cannot be loaded")]
    assert findings(list) == [("note", "the NVIDIA driver lists no card")]
    ((status, detail),) = findings(lambda: [driver.Device(0, "A", (9, 0), 1, 1)])
    assert status == "note" and detail.startswith("cuda:0 A: ")


NODE = (
    "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status code returned while running "
    "MatMul node. Name:'m' Status Message: "
)
FULL = [
    # As issues 22702 and 4062 of onnxruntime have them, and Deep-Live-Cam's 584 and 645.
    f"{NODE}\n/onnxruntime_src/onnxruntime/core/framework/bfc_arena.cc:376 void* onnxruntime::"
    "BFCArena::AllocateRawInternal(size_t, bool, onnxruntime::Stream*, bool, onnxruntime::"
    "WaitNotificationFn) Failed to allocate memory for requested buffer of size 2830172160",
    f"{NODE}Available memory of 1048576 is smaller than requested bytes of 2830172160",
    "[ONNXRuntimeError] : 1 : FAIL : cuda_call.cc:114 onnxruntime::CudaCall CUDA failure 2: out of "
    "memory ; GPU=0 ; hostname=h ; expr=cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);",
    f"{NODE}cuda_call.cc:114 onnxruntime::CudaCall CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED ; "
    "GPU=0 ; hostname=h ; expr=cublasCreate(&cublas_handle_);",
    f"{NODE}CUDA: a workspace: out of memory (2); a lower-bit scheme needs less",
]


@pytest.fixture
def card(monkeypatch):
    """One of 8 GB, whose runs are the CPU's until `said` is what ONNX Runtime says instead."""

    class Graph(onnxruntime.InferenceSession):
        opening = running = ""

        def __init__(self, model, options, providers, enable_fallback):
            assert (providers[0][0], enable_fallback) == (devices.CUDA_PROVIDER, 0)
            if self.opening:
                raise RuntimeError(self.opening)
            super().__init__(model, options, providers=CUDA[1:])

        def get_providers(self):
            return CUDA

        def run(self, *given, **options):
            if self.running:
                raise RuntimeError(self.running)
            return super().run(*given, **options)

        def run_with_iobinding(self, *given, **options):
            if self.running:
                raise RuntimeError(self.running)
            super().run_with_iobinding(*given, **options)

    made = key_values.OnCard.__init__
    monkeypatch.setattr(
        key_values.OnCard, "__init__", lambda self, *given: made(self, *given[:-1], ("cpu", 0))
    )
    monkeypatch.setattr(onnxruntime, "InferenceSession", Graph)
    monkeypatch.setattr(
        devices, "choose", lambda asked: devices.Device("cuda", 0, "A, asked for", 8_000_000_000)
    )
    return Graph


@pytest.mark.parametrize("said", FULL)
def test_a_full_card_is_told_plainly(tmp_path, capsys, card, said):
    bundle = tiny_bundles.language(tmp_path)
    command = ["generate", str(bundle.path), "--prompt", "a", "--max-new-tokens", "2"]
    assert cli.main(command) == 0
    for when in ("running", "opening"):
        capsys.readouterr()
        setattr(card, when, said)
        assert cli.main(command) == 2
        told = capsys.readouterr().err.splitlines()
        assert told[-1].startswith(
            "leangen: error: cuda:0 is out of memory: it has 8.0 GB in all, "
        )
        assert ("2.8 GB more were asked for" in told[-1]) == ("buffer of size" in said)
        assert told[-1].endswith("other programs ended, or --device cpu")
        assert "Traceback" not in "".join(told)
        assert when == "opening" or len(told) < 3


def test_keys_and_values_that_find_no_room(tmp_path, monkeypatch, card):
    def none_left(*given):
        raise RuntimeError(FULL[0])

    session = Session(tiny_bundles.language(tmp_path))
    monkeypatch.setattr(onnxruntime.OrtValue, "ortvalue_from_shape_and_type", none_left)
    with pytest.raises(OutOfMemoryError, match="a shorter prompt or context"):
        Decoder(session, 16)


def test_weights_that_do_not_fit_are_told_with_what_would():
    device = devices.Device("cuda", 0, "", 8_000_000_000)
    load = devices.Load("m", 16_000_000_000, 16)
    told = load.too_much(device, FULL[0])
    assert "m is 16.0 GB" in told
    assert "fewer bits (about 6 a weight, now 16, leave room to work in), or --device cpu" in told
    assert "about" not in devices.Load("m", 10**12, 4).too_much(device, FULL[0])


def test_other_failures_of_a_card_stay_what_they_are(tmp_path, card):
    assert not devices.out_of_memory("CUDA failure 700: an illegal memory access")
    card.running = "CUDA failure 700: an illegal memory access"
    session = Session(tiny_bundles.oneshot(tmp_path))
    graph = session.graph("model")
    with pytest.raises(RuntimeError, match="failure 700"):
        graph.run(None, {})


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A session, and one whose caches are asked of another device: the same calls as for a card."""
    bundle = tiny_bundles.language(tmp_path)
    other = Session(bundle, kernels="ort")
    other.graph("model")
    other.device = devices.Device("cuda", 0, "")
    made = key_values.OnCard.__init__
    monkeypatch.setattr(
        key_values.OnCard, "__init__", lambda self, *given: made(self, *given[:-1], ("cpu", 0))
    )

    def copy_within(index, places, size_bytes):
        for to, source in places:
            ctypes.memmove(to, source, size_bytes)

    monkeypatch.setattr(driver, "copy_within", copy_within)
    return Session(bundle, kernels="ort"), other


def test_caches_elsewhere_give_the_same_logits(elsewhere):
    found = []
    for session in elsewhere:
        with Decoder(session, 16) as decoder:
            first = decoder.feed([1, 2, 3]).copy()
            twin = decoder.fork(session)
            found.append([first, twin.feed([4]).copy(), decoder.feed([5]).copy()])
        with Decoder(session, 600, prefix=[1, 2, 3, 4]) as longer:
            assert longer.length == 3
            found[-1].append(longer.feed([4]).copy())
    np.testing.assert_array_equal(*found)


def test_many_sequences_elsewhere_give_the_same_logits(elsewhere):
    found = []
    for session in elsewhere:
        rows = Rows(session, 3, 100)
        texts = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
        logits = [rows.prefill(row, text, 0).copy() for row, text in enumerate(texts)]
        logits += list(rows.decode([1, 2, 3], [3, 2, 4]).copy())
        rows.copy(2, 0, 5)
        logits += list(rows.decode([4, 5], [5, 3]).copy())
        found.append(logits)
    np.testing.assert_array_equal(*found)


def lowered(tmp_path, scheme, **shape):
    """A tiny decoder's graph on leangen's operators, as the CPU has it."""
    given = gguf.export(write(tmp_path / "t.gguf", Tiny(tied=False, **shape)), tmp_path / "fp32")
    graph = Draft(quantize(given, scheme, tmp_path / scheme).graph("model"))
    assert linear.rewrite(graph) and language.rewrite(graph)
    return graph


def weights(graph, op, unpack):
    return {
        node.name: unpack(
            layout.FORMS[attributes(node)["form"].decode()], graph.array(node.input[1]),
            attributes(node)["n"], attributes(node)["k"],
        )
        for node in graph.all(op)
    }  # fmt: skip


@pytest.mark.parametrize("scheme", ["int4", "nf4"])
def test_lowering_for_a_card_keeps_the_weights(tmp_path, scheme):
    graph = lowered(tmp_path, scheme, head_dim=64)
    before = weights(graph, "Linear", layout.unpack)
    linears, attentions = len(graph.all("Linear")), len(graph.all("Attention"))
    assert on_card.rewrite(graph) is None
    assert not graph.all("Linear", "Attention")
    assert (len(graph.all("CudaLinear")), len(graph.all("CudaAttention"))) == (linears, attentions)
    after = weights(graph, "CudaLinear", tiles.unpack)
    for name, parts in before.items():
        for mine, theirs in zip(parts, after[name], strict=True):
            np.testing.assert_array_equal(mine, theirs)


def test_a_card_holds_five_bits_in_eight(tmp_path):
    source = write(tmp_path / "t.gguf", Tiny(head_dim=64, default_type="Q5_0"))
    graph = Draft(gguf.export(source, tmp_path / "gguf", form="gguf").graph("model"))
    assert linear.rewrite(graph) and language.rewrite(graph)
    before = weights(graph, "Linear", layout.unpack)
    assert max(codes.max() for codes, _, _ in before.values()) == 31
    assert on_card.rewrite(graph) is None
    after = weights(graph, "CudaLinear", tiles.unpack)
    assert {attributes(node)["form"] for node in graph.all("CudaLinear")} == {b"q8"}
    for name, (codes, scales, _) in before.items():
        np.testing.assert_array_equal(after[name][0].astype(int) - 128, codes.astype(int) - 16)
        np.testing.assert_array_equal(after[name][1], scales)


def test_a_graph_that_a_card_cannot_take_stays_whole(tmp_path, monkeypatch):
    assert "heads of 16, not of 64 or 128" in on_card.rewrite(lowered(tmp_path, "int4"))
    (tmp_path / "kernels" / "cuda").mkdir(parents=True)
    monkeypatch.setattr(lowering.leangen_kernels, "status", lambda: ("avx2", ""))
    library = tmp_path / "kernels" / "library.so"
    library.write_text("")
    monkeypatch.setattr(lowering.leangen_kernels, "library", lambda: library)
    bundle = tiny_bundles.language(tmp_path / "other")
    found, why = lowering.find(bundle, "model", device="cuda")
    assert found is None and "for a card were not built" in why
    (library.parent / "cuda" / driver.NAMES).write_text("")
    found, why = lowering.find(bundle, "model", device="cuda")
    assert found is None and "fit no node of it" in why
