"""Collecting what nobody needs: abandoned attempts and uploads, leftovers, and, when asked, old results."""

import contextlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from math import inf
from pathlib import Path
from typing import Any

from nanodlm.errors import FULL, Damaged, NanodlmError, UsageError
from nanodlm.stages.table import STAGES
from nanodlm.store import Artifact, Item, Json, Store
from nanodlm.store.attempt import NOBODYS
from nanodlm.store.bucket import Bucket
from nanodlm.store.disk import Found
from nanodlm.store.files import PROBES
from nanodlm.store.lease import LEASE_SECONDS, read_lease
from nanodlm.store.manifest import MANIFEST, utc_now
from nanodlm.upkeep.ages import made_at
from nanodlm.upkeep.verify import in_order

log = logging.getLogger(__name__)
GRACE_SECONDS = 3600.0  # nothing that changed so lately is collected
LEASE_GRACE = 4 * LEASE_SECONDS  # a lease that was not renewed for so long is a dead run's, whatever the grace
# What a write that was cut off has left; earlier versions left the latter, beside records alone.
TEMPORARY = re.compile(r"(.*/)?\.[0-9a-f]{16}\.tmp|(attempts/[^/]+/parts/(.*/)?)?\.[0-9a-z_]{8}")
# What there may be in the folder of an artifact, sound or not; a folder of anything else is never removed.
OURS = re.compile(rf"attempts/.*|(manifest|retired|lease)\.json(/.*)?|{TEMPORARY.pattern}|{NOBODYS.pattern}", re.DOTALL)
RETIRED, LEASE = "retired.json", "lease.json"
Files = dict[str, Found]  # what a listing shows below one stage's fingerprint, or of one attempt
Listed = dict[Item, Files]
Removal = tuple[str, str, int, Callable[[], Any]]  # kind, address and bytes of what goes, and what removes it


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
    finish, and a run that needs it again adopts its parts. What has changed so lately is left alone. So are attempts
    with finished parts of what is not committed, unless they are older than `older_than`.
    """
    if keep_last is not None and keep_last < 0:
        raise UsageError(f"--keep-last counts results to keep, from 0, not {keep_last}")
    listed = store.listed()
    now = _now(store, listed, dry_run)
    for kind, uri, size, end in _removals(store, listed, keep_last, older_than, now, grace):
        if not dry_run:
            end()
        yield {"kind": kind, "uri": uri, "bytes": size}
    if store.is_local and not dry_run:
        building, _ = _in_use(store, listed, now - max(grace, LEASE_GRACE))  # and so may be about to write there
        for stage in (*STAGES, PROBES):
            for base, _, files in os.walk(store.path(stage), topdown=False):
                busy = Path(base).relative_to(store.root).parts[:2] in building
                with contextlib.suppress(OSError):  # it is not empty, or not there any more
                    if not files and not busy and os.stat(base).st_mtime < now - grace:
                        os.rmdir(base)


def _removals(
    store: Store, listed: Listed, keep_last: int | None, older_than: float | None, now: float, grace: float
) -> Iterator[Removal]:
    # A listing of files does not show a manifest that is a folder.
    there = dict(store.artifacts(item for item in sorted(listed) if MANIFEST in listed[item] or store.is_local))
    artifacts = {item: artifact for item, artifact in there.items() if isinstance(artifact, Artifact)}
    torn = {item: artifact for item, artifact in there.items() if isinstance(artifact, Damaged)}
    building, read = _in_use(store, listed, now - max(grace, LEASE_GRACE))
    beside = {item for item in artifacts if item[0] == "frontier"}  # of models, with which they stay and go
    kept, wished = set(artifacts), keep_last is not None or older_than is not None
    if wished and torn:  # what it was made from is not known
        log.warning("no result is given up while one cannot be read: %s", next(iter(torn.values())))
    elif wished:
        own = artifacts.keys() - beside
        results = own - {source for item in own for source in artifacts[item].inputs}
        written = {item: listed[item][MANIFEST].changed for item in artifacts}
        made = {item: made_at(artifact) for item, artifact in artifacts.items()}
        # No clock is believed alone: that of who made it may be wrong, and a repair or a copy writes a manifest anew.
        age = {item: now - max(made[item], written[item]) for item in artifacts}
        wanted = {item for item in artifacts if age[item] < grace or item in read}
        wanted |= {item for item in results if older_than is not None and age[item] <= older_than}
        for times in (written, made):
            wanted |= set(sorted(results, key=lambda item: (times[item], item), reverse=True)[: keep_last or 0])
        kept = _reached(wanted, lambda item: artifacts.keys() & set(artifacts[item].inputs))
        kept |= {item for item in beside if kept.issuperset(artifacts[item].inputs)}
    for item in sorted(artifacts.keys() - kept):
        size = sum(file["size"] for file in artifacts[item].files())
        yield "artifact", store.uri(*item), size, lambda item=item: _give_up(store, item)
        listed[item] = {**listed[item], RETIRED: Found(0, now)}
        del listed[item][MANIFEST]
    oldest = -inf if older_than is None else now - older_than
    for item in sorted(listed.keys() - torn.keys() - building - read):
        named = {artifacts[item].manifest["attempt"], *artifacts[item].adopted.values()} if item in kept else set()
        attempts = _attempts(listed[item], named)
        gone = list(_abandoned(listed[item], attempts, bool(named), now - grace, oldest))
        for attempt in gone:
            size = sum(found.size for found in attempts[attempt].values())
            folder = store.path(*item, "attempts", attempt)
            yield "attempt", store.address(folder), size, lambda folder=folder: store.remove_folder(folder)
        over = [path for path in listed[item] if item[0] == PROBES or TEMPORARY.fullmatch(path)]
        if len(gone) == len(attempts) or named:  # nothing remembers any more that it was given up, or built
            over += [RETIRED, LEASE]
        for path in over:
            if path in listed[item] and listed[item][path].changed < now - grace:
                file = store.path(*item, path)
                yield "leftover", store.address(file), listed[item][path].size, lambda file=file: store.remove(file)
    for path, started, end in store.driver.uploads(store.root) if isinstance(store.driver, Bucket) else ():
        stage, fingerprint, attempts, *_ = [*path.split("/"), "", ""]
        # Of others that use this bucket, or under way: large files may take longer than the grace.
        if attempts == "attempts" and (stage, fingerprint) not in building and started < now - grace:
            yield "upload", store.uri(path), 0, end


def remove(store: Store, item: Item, recursive: bool = False, dry_run: bool = False) -> Iterator[Json]:
    """Remove an artifact that no run is busy with, with `recursive` all that was made from it; yield as `collect`."""
    listed = store.listed()
    there = dict(store.artifacts(sorted(listed)))
    artifacts = [(other, artifact) for other, artifact in there.items() if isinstance(artifact, Artifact)]
    others = [path for path in listed.get(item, ()) if not OURS.fullmatch(path)]
    if others and not isinstance(there.get(item), Artifact):
        raise NanodlmError(f"no artifact at {store.uri(*item)}, which holds {others[0]}: remove that by other means")
    if item not in listed:
        raise NanodlmError(f"there is nothing at {store.uri(*item)}: `nanodlm ls` shows what is there")
    doomed = _reached({item}, lambda source: (other for other, made in artifacts if source in made.inputs))
    if len(doomed) > 1 and not recursive:
        names = ", ".join(f"{stage}/{fingerprint[:12]}" for stage, fingerprint in sorted(doomed - {item}))
        raise NanodlmError(f"{names} would lack it: --recursive removes them as well")
    building, read = _in_use(store, listed, _now(store, listed, dry_run) - LEASE_GRACE)
    if busy := sorted(doomed & (building | read)):
        raise NanodlmError(f"{store.uri(*busy[0])} is being built or read by a run: wait for it, or stop it first")
    for found in reversed(in_order({found: there[found] for found in doomed})):
        size = sum(file.size for path, file in listed[found].items() if path.startswith("attempts/"))
        if not dry_run:
            store.retire(found)  # first, so that nobody finds half of it
            store.remove_folder(store.path(*found))
        yield {"kind": "artifact", "uri": store.uri(*found), "bytes": size}


def _give_up(store: Store, item: Item) -> None:
    store.write_json(store.path(*item, RETIRED), {"retired": utc_now()})
    store.retire(item)


def _reached(items: set[Item], links: Callable[[Item], Iterable[Item]]) -> set[Item]:
    """Return items with all that links lead to from them."""
    reached: set[Item] = set()
    while items := items - reached:
        reached |= items
        items = {other for item in items for other in links(item)}
    return reached


def _now(store: Store, listed: Listed, dry_run: bool) -> float:
    """Return the time by the storage's own clock, whatever this machine's says; at least, where no file fits in."""
    if not listed:
        return time.time()
    try:
        return store.now()
    except (NanodlmError, OSError) as error:
        if not dry_run and getattr(error, "errno", None) not in FULL:
            raise
        files = (found.changed for files in listed.values() for found in files.values())
        return time.time() if dry_run else max(files, default=0.0)


def _in_use(store: Store, listed: Listed, since: float) -> tuple[set[Item], set[Item]]:
    """Return what is being built, by leases that were renewed since a time, and what is read for that."""
    building = {item for item, files in listed.items() if LEASE in files and files[LEASE].changed > since}
    leases = [read_lease(store, store.path(*item, LEASE)) or {} for item in building]
    return building, {item for lease in leases for item in lease.get("inputs", {}).items()}


def _attempts(files: Files, named: set[str]) -> dict[str, Files]:
    """Return the files of each attempt that an artifact has none of, by path below it."""
    attempts: dict[str, Files] = {}
    for path, found in files.items():
        top, attempt, below = [*path.split("/", 2), "", ""][:3]
        if top == "attempts" and below and attempt not in named and not TEMPORARY.fullmatch(path):
            attempts.setdefault(attempt, {})[below] = found
    return attempts


def _abandoned(files: Files, attempts: dict[str, Files], built: bool, since: float, oldest: float) -> Iterator[str]:
    """Yield the attempts that nobody needs: none of those that have finished parts, until the artifact is `built`."""
    retired = files[RETIRED].changed if RETIRED in files else 0.0
    # What another took the place of may have readers still: its age is that of the manifest there now.
    placed = max(retired, files[MANIFEST].changed if MANIFEST in files else 0.0)
    for attempt in sorted(attempts):
        changed = max(found.changed for found in attempts[attempt].values())
        age = max(changed, placed)
        finished = changed > retired and any(path.startswith("parts/") for path in attempts[attempt])
        if age < since and not (finished and not built and age >= oldest):
            yield attempt
