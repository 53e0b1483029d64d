"""`hf:org/name[/file][@revision]`: which file of a Hugging Face repository to take, and how.

huggingface_hub (the extra `hub`) is imported on use; endpoint, token and offline mode are the
user's (`HF_ENDPOINT`, `HF_TOKEN`, `HF_HUB_OFFLINE`). A broken download is resumed by the next try.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from leangen.bundle import sha256_file
from leangen.catalog import Entry, HubFiles, gguf_forms
from leangen.console import Progress
from leangen.errors import ChecksumError, SourceError, StorageError, needs
from leangen.fetch import watching

# What suits a small machine first: 4-bit, then as few bits above that as there are.
PREFERRED = "Q4_K_M Q4_K_S Q4_0 Q4_1 Q5_K_M Q5_K_S Q6_K Q8_0 BF16 F16 F32".split()
CONFIG = "config.json"
BESIDE = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "preprocessor_config.json",
)
"""What transformers saves beside the weights and an export reads."""
_KIND = re.compile(r"(?:^|[-._])(I?Q\d\w*|BF16|F16|F32|FP16|FP32)(?=[-.])", re.IGNORECASE)
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.gguf$")


def entry(name: str, *, endpoint: str | None = None) -> Entry:
    """Ask the hub what `hf:org/name[/file][@revision]` is, and choose the file to take.

    Raises SourceError (no such repository, gated, no network, nothing that leangen can read; it
    lists what there is) and DependencyError without huggingface_hub.
    """
    repo, wanted, revision = _split(name)
    with _hub_errors(repo, revision, wanted):
        from huggingface_hub import HfApi

        info = HfApi(endpoint=endpoint).model_info(repo, revision=revision, files_metadata=True)
    files = {sibling.rfilename: sibling for sibling in info.siblings or ()}
    members = choose(repo, list(files), wanted)
    lfs = {path: files[path].lfs for path in members}
    source = HubFiles(
        repo=repo,
        revision=info.sha,
        members=members,
        sha256={path: info.sha256 for path, info in lfs.items() if info is not None},
        size_bytes=sum(files[path].size or 0 for path in members),
        licence=str(getattr(info.card_data, "license", None) or "not stated"),
    )
    kind: dict[str, Any] = {"family": "flow", "exporter": "piper", "forms": {"fp32": {}}}
    if members[0] == CONFIG:
        kind = {"family": "language", "exporter": "transformers", "forms": {"fp32": {}}}
    elif members[0].endswith(".gguf"):
        kind = {"family": "language", "exporter": "gguf", **gguf_forms(gguf_kind(members[0]))}
    return Entry(name=name, summary=f"{members[0]} of {repo}", source=source, **kind)


def _split(name: str) -> tuple[str, str | None, str | None]:
    """Repository, file and revision of a name that `parse_ref` let through."""
    path, _, revision = name.removeprefix("hf:").partition("@")
    org, repo, *file = path.split("/", 2)
    return f"{org}/{repo}", file[0] if file else None, revision or None


def gguf_kind(path: str) -> str:
    """The type in a GGUF's file name, as is the hub's convention; empty where there is none.

    >>> gguf_kind("Qwen3-0.6B-Q4_K_M.gguf"), gguf_kind("a/tiny.f16.gguf"), gguf_kind("model.gguf")
    ('Q4_K_M', 'F16', '')
    """
    found = _KIND.findall(PurePosixPath(path).name)
    return found[-1].upper().replace("FP", "F") if found else ""


def choose(repo: str, files: Sequence[str], wanted: str | None = None) -> tuple[str, ...]:
    """The file of a repository that leangen can export, with what must lie beside it.

    A GGUF in the order of `PREFERRED`, else what transformers saved (`config.json` and all
    safetensors), else the one Piper voice (`.onnx` with `.onnx.json`).

    >>> choose("org/name", ["README.md", "m.Q8_0.gguf", "m.Q4_K_M.gguf"])
    ('m.Q4_K_M.gguf',)
    """
    ggufs = [
        path
        for path in files
        if path.endswith(".gguf") and not _SHARD.search(path) and "mmproj" not in path.lower()
    ]
    voices = [path for path in files if path.endswith(".onnx") and f"{path}.json" in files]
    if wanted is not None and wanted not in ggufs + voices:
        missing = "holds no" if wanted not in files else "has, but leangen cannot read,"
        raise SourceError(f"{repo} {missing} {wanted!r}; {_readable(ggufs + voices, files)}")
    ggufs.sort(key=lambda path: (_rank(gguf_kind(path)), path))
    pick = wanted or (ggufs[0] if ggufs else None)
    if pick is None and CONFIG in files and (weights := _weights(files)):
        return (CONFIG, *weights, *(path for path in BESIDE if path in files))
    if pick is None and len(voices) == 1:
        pick = voices[0]
    if pick is None:
        raise SourceError(f"no single model in {repo}: {_readable(voices, files)}")
    return (pick,) if pick in ggufs else (pick, f"{pick}.json")


def _weights(files: Sequence[str]) -> list[str]:
    """The safetensors at the top of a repository; folders hold other forms of the same model."""
    return sorted(path for path in files if path.endswith(".safetensors") and "/" not in path)


def _rank(kind: str) -> int:
    return PREFERRED.index(kind) if kind in PREFERRED else len(PREFERRED)


def _readable(usable: Sequence[str], files: Sequence[str]) -> str:
    shown = ", ".join((usable or files)[:8]) + (", ..." if len(usable or files) > 8 else "")
    if usable:
        return f"name one of its files as hf:org/name/FILE: {shown}"
    return (
        "expected a .gguf in one part, config.json with *.safetensors, or a Piper voice (.onnx and "
        f".onnx.json); found {shown}"
    )


def fetch(
    source: HubFiles, cache: Path, *, endpoint: str | None = None, progress: Progress | None = None
) -> Path:
    """Download the files into the hub cache in folder `cache`; the path of the first.

    Raises ChecksumError, SourceError, StorageError and DependencyError.
    """
    what = f"downloading {source.title}"
    with (
        _hub_errors(source.repo, source.revision, source.members[0]),
        watching(cache, source.size_bytes, what, progress),
    ):
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
        paths = [
            Path(
                hf_hub_download(
                    source.repo,
                    member,
                    revision=source.revision,
                    cache_dir=cache,
                    endpoint=endpoint,
                )
            )
            for member in source.members
        ]
    for member, path in zip(source.members, paths, strict=True):
        _check(source.sha256, member, path)
    return paths[0]


def _check(expected: Mapping[str, str], member: str, path: Path) -> None:
    if member in expected and (actual := sha256_file(path)) != expected[member]:
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise ChecksumError(
            f"{member} has sha256 {actual}, expected {expected[member]} as the hub states it: "
            "it was removed, try again"
        )


@contextmanager
def _hub_errors(repo: str, revision: str | None, file: str | None) -> Iterator[None]:
    """Turn what huggingface_hub and its HTTP library raise into our errors, in one line."""
    message = f"hf:{repo} needs huggingface_hub: `pip install 'leangen[hub]'`"
    with needs("huggingface_hub", message=message):
        from huggingface_hub import errors
    at = f"{repo}@{revision}" if revision else repo
    try:
        yield
    except errors.GatedRepoError as error:
        raise SourceError(
            f"{at} is gated: accept its terms on its page, then `hf auth login` or set HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise SourceError(
            f"the hub has no model {repo} that you may see: check the name, or set HF_TOKEN"
        ) from error
    except errors.LocalEntryNotFoundError as error:  # its way to say that the hub was not reached
        raise _no_answer(at, error) from error
    except (errors.RevisionNotFoundError, errors.EntryNotFoundError) as error:
        raise SourceError(f"{at} has no such revision or file {file or ''}".rstrip()) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(
                f"disk full while downloading {at}: free some space (`leangen gc`) and try again"
            ) from error
        raise _no_answer(at, error) from error
    except (errors.HTTPError, errors.HFValidationError) as error:
        raise _no_answer(at, error) from error


def _no_answer(at: str, error: Exception) -> SourceError:
    cause: BaseException = error
    while cause.__cause__ is not None:  # huggingface_hub wraps what happened in what it tried
        cause = cause.__cause__
    detail = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
    return SourceError(
        f"cannot get {at} from the hub ({detail[:160]}): check the network and HF_ENDPOINT, or "
        "fetch the file yourself and `leangen export FILE -o DIR`"
    )
