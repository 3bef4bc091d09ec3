"""Calls of the Hub's client: tried again where the failure may pass, never for long, its errors told as ours.

By itself the client waits without end for the answer to most calls, and for minutes for the first word about
a file. So requests of ours get a time limit on their way out, and give up when nothing was
answered for `PATIENCE`; others' requests in the same process are left alone.
"""

import errno
import re
import time
from collections.abc import Callable
from threading import Lock, local
from typing import Any, ParamSpec, TypeVar

from .errors import AccessError, ConflictError, DistilledDataError, HubError, OutputError, UsageError
from .terminal import without_login

LIBRARY = "distilled-data"  # in the User-Agent of our requests
LIMIT = 10.0  # seconds in which the Hub has to send the next bytes
WRITE_LIMIT = 20.0  # seconds in which it has to answer what changes something: a commit takes its time
PATIENCE = 12.0  # seconds without a good answer after which nothing more is asked
PAUSES = (0.5, 1.0, 2.0, 4.0)  # seconds between calls, where the client does not try again itself

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO}
_DISK |= {errno.ENOTDIR, errno.EEXIST}  # a file is where the cache has a folder

P = ParamSpec("P")
T = TypeVar("T")


def call(where: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """`function(*args, **kwargs)`, again while the Hub answers 5xx or 429, or the connection fails.

    `where` is the repository, for messages. Raises `AccessError`, `ConflictError`, `HubError`, `OutputError`.
    """
    start = time.monotonic()
    for pause in PAUSES:
        try:
            return once(where, function, *args, **kwargs)
        except HubError as error:
            if time.monotonic() - start > PATIENCE or not _may_pass(error.__cause__):
                raise
        time.sleep(pause)
    return once(where, function, *args, **kwargs)


def once(where: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """`function(*args, **kwargs)` with the client's errors told as ours."""
    with _watch:
        try:
            return function(*args, **kwargs)
        except (DistilledDataError, TypeError, AssertionError):
            raise
        except Exception as error:
            raise _translated(where, error) from error


def refused() -> bool:
    """Whether the Hub refused what this thread called last, for which the client then took its cache."""
    return _watch.thread.refused


class _Watch:
    """While one of our calls runs, hooks on the client's session keep it within `LIMIT` and `PATIENCE`."""

    def __init__(self):
        self.unanswered: float | None = None  # since when requests of ours have had no good answer
        self.calls = 0  # of ours, that are running now
        self.thread = local()  # refused: whether a request of its last call was
        self._lock = Lock()

    def __enter__(self) -> None:
        from huggingface_hub import get_session

        self.thread.refused = False
        with self._lock:
            self.calls += 1
            self.unanswered = None
        hooks = get_session().event_hooks
        if self.sent not in hooks["request"]:
            get_session().event_hooks = {
                "request": [*hooks["request"], self.sent],
                "response": [*hooks["response"], self.answered],
            }

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self.calls -= 1
            self.unanswered = None

    def sent(self, request: Any) -> None:
        if not self._is_ours(request):
            return
        now = time.monotonic()
        if self.unanswered is None:
            self.unanswered = now
        elif now - self.unanswered > PATIENCE:
            raise HubError(
                f"{request.url.host} gave no answer for {now - self.unanswered:.0f} seconds. Try again later."
            )
        limits = request.extensions.get("timeout", {})
        most = LIMIT if request.method in ("GET", "HEAD") else WRITE_LIMIT
        request.extensions["timeout"] = {
            name: min(limits.get(name) or most, most) for name in ("connect", "read", "write", "pool")
        }

    def answered(self, response: Any) -> None:
        if not self._is_ours(response.request):
            return
        if response.status_code < 500 and response.status_code != 429:
            self.unanswered = None
        self.thread.refused = response.status_code in (401, 403, 404)
        if response.request.method == "HEAD":  # of which the client takes the names of files in its cache
            tags = [response.headers.get(name, "").removeprefix("W/") for name in ("X-Linked-Etag", "ETag")]
            if any(re.search(r"[/\\:]", tag) for tag in tags):
                raise HubError(
                    f"{response.request.url.host} names a file by a path, which may lead out of the cache. "
                    "Do not use that address."
                )
        wait = response.headers.get("Retry-After", "")
        if response.status_code == 429 and wait.isdigit() and int(wait) > PATIENCE:
            # The client would sleep so long.
            raise HubError(
                f"{response.request.url.host} takes no more requests for {wait} seconds. Try again then."
            )

    def _is_ours(self, request: Any) -> bool:
        # Uploads go to signed addresses without the client's User-Agent; nothing else does.
        agent = request.headers.get("User-Agent", "")
        return self.calls > 0 and (LIBRARY in agent or "hf_hub" not in agent)


_watch = _Watch()


def check_arguments(repo_id: str, token: Any, endpoint: str | None) -> None:
    """Raise `UsageError` for what the client would take to the Hub, or into an error, as it is."""
    if isinstance(token, str) and not re.fullmatch(r"[!-~]+", token):
        raise UsageError(
            "the token holds characters that no token has, perhaps the end of a line; expected a word like "
            "hf_..."
        )
    if endpoint is not None and not re.match(r"https?://[^/\s]+", endpoint):
        raise UsageError(
            f"the endpoint {without_login(endpoint)!r} is no address; expected one like https://huggingface.co"
        )
    if not re.fullmatch(r"([\w.-]+/)?[\w.-]+", repo_id):
        raise UsageError(f"{repo_id!r} is not a repository name like org/cifar100-ncfm")


def _cause(error: BaseException) -> BaseException:
    """What the client met, where it says only that a file could not be found, fetched or uploaded."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    wrappers = (LocalEntryNotFoundError, RuntimeError, ValueError)
    while isinstance(error, wrappers) and _status(error) is None and error.__cause__ is not None:
        error = error.__cause__
    return error


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _is_transport(error: BaseException) -> bool:
    # httpx, or httpx2 from huggingface_hub 2 on; its errors of a connection have no response. The client of
    # before closes its session where a connection is refused, and tries again with the closed one.
    httpx = type(error).__module__.startswith("httpx") and _status(error) is None
    return httpx or "client has been closed" in str(error)


def _may_pass(error: BaseException | None) -> bool:
    if error is None:
        return False
    error = _cause(error)
    status = _status(error)
    if status is not None:
        return status == 429 or status >= 500
    # The client raises a bare OSError when a file has not the size that was announced.
    return _is_transport(error) or (isinstance(error, OSError) and "Consistency check failed" in str(error))


def _translated(where: str, error: BaseException) -> DistilledDataError:
    from huggingface_hub import errors

    said, error = error, _cause(error)
    status, response = _status(error), getattr(error, "response", None)
    nobody = AccessError(f"{where}: nobody is logged in. Log in: hf auth login, or HF_TOKEN.")
    match error:
        case DistilledDataError():
            return error
        case errors.GatedRepoError():
            return AccessError(
                f"{where} is gated: its owners ask for consent to their conditions. Accept them on its page, "
                "then log in: hf auth login, or HF_TOKEN."
            )
        case errors.RevisionNotFoundError():
            return AccessError(
                f"{where} has no such revision. It may have been deleted; its page lists branches, tags "
                "and commits; of a commit all 40 digits are expected."
            )
        case errors.RemoteEntryNotFoundError():
            return AccessError(f"{where} lacks a file that a distilled set has: {_sentence(error)}")
        case errors.RepositoryNotFoundError():
            return AccessError(
                f"{where} does not exist, or it is private and this token, if there is one, may not read it. "
                "Check the name; for a private repository log in: hf auth login, or HF_TOKEN."
            )
        case errors.LocalTokenNotFoundError():
            return nobody
        case errors.HFValidationError():
            return UsageError(f"{where} is not a repository name like org/cifar100-ncfm: {_sentence(error)}")
        case errors.OfflineModeIsEnabled() if said is error:  # else it was the reason not to fetch a file
            return AccessError(
                f"HF_HUB_OFFLINE forbids to ask the Hub about {where}. Unset it and run again."
            )
        case errors.OfflineModeIsEnabled() | errors.LocalEntryNotFoundError():
            return AccessError(
                f"{where} is not in the cache, which knows a revision by the name that it was loaded by, and "
                "HF_HUB_OFFLINE or local_files_only forbids to ask the Hub for it."
            )
    if status == 401 and response is not None and "Authorization" not in response.request.headers:
        return nobody
    if status == 401:
        return AccessError(
            f"the Hub does not accept the token that was sent for {where}. It may have expired: "
            "hf auth login, or HF_TOKEN."
        )
    if status == 403:
        return AccessError(f"the token may not do this with {where}: {_sentence(error)}")
    if status in (409, 412):
        return ConflictError(f"somebody else changed {where} at the same time: {_sentence(error)}.")
    if status == 400 and isinstance(said, ValueError):  # of a card, which the client names
        return HubError(
            f"the Hub does not take what was sent for {where}: {_sentence(said)}: {_sentence(error)}."
        )
    if status is not None or _is_transport(error) or isinstance(error, TimeoutError):
        return HubError(f"the Hub failed for {where}: {_sentence(error)}. Try again later.")
    if isinstance(error, OSError) and error.errno in _DISK:
        return OutputError(
            f"{where}: {error.filename or 'the cache'} cannot be read or written: {error.strerror}. Free "
            "some space, or choose another folder with cache_dir or HF_HOME."
        )
    return HubError(f"the Hub's client failed for {where}: {type(error).__name__}: {_sentence(error)}")


def _sentence(error: BaseException) -> str:
    """The message on one line, without addresses, which can be signed, and tokens."""
    text = str(error)
    if status := _status(error):
        text = f"HTTP {status}: {getattr(error, 'server_message', None) or type(error).__name__}"
    text = re.sub(r"Bearer\s+\S+|\bhf_\w+", "[token]", text)
    words = [word for word in text.split() if "://" not in word and "?" not in word]
    return " ".join(words)[:300].rstrip(".") or type(error).__name__
