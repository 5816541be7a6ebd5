"""Collecting what nobody needs: abandoned attempts and uploads, and, when asked, old results."""

import contextlib
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import inf
from typing import Any

from nanodlm.errors import Damaged, NanodlmError, UsageError
from nanodlm.stages.table import STAGES
from nanodlm.store import Artifact, Item, Json, Store
from nanodlm.store.disk import Found
from nanodlm.store.lease import LEASE_SECONDS, read_lease
from nanodlm.store.manifest import utc_now
from nanodlm.upkeep.ages import made_at

log = logging.getLogger(__name__)
GRACE_SECONDS = 3600.0  # nothing that changed so lately is collected
LEASE_GRACE = 4 * LEASE_SECONDS  # a lease that was not renewed for so long is a dead run's, whatever the grace


@dataclass
class Contents:
    """What a listing shows below one stage's fingerprint; Unix times are 0 for what is not there."""

    manifest: float = 0.0
    retired: float = 0.0
    lease: float = 0.0
    attempts: dict[str, list[Found]] = field(default_factory=lambda: defaultdict(list))
    parts: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))  # finished, of each attempt

    def changed(self, attempt: str) -> float:
        """Return when a file of an attempt last changed."""
        return max(found.changed for found in self.attempts[attempt])


def collect(
    store: Store,
    *,
    keep_last: int | None = None,
    older_than: float | None = None,
    grace: float = GRACE_SECONDS,
    dry_run: bool = False,
) -> Iterator[Json]:
    """Remove abandoned attempts and uploads, and, when asked, old results; yield `kind`, `uri` and `bytes` of each.

    Results are artifacts that no other was made from. The newest `keep_last` stay, and those that are younger than
    `older_than` seconds (all, when both are None), with all that they were made from. A result that is given up loses
    its manifest now, and its files at the first collection `grace` seconds later, so that whoever is reading it can
    finish, and a run that needs it again adopts its parts. What has changed so lately is left alone.
    """
    if keep_last is not None and keep_last < 0:
        raise UsageError(f"--keep-last counts results to keep, from 0, not {keep_last}")
    listed, now = _contents(store), time.time()
    if listed:
        with contextlib.suppress(NanodlmError) if dry_run else contextlib.nullcontext():
            now = store.now()  # ages are by the storage's own clock, whatever this machine's says
    artifacts, unreadable, torn = _artifacts(store)
    building = {item for item, contents in listed.items() if contents.lease > now - max(grace, LEASE_GRACE)}
    leases = [read_lease(store, store.path(*item, "lease.json")) or {} for item in building]
    read = {item for lease in leases for item in lease.get("inputs", {}).items()}
    young = {i for i, a in artifacts.items() if now - max(made_at(a), listed[i].manifest) < grace}  # or copied here
    kept, wished = set(artifacts), keep_last is not None or older_than is not None
    if wished and torn:  # what it was made from is not known
        log.warning("no result is given up while one cannot be read: %s", torn)
    elif wished:
        kept = _needed(artifacts, young | read, keep_last or 0, inf if older_than is None else now - older_than)
    for item in sorted(set(artifacts) - kept):
        if not dry_run:
            store.write_json(store.path(*item, "retired.json"), {"retired": utc_now()})
            store.retire(item)
        listed[item].retired = now
        yield {"kind": "artifact", "uri": store.uri(*item), "bytes": sum(f["size"] for f in artifacts[item].files())}
    oldest = -inf if older_than is None else now - older_than
    for item in sorted(listed.keys() - unreadable - building - read):
        named = artifacts[item].manifest["attempt"] if item in kept else ""
        for attempt in _abandoned(item[0], listed[item], named, now - grace, oldest):
            if not dry_run:
                store.remove_folder(store.path(*item, "attempts", attempt))
            size = sum(found.size for found in listed[item].attempts[attempt])
            yield {"kind": "attempt", "uri": store.uri(*item, "attempts", attempt), "bytes": size}
    for path, abort in _uploads(store, building, now - grace):
        if not dry_run:
            abort()
        yield {"kind": "upload", "uri": store.fs.unstrip_protocol(path), "bytes": 0}


