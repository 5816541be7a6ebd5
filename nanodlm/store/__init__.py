"""Content-verified artifacts on any fsspec URL: local disk, `s3://`, `gs://`.

    {store}/{stage}/{fingerprint}/
      manifest.json        the only commit point: written last, created once
      attempts/{id}/...    the files of one attempt; another attempt never writes there
      attempts/{id}/parts/{name}.json   a finished part (a shard, a checkpoint): its files and their sha256
      lease.json           tells a second run to wait, and others how far the first is; nothing else rests on it

An artifact exists when its manifest does. A killed attempt leaves finished parts, which the next attempt
adopts after checking that they are whole. Readers call `Artifact.local()`, which checks every file first.

Throughout this room, `emit` is called as `emit(kind, **fields)`, here with `"progress"` and `done`, `total` and `unit`;
what is not as its manifest says raises `Damaged`, no such file `FileNotFoundError`, what users can mend `NanodlmError`.
"""

from nanodlm.store.attempt import Attempt, new_attempt
from nanodlm.store.lease import hold_lease, lease_events
from nanodlm.store.manifest import FLOW_RUN, SCHEMA, Item, Json, fingerprint_of, sealed
from nanodlm.store.part import Part
from nanodlm.store.store import Artifact, Store
