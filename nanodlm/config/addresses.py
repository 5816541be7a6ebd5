"""The addresses that settings hold, which must carry no secrets."""

import re
from typing import Annotated
from urllib.parse import parse_qsl

from pydantic import AfterValidator, Field

from nanodlm.errors import SECRETS, UsageError


def refuse_secrets(url: str) -> str:
    """Return a URL that holds no secrets; they belong into the environment, for URLs are written into records.

    Raises:
        UsageError: When it holds a user's name and password, a token or a signature; they are not repeated.

    >>> refuse_secrets("s3://bucket/prefix")
    's3://bucket/prefix'
    """
    for piece in url.split("::"):  # as in `zip://*.txt::s3://bucket/texts.zip`
        scheme, has_host, rest = piece.partition("://")
        if not has_host:
            continue
        host = re.split("[/?#]", rest)[0]
        named = [name for name, _ in parse_qsl(rest.partition("?")[2]) if SECRETS.search(name)]
        port = host.rpartition(":")[2]
        user = "@" in host or (":" in host and not port.isdecimal() and "@" in rest)  # a password may hold a slash
        if user or named:
            what = "a user name or password" if user else " and ".join(named)
            raise UsageError(
                f"the address {scheme}://... holds {what}: credentials come from the environment only "
                "(AWS_ACCESS_KEY_ID and the like); take them out of the address"
            )
    return url


# The pattern lets a server refuse credentials in a form, before they are kept with a run's parameters.
StoreUrl = Annotated[str, Field(min_length=1, pattern=r"^[^@?*\[\]]*$"), AfterValidator(refuse_secrets)]
