"""Requests to a storage, made again while they fail for a reason that may pass by itself."""

import contextlib
import errno
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from email.utils import parsedate_to_datetime
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_before_delay, wait_random_exponential

from nanodlm.errors import NanodlmError, Unreachable, UsageError, redact

T = TypeVar("T")
log = logging.getLogger(__name__)
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 15.0  # the longest pauses in seconds: doubled every time, and shortened at random
_longest: ContextVar[float] = ContextVar("longest", default=float("inf"))
PASSING_CODES = {408, 409, 425, 429, 499, 500, 502, 503, 504}  # HTTP's, as gcsfs, aiohttp and httpx give them
PASSING_KINDS = {"ClientError", "NetworkError", "TimeoutException", "RemoteProtocolError"}  # aiohttp's, and httpx's
PASSING_ERRNOS = {errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EBUSY, errno.EAGAIN}


def ask(uri: str, call: Callable[[], T]) -> T:
    """Return the result of a request to `uri`, tried again for `$NANODLM_RETRY_SECONDS` if it may pass."""
    patience = number("NANODLM_RETRY_SECONDS", 300)
    pause = wait_random_exponential(multiplier=FIRST_PAUSE, max=LONGEST_PAUSE)

    def wait(state: RetryCallState) -> float:
        answer = getattr(state.outcome and state.outcome.exception(), "response", None)
        after = getattr(answer, "headers", {}).get("Retry-After", "")
        return max(pause(state), seconds_until(after))

    def warn(state: RetryCallState) -> None:
        if state.attempt_number == 4 and state.outcome:
            log.warning("%s does not answer (%s): trying again", uri, redact(one_line(state.outcome.exception())))

    tries = Retrying(
        retry=retry_if_exception(may_pass),
        wait=wait,
        stop=stop_before_delay(min(patience, _longest.get())),
        before_sleep=warn,
        reraise=True,
    )
    try:
        return tries(call)
    except Exception as error:
        if may_pass(error):
            remedy = "what is finished is kept, run again to continue"
            raise Unreachable(f"{uri} does not answer: {one_line(error)}; {remedy}") from error
        denied = isinstance(error, PermissionError) or code_of(error) in (401, 403)
        words = f"{type(error).__name__} {error}"  # as Google's libraries put it
        if denied or re.match("RefreshError|DefaultCredentialsError|.* Forbidden", words):
            remedy = "mend the credentials in the environment, or the permissions, or choose another --store"
            which = f" {error.filename}" if isinstance(error, OSError) and error.filename else ""
            raise NanodlmError(f"{uri} refuses access: {one_line(error)}{which}; {remedy}") from error
        raise


def seconds_until(after: str) -> float:
    """Return the seconds that a Retry-After asks for, by their number or by a date; of anything else none."""
    with contextlib.suppress(ValueError):
        return float(after) if after.isdecimal() else parsedate_to_datetime(after).timestamp() - time.time()
    return 0.0


def number(name: str, default: float) -> float:
    """Return what a variable of the environment gives as a number above 0."""
    text = os.environ.get(name) or str(default)
    with contextlib.suppress(ValueError):
        if 0 < float(text) < 1e9:  # neither nan nor inf
            return float(text)
    raise UsageError(f"{name} must be a number above 0, not {text!r}")


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
    if (code := code_of(error)) is not None:
        return code in PASSING_CODES
    if isinstance(error, OSError) and error.errno in PASSING_ERRNOS:
        return True
    named = {kind.__name__ for kind in type(error).__mro__}  # what defines them need not be installed
    return isinstance(error, TimeoutError | ConnectionError) or not named.isdisjoint(PASSING_KINDS)


def one_line(error: BaseException | None) -> str:
    """Return the message of an error as one short line."""
    return " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())[:300]


def code_of(error: BaseException) -> int | None:
    """Return the HTTP status that an error of gcsfs, aiohttp or httpx holds."""
    answer = getattr(error, "response", None)
    code = getattr(answer, "status_code", getattr(error, "code", getattr(error, "status", None)))
    return int(code) if isinstance(code, int | str) and str(code).isdecimal() else None
