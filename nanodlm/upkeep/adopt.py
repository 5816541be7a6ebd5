"""Taking files at hand for what a configuration would download."""

from nanodlm.config import Config
from nanodlm.data.download import download
from nanodlm.stages.lookup import ready
from nanodlm.stages.progress import Emit
from nanodlm.stages.run import full_disk_in_one_line
from nanodlm.store import Artifact, Store, code_record, hold_lease, new_attempt


def adopt(config: Config, store: Store, files: list[str], emit: Emit = lambda *_, **__: None) -> tuple[Artifact, bool]:
    """Return the download of a configuration, made of files at hand, and whether it was made now.

    The same parts are written as the download stage would write, so the same files give the same artifact. That they
    are the source's files, at its pinned commit, is for the caller to know; the manifest says that they were adopted.
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
        code = code_record(lookup.stage.module)
        metrics = {**download(config, {}, attempt, emit, adopted=files), "adopted": True}
        settings = config.model_dump(mode="json")
        return attempt.commit(identity=lookup.identity, config=settings, code=code, metrics=metrics), True
