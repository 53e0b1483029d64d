"""`leangen demo`: published models, or those of leangen's own zoo, at three precisions.

Each generation goes through the same engine as `leangen generate`; the page and the table show
what came out, what it cost, and how far it is from fp32. A pipeline is shown as it is written.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leangen import api, benchmark, charts, environment, page, pipeline, quality, report
from leangen.catalog import CATALOG
from leangen.console import print_json, progress_bar, say, table, with_u
from leangen.engine import Engine, Result
from leangen.errors import DependencyError
from leangen.files import write_atomic

SCHEMES = ("fp32", "int8", "int4")
REPEATS = 3


@dataclass(frozen=True, slots=True)
class Show:
    """What is generated, and what the page says of it."""

    title: str
    lead: str
    runs: Mapping[str, tuple[str, Mapping[str, Any]]]
    """By heading: a model or a pipeline, and options; none are the family's own example."""


PUBLISHED = Show(
    "leangen demo",
    "Three published models of three families at three precisions on ONNX Runtime, every "
    "generation with its joules.",
    {
        "smollm2-135m": (
            "smollm2-135m",
            {
                "messages": [{"role": "user", "content": "What can a small river do?"}],
                "max_new_tokens": 48,
                "ignore_eos": True,
            },
        ),
        "piper-joe": ("piper-joe", {}),
        "terrain": ("terrain", {"seed": 7, "conditions": {"difficulty": 1.0}}),
    },
)
ZOO = Show(
    "leangen zoo",
    "Models that were trained for leangen and come with it, at three precisions on ONNX Runtime: "
    "same seeds, so that what a precision changes can be seen.",
    {
        **{
            f"fashion-ddpm: {what}": (
                "fashion-ddpm",
                {"count": 4, "seed": 4, "conditions": {"label": label}},
            )
            for label, what in ((9, "ankle boots"), (8, "bags"), (3, "dresses"))
        },
        **{
            name: (name, {"count": 4, "seed": 1, "conditions": {"label": label}})
            for name, label in (("fashion-fm", 1), ("fashion-dit", 3), ("fashion-gan", 2))
        },
        "fashion-glow": ("fashion-glow", {"count": 4, "seed": 1}),
        **{
            name: (name, {"count": 2, "seed": 1, "conditions": {"label": label}})
            for name, label in (("fashion-gpt", 8), ("fashion-pixelcnn", 7))
        },
        "prompts-wavenet": ("prompts-wavenet", {"seconds": 1.0, "seed": 1}),
        "cascade": ("cascade", {"label": "sandal", "count": 4, "seed": 1}),
        "draw": ("draw", {"text": "a pair of trousers", "count": 4, "seed": 1}),
        "smiles-lm": (
            "smiles-lm",
            {"tokens": [0], "max_new_tokens": 60, "temperature": 1.0, "seed": 3},
        ),
    },
)
SHOWN = 2
"""Measures of quality that the table and the page show; a denoiser also has one for each step."""
SUFFIXES = {"text": ".txt", "audio": ".wav", "image": ".png"}
COLUMNS = (
    *("model", "size", "bits/weight", "speed", "first unit", "joules per unit"),
    "quality against fp32",
)


def run(out: Path, show: Show = PUBLISHED, *, threads: int | None, as_json: bool) -> int:
    """Generate everything into folder `out` and print one table; 0 when all was done."""
    out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    absent = []
    for heading, (name, options) in show.runs.items():
        try:
            path = pipeline.find(name)
            if path is not None:
                rows.append(_composed(heading, path, options, threads, out))
                continue
            reference: Any = None
            for scheme in SCHEMES:
                row, observation = _one(heading, name, scheme, options, threads, reference, out)
                reference = observation if reference is None else reference
                rows.append(row)
        except DependencyError as error:
            absent.append(f"not shown: {error}")
            say(absent[-1])
    state = environment.conditions()
    notes = [*environment.warnings(state), *absent]
    document = {"rows": rows, "environment": state, "notes": notes}
    write_atomic(out / "demo.json", json.dumps(document, indent=1).encode())
    _write_page(out, show, rows, notes)
    if as_json:
        print_json(document)
    else:
        table(COLUMNS, [_cells(row) for row in rows])
    for reason in sorted({row["energy_reason"] for row in rows if row["energy_reason"]}):
        say(reason)
    say(f"wrote {out / 'report.html'} and {len(rows)} outputs beside it")
    return 0


def _one(
    heading: str,
    name: str,
    scheme: str,
    options: Mapping[str, Any],
    threads: int | None,
    reference: Any,
    out: Path,
) -> tuple[dict[str, Any], Any]:
    """Run one model at one scheme: the row of the table, and what quality is judged by."""
    say(f"\n{heading}:{scheme}" if heading == name else f"\n{heading}, {scheme}")
    with progress_bar() as progress:
        engine = api.load_model(f"{name}:{scheme}", threads=threads, tag="demo", progress=progress)
    row = _generated(engine, heading, scheme, engine.or_example(None, options), out)
    observation = quality.observe(engine.session, reference)
    measures = [] if reference is None else quality.measure(engine.bundle, reference, observation)
    bundle = engine.bundle
    row |= {
        "size_bytes": bundle.size_bytes,
        "bits_per_weight": bundle.quantization.get("bits_per_weight", 32.0),
        "quality": [measure.to_json() for measure in measures],
    }
    return row, observation


