"""Pipelines: parts that fit run in one window whose joules they share; others are refused."""

import json
import shutil
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cli import fails
from tiny_bundles import density, diffusion, language, oneshot, speech

import leangen
from leangen import families, pipeline
from leangen.bundle import MANIFEST, sha256_file
from leangen.cli import main
from leangen.engine import Engine
from leangen.errors import BundleError, RequestError, UnknownModelError
from leangen.ledger import Ledger
from leangen.meters import Selection
from leangen.pipeline import accounts, ports, template
from leangen.records import MeterWindow, Output
from leangen.session import Session

WRITER = (
    'model = "./language"\nrequest = {{ prompt = "{}", max_new_tokens = 4, ignore_eos = true }}'
)
TWO_WRITERS = f"""
summary = "one goes on where the other stops"
[inputs.start]
about = "how it begins"
[parts.first]
{WRITER.format("{input.start}")}
[parts.second]
{WRITER.format("a{first.text}")}
"""
TWO_PAINTERS = """
[inputs.seed]
default = 3
[parts.first]
model = "./diffusion"
request = {{ seed = "{{input.seed}}", steps = 2 }}
[parts.second]
model = "./{other}"
request = {{ image = "{{first.image{filters}}}", strength = 0.5, steps = 4 }}
"""


def edited(source, target, **config):
    """A copy of a bundle with another config."""
    shutil.copytree(source, target)
    path = target / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["config"] |= config
    path.write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    for make in (language, speech, density, diffusion, oneshot):
        made = make(folder / f"{make.__name__}-source").path
        made.rename(folder / make.__name__)
    sample = json.loads((folder / "diffusion" / MANIFEST).read_text())["config"]["sample"]
    edited(folder / "diffusion", folder / "painter", range=[-1.0, 1.0])
    edited(folder / "diffusion", folder / "bytes", range=[0.0, 255.0])
    edited(folder / "diffusion", folder / "small", sample=sample | {"shape": [1, 4, 4]})
    edited(folder / "language", folder / "foreign")
    tokenizer = folder / "foreign" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + " ")
    manifest = json.loads((folder / "foreign" / MANIFEST).read_text())
    manifest["files"]["tokenizer.json"] = {
        "bytes": tokenizer.stat().st_size,
        "sha256": sha256_file(tokenizer),
    }
    (folder / "foreign" / MANIFEST).write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def load(folder, tmp_path):
    """Loads a pipeline from its text, with a ledger of the test's own."""
    book = Ledger(tmp_path / "ledger.sqlite")

    def load(text):
        path = folder / "made.toml"
        path.write_text(text)

        def open_model(ref):
            return Engine(Session(leangen_bundle(ref), threads=1), ledger=book)

        made = pipeline.load(path, open_model)
        made.book = book
        return made

    return load


def leangen_bundle(ref):
    from pathlib import Path

    from leangen.bundle import open_bundle

    return open_bundle(Path(ref))


def test_the_parts_add_up_to_the_whole(load):
    made = load(TWO_WRITERS)
    stream = made.stream("ab")
    kinds = [step.kind for step in stream]
    result = stream.result
    receipt = result.receipt
    assert kinds[0] == "first/prefill" and set(kinds[4:]) == {"second/prefill", "second/decode"}
    assert [part.request["pipeline"]["part"] for part in receipt.parts] == ["first", "second"]
    for figure in ("gross_uj", "idle_uj", "marginal_uj"):
        of_parts = [getattr(part.energy, figure) for part in receipt.parts]
        assert sum(of_parts) == getattr(receipt.energy, figure)
    assert [line.energy_uj for line in receipt.energy.steps] == [
        part.energy.gross_uj for part in receipt.parts
    ]
    for part in receipt.parts:
        assert sum(step.energy_uj for step in part.energy.steps) == part.energy.gross_uj
    assert sum(part.duration_ns for part in receipt.parts) == receipt.duration_ns
    assert (receipt.model, receipt.scheme, receipt.family) == ("made", "fp32+fp32", "pipeline")
    assert receipt.units.count == 4 and result.text == result.parts["second"].text


