"""What a client is told when a request is not carried out: status and body as OpenAI's.

    {"error": {"message": ..., "type": ..., "param": ..., "code": ...}}

`leangen.errors` has what can be wrong with a request itself; here is what only a server meets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from leangen.errors import (
    BundleError,
    DependencyError,
    LeangenError,
    OutOfMemoryError,
    RequestError,
    StorageError,
    UnknownModelError,
    UnsupportedError,
)


class OverloadError(LeangenError):
    """Too many requests wait."""


class BudgetError(LeangenError):
    """A budget of energy or emissions is used up."""


class RateError(LeangenError):
    """A client asks more often than it may."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineError(LeangenError):
    """The request's time was over before it was done."""


class StoppingError(LeangenError):
    """The server is shutting down: another may take the request."""


class LostError(LeangenError):
    """The machine of a cluster that worked on a request is gone."""


class AuthError(LeangenError):
    """No API key, or one that the server does not know."""


class TooLargeError(LeangenError):
    """The request's body is larger than the server takes."""


class NotFoundError(LeangenError):
    """There is nothing under this name or address."""


_STATUS: tuple[tuple[type[LeangenError], int, str, str], ...] = (
    (RequestError, 400, "invalid_request_error", "invalid_request"),
    (UnsupportedError, 400, "invalid_request_error", "unsupported"),
    (AuthError, 401, "authentication_error", "invalid_api_key"),
    (UnknownModelError, 404, "invalid_request_error", "model_not_found"),
    (NotFoundError, 404, "invalid_request_error", "not_found"),
    (TooLargeError, 413, "invalid_request_error", "request_too_large"),
    (BudgetError, 429, "insufficient_quota", "budget_exceeded"),
    (RateError, 429, "rate_limit_error", "rate_limit_exceeded"),
    (DependencyError, 501, "server_error", "missing_dependency"),
    (OverloadError, 503, "overloaded_error", "overloaded"),
    (OutOfMemoryError, 503, "overloaded_error", "out_of_memory"),
    (StoppingError, 503, "overloaded_error", "shutting_down"),
    (BundleError, 503, "server_error", "model_unavailable"),
    (LostError, 503, "server_error", "replica_lost"),
    (StorageError, 503, "server_error", "storage"),
    (DeadlineError, 504, "timeout_error", "deadline_exceeded"),
)

INTERNAL = "the server met a mistake of its own; its log has the details"


def out_of_memory(error: BaseException) -> OutOfMemoryError | None:
    """What a client is told of an error that is a lack of memory; None for any other.

    Python, and ONNX Runtime's C++, have several ways to say so.
    """
    said = ("can't start new thread", "bad_alloc", "allocate memory", "failed to map segment")
    if isinstance(error, OutOfMemoryError):
        return error
    if isinstance(error, MemoryError) or any(text in str(error) for text in said):
        return OutOfMemoryError("the machine is short of memory: try again in a moment")
    return None


def status(error: LeangenError) -> int:
    """The HTTP status of an error."""
    return _entry(error)[1]


def body(error: LeangenError, param: str | None = None) -> dict[str, Any]:
    """The JSON body of an error.

    A bundle's or the store's own trouble names files of the server, so its text stays in the log.
    """
    kind, _, label, code = _entry(error)
    message = str(error)
    if kind is BundleError or kind is StorageError:
        message = "the model or its storage is damaged or missing; the server's log has the details"
    return shaped(message, label, code, param)


def shaped(message: str, label: str, code: str | None, param: str | None = None) -> dict[str, Any]:
    """An error's JSON body from its parts."""
    return {"error": {"message": message, "type": label, "param": param, "code": code}}


def invalid(errors: Sequence[Mapping[str, Any]], body: Any) -> dict[str, Any]:
    """The JSON body of what pydantic finds wrong with a request's `body`.

    A value that may be one of several types has errors by each of them. Told is that of the type
    which it comes nearest to: the error lies deepest, is not of the type itself, and is alone.
    """
    found = [(*_place(error, body), error) for error in errors]
    of_first = [entry for entry in found if entry[0][:1] == found[0][0][:1]]
    kinds = [kind for _, kind, _ in of_first]

    def distance(entry: tuple[list[str], tuple[Any, ...], Mapping[str, Any]]) -> tuple[int, ...]:
        path, kind, error = entry
        return -len(path), error["type"].endswith("_type"), kinds.count(kind)

    path, _, error = min(of_first, key=distance)
    param, label = ".".join(path)[:200] or None, "invalid_request_error"
    if error["type"] == "json_invalid":
        why = f"{error['ctx']['error']} at character {error['loc'][-1]}"
        return shaped(f"the body is not JSON: {why}", label, "invalid_json")
    if error["type"] == "extra_forbidden":
        return shaped(f"{param} is not known here: leave it out", label, "unknown_parameter", param)
    said = str(error["msg"]).removeprefix("Value error, ")
    if said.startswith("Expected UploadFile"):
        said = "expected a file"
    if param is None and error["type"] == "missing":
        said = "the body is empty, expected JSON"
    if error["type"] == "model_attributes_type":
        said = "expected a JSON object"
    return shaped(f"{param}: {said}" if param else said, label, "invalid_value", param)


def _place(error: Mapping[str, Any], body: Any) -> tuple[list[str], tuple[Any, ...]]:
    """Where in the body an error is, and as which of the types that a value may have."""
    path: list[str] = []
    kind: tuple[Any, ...] = ()
    value = body
    where = error["loc"][1:]  # after "body"
    for index, part in enumerate(where):
        inside = isinstance(value, Mapping) and part in value
        if inside or (isinstance(value, list) and isinstance(part, int) and part < len(value)):
            value = value[part]
        elif not (error["type"] == "missing" and index == len(where) - 1):
            kind = kind or where[: index + 1]
            continue
        path.append(str(part))
    return path, kind


def _entry(error: LeangenError) -> tuple[type[LeangenError], int, str, str]:
    for entry in _STATUS:
        if isinstance(error, entry[0]):
            return entry
    return (LeangenError, 500, "server_error", "internal")
