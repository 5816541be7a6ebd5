"""Collecting what nobody needs: abandoned attempts and uploads, leftovers, and, when asked, old results."""

import contextlib
import logging
import os
import re
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import inf
from pathlib import Path

from nanodlm.errors import FULL, Damaged, NanodlmError, UsageError
from nanodlm.stages.table import STAGES
from nanodlm.store import Artifact, Item, Json, Store
from nanodlm.store.attempt import STRAY
from nanodlm.store.bucket import Bucket
from nanodlm.store.disk import Found
from nanodlm.store.files import PROBES
from nanodlm.store.lease import LEASE_SECONDS, read_lease
from nanodlm.store.manifest import MANIFEST, utc_now
from nanodlm.upkeep.ages import made_at
from nanodlm.upkeep.verify import chain

log = logging.getLogger(__name__)
GRACE_SECONDS = 3600.0  # nothing that changed so lately is collected
LEASE_GRACE = 4 * LEASE_SECONDS  # a lease that was not renewed for so long is a dead run's, whatever the grace
# What a write that was cut off has left; earlier versions left the latter, beside records alone.
TEMPORARY = re.compile(r"(.*/)?\.[0-9a-f]{16}\.tmp|(attempts/[^/]+/parts/(.*/)?)?\.[0-9a-z_]{8}")
# What there may be in the folder of an artifact, sound or not; a folder of anything else is never removed.
OURS = re.compile(rf"attempts/.*|(manifest|retired|lease)\.json(/.*)?|{TEMPORARY.pattern}|{STRAY.pattern}")


@dataclass
class Contents:
    """What a listing shows below one stage's fingerprint; Unix times are 0 for what is not there."""

    manifest: float = 0.0
    retired: float = 0.0
    lease: float = 0.0
    attempts: dict[str, list[Found]] = field(default_factory=lambda: defaultdict(list))
    parts: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))  # finished, of each attempt
    temporary: dict[str, Found] = field(default_factory=dict)

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
        now = _now(store, listed, dry_run)
    there = dict(store.artifacts(item for item in sorted(listed) if listed[item].manifest))
    artifacts = {item: artifact for item, artifact in there.items() if isinstance(artifact, Artifact)}
    torn = {item: artifact for item, artifact in there.items() if isinstance(artifact, Damaged)}
    building, read = _in_use(store, listed, now - max(grace, LEASE_GRACE))
    # No clock is believed alone: the one of who made it may be behind, and a copy was written later than it was made.
    made = {item: max(made_at(artifact), listed[item].manifest) for item, artifact in artifacts.items()}
    kept, wished = set(artifacts), keep_last is not None or older_than is not None
    if wished and torn:  # what it was made from is not known
        log.warning("no result is given up while one cannot be read: %s", next(iter(torn.values())))
    elif wished:
        newest = sorted(_results(artifacts), key=lambda item: (listed[item].manifest, made[item]), reverse=True)
        young = {item for item in artifacts if now - made[item] < grace}
        later = {item for item in newest if older_than is not None and now - made[item] <= older_than}
        wanted = young | read | later | set(newest[: keep_last or 0])
        kept = _with_sources(artifacts, wanted)
    for item in sorted(artifacts.keys() - kept):
        if not dry_run:
            store.write_json(store.path(*item, "retired.json"), {"retired": utc_now()})
            store.retire(item)
        listed[item].manifest, listed[item].retired = 0.0, now
        yield {"kind": "artifact", "uri": store.uri(*item), "bytes": sum(f["size"] for f in artifacts[item].files())}
    oldest = -inf if older_than is None else now - older_than
    for item in sorted(listed.keys() - torn.keys() - building - read):
        contents = listed[item]
        named = {artifacts[item].manifest["attempt"], *artifacts[item].adopted.values()} if item in kept else set()
        gone = list(_abandoned(item[0], contents, named, now - grace, oldest))
        for attempt in gone:
            if not dry_run:
                store.remove_folder(store.path(*item, "attempts", attempt))
            size = sum(found.size for found in contents.attempts[attempt])
            yield {"kind": "attempt", "uri": store.uri(*item, "attempts", attempt), "bytes": size}
        over = {path: found for path, found in contents.temporary.items() if found.changed < now - grace}
        if gone == list(contents.attempts) or named:  # nothing remembers any more that it was given up, or built
            for name in ("retired", "lease"):
                if 0 < (changed := getattr(contents, name)) < now - grace:
                    over[f"{name}.json"] = Found(0, changed)
        for path, found in over.items():
            if not dry_run:
                store.remove(store.path(*item, path))
            yield {"kind": "leftover", "uri": store.uri(*item, path), "bytes": found.size}
    for path, started, end in store.driver.uploads(store.root) if isinstance(store.driver, Bucket) else ():
        stage, fingerprint, attempts, *_ = [*path.split("/"), "", ""]
        # Of others that use this bucket, or under way: large files may take longer than the grace.
        if attempts == "attempts" and (stage, fingerprint) not in building and started < now - grace:
            if not dry_run:
                end()
            yield {"kind": "upload", "uri": store.uri(path), "bytes": 0}
    if store.is_local and not dry_run:
        _remove_empty_folders(Path(store.root), building, now - grace)


