"""Finding a checkpoint by its address, without reading it."""

from nanodlm.config import parse_address
from nanodlm.errors import UsageError
from nanodlm.store import Part, Store, read_part
from nanodlm.store.manifest import MANIFEST, NAME


def find_checkpoint(address: str) -> Part:
    """Return the checkpoint at an address; its files are not read yet.

    Args:
        address: `BASE/step_100` or `BASE/checkpoints/step_100`, the number with or without leading zeros, where BASE is
            a run's folder (that of an attempt, finished or not) or a train artifact's URI.

    Raises:
        UsageError: When no finished checkpoint is there.
    """
    parsed = parse_address(address)
    if parsed.checkpoint is None:
        raise UsageError(f"{address!r} names no checkpoint: it must end in step_ and a number")
    store = Store(parsed.folder)
    manifest = store.read_json(store.path(MANIFEST))
    if isinstance(manifest, dict) and NAME.fullmatch(str(manifest.get("attempt", ""))):
        store = Store(store.uri("attempts", str(manifest["attempt"])))
    name = f"checkpoints/step_{parsed.checkpoint:06d}"
    part = read_part(store, store.path("parts", f"{name}.json"), stage="train", part=name)
    if part is None:
        finished = sorted(path.removesuffix(".json") for path in store.sizes(store.path("parts", "checkpoints")))
        have = f"there are {', '.join(finished)}" if finished else "there are none"
        raise UsageError(f"no finished checkpoint step_{parsed.checkpoint} in {store.uri()}: {have}")
    return Part(store, name, part["files"], part["info"])
