"""Taking files at hand for what a configuration would download."""

from nanodlm.config import Config
from nanodlm.data.download import download
from nanodlm.stages.lookup import ready
from nanodlm.stages.progress import Emit
from nanodlm.stages.run import full_disk_in_one_line
from nanodlm.store import Artifact, Store, hold_lease, new_attempt


def adopt(config: Config, store: Store, files: list[str], emit: Emit = lambda *_, **__: None) -> tuple[Artifact, bool]:
    """Take files that are at hand for the download of a configuration, instead of fetching its source.

    The same parts are written as the download stage would write, so the same files give the same artifact. That they
    are the source's files, at its pinned commit, is for the caller to know; the manifest says that they were adopted.

    Args:
        config: Its `data.source` names where the documents come from.
        store: Where the artifact goes.
        files: Paths or globs of the same files.
        emit: Called as `emit(kind, **fields)` with progress.

    Returns:
        The artifact, and whether it was built now.

    Raises:
        NanodlmError: When a file cannot be read as `data` says.
    """
    lookup = ready("download", config, store)
    if lookup.artifact:
        return lookup.artifact, False
    with (
        hold_lease(store, "download", lookup.fingerprint),
        full_disk_in_one_line(store),
        new_attempt(store, "download", lookup.fingerprint) as attempt,
    ):
        if there := store.find("download", lookup.fingerprint):  # another process may have been quicker
            return there, False
        metrics = {**download(config, {}, attempt, emit, adopted=files), "adopted": True}
        settings = config.model_dump(mode="json")
        return attempt.commit(identity=lookup.identity, config=settings, metrics=metrics), True