def remove(store: Store, item: Item, recursive: bool = False, dry_run: bool = False) -> Iterator[Json]:
    """Remove an artifact at once, and with `recursive` all that was made from it; yield rows as `collect` does.

    What others were made from, what is being built, and what a run under way reads is refused.
    """
    sound = None
    with contextlib.suppress(Damaged):
        sound = store.find(*item)
    if not sound and (others := [path for path in store.sizes(store.path(*item)) if not OURS.fullmatch(path)]):
        raise NanodlmError(f"no artifact at {store.uri(*item)}, which holds {others[0]}: remove that by other means")
    listed = _contents(store)
    if item not in listed:
        raise NanodlmError(f"there is nothing at {store.uri(*item)}: `nanodlm ls` shows what is there")
    there = dict(store.artifacts(sorted(listed)))
    artifacts = {found: artifact for found, artifact in there.items() if isinstance(artifact, Artifact)}
    doomed, waiting = {item}, [item]
    while waiting:
        source = waiting.pop()
        made = {other for other, artifact in artifacts.items() if source in artifact.inputs} - doomed
        doomed, waiting = doomed | made, [*waiting, *made]
    names = ", ".join(f"{stage}/{fingerprint[:12]}" for stage, fingerprint in sorted(doomed - {item})[:4])
    if names and not recursive:
        raise NanodlmError(
            f"{names}{' and others' * (len(doomed) > 5)} would lack it: --recursive removes them as well"
        )
    building, read = _in_use(store, listed, _now(store, listed, dry_run) - LEASE_GRACE)
    if busy := sorted(doomed & (building | read)):
        raise NanodlmError(f"{store.uri(*busy[0])} is being built or read by a run: wait for it, or stop it first")
    for found in reversed(list(chain(store, *doomed))):
        if found in doomed:
            if not dry_run:
                store.retire(found)  # first, so that nobody finds half of it
                store.remove_folder(store.path(*found))
            contents = listed[found]
            size = sum(file.size for files in contents.attempts.values() for file in files)
            yield {"kind": "artifact", "uri": store.uri(*found), "bytes": size}


def _now(store: Store, listed: dict[Item, Contents], dry_run: bool) -> float:
    """Return the time by the storage's own clock, whatever this machine's says; at least, where no file fits in."""
    try:
        return store.now()
    except NanodlmError as error:
        if not dry_run and getattr(error.__cause__, "errno", None) not in FULL:
            raise
        times = (max(c.manifest, c.retired, c.lease, *map(c.changed, c.attempts)) for c in listed.values())
        return time.time() if dry_run else max(times)


