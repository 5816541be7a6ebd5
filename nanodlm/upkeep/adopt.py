"""Taking files at hand for what a configuration would download."""

from nanodlm.config import Config
from nanodlm.data.download import download
from nanodlm.errors import Emit, silent
from nanodlm.stages.lookup import ready
from nanodlm.stages.run import build
from nanodlm.store import Artifact, Store


def adopt(config: Config, store: Store, files: list[str], emit: Emit = silent) -> tuple[Artifact, bool]:
    """Return the download of a configuration, made of files at hand, and whether it was made now.

    The same parts are written as the download stage would write, so the same files give the same artifact. That they
    are the source's files, at its pinned commit, is for the caller to know; the manifest says that they were adopted.
    """
    lookup = ready("download", config, store)
    if lookup.artifact:
        return lookup.artifact, False
    take = lambda *stage: {**download(*stage, adopted=files), "adopted": True}  # noqa: E731
    return build(lookup, config, store, False, emit, take)