def test_each_part_gets_what_the_one_before_gave(load):
    made = load(TWO_WRITERS)
    result = made.generate("ab")
    alone = made.atoms["second"].engine
    again = alone.generate("a" + result.parts["first"].text, max_new_tokens=4, ignore_eos=True)
    assert again.text == result.text


def test_the_ledger_counts_each_part_once(load):
    made = load(TWO_WRITERS)
    whole = made.generate("ab").receipt
    (row,) = made.book.summary(("tag",))
    assert row.group == {"tag": "made"} and row.receipts == 2
    assert row.gross_uj == whole.energy.gross_uj and row.overlapping == 0


def test_an_image_goes_from_part_to_part(load):
    made = load(TWO_PAINTERS.format(other="diffusion", filters=""))
    first, again, other = (made.generate(seed=seed) for seed in (5, 5, 6))
    assert first.array.shape == (1, 8, 8, 1)
    assert np.array_equal(first.array, again.array)
    assert not np.array_equal(first.array, other.array)
    assert first.receipt.request == {"seed": 5}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            TWO_PAINTERS.format(other="small", filters=""),
            r"parts.second.image: \{first.image\}: the image of first \(tiny:fp32\) has shape "
            r"\[8, 8, 1\], expected \[4, 4, 1\]",
        ),
        (
            TWO_PAINTERS.format(other="painter", filters="").replace("./diffusion", "./bytes"),
            "goes from 0 to 255, expected -1 to 1",
        ),
        (
            TWO_PAINTERS.format(other="painter", filters=""),
            "does not say its range, expected -1 to 1",
        ),
        (
            TWO_WRITERS.replace("./language", "./foreign", 1).replace(
                'prompt = "a{first.text}"', 'tokens = "{first.tokens}"'
            ),
            "holds tokens of the tokenizer [0-9a-f]{12}, expected those of [0-9a-f]{12}: pass text",
        ),
        (TWO_WRITERS.replace("first.text", "first.audio"), "gives no 'audio': it gives text"),
        (TWO_WRITERS.replace("a{first.text}", "{first.tokens}"), "is tokens, expected text"),
        (TWO_WRITERS.replace("a{first.text}", "{second.text}"), "names no earlier part"),
        (
            TWO_WRITERS.replace("input.start", "input.begin"),
            "names no input: expected one of start",
        ),
        (TWO_WRITERS.replace("max_new_tokens", "words"), "takes no such option: it takes .*prompt"),
        (
            TWO_WRITERS.replace("ignore_eos = true", 'seed = "{first.text}"').replace(
                'seed = "{first.text}"', "ignore_eos = true", 1
            ),
            "takes no part's output as seed: it takes prompt",
        ),
        (TWO_PAINTERS.format(other="painter", filters="|sharpen 1 2"), "no filter 'sharpen'"),
        (TWO_PAINTERS.format(other="painter", filters="| "), "no filter ''"),
        (TWO_PAINTERS.format(other="painter", filters="|resize 4"), "expected resize HEIGHT WIDTH"),
        (TWO_PAINTERS.format(other="painter", filters="|range 0 1"), "its range is not known"),
        (TWO_PAINTERS.format(other="painter", filters="|range 1 1"), "LOW HIGH, low below high"),
        (TWO_PAINTERS.format(other="painter", filters="|resize 0 8"), "pixels, 1 to 8192"),
        (TWO_WRITERS.replace("input.start", "input.start|resize 4 4"), "for what a part gives"),
        (
            TWO_WRITERS.replace("first.text", "first.text|resize 4 4"),
            "resize takes an image, got t",
        ),
        (TWO_WRITERS.replace("{first.text}", "{first"), "is not a reference"),
        ("summary = 3 4", "is not TOML"),
        ("[inputs.x]", "has no parts"),
        ("[parts.x]\nrequest = {}", "parts.x has no model"),
        ('[parts.input]\nmodel = "./language"', "a part cannot be called 'input'"),
        ('[parts.x]\nmodel = "./language"\ntemperature = 1', "options of a part's model go into"),
        ('[parts.x]\nmodel = "./language"\nbundle = 5', "parts.x.bundle is 5, expected 'sha256:"),
        ('inputs = 3\n[parts.x]\nmodel = "./language"', "inputs is 3, expected a table"),
    ],
)
def test_what_does_not_fit_is_named(load, text, reason):
    with pytest.raises(RequestError, match=reason):
        load(text)


