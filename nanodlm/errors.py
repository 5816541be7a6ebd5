"""What a run tells people: its events, and the errors that they cause or can mend.

Each error is one line that says what is wrong and what to do. Whatever reads settings, files or a store raises
`UsageError` or another `NanodlmError` for what it cannot take; docstrings inside the package do not repeat that.
"""

import contextlib
import errno
import os
import re
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import unquote

Emit = Callable[..., None]  # called as emit(kind, **fields), such as `message` with `text`


def silent(kind: str, **fields: Any) -> None:
    """Tell nobody of an event."""


def counted(number: int, things: str) -> str:
    """Return a number of things in words.

    >>> counted(1, "documents"), counted(2000, "rows")
    ('1 document', '2,000 rows')
    """
    return f"{number:,} {things.removesuffix('s') if number == 1 else things}"


# In names of what holds a secret: environment variables, and what follows `?`, `;` or `#` in an address.
SECRETS = re.compile(
    r"secret|pass(w|phrase|code)|credential|signature|webhook|bearer|jwt|hmac|saml|sess(ion)?_?id"
    r"|token(?!i[sz])|auth(?!or(?!i[sz]))|pwd(?![a-z])|(access|security)_?code"
    r"|(?<!mon)(?<!don)(?<!tur)(?<!hoc)(?<!joc)key(?!word|board|note|stone|frame|point|map)"
    r"|(?<![a-z])(db|user)?pass(?![a-z])|(?<![a-z])(sas|sig|otp)(?![a-z])|^(code|session|sid|cookie|ticket)$",
    re.IGNORECASE,
)
NAMED = re.compile(r"([?&;#])([^=?&;#\s]+)=([^&\s'\"]+)")  # such as `?part=1` in an address


def is_secret(name: str) -> bool:
    """Say if something of this name, which may be written together or quoted, is a secret.

    >>> [name for name in ("api_key", "dbPass", "%6Awt", "author", "keyword", "passage", "encode") if is_secret(name)]
    ['api_key', 'dbPass', '%6Awt']
    """
    return bool(SECRETS.search(re.sub("(?<=[a-z0-9])(?=[A-Z])", "_", unquote(name))))


def redact(text: str) -> str:
    """Return a text without the secrets of the environment, and without those in addresses that it names.

    >>> redact("cannot reach http://me:mine@proxy:80/x?token=abc&part=1#jwt=abc")
    'cannot reach http://***@proxy:80/x?token=***&part=1#jwt=***'
    """
    for name, value in os.environ.items():
        if len(value) >= 8 and is_secret(name) and not value.startswith(("/", "~")):  # a path is no secret
            text = text.replace(value, "***")

    def hide(found: re.Match[str]) -> str:
        mark, name, value = found.groups()  # a value that is none may hold further names, behind a `#`
        return f"{mark}{name}={'***' if is_secret(name) else NAMED.sub(hide, value)}"

    return NAMED.sub(hide, re.sub(r"(?<=://)[^/\s]*@", "***@", text))


class NanodlmError(Exception):
    """Something failed for a reason that the message names; the command line exits with 1."""

    exit_code = 1

    def __init__(self, message: str):
        super().__init__(redact(message))  # for errors of drivers may quote secrets


class UsageError(NanodlmError):
    """A bad flag, preset or setting; the command line exits with 2."""

    exit_code = 2


class SourceGone(NanodlmError):
    """None of a source's files is there; the store may hold what was downloaded from them."""


class Damaged(NanodlmError):
    """An artifact's files are not what its manifest says: missing, truncated, swapped or altered."""

    def __init__(self, problem: str, remedy: str = ""):
        super().__init__(problem + remedy)
        self.problem = problem


class Unreachable(NanodlmError):
    """A storage did not answer for as long as it was asked; the same may succeed later."""


class Stopped(NanodlmError):
    """A signal ended the work after it was saved; running again continues. The command line exits with 75."""

    exit_code = 75


FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextlib.contextmanager
def full_disk_named(where: str) -> Iterator[None]:
    """Turn whatever the block raises when a disk is full into one line that names the place."""
    try:
        yield
    except Exception as error:  # libraries that write by themselves say it in words of their own
        codes = {getattr(error, "errno", None), *(code for code in FULL if os.strerror(code) in str(error))}
        if isinstance(error, NanodlmError) or not (full := codes & FULL):
            raise
        said = f"nothing more fits into {where}: {os.strerror(full.pop())}"
        raise NanodlmError(f"{said}; make room and run again, what is finished is kept") from error