def _composed(
    heading: str, path: Path, options: Mapping[str, Any], threads: int | None, out: Path
) -> dict[str, Any]:
    """Run a pipeline: the row of the table."""
    say(f"\n{heading}")
    with progress_bar() as progress:
        made = pipeline.load(
            path,
            lambda ref: api.load_model(ref, threads=threads, tag="demo", progress=progress),
        )
    row = _generated(made, heading, "", options, out)
    bundles = {atom.engine.bundle.path: atom.engine.bundle for atom in made.atoms.values()}
    row |= {
        "size_bytes": sum(bundle.size_bytes for bundle in bundles.values()),
        "bits_per_weight": None,
        "quality": [],
    }
    return row


def _generated(
    engine: Engine | pipeline.Pipeline,
    heading: str,
    scheme: str,
    options: Mapping[str, Any],
    out: Path,
) -> dict[str, Any]:
    """Generate once to show, and again to measure: what a row says of both."""
    result = _show(engine, options)
    repeats = [engine.generate(**options).receipt for _ in range(REPEATS)]
    stem = "-".join([*heading.replace(":", "").split(), *filter(None, [scheme])])
    saved = out / f"{stem}{SUFFIXES[result.output.media]}"
    result.save(saved)
    summary = benchmark.summarise(repeats)
    return summary | {
        "heading": heading,
        "asked_scheme": scheme or summary["scheme"],
        "file": saved.name,
        "text": result.text,
        "receipt": result.receipt.to_json(),
        "cost": report.summary(result.receipt).splitlines()[0],
    }


def _show(engine: Engine | pipeline.Pipeline, options: Mapping[str, Any]) -> Result:
    """Generate once, streaming the text as it comes, and say what it cost."""
    stream = engine.stream(**options)
    wrote = False
    for step in stream:
        wrote |= bool(step.text)
        print(step.text, end="", file=sys.stderr, flush=True)
    if wrote:
        say("")
    say(report.summary(stream.result.receipt).splitlines()[0])
    return stream.result


def _cells(row: dict[str, Any]) -> list[str]:
    rate, first = row["units_per_s"]["median"], row["ttft_s"]
    asked = "" if row["asked_scheme"] == row["scheme"] else f" (as {row['asked_scheme']})"
    return [
        f"{row['heading']}{':' if row['heading'] == row['model'] else ', '}{row['scheme']}{asked}",
        f"{row['size_bytes'] / 1e6:.1f} MB",
        "" if row["bits_per_weight"] is None else f"{row['bits_per_weight']:.2f}",
        f"{rate:.4g} {row['unit']}s/s",
        f"{first['median'] * 1000:.0f} ms" if first else "",
        f"{with_u(row['j_per_unit'], row['j_per_unit_u'], 'J')} ({row['energy_source']})",
        ", ".join(
            f"{m['name']} {with_u(m['value'], m['u'], m['unit']).strip()}"
            for m in row["quality"][:SHOWN]
        )
        or ("" if row["bits_per_weight"] is None else "reference"),
    ]


def _write_page(
    out: Path, show: Show, rows: Sequence[dict[str, Any]], notes: Sequence[str]
) -> None:
    models, plotted = [], set[str]()
    for heading, (name, _) in show.runs.items():
        group = [row for row in rows if row["heading"] == heading]
        if not group:
            continue
        models.append(
            {
                "name": heading,
                "about": _about(name),
                # of a model, once; of a pipeline there is nothing to compare
                "plots": [] if name in plotted or len(group) == 1 else _plots(group),
                "outputs": [_output(out, row) for row in group],
            }
        )
        plotted.add(name)
    page.write_page(
        out / "report.html",
        title=show.title,
        lead=show.lead,
        notes=[*notes, *sorted({row["energy_reason"] for row in rows if row["energy_reason"]})],
        columns=COLUMNS,
        table=[_cells(row) for row in rows],
        models=models,
    )


def _about(name: str) -> str:
    path = pipeline.find(name)
    if path is not None:
        spec = pipeline.read(path)
        return f"{spec.summary} ({', '.join(part.model for part in spec.parts)})"
    entry = CATALOG[name]
    return f"{entry.summary} ({entry.source.title}, {entry.source.licence})"


def _plots(group: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Charts of one model over its schemes."""

    def bar(row: dict[str, Any], value: Any, u: Any = None, source: str = "measured") -> charts.Bar:
        return charts.Bar(name=row["scheme"], value=value, u=u, source=source)

    unit = group[0]["unit"]
    plots = [
        charts.bars(
            f"Energy per {unit}",
            "J",
            [bar(r, r["j_per_unit"], r["j_per_unit_u"], r["energy_source"]) for r in group],
            prefixed=True,
        ),
        charts.bars("Time of one generation", "ms", [bar(r, *_spread_ms(r)) for r in group]),
        charts.bars("Size on disk", "MB", [bar(r, r["size_bytes"] / 1e6) for r in group]),
    ]
    for index, measure in enumerate(group[-1]["quality"][:SHOWN]):
        plots.append(
            charts.bars(
                f"{measure['name']} against fp32",
                measure["unit"],
                [
                    bar(row, row["quality"][index]["value"], row["quality"][index]["u"])
                    for row in group
                    if row["quality"]
                ],
            )
        )
    return plots


def _spread_ms(row: dict[str, Any]) -> tuple[float, float]:
    """Median, and the larger distance from it to p5 or p95."""
    figure = row["total_s"]
    half = max(figure["p95"] - figure["median"], figure["median"] - figure["p5"])
    return figure["median"] * 1e3, half * 1e3


def _output(out: Path, row: dict[str, Any]) -> dict[str, Any]:
    path = out / row["file"]
    return {
        "scheme": row["scheme"],
        "text": row["text"],
        "audio": page.data_uri(path, "audio/wav") if path.suffix == ".wav" else None,
        "image": page.data_uri(path, "image/png") if path.suffix == ".png" else None,
        "cost": row["cost"],
    }