@pytest.mark.parametrize(
    ("other", "filters", "first"),
    [
        ("small", "|resize 4 4", "./diffusion"),
        ("painter", "|range -1 1", "./bytes"),
        ("painter", "|resize 16 16|resize 8 8|range -1 1", "./bytes"),
    ],
)
def test_a_filter_mends_a_misfit(load, other, filters, first):
    load(TWO_PAINTERS.format(other=other, filters=filters).replace("./diffusion", first))


def test_parts_of_one_model_share_it(load):
    made = load(TWO_WRITERS)
    assert made.atoms["first"].engine is made.atoms["second"].engine


def test_sound_goes_on_at_another_rate():
    port = ports.Port(kind="audio", rate_hz=22_050)
    sound = np.sin(np.arange(22_050) * 2 * np.pi * 440 / 22_050).astype(np.float32)
    (reference,) = template.parse("{voice.audio|rate 16000}")
    assert template.through(reference.filters, port, "here").rate_hz == 16_000
    slower = template.apply(reference.filters, sound, port)
    expected = np.sin(np.arange(16_000) * 2 * np.pi * 440 / 16_000)
    assert slower.shape == (16_000,) and np.abs(slower - expected)[500:-500].max() < 0.01


def test_filters_change_what_they_say():
    port = ports.Port(kind="image", shape=(2, 2, 1), range=(0.0, 255.0))
    image = np.float32([[[0], [255]], [[51], [255]]])[None]
    scaled = template.apply((("range", (-1.0, 1.0)),), image, port)
    assert np.allclose(scaled[0, :, :, 0], [[-1, 1], [-0.6, 1]])
    large = template.apply((("resize", (8.0, 6.0)),), image, port)
    assert large.shape == (1, 8, 6, 1) and 0 <= large.min() and large.max() <= 255
    assert np.argmax(large[0, 0, :, 0]) >= 3
    assert template.fill("a {{x}}", None) == "a {x}"


def test_a_part_that_fails_leaves_the_others_accounted(load):
    made = load(TWO_WRITERS.replace("a{first.text}", "{input.start}{input.start}"))
    with pytest.raises(RequestError, match=r"^made: parts\.second: the prompt .* context"):
        made.generate("ab " * 40)
    (row,) = made.book.summary(("model",))
    assert row.receipts == 1


def test_closing_early_accounts_for_what_was_spent(load):
    made = load(TWO_WRITERS)
    stream = made.stream("ab")
    for _ in range(5):
        next(stream)
    stream.close()
    whole = stream.receipt
    assert len(whole.parts) == 2 and whole.parts[1].units.count == 1
    assert sum(part.energy.gross_uj for part in whole.parts) == whole.energy.gross_uj
    with pytest.raises(RequestError, match="not finished"):
        _ = stream.result


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        ({}, "needs the input 'start': how it begins"),
        ({"start": "a", "end": "b"}, "takes no input 'end': it takes start"),
    ],
)
def test_inputs_are_checked_before_anything_runs(load, inputs, reason):
    with pytest.raises(RequestError, match=reason):
        load(TWO_WRITERS).stream(**inputs)


def test_every_family_says_what_it_gives():
    assert set(ports.PORTS) == set(families.FAMILIES)


def test_a_part_that_cannot_be_opened_is_named(load):
    with pytest.raises(
        BundleError, match="made: parts.first: .*lacks|made: parts.first: .*not a b"
    ):
        load(TWO_WRITERS.replace("./language", "./nothing", 1))


