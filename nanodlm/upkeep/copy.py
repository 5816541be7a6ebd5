"""Copying artifacts to another store, each file compared with its sha256."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from nanodlm.errors import Damaged, Emit, NanodlmError
from nanodlm.stages.run import full_disk_in_one_line
from nanodlm.store import Artifact, Item, Store, hold_lease
from nanodlm.store.disk import flush_folders
from nanodlm.store.files import show_transfer
from nanodlm.store.manifest import MANIFEST


def copy(source: Store, target: Store, artifacts: Iterable[Item], emit: Emit) -> Iterator[tuple[Artifact, bool]]:
    """Copy artifacts to another store, and yield each there, and whether anything had to be copied.

    Neither what is damaged is copied, nor what the target holds other bytes in place of, nor what was made from those:
    when all else is done, that is an error. But a report may tell the same differently.
    """
    source.emit = target.emit = emit
    target.require_create_only()
    other = f"other bytes are there: `nanodlm rm` those, or choose another target than {target.uri()}"
    left: dict[Item, str] = {}  # what was not copied, and why
    for item in artifacts:
        try:
            artifact = source.open("/".join(item))
            if bad := left.keys() & set(artifact.inputs):
                raise Damaged(left[bad.pop()])
            there, sent = _copy(artifact, target, emit)
            if there.digest != artifact.digest and artifact.stage != "report":
                raise Damaged(other)
        except Damaged as error:
            left[item] = str(error)
        else:
            yield there, sent
    if left:
        names: dict[str, list[str]] = {}
        for (stage, fingerprint), why in left.items():
            names.setdefault(why, []).append(f"{stage}/{fingerprint[:12]}")
        raise NanodlmError("; ".join(f"{', '.join(those)} not copied: {why}" for why, those in names.items()))


def _copy(artifact: Artifact, target: Store, emit: Emit) -> tuple[Artifact, bool]:
    """Return what the target holds in an artifact's place, and whether it had to be copied there."""
    item = artifact.stage, artifact.fingerprint
    if (there := target.find(*item)) is None:
        with hold_lease(target, *item, emit, dict(artifact.inputs)), full_disk_in_one_line(target):
            if (there := target.find(*item)) is None:  # else another process was quicker
                return _send(artifact, target, emit), True
    return there.check(), False


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
