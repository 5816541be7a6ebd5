"""Finding a checkpoint by its address, without reading it."""

import re

from nanodlm.config import refuse_secrets
from nanodlm.errors import UsageError
from nanodlm.store import Part, Store, read_part
from nanodlm.store.manifest import NAME


def find_checkpoint(address: str) -> Part:
    """The checkpoint at an address; its files are not read yet.

    Args:
        address: `BASE/step_100` or `BASE/checkpoints/step_100`, the number with or without leading zeros, where BASE is
            a run's folder (that of an attempt, finished or not) or a train artifact's URI.

    Raises:
        UsageError: When no finished checkpoint is there.
    """
    base, _, step = refuse_secrets(address).rstrip("/").rpartition("/")
    if not re.fullmatch(r"step_[0-9]+", step):
        raise UsageError(f"{address!r} names no checkpoint: it must end in step_ and a number")
    store = Store(base or ".")
    if store.root.endswith("/checkpoints"):
        store = Store(store.uri().removesuffix("/checkpoints"))
    manifest = store.read_json(store.path("manifest.json"))
    if isinstance(manifest, dict) and NAME.fullmatch(str(manifest.get("attempt", ""))):
        store = Store(store.uri("attempts", str(manifest["attempt"])))
    name = f"checkpoints/step_{int(step.removeprefix('step_')):06d}"
    part = read_part(store, store.path("parts", f"{name}.json"), stage="train", part=name)
    if part is None:
        finished = sorted(path.removesuffix(".json") for path in store.sizes(store.path("parts", "checkpoints")))
        have = f"there are {', '.join(finished)}" if finished else "there are none"
        raise UsageError(f"no finished checkpoint {step} in {store.uri()}: {have}")
    return Part(store, name, part["files"], part["info"])
