"""The closed list of errors a user can meet.

Each message says what was given, what was expected and what to do. The command line prints it on
one line and exits with 2; nothing half-written is left behind.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class LeangenError(Exception):
    """Base of every error that a user's input or surroundings can cause."""


class UnknownModelError(LeangenError):
    """The name is neither in the catalog, nor a bundle's path, nor `hf:org/name`."""


class UnknownSchemeError(LeangenError):
    """The scheme is not one that leangen has, or not one that this model can take."""


class ChecksumError(LeangenError):
    """Bytes that arrived are not the bytes that were pinned."""


class SourceError(LeangenError):
    """A file to be exported is missing, truncated, or not what its name says."""


class UnsupportedError(LeangenError):
    """A well-formed source of an architecture or a form that leangen cannot run yet."""


class BundleError(LeangenError):
    """A bundle is missing a file, is damaged, or was written by a newer leangen."""


class RequestError(LeangenError):
    """A generation was asked for that cannot be carried out as stated."""


class OutOfMemoryError(LeangenError):
    """A card, or the machine, has no memory left for what was asked."""


class StorageError(LeangenError):
    """The disk is full, read-only, or another process holds the lock."""


class DependencyError(LeangenError):
    """An optional dependency is needed; the message names the extra to install."""


@contextmanager
def needs(*modules: str, message: str) -> Iterator[None]:
    """Around imports: DependencyError with the message where one of these modules is missing.

    Any other that cannot be found is a fault of what is installed, and passes.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in modules:
            raise
        raise DependencyError(message) from None
