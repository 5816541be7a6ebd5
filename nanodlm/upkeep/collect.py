"""Keeping a store: check the chain from samples to data, repair, collect, copy to another store, adopt what exists."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

from nanodlm.errors import Damaged, NanodlmError, UsageError
from nanodlm.stages.table import STAGES
from nanodlm.store import Store
from nanodlm.store.disk import Found
from nanodlm.store.lease import LEASE_SECONDS
from nanodlm.store.manifest import MANIFEST
from nanodlm.upkeep.ages import _now, _time

log = logging.getLogger(__name__)
GRACE_SECONDS = 3600.0  # nothing that changed so lately is collected
LEASE_GRACE = 4 * LEASE_SECONDS  # a lease that was not renewed for so long is a dead run's, whatever the grace


def collect(
    store: Store,
    *,
    keep_last: int | None = None,
    older_than: float | None = None,
    grace: float = GRACE_SECONDS,
    dry_run: bool = False,
) -> Iterator[dict[str, Any]]:
    """Mark what is needed, and remove the rest: abandoned attempts and uploads, and, when asked, old results.

    Results are artifacts that no other was made from. All that a kept one was made from is kept. A result that is
    given up loses its manifest now, and its files at the first collection `grace` later, so that whoever is reading
    it can finish, and a run that needs it again adopts its parts.

    Args:
        store: Where to collect.
        keep_last: Results to keep, the newest; all when None.
        older_than: Seconds; results that are younger are kept besides.
        grace: Seconds for which whatever has changed is left alone.
        dry_run: Only say what would be removed.

    Yields:
        `kind` (artifact, attempt or upload), `uri` and `bytes` of each thing removed.

    Raises:
        UsageError: When `keep_last` is below 0.
    """
    if keep_last is not None and keep_last < 0:
        raise UsageError(f"--keep-last counts results to keep, from 0, not {keep_last}")
    listed = store.listed()
    now = time.time()
    if listed:
        try:
            now = store.now()  # ages are by the storage's own clock, whatever this machine's says
        except NanodlmError:
            if not dry_run:
                raise
    artifacts, unreadable, torn = {}, set(), ""
    for item in store:
        try:
            found = store.find(*item)
        except Damaged as error:
            found, torn = None, str(error)
        if found:
            artifacts[item] = found
        else:
            unreadable.add(item)  # its manifest may name any attempt, or is about to be made again
    leased, read = _leases(store, listed, now, grace)
    came = {item: listed[path].changed for item in artifacts if (path := "/".join((*item, MANIFEST))) in listed}
    dropped = set(artifacts) - _needed(artifacts, came, read, now, keep_last, older_than, grace)
    if dropped and torn:  # what it was made from is not known
        log.warning("no result is given up while one cannot be read: %s", torn)
        dropped = set()
    for item in sorted(dropped):
        size = sum(file["size"] for file in artifacts[item].manifest["files"])
        if not dry_run:
            store.write_json(store.path(*item, "retired.json"), {"retired": _now()})
            store.retire(item)
        yield {"kind": "artifact", "uri": store.uri(*item), "bytes": size}
    kept = {item: a.manifest["attempt"] for item, a in artifacts.items() if item not in dropped}
    for attempt, size in _abandoned(listed, kept, leased | unreadable | read, dropped, now, grace, older_than):
        if not dry_run:
            store.remove_folder(store.path(attempt))
        yield {"kind": "attempt", "uri": store.uri(attempt), "bytes": size}
    for path, abort in _uploads(store, leased, now, grace):
        if not dry_run:
            abort()
        yield {"kind": "upload", "uri": store.fs.unstrip_protocol(path), "bytes": 0}


def _leases(
    store: Store, listed: dict[str, Found], now: float, grace: float
) -> tuple[set[tuple[str, str]], set[tuple[str, str]]]:
    """What runs under way are building, and what they read. A lease that nobody has renewed is a dead run's."""
    building, read = set(), set()
    for path, found in listed.items():
        parts = path.split("/")
        if len(parts) == 3 and parts[2] == "lease.json" and now - found.changed < max(grace, LEASE_GRACE):
            building.add((parts[0], parts[1]))
            held = store.read_json(store.path(path))
            inputs = held.get("inputs") if isinstance(held, dict) else None
            if isinstance(inputs, dict):
                read |= {(name, made) for name, made in inputs.items() if isinstance(made, str)}
    return building, read


