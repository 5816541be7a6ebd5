"""The addresses that people type and settings hold: of stores, artifacts and checkpoints. They carry no secrets."""

import re
from typing import Annotated, NamedTuple

from pydantic import AfterValidator, BeforeValidator, Field

from nanodlm.errors import UsageError, is_secret


def refuse_secrets(url: str) -> str:
    """Return a URL that holds no secrets; they belong into the environment, for URLs are written into records."""
    for piece in str(url).split("::"):  # as in `zip://*.txt::s3://bucket/texts.zip`
        scheme, _, rest = piece.partition("://")
        host = re.split("[/?#]", rest)[0]
        named = [name for name in re.findall("[?&;#]([^=?&;#]+)=[^&;#]", rest) if is_secret(name)]
        port = host.rpartition(":")[2]
        user = "@" in host or (":" in host and not port.isdecimal() and "@" in rest)  # a password may hold a slash
        if user or named:
            what = f"{scheme}://... holds {'a user name or password' if user else ' and '.join(named)}"
            remedy = "credentials come from the environment only (AWS_ACCESS_KEY_ID and the like)"
            raise UsageError(f"the address {what}: {remedy}; take them out of the address")
    return url


Url = Annotated[str, AfterValidator(refuse_secrets)]
# The pattern lets a server refuse credentials in a form, before it keeps them. Here they are refused before that, by an
# error which pydantic passes on as it is: of its own, a flow's log would quote them.
StoreUrl = Annotated[str, Field(min_length=1, pattern=r"^[^@?*\[\]]*$"), BeforeValidator(refuse_secrets)]


def single_slashes(address: str) -> str:
    """Return the one spelling of an address: repeated slashes mean what one does, but for those of its `://`."""
    scheme, mark, path = address.rpartition("://")
    return scheme + mark + re.sub("/+", "/", path)


class Address(NamedTuple):
    """The parts of an address; those that it does not name are empty, as all but `folder` are of `s3://bucket/prefix`."""

    folder: str  # the address itself, without a checkpoint, a manifest's name or slashes at its end
    store: str
    stage: str
    fingerprint: str
    checkpoint: int | None  # its number of updates


def parse_address(address: str) -> Address:
    """Split the address of an artifact, of its manifest, or of a checkpoint; nothing is looked up.

    A plain path of two words, such as `data/store`, may be a store or `stage/fingerprint`: whoever asks knows which.

    >>> parse_address("s3://bucket/runs/train/3f2a/manifest.json")[1:]
    ('s3://bucket/runs', 'train', '3f2a', None)
    """
    folder = single_slashes(refuse_secrets(address)).rstrip("/").removesuffix("/manifest.json")
    named = re.fullmatch(r"(?:(.*)/)?step_([0-9]+)", folder)
    if named:
        folder = re.sub("(^|/)checkpoints$", "", named[1] or ".") or "."
    parts = re.sub("/attempts/[^/]+$", "", folder).rsplit("/", 2)
    if len(parts) < 2 or re.fullmatch(r"\w+:/?", parts[0]):  # a bucket or a folder of it is a store itself
        parts = ["", "", ""]
    store = (parts[0] or "/") if len(parts) == 3 and parts[2] else ""
    return Address(folder, store, parts[-2], parts[-1], int(named[2]) if named else None)