def test_from_python_and_the_command_line(folder, tmp_path, capsys):
    path = folder / "written.toml"
    path.write_text(TWO_WRITERS)
    assert leangen.load(path).generate(start="ab").text
    argv = ["generate", str(path), "--input", "start=ab"]
    assert main([*argv, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [part["model"] for part in document["receipt"]["parts"]] == ["tiny", "tiny"]
    assert document["parts"].keys() == {"first", "second"}
    assert document["parts"]["second"] == document["text"]
    assert main(argv) == 0
    assert "first (tiny:fp32): 4 tokens in" in capsys.readouterr().err
    assert "needs the input 'start'" in fails(capsys, "generate", str(path))
    assert "there is no pipeline at" in fails(capsys, "generate", "nowhere.toml")
    assert main(["pipelines", "--json"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == [*pipeline.shipped()]


def test_the_shipped_ones_are_whole():
    from leangen.catalog import parse_ref

    for path in pipeline.shipped().values():
        spec = pipeline.read(path)
        assert spec.summary
        for part in spec.parts:
            try:
                parse_ref(part.model)
            except UnknownModelError as error:
                pytest.fail(f"{path.name}: {error}")


figure = st.integers(0, 10**9)
u = st.floats(0, 10)


@st.composite
def runs(draw):
    """A run of one to four legs under one to three meters, looked at here and there."""
    legs = draw(st.lists(st.lists(st.integers(1, 10**9), min_size=1, max_size=4), max_size=4))
    legs = [[1], *legs]
    durations = [ns for leg in legs for ns in leg]
    windows = tuple(
        MeterWindow(
            sensor=f"rapl:package-{i}",
            source="measured",
            energy_uj=draw(figure),
            u_random_j=draw(u),
            u_systematic_j=draw(u),
            tick_s=0.001,
        )
        for i in range(draw(st.integers(1, 3)))
    )
    total = sum(window.energy_uj for window in windows)
    looks = sorted(draw(st.sets(st.integers(0, len(durations) - 1))))
    spent = sorted(draw(st.lists(st.integers(0, total), min_size=len(looks), max_size=len(looks))))
    return legs, windows, dict(zip(looks, spent, strict=True))


@pytest.fixture(scope="module")
def engine(folder):
    return Engine(Session(leangen_bundle(folder / "oneshot"), threads=1))


@settings(max_examples=60)
@given(case=runs())
def test_shares_of_any_window_add_up(engine, case):
    durations, windows, marks = case
    legs, begin_ns = [], 0
    for index, steps in enumerate(durations):
        request = engine.request()
        leg = accounts.Leg(f"part{index}", engine, request, "2026-01-01T00:00:00.000Z", begin_ns)
        leg.steps = [("decode", 1.0, ns) for ns in steps]
        leg.output, leg.counts = Output(), Counter()
        legs.append(leg)
        begin_ns += sum(steps)
    receipt = accounts.settle(
        accounts.Run(
            legs=legs,
            started_at="2026-01-01T00:00:00.000Z",
            begin_boottime_ns=0,
            duration_ns=begin_ns,
            windows=windows,
            marks=marks,
        ),
        name="any",
        digest="sha256:0",
        request={},
        selection=Selection(meters=(), reason=None),
        baseline=None,
    )
    assert receipt.energy.gross_uj == sum(window.energy_uj for window in windows)
    assert receipt.energy.gross_uj == sum(part.energy.gross_uj for part in receipt.parts)
    for index, window in enumerate(windows):
        of_parts = [part.energy.meters[index].energy_uj for part in receipt.parts]
        assert sum(of_parts) == window.energy_uj
    for part in receipt.parts:
        assert sum(step.energy_uj for step in part.energy.steps) == part.energy.gross_uj


def test_a_fault_leaves_no_part_with_a_figure(engine):
    leg = accounts.Leg("one", engine, engine.request(), "2026-01-01T00:00:00.000Z", 0)
    leg.steps = [("decode", 1.0, 1000)]
    window = MeterWindow(
        sensor="rapl:package-0", source="measured", energy_uj=None, faults=("vanished",)
    )
    run = accounts.Run(
        legs=[leg],
        started_at="2026-01-01T00:00:00.000Z",
        begin_boottime_ns=0,
        duration_ns=1000,
        windows=(window,),
        marks={},
    )
    receipt = accounts.settle(
        run,
        name="any",
        digest="sha256:0",
        request={},
        selection=Selection(meters=(), reason=None),
        baseline=None,
    )
    assert receipt.energy.gross_uj is None and receipt.parts[0].energy.gross_uj is None
    assert "vanished" in receipt.parts[0].energy.reason