def _needed(
    artifacts: dict[tuple[str, str], Any],
    came: dict[tuple[str, str], float],
    read: set[tuple[str, str]],
    now: float,
    keep_last: int | None,
    older_than: float | None,
    grace: float,
) -> set[tuple[str, str]]:
    """Mark: results that stay, what runs under way read, and all that these were made from."""
    if keep_last is None and older_than is None:
        return set(artifacts)
    sources = {(n, made["fingerprint"]) for a in artifacts.values() for n, made in a.manifest["inputs"].items()}
    ages = {item: now - _time(a.manifest["created"]) for item, a in artifacts.items()}
    results = sorted(set(artifacts) - sources, key=ages.__getitem__)
    young = [item for item in artifacts if min(ages[item], now - came.get(item, 0.0)) < grace]  # made, or copied here
    todo = [*young, *read, *results[: keep_last or 0]]
    if older_than is not None:
        todo += [item for item in results if ages[item] <= older_than]
    needed: set[tuple[str, str]] = set()
    while todo:
        item = todo.pop()
        if item in artifacts and item not in needed:
            needed.add(item)
            todo += [(name, made["fingerprint"]) for name, made in artifacts[item].manifest["inputs"].items()]
    return needed


def _abandoned(
    listed: dict[str, Found],
    kept: dict[tuple[str, str], str],
    untouched: set[tuple[str, str]],
    dropped: set[tuple[str, str]],
    now: float,
    grace: float,
    older_than: float | None,
) -> Iterator[tuple[str, int]]:
    """Attempts that nobody needs: relative path and size in bytes.

    Kept are those that a manifest names, all attempts at what is `untouched`, and those from which a run would continue
    what has no manifest (see `_resumed`), unless it was retired since, or is older than what is asked for. An attempt
    that another took the place of may have readers still: its age is that of the manifest that is there now.
    """
    attempts: dict[str, list[Found]] = {}
    finished: dict[tuple[str, str], dict[str, set[str]]] = {}  # the parts of each attempt, the oldest first
    retired, since = {}, {}  # when a manifest was given up; when it was, or another came
    for path, found in sorted(listed.items()):
        parts = path.split("/")
        item = (parts[0], parts[1]) if len(parts) > 2 else ("", "")
        if len(parts) > 4 and parts[2] == "attempts":
            attempts.setdefault("/".join(parts[:4]), []).append(found)
            if parts[4] == "parts":
                finished.setdefault(item, {}).setdefault(parts[3], set()).add("/".join(parts[5:]))
        elif parts[2:] in ([MANIFEST], ["retired.json"]):
            since[item] = max(found.changed, since.get(item, 0.0))
        if parts[2:] == ["retired.json"]:
            retired[item] = found.changed
    retired |= dict.fromkeys(dropped, now)
    since |= dict.fromkeys(dropped, now)
    changed = {attempt: max(found.changed for found in files) for attempt, files in attempts.items()}
    resumed: set[str] = set()
    for item, made in finished.items():
        folder = "/".join((*item, "attempts"))
        if item not in kept:
            later = {n: of for n, of in made.items() if changed[f"{folder}/{n}"] > retired.get(item, 0.0)}
            resumed |= {f"{folder}/{number}" for number in _resumed(item[0], later)}
    for attempt, files in attempts.items():
        stage, fingerprint, _, number = attempt.split("/")
        item = (stage, fingerprint)
        if item in untouched or kept.get(item) == number:
            continue
        age = now - max(changed[attempt], since.get(item, 0.0))
        if age > grace and not (attempt in resumed and (older_than is None or age <= older_than)):
            yield attempt, sum(found.size for found in files)


def _resumed(stage: str, finished: dict[str, set[str]]) -> set[str]:
    """Attempts from which a run would continue, of those that have finished parts.

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


def _uploads(
    store: Store, leased: set[tuple[str, str]], now: float, grace: float
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Uploads in several parts that nobody finished: their path, and what ends them. Only S3 keeps such.

    Those of what is `leased` may be under way for longer than the grace: files can be large.
    """
    if not store.uri().startswith("s3"):
        return
    bucket, _, prefix = store.root.partition("/")
    prefix += "/" if prefix else ""
    listed: dict[str, Any] = {}
    with contextlib.suppress(FileNotFoundError):  # there is no such bucket yet
        listed = store.patiently(lambda: store.fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix))
    for upload in listed.get("Uploads", []):
        parts = upload["Key"].removeprefix(prefix).split("/")
        if not upload["Key"].startswith(prefix) or parts[2:3] != ["attempts"] or (parts[0], parts[1]) in leased:
            continue  # of others that use this bucket, or under way
        if now - upload["Initiated"].timestamp() > grace:
            named = {"Bucket": bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
            yield f"{bucket}/{upload['Key']}", lambda named=named: store.fs.call_s3("abort_multipart_upload", **named)
