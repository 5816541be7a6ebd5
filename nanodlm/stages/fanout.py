"""The shards one at a time, for many workers that share nothing but the store.

Each shard is made in an attempt of its own and recorded there as a finished part. The shard stage then runs as ever: it
adopts what is finished, makes what is not, and commits. So nothing rests on what is done here but time.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from nanodlm.config import Config
from nanodlm.data import rows, shard
from nanodlm.data.download import parts
from nanodlm.stages.lookup import ready
from nanodlm.stages.run import full_disk_in_one_line
from nanodlm.stages.table import Emit
from nanodlm.store import Artifact, Store, finished_parts, hold_lease, new_attempt


@dataclass(frozen=True)
class Work:
    """What is to be done.

    Attributes:
        inputs: Fingerprints, by stage, of what the shards are made from.
        missing: Shards that no attempt has finished, from 0.
    """

    inputs: dict[str, str]
    missing: list[int]


@contextmanager
def work(
    config: Config,
    store: Store,
    inputs: dict[str, Artifact] | None = None,
    emit: Emit = lambda *_, **__: None,
) -> Iterator[Work]:
    """Say which shards are missing, and hold the shard stage's lease while there are some.

    A second run waits meanwhile, and a collection leaves inputs and finished shards alone.

    Args:
        config: The run's configuration.
        store: Where artifacts lie.
        inputs: What the shards are made from, where it is known; else it is looked up, from the source on.
        emit: Called as `emit("message", text)` while another run is waited for.

    Raises:
        NanodlmError: When an input has not been built.
    """
    lookup, inputs = ready("shard", config, store, inputs=inputs)
    reads = {name: artifact.fingerprint for name, artifact in inputs.items()}
    if lookup.artifact or not _missing(store, inputs, lookup.fingerprint):
        yield Work(reads, [])
        return
    assert lookup.fingerprint is not None
    with hold_lease(store, "shard", lookup.fingerprint, lambda text: emit("message", text=text), reads):
        built = store.find("shard", lookup.fingerprint)  # another run may have been quicker
        yield Work(reads, [] if built else _missing(store, inputs, lookup.fingerprint))


def _missing(store: Store, inputs: dict[str, Artifact], fingerprint: str | None) -> list[int]:
    assert fingerprint is not None
    finished = finished_parts(store, "shard", fingerprint)
    return [i for i in range(len(parts(inputs["download"]))) if rows.name(i) not in finished]


def build_shard(config: Config, store: Store, index: int, inputs: dict[str, str] | None = None) -> bool:
    """Make one shard, unless an earlier attempt has finished it or the whole stage is done.

    Any number of processes may do so at once, for one shard or for several: each has an attempt of its own.

    Args:
        config: The run's configuration.
        store: Where artifacts lie.
        index: Which shard, from 0: that of the corpus's part of this number.
        inputs: Fingerprints, by stage, of what it is made from; else they are looked up, from the source on, which must
            then be at hand.

    Returns:
        Whether it was made now.

    Raises:
        NanodlmError: When an input has not been built, or is not there any more.
        Damaged: When a file that it is made from is not what it was.
    """
    found = {name: store.open(f"{name}/{fingerprint}") for name, fingerprint in (inputs or {}).items()}
    lookup, opened = ready("shard", config, store, inputs=found or None)
    assert lookup.fingerprint is not None
    if lookup.artifact or rows.name(index) in finished_parts(store, "shard", lookup.fingerprint):
        return False
    with full_disk_in_one_line(store), new_attempt(store, "shard", lookup.fingerprint) as attempt:
        shard.build_shard(config, opened, attempt, index)
    return True
