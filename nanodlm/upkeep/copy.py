"""Copying artifacts to another store, each file compared with its sha256."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from nanodlm.errors import Emit, NanodlmError
from nanodlm.stages.run import full_disk_in_one_line
from nanodlm.store import Artifact, Item, Store, hold_lease
from nanodlm.store.attempt import cannot_write
from nanodlm.store.disk import flush_folders
from nanodlm.store.files import show_transfer
from nanodlm.store.manifest import MANIFEST


def copy(source: Store, target: Store, artifacts: Iterable[Item], emit: Emit) -> Iterator[tuple[Artifact, bool]]:
    """Copy artifacts to another store, and yield each there, and whether anything had to be copied.

    Where the target holds other bytes in an artifact's place they stay, and what was made from it is not copied; when
    all else is done, that is an error, but of a report, which may tell the same differently.
    """
    source.emit = target.emit = emit
    try:
        target.require_create_only()
    except OSError as error:
        raise cannot_write(target, error) from error
    others: dict[Item, str] = {}  # what the target holds in place of these, and what would be made from it
    for stage, fingerprint in artifacts:
        artifact = source.open(f"{stage}/{fingerprint}")
        there, sent = target.find(stage, fingerprint), False
        if others.keys() & set(artifact.inputs):
            others[stage, fingerprint] = artifact.name
            continue
        if there is None:
            lease = hold_lease(target, stage, fingerprint, emit, dict(artifact.inputs))
            with lease, full_disk_in_one_line(target):
                if (there := target.find(stage, fingerprint)) is None:  # else another process was quicker
                    there, sent = _send(artifact, target, emit), True
        if there.digest != artifact.digest and stage != "report":
            others[stage, fingerprint] = artifact.name
        else:
            yield (there if sent else there.check()), sent
    if others:
        remedy = f"`nanodlm rm` what is there, or choose another target than {target.uri()}"
        raise NanodlmError(f"other bytes are there for {', '.join(others.values())}, which were not copied: {remedy}")


def _send(artifact: Artifact, target: Store, emit: Emit) -> Artifact:
    """Copy an artifact that the target does not hold; its lease there keeps a collection away meanwhile."""
    stage, fingerprint = artifact.stage, artifact.fingerprint
    copied = Artifact(target, target.path(stage, fingerprint), artifact.manifest)
    lacking = copied.problems(deep=True)
    wanted = [file for file in artifact.files() if file["path"] in lacking]
    if wanted:
        folder = artifact.local(*(file["path"] for file in wanted))
        pairs = [(folder / file["path"], copied.remote(file["path"])) for file in wanted]
        target.put(pairs, show_transfer(emit, "MB copied", wanted))
    copied.check(deep=True)
    if target.is_local:
        flush_folders(Path(copied.folder).rglob("*"), Path(target.root).parent)
    target.write_json(target.path(stage, fingerprint, MANIFEST), artifact.manifest, create_only=True)
    return target.open(f"{stage}/{fingerprint}")
