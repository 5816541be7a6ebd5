"""Requests to a storage: which failures may pass by themselves, and for how long they are tried again."""

import contextlib
import errno
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_before_delay, wait_random_exponential

from nanodlm.errors import NanodlmError, Unreachable, UsageError

T = TypeVar("T")
log = logging.getLogger(__name__)
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 15.0  # the longest pauses in seconds: doubled every time, and shortened at random
_longest: ContextVar[float] = ContextVar("longest", default=float("inf"))
# What the caller of a request knows best, whatever caused it.
SETTLED = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, NanodlmError)
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
PASSING_ERRNOS = {errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EBUSY, errno.EAGAIN}


def ask(uri: str, call: Callable[[], T]) -> T:
    """Return the result of a request to `uri`; what may pass is tried again, and in the end raised as `Unreachable`."""

    def warn(state: RetryCallState) -> None:
        if state.attempt_number == 4 and state.outcome:
            log.warning("%s does not answer (%s): trying again", uri, one_line(state.outcome.exception()))

    text = os.environ.get("NANODLM_RETRY_SECONDS") or "300"
    try:
        patience = float(text)
    except ValueError:
        raise UsageError(f"NANODLM_RETRY_SECONDS must be a number of seconds, not {text!r}") from None
    tries = Retrying(
        retry=retry_if_exception(may_pass),
        wait=wait_random_exponential(multiplier=FIRST_PAUSE, max=LONGEST_PAUSE),
        stop=stop_before_delay(min(patience, _longest.get())),
        before_sleep=warn,
        reraise=True,
    )
    try:
        return tries(call)
    except Exception as error:
        if _refused(error) and not isinstance(error, SETTLED):
            remedy = "mend the credentials in the environment, or the permissions, or choose another --store"
            raise NanodlmError(f"{uri} refuses access: {one_line(error)}; {remedy}") from error
        if may_pass(error):
            remedy = "what is finished is kept, run again to continue"
            raise Unreachable(f"{uri} does not answer: {one_line(error)}; {remedy}") from error
        raise


@contextlib.contextmanager
def retrying_for(seconds: float) -> Iterator[None]:
    """Try requests again for no longer than this, whatever is set: what is done here may as well fail."""
    token = _longest.set(seconds)
    try:
        yield
    finally:
        _longest.reset(token)


def may_pass(error: BaseException) -> bool:
    """Say if the same request may succeed later."""
    if isinstance(error, SETTLED) or _refused(error):
        return False
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
    """Say if the same request would be refused again for lack of rights."""
    if isinstance(error, PermissionError) or type(error).__name__ in ("NoCredentialsError", "RefreshError"):
        return True
    return any(_code(cause) in (401, 403) for cause in _causes(error)) or str(error).startswith("Forbidden")


def says_it_exists(error: BaseException) -> bool:
    """Say if an error means that a file to be created was there already; SeaweedFS says it in the error's cause."""
    return any(_code(cause) == 412 or "PreconditionFailed" in f"{cause}" for cause in _causes(error))


def one_line(error: BaseException | None) -> str:
    """Return the message of an error as one short line."""
    return " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())[:300]


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    for _ in range(8):
        if error is None:
            return
        yield error
        error = error.__cause__ or error.__context__


def _code(error: BaseException) -> int | None:
    """Return the HTTP status behind an error, where its driver says it."""
    response = getattr(error, "response", None)
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, dict) else None
    for value in (status, getattr(error, "code", None), getattr(error, "status", None)):
        if isinstance(value, int | str) and str(value).isdecimal():
            return int(value)
    return None
