"""Which name or path is a pipeline's. Every `leangen.load` asks, so nothing heavy is loaded."""

from __future__ import annotations

from pathlib import Path

from leangen.errors import UnknownModelError

FOLDER = Path(__file__).parent.parent / "assets" / "pipelines"


def shipped() -> dict[str, Path]:
    """The pipelines that come with leangen, by name."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.toml"))}


def find(ref: str | Path) -> Path | None:
    """The file of a pipeline, by path or by a shipped one's name; None for a model."""
    text = str(ref)
    if text.endswith(".toml"):
        path = Path(text).expanduser()
        if not path.is_file():
            raise UnknownModelError(
                f"there is no pipeline at {text!r}: expected a .toml file, or one of "
                f"{', '.join(shipped())}"
            )
        return path
    return shipped().get(text)
