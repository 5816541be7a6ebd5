"""Which failures of a storage may pass by themselves, and how long they are tried again."""

import contextlib
import errno
import logging
import os
import re
from collections.abc import Iterator
from contextvars import ContextVar

from nanodlm.errors import UsageError

log = logging.getLogger(__name__)
RETRY_SECONDS = 300.0  # for how long what may pass by itself is tried again
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 15.0  # seconds between tries; each is twice the last, and shortened at random
_most: ContextVar[float] = ContextVar("most", default=float("inf"))  # see `briefly`
PASSING_CODES = {408, 409, 425, 429, 499, 500, 502, 503, 504}
# Numbers stand alone: fingerprints in paths hold any digits.
PASSING_WORDS = re.compile(r"SlowDown|ServiceUnavailable|InternalError|RequestTimeout|Throttling|\b50[234]\b")
# Names, not classes: the drivers that define them need not be installed.
PASSING_CLASSES = {
    "ClientError",  # aiohttp's; botocore's of that name is told apart by its code below
    "ClientConnectionError", "ClientOSError", "ClientPayloadError", "ConnectionClosedError", "ConnectTimeoutError",
    "EndpointConnectionError", "HTTPClientError", "IncompleteRead", "IncompleteReadError", "ProxyError",
    "ReadTimeoutError", "ResponseParserError", "ResponseStreamingError", "ServerDisconnectedError", "ChecksumError",
    "FSTimeoutError", "ServerTimeoutError",
}  # fmt: skip
PASSING_ERRNOS = {
    errno.ECONNREFUSED, errno.ECONNRESET, errno.EPIPE, errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH,
    errno.EBUSY, errno.EAGAIN, getattr(errno, "EREMOTEIO", errno.EAGAIN),  # macOS has no such error
}  # fmt: skip


@contextlib.contextmanager
def retrying_for(seconds: float) -> Iterator[None]:
    """Try again for no longer than this, whatever is set: what is done here may as well fail."""
    token = _most.set(seconds)
    try:
        yield
    finally:
        _most.reset(token)


def _patience() -> float:
    """Seconds for which what may pass is tried again."""
    text = os.environ.get("NANODLM_RETRY_SECONDS") or str(RETRY_SECONDS)
    try:
        return min(float(text), _most.get())
    except ValueError:
        raise UsageError(f"NANODLM_RETRY_SECONDS must be a number of seconds, not {text!r}") from None


def _causes(error: BaseException) -> list[BaseException]:
    found: list[BaseException] = []
    while error is not None and error not in found and len(found) < 8:
        found.append(error)
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return found


def _code(error: BaseException) -> int | None:
    """The HTTP status behind an error, where its driver tells."""
    response = getattr(error, "response", None)
    told = response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, dict) else None
    for value in (told, getattr(error, "code", None), getattr(error, "status", None)):
        if isinstance(value, int | str) and str(value).isdecimal():
            return int(value)
    return None


def _may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed later."""
    for cause in _causes(error):
        code = _code(cause)
        if code is not None:
            return code in PASSING_CODES
        if isinstance(cause, TimeoutError | ConnectionError) or type(cause).__name__ in PASSING_CLASSES:
            return True
        if isinstance(cause, OSError) and cause.errno in PASSING_ERRNOS:
            return True
    return PASSING_WORDS.search(str(error)) is not None


def _refused(error: BaseException) -> bool:
    """Whether asking again would be refused again for lack of rights."""
    if isinstance(error, PermissionError) or type(error).__name__ in ("NoCredentialsError", "RefreshError"):
        return True
    return any(_code(cause) in (401, 403) for cause in _causes(error)) or str(error).startswith("Forbidden")


def _exists(error: BaseException) -> bool:
    """Whether an error says that a file to be created was there already; SeaweedFS says it in its cause."""
    return any(_code(cause) == 412 or "PreconditionFailed" in f"{cause}" for cause in _causes(error))


def _text(error: BaseException) -> str:
    """One short line of an error."""
    return " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())[:200]
