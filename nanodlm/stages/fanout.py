"""The shards one at a time, for many workers that share nothing but the store.

Each shard is made in an attempt of its own and recorded there as a finished part. The shard stage then runs as ever: it
adopts what is finished, makes what is not, and commits. So nothing rests on what is done here but time.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from nanodlm.config import Config
from nanodlm.data import rows, shard
from nanodlm.data.download import parts
from nanodlm.errors import Emit, silent
from nanodlm.stages.lookup import Lookup, ready
from nanodlm.stages.run import full_disk_in_one_line
from nanodlm.store import Store, hold_lease, new_attempt


@contextmanager
def missing_shards(lookup: Lookup, store: Store, emit: Emit = silent) -> Iterator[list[int]]:
    """Yield the numbers of shards that no attempt has finished, holding the lease of the stage that was looked up."""
    if lookup.artifact or not _missing(store, lookup):
        yield []
        return
    with hold_lease(store, "shard", lookup.fingerprint, emit, lookup.input_fingerprints):
        yield _missing(store, lookup)  # another run may have made some meanwhile


def _missing(store: Store, lookup: Lookup) -> list[int]:
    finished = store.finished_parts("shard", lookup.fingerprint)
    return [i for i in range(len(parts(lookup.inputs["download"]))) if rows.name(i) not in finished]


def build_shard(config: Config, store: Store, index: int, inputs: dict[str, str]) -> bool:
    """Make the shard of the corpus's part of this number, from 0, and return whether that was still to be done."""
    opened = {name: store.open(f"{name}/{fingerprint}") for name, fingerprint in inputs.items()}
    lookup = ready("shard", config, store, inputs=opened)
    if lookup.artifact or rows.name(index) in store.finished_parts("shard", lookup.fingerprint):
        return False
    with full_disk_in_one_line(store), new_attempt(store, "shard", lookup.fingerprint) as attempt:
        shard.build_shard(config, opened, attempt, index)
    return True
