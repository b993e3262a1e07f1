"""Faults of remote storage: which of them may heal, and how they are told without giving a secret away."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vqscale.errors import UserError
from vqscale.masking import has_password, shown

CREDENTIALS = "give credentials by the environment (such as AWS_ACCESS_KEY_ID) or fsspec's configuration files"

_HEALING = {408, 425, 429, *range(500, 600)} - {501, 505}
_DENIED = {401, 403}
_MISSING = {404, 410}
_FINAL = (
    *(FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError),
    *(ValueError, NotImplementedError, ImportError),
)
_LOST = {
    # Their libraries need not be installed, so the classes are known by name only.
    *("aiohttp.ClientError", "httpx.TransportError", "httpx2.TransportError", "urllib3.HTTPError"),
    *("botocore.HTTPClientError", "botocore.ConnectionError", "botocore.IncompleteReadError"),
    "botocore.ResponseParserError",  # an overloaded proxy answers with something that is no XML
}
_NO_CREDENTIALS = {"botocore.NoCredentialsError", "botocore.PartialCredentialsError", "botocore.TokenRetrievalError"}
_LIBRARIES = {"aiohttp", "botocore", "gcsfs", "httpx", "httpx2", "urllib3"}
_LONGEST = 300  # characters of a library's words that are passed on


class WrongLengthError(OSError):
    """Another number of bytes came than was asked for."""


def refuse_password(url: str | Path) -> None:
    """Passwords do not belong into URLs, which stand in recipes, logs and process lists.

    Raises:
        UserError: there is one, as in `https://user:password@host`.
    """
    if has_password(str(url)):
        raise UserError("holds a password", where=shown(url), mend=f"leave it out and {CREDENTIALS}")


def kind(error: BaseException) -> str | None:
    """Which fault it is, where trying again may help.

    Returns:
        `timeout`, `status` (such as 503), `length` (too short a body), `reset` (any other loss of the connection), or
        None for what does not heal, such as a missing file, and for faults of the program.
    """
    chain = list(_chain(error))
    if any(isinstance(fault, TimeoutError) or "Timeout" in type(fault).__name__ for fault in chain):
        return "timeout"
    # The deepest decides: fsspec's HTTP makes FileNotFoundError of whatever keeps it from asking for the size.
    for fault in reversed(chain):
        status = _status(fault)
        if status is not None:
            return "status" if status in _HEALING else None
        if isinstance(fault, WrongLengthError):
            return "length"
        if isinstance(fault, _FINAL):
            return None
        if isinstance(fault, OSError | EOFError) or _names(fault) & _LOST:
            return "reset"
    return None


def absent(error: BaseException) -> bool:
    """Whether an error says that there is no such file, whatever it is called."""
    chain = list(_chain(error))
    statuses = {status for fault in chain if (status := _status(fault)) is not None}
    return any(isinstance(fault, FileNotFoundError) for fault in chain) and kind(error) is None and statuses <= _MISSING


def told(error: BaseException, url: str | Path, tries: int = 1) -> UserError | None:
    """One line about a fault of the storage; None for a fault of the program, which keeps its traceback.

    Args:
        error: what a library raised; its words are quoted, without secrets and on one line.
        url: what was asked for.
        tries: how often it was tried in a row.
    """
    chain, where = list(_chain(error)), shown(url)
    healing = kind(error)
    if healing is not None:
        tried = f", {tries} tries in a row failed" if tries > 1 else ""
        mend = "check the network and the storage, then start again"
        return UserError(f"cannot be reached{tried} ({_words(error)})", where=where, mend=mend)
    if absent(error):
        return UserError("no such file", where=where, mend="check the path")
    if any(_denies(fault) for fault in chain):
        return UserError(f"permission denied ({_words(error)})", where=where, mend=CREDENTIALS)
    if isinstance(error, ImportError):
        missing = next((fault.name for fault in chain if isinstance(fault, ImportError) and fault.name), None)
        mend = f"pip install -c constraints.txt {missing}" if missing else ""
        return UserError(f"cannot be reached without the package {missing or _words(error)}", where=where, mend=mend)
    if isinstance(error, NotImplementedError):
        return UserError("this kind of storage cannot do that", where=where, mend="use another one")
    if isinstance(error, OSError | ValueError) or any(name.split(".")[0] in _LIBRARIES for name in _names(error)):
        return UserError(f"cannot be reached ({_words(error)})", where=where)
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and what it was raised from."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__


def _names(fault: BaseException) -> set[str]:
    """Its classes, each as package.Class."""
    return {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(fault).__mro__}


def _denies(fault: BaseException) -> bool:
    return isinstance(fault, PermissionError) or _status(fault) in _DENIED or bool(_names(fault) & _NO_CREDENTIALS)


def _status(fault: BaseException) -> int | None:
    """The HTTP status that an error of any of the libraries stands for."""
    response: Any = getattr(fault, "response", None)
    if isinstance(response, dict):  # botocore
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    elif any(name.startswith("gcsfs.") for name in _names(fault)):
        found = getattr(fault, "code", None)
    else:  # aiohttp, azure, then requests and httpx
        places = ((fault, "status"), (fault, "status_code"), (response, "status_code"))
        found = next((value for place, name in places if (value := getattr(place, name, None)) is not None), None)
    return found if isinstance(found, int) and 300 <= found < 600 else None


def _words(error: BaseException) -> str:
    if isinstance(error, FileNotFoundError) and error.__cause__:
        error = error.__cause__  # it only repeats the URL
    words = shown(error).strip()
    if not words:
        return "no answer in time" if isinstance(error, TimeoutError) else type(error).__name__
    return words if len(words) <= _LONGEST else words[:_LONGEST] + "…"