def _artifacts(store: Store) -> tuple[dict[Item, Artifact], set[Item], str]:
    """Return the artifacts of a store, those whose manifest cannot be read, and what is wrong with one of these."""
    found, torn = {}, ""
    for item in store:
        found[item] = None  # its manifest may name any attempt, or is about to be made again
        try:
            found[item] = store.find(*item)
        except Damaged as error:
            torn = str(error)
    artifacts = {item: artifact for item, artifact in found.items() if artifact}
    return artifacts, found.keys() - artifacts.keys(), torn


def _contents(store: Store) -> dict[Item, Contents]:
    listed: dict[Item, Contents] = defaultdict(Contents)
    for path, found in store.listed().items():
        match path.split("/"):
            case [stage, fingerprint, "manifest.json" | "retired.json" | "lease.json" as name]:
                setattr(listed[stage, fingerprint], name.removesuffix(".json"), found.changed)
            case [stage, fingerprint, "attempts", attempt, first, *rest]:
                listed[stage, fingerprint].attempts[attempt].append(found)
                if first == "parts":
                    listed[stage, fingerprint].parts[attempt].add("/".join(rest))
    return listed


def _needed(artifacts: dict[Item, Artifact], needed: set[Item], keep_last: int, oldest: float) -> set[Item]:
    """Return the artifacts that stay: the last results, those that are younger, and all that these were made from."""
    used = {source for artifact in artifacts.values() for source in artifact.inputs}
    results = sorted(artifacts.keys() - used, key=lambda item: made_at(artifacts[item]), reverse=True)
    todo = [*needed, *results[:keep_last], *(item for item in results if made_at(artifacts[item]) >= oldest)]
    kept: set[Item] = set()
    while todo:
        item = todo.pop()
        if item in artifacts and item not in kept:
            kept.add(item)
            todo += artifacts[item].inputs
    return kept


def _abandoned(stage: str, contents: Contents, named: str, since: float, oldest: float) -> Iterator[str]:
    """Yield the attempts that nobody needs.

    Kept are the one that is `named`, or where none is those from which a run would continue, unless the artifact was
    retired since, or they are older than is asked for. An attempt that another took the place of may have readers
    still: its age is that of the manifest that is there now.
    """
    later = {n: parts for n, parts in contents.parts.items() if contents.changed(n) > contents.retired}
    resumed = set() if named else _resumed(stage, later)
    for attempt in contents.attempts:
        changed = max(contents.changed(attempt), contents.manifest, contents.retired)
        continued = attempt in resumed and changed >= oldest
        if attempt != named and changed < since and not continued:
            yield attempt


def _resumed(stage: str, finished: dict[str, set[str]]) -> set[str]:
    """Return the attempts from which a run would continue, of those that have finished parts.

    The newest, and the one that has most parts, where the newest was ended before it had adopted them all. Parts that
    go into the result, unlike checkpoints, are all needed: each is kept once, for every worker has its own attempt.
    """
    if not finished:
        return set()
    newest, fullest = max(finished), max(finished, key=lambda name: (len(finished[name]), name))
    needed, there = {newest, fullest}, finished[newest] | finished[fullest]
    volatile = STAGES[stage].volatile if stage in STAGES else ()
    for attempt in sorted(finished, reverse=True):
        lacking = {part for part in finished[attempt] - there if not part.startswith(volatile)}
        if lacking:
            needed.add(attempt)
            there |= lacking
    return needed


def _uploads(store: Store, building: set[Item], since: float) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield uploads in several parts that nobody finished: their path, and what ends them. Only S3 keeps such.

    Those of what is being built may be under way for longer than the grace: files can be large.
    """
    if not store.uri().startswith("s3"):
        return
    bucket, _, prefix = store.root.partition("/")
    prefix += "/" if prefix else ""
    listed: Json = {}
    with contextlib.suppress(FileNotFoundError):  # there is no such bucket yet
        listed = store.patiently(lambda: store.fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix))
    for upload in listed.get("Uploads", []):
        parts = upload["Key"].removeprefix(prefix).split("/")
        if not upload["Key"].startswith(prefix) or parts[2:3] != ["attempts"] or (parts[0], parts[1]) in building:
            continue  # of others that use this bucket, or under way
        if upload["Initiated"].timestamp() < since:
            named = {"Bucket": bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
            yield f"{bucket}/{upload['Key']}", lambda named=named: store.fs.call_s3("abort_multipart_upload", **named)
