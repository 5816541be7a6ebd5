"""Copying artifacts to another store, each file compared with its sha256."""

from collections.abc import Iterator

from nanodlm.errors import Emit, NanodlmError
from nanodlm.stages.run import full_disk_in_one_line
from nanodlm.store import Artifact, Item, Json, Store, hold_lease, read_part
from nanodlm.store.files import show_transfer
from nanodlm.store.manifest import MANIFEST


def copy(source: Store, target: Store, artifacts: list[Item], emit: Emit) -> Iterator[tuple[Artifact, bool]]:
    """Copy artifacts to another store, and yield each there, and whether anything had to be copied.

    Files are compared with their sha256 when they are read, and again when they are there. The manifest comes last.
    """
    source.emit = target.emit = emit
    target.require_create_only()
    for stage, fingerprint in artifacts:
        artifact = source.open(f"{stage}/{fingerprint}")
        there, sent = _find_same(artifact, target), False
        if there is None:
            lease = hold_lease(target, stage, fingerprint, emit, dict(artifact.inputs))
            with lease, full_disk_in_one_line(target):
                there = _find_same(artifact, target)  # another process may have been quicker
                if there is None:
                    there, sent = _send(artifact, target, emit), True
        yield (there if sent else there.check()), sent


def _find_same(artifact: Artifact, target: Store) -> Artifact | None:
    """Return what the target holds in an artifact's place, which must be the same."""
    there = target.find(artifact.stage, artifact.fingerprint)
    if there is not None and there.digest != artifact.digest:
        raise NanodlmError(f"{there.uri} holds another artifact than {artifact.uri}: remove one of them")
    return there


def _send(artifact: Artifact, target: Store, emit: Emit) -> Artifact:
    """Copy an artifact that the target does not hold; its lease there keeps a collection away meanwhile."""
    stage, fingerprint = artifact.stage, artifact.fingerprint
    copied = Artifact(target, stage, fingerprint, artifact.manifest)
    sizes = target.sizes(copied.folder)

    def is_there(file: Json) -> bool:
        same_size = sizes.get(file["path"]) == file["size"]
        return same_size and target.sha256(copied.remote(file["path"])) == file["sha256"]

    wanted = [file for file in artifact.files() if not is_there(file)]
    if wanted:
        folder = artifact.local(*(file["path"] for file in wanted))
        pairs = [(folder / file["path"], copied.remote(file["path"])) for file in wanted]
        target.put(pairs, show_transfer(emit, "MB copied", wanted))
    copied.check(deep=True)
    for path in artifact.store.sizes(f"{artifact.folder}/parts"):  # a repair keeps them, a training starts from them
        of = {"stage": stage, "fingerprint": fingerprint, "part": path.removesuffix(".json")}
        if part := read_part(artifact.store, f"{artifact.folder}/parts/{path}", **of):
            target.write_json(f"{copied.folder}/parts/{path}", part)
    target.write_json(target.path(stage, fingerprint, MANIFEST), artifact.manifest, create_only=True)
    return _find_same(artifact, target) or copied