def _in_use(store: Store, listed: dict[Item, Contents], since: float) -> tuple[set[Item], set[Item]]:
    """Return what is being built, by leases that were renewed since a time, and what is read for that."""
    building = {item for item, contents in listed.items() if contents.lease > since}
    leases = [read_lease(store, store.path(*item, "lease.json")) or {} for item in building]
    return building, {item for lease in leases for item in lease.get("inputs", {}).items()}


def _contents(store: Store) -> dict[Item, Contents]:
    contents: dict[Item, Contents] = {}
    for item, files in store.listed().items():
        shown = contents[item] = Contents()
        for path, found in files.items():
            if item[0] == PROBES or TEMPORARY.fullmatch(path):
                shown.temporary[path] = found
            elif path in ("manifest.json", "retired.json", "lease.json"):
                setattr(shown, path.removesuffix(".json"), found.changed)
            elif path.startswith("attempts/") and path.count("/") > 1:
                _, attempt, below = path.split("/", 2)
                shown.attempts[attempt].append(found)
                if below.startswith("parts/"):
                    shown.parts[attempt].add(below.removeprefix("parts/"))
        if store.is_local and os.path.isdir(store.path(*item, MANIFEST)):  # which a listing of files does not show
            shown.manifest = inf
    return contents


def _results(artifacts: dict[Item, Artifact]) -> set[Item]:
    """Return the artifacts that no other was made from."""
    return artifacts.keys() - {source for artifact in artifacts.values() for source in artifact.inputs}


def _with_sources(artifacts: dict[Item, Artifact], wanted: set[Item]) -> set[Item]:
    """Return artifacts with all that they were made from."""
    kept: set[Item] = set()
    todo = list(wanted & artifacts.keys())
    while todo:
        item = todo.pop()
        if item in artifacts and item not in kept:
            kept.add(item)
            todo += artifacts[item].inputs
    return kept


def _abandoned(stage: str, contents: Contents, named: set[str], since: float, oldest: float) -> Iterator[str]:
    """Yield the attempts that nobody needs.

    Kept are those that are `named`, or where none is those from which a run would continue, unless the artifact was
    retired since, or they are older than is asked for. An attempt that another took the place of may have readers
    still: its age is that of the manifest that is there now.
    """
    later = {n: parts for n, parts in contents.parts.items() if contents.changed(n) > contents.retired}
    resumed = set() if named else _resumed(stage, later)
    for attempt in contents.attempts:
        changed = max(contents.changed(attempt), contents.manifest, contents.retired)
        continued = attempt in resumed and changed >= oldest
        if attempt not in named and changed < since and not continued:
            yield attempt


def _resumed(stage: str, finished: dict[str, set[str]]) -> set[str]:
    """Return the attempts from which a run would continue, of those that have finished parts.

    The one with the last checkpoint, and the one that has most, should that be damaged; clocks are not asked. Parts
    that go into the result, unlike checkpoints, are all needed: each is kept once, for each worker has its own attempt.
    """
    if not finished:
        return set()

    def progress(name: str) -> tuple[tuple[int, str], int, str]:
        return max((len(part), part) for part in finished[name]), len(finished[name]), name

    furthest, fullest = max(finished, key=progress), max(finished, key=lambda name: (len(finished[name]), name))
    needed, there = {furthest, fullest}, finished[furthest] | finished[fullest]
    volatile = STAGES[stage].volatile if stage in STAGES else ()
    for attempt in sorted(finished, key=progress, reverse=True):
        lacking = {part for part in finished[attempt] - there if not part.startswith(volatile)}
        if lacking:
            needed.add(attempt)
            there |= lacking
    return needed


def _remove_empty_folders(root: Path, building: set[Item], since: float) -> None:
    """Remove empty folders of stages, but of what is being built, which may be about to write there."""
    for base, _, files in (found for stage in (*STAGES, PROBES) for found in os.walk(root / stage, topdown=False)):
        with contextlib.suppress(OSError):  # it is not empty, or not there any more
            busy = Path(base).relative_to(root).parts[:2] in building
            if not files and not busy and os.stat(base).st_mtime < since:
                os.rmdir(base)
