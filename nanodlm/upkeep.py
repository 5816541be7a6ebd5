"""Keeping a store: check the chain from samples to data, repair, collect, copy to another store, adopt what exists."""

import contextlib
import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from nanodlm import corpus, stages
from nanodlm.config import Config
from nanodlm.errors import Damaged, NanodlmError, UsageError
from nanodlm.storage import Found
from nanodlm.store import LEASE_SECONDS, Artifact, Store, read_part, sealed

Emit = Callable[..., None]
log = logging.getLogger(__name__)
GRACE_SECONDS = 3600.0  # nothing that changed so lately is collected
MANIFEST = "manifest.json"
LEASE_GRACE = 4 * LEASE_SECONDS  # a lease that was not renewed for so long is a dead run's, whatever the grace


@dataclass(frozen=True)
class Checked:
    """An artifact's address and what is wrong with it, one line each; whether that was mended."""

    stage: str
    fingerprint: str
    problems: list[str]
    repaired: bool = False


# Checking


def chain(store: Store, stage: str, fingerprint: str) -> list[tuple[str, str]]:
    """An artifact and all that it was made from, in the order of the pipeline.

    What a manifest that cannot be read was made from is not known, and left out.
    """
    found: dict[tuple[str, str], None] = {}

    def walk(stage: str, fingerprint: str) -> None:
        try:
            artifact = store.find(stage, fingerprint)
        except Damaged:
            artifact = None
        for name, made in (artifact.manifest["inputs"] if artifact else {}).items():
            walk(name, made["fingerprint"])
        found.setdefault((stage, fingerprint))

    walk(stage, fingerprint)
    return in_order(found)


def in_order(artifacts: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Stages and fingerprints in the order of the pipeline."""
    order = list(stages.STAGES)
    return sorted(artifacts, key=lambda item: order.index(item[0]) if item[0] in order else len(order))


def named(store: Store) -> list[tuple[str, str]]:
    """All artifacts of a store, and those that they were made from, whether these are there or not, in order."""
    found = dict.fromkeys(store)
    for item in list(found):
        with contextlib.suppress(Damaged):
            artifact = store.find(*item)
            inputs = artifact.manifest["inputs"] if artifact else {}
            found |= dict.fromkeys((name, made["fingerprint"]) for name, made in inputs.items())
    return in_order(found)


def check(
    store: Store,
    artifacts: list[tuple[str, str]],
    *,
    deep: bool = False,
    repair: bool = False,
    emit: Emit = lambda *_, **__: None,
) -> Iterator[Checked]:
    """Compare artifacts with their manifests, and each with what it was made from.

    Args:
        store: Where they lie.
        artifacts: Their stages and fingerprints, in the order of the pipeline, so that inputs are repaired first.
        deep: Whether to read every file and compare its sha256, not only its size.
        repair: Build again what is bad, from what is good: finished parts that are whole are kept.
        emit: Called as `emit(kind, **fields)` with progress.
    """
    for stage, fingerprint in artifacts:
        artifact, problems = None, []
        try:
            artifact = store.find(stage, fingerprint)
            problems = _problems(artifact, deep, emit) if artifact else ["its manifest is missing"]
        except Damaged as error:
            problems = [str(error)]
        if not (problems and repair):
            yield Checked(stage, fingerprint, problems)
            continue
        settings = _settings(store, (stage, fingerprint), artifacts)
        remedy = _repair(store, stage, fingerprint, artifact, settings, emit)
        yield Checked(stage, fingerprint, [*problems, *([remedy] if remedy else [])], repaired=not remedy)


def _problems(artifact: Artifact, deep: bool, emit: Emit) -> list[str]:
    lines = artifact.problems(deep=deep, emit=emit)
    for name, made in artifact.manifest["inputs"].items():
        try:
            source = artifact.store.find(name, made["fingerprint"])
        except Damaged:
            continue  # named by itself
        if source and source.digest != made["digest"]:
            lines.append(f"it was made from another {name} than the one that is there now")
    return lines


def _settings(store: Store, item: tuple[str, str], artifacts: list[tuple[str, str]]) -> dict[str, Any] | None:
    """The settings an artifact was made with, from its own manifest, else from that of one that was made from it."""
    for stage, fingerprint in [item, *artifacts]:
        with contextlib.suppress(Damaged):
            found = store.find(stage, fingerprint)
            if found is None or not found.manifest.get("config"):
                continue
            made = found.manifest["inputs"].get(item[0], {})
            if item in ((stage, fingerprint), (item[0], made.get("fingerprint"))):
                return found.manifest["config"]
    return None


def _repair(
    store: Store,
    stage: str,
    fingerprint: str,
    artifact: Artifact | None,
    settings: dict[str, Any] | None,
    emit: Emit,
) -> str:
    """Build an artifact again; what stands in the way, or nothing."""
    manifest = None if artifact else store.read_json(store.path(stage, fingerprint, MANIFEST))
    if whose := _misplaced(manifest, stage, fingerprint):
        return f"not repaired, for it is not damaged but out of place: move its folder to {whose}, or remove it"
    if settings is None:
        store.retire((stage, fingerprint))
        return "its settings are not known, so it was set aside: `nanodlm run` with those it was made with rebuilds it"
    try:
        config, inputs = Config(**settings), None
        if artifact:  # then the source need not be there, unless it is the download that is bad
            lineage = artifact.manifest["inputs"].items()
            inputs = {name: store.open(f"{name}/{made['fingerprint']}").check() for name, made in lineage}
        lookup, _ = stages.ready(stage, config, store, rebuild=True, inputs=inputs)
        if lookup.fingerprint != fingerprint:
            raise NanodlmError("this version of nanodlm, or the source's files now, would make another one")
    except (NanodlmError, ValueError) as error:
        return f"not repaired: {_short(error)}"
    with store.lease(stage, fingerprint):  # of two repairs at once the second finds what the first has made
        there = None
        with contextlib.suppress(Damaged):
            there = store.find(stage, fingerprint)
        if there is None or (artifact and there.manifest == artifact.manifest):
            store.retire((stage, fingerprint))
    try:
        stages.run(stage, config, store, inputs=inputs, emit=emit)
    except BaseException as error:
        if artifact is not None:  # what was there is there again
            with contextlib.suppress(OSError, NanodlmError):
                store.write_json(store.path(stage, fingerprint, "manifest.json"), artifact.manifest, create_only=True)
        if not isinstance(error, NanodlmError):
            raise
        return f"not repaired: {_short(error)}"
    return ""


def _misplaced(manifest: Any, stage: str, fingerprint: str) -> str:
    """Where an intact manifest belongs, if that is somewhere else; such as that of a renamed folder, or of a backup."""
    if not isinstance(manifest, dict) or manifest != sealed(manifest):
        return ""
    whose = (str(manifest.get("stage", stage)), str(manifest.get("fingerprint", fingerprint)))
    return "" if whose == (stage, fingerprint) else "/".join(whose)


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


# Collecting


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
    volatile = stages.STAGES[stage].volatile if stage in stages.STAGES else ()
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


# Between stores


def copy(source: Store, target: Store, artifacts: list[tuple[str, str]], emit: Emit) -> Iterator[tuple[Artifact, bool]]:
    """Copy artifacts to another store, each with its manifest last; what is there already is compared, not sent again.

    Args:
        source: Where they lie; every file is compared with its sha256 when it is read.
        target: Where they go; every file is read back and compared.
        artifacts: Their stages and fingerprints.
        emit: Called as `emit("progress", done, total, unit)`.

    Yields:
        Each artifact in the target, and whether anything had to be copied.

    Raises:
        NanodlmError: When the target holds another artifact in its place.
        Damaged: When a file is not what the manifest says, here or there.
    """
    source.emit = target.emit = emit
    target.require_create_only()
    for stage, fingerprint in artifacts:
        artifact = source.open(f"{stage}/{fingerprint}")
        there, sent = _same(artifact, target), False
        if there is None:
            reads = {name: made["fingerprint"] for name, made in artifact.manifest["inputs"].items()}
            lease = target.lease(stage, fingerprint, lambda text: emit("message", text=text), reads)
            with lease, stages.room(target):
                there = _same(artifact, target)  # another process may have been quicker
                if there is None:
                    there, sent = _send(artifact, target, emit), True
        yield (there if sent else there.check()), sent


def _same(artifact: Artifact, target: Store) -> Artifact | None:
    """What the target holds in an artifact's place, which must be the same."""
    there = target.find(artifact.stage, artifact.fingerprint)
    if there is not None and there.digest != artifact.digest:
        raise NanodlmError(f"{there.uri} holds another artifact than {artifact.uri}: remove one of them")
    return there


def _send(artifact: Artifact, target: Store, emit: Emit) -> Artifact:
    """Copy an artifact that the target does not hold; its lease there keeps a collection away meanwhile."""
    stage, fingerprint = artifact.stage, artifact.fingerprint
    copied = Artifact(target, stage, fingerprint, artifact.manifest)
    sizes = target.sizes(copied.remote("parts").rsplit("/", 1)[0])

    def there_already(file: dict[str, Any]) -> bool:
        same_size = sizes.get(file["path"]) == file["size"]
        return same_size and target.sha256(copied.remote(file["path"])) == file["sha256"]

    listed = {file["path"] for file in artifact.files()}  # what a killed copy had begun on a local disk goes
    target.remove(*(copied.remote(path) for path in sizes if path not in listed and not path.startswith("parts/")))
    wanted = [file for file in artifact.files() if not there_already(file)]
    done, total = 0, sum(file["size"] for file in wanted)

    def arrived(size: int) -> None:
        nonlocal done
        done += size
        emit("progress", done=done / 1e6, total=total / 1e6, unit="MB copied")

    if wanted:
        folder = artifact.local(*(file["path"] for file in wanted))
        target.put([(folder / file["path"], copied.remote(file["path"])) for file in wanted], arrived)
    copied.check(deep=True)
    parts = artifact.remote("parts")  # from which a repair keeps what is good, and a training may be started
    for path in artifact.store.sizes(parts):
        of = {"stage": stage, "fingerprint": fingerprint, "part": path.removesuffix(".json")}
        if part := read_part(artifact.store, f"{parts}/{path}", **of):
            target.write_json(copied.remote(f"parts/{path}"), part)
    target.write_json(target.path(stage, fingerprint, "manifest.json"), artifact.manifest, create_only=True)
    return _same(artifact, target) or copied


def adopt(config: Config, store: Store, files: list[str], emit: Emit = lambda *_, **__: None) -> tuple[Artifact, bool]:
    """Take files that are at hand for the download of a configuration, instead of fetching its source.

    The same parts are written as the download stage would write, so the same files give the same artifact. That they
    are the source's files, at its pinned commit, is for the caller to know; the manifest says that they were adopted.

    Args:
        config: Its `data.source` names where the documents come from.
        store: Where the artifact goes.
        files: Paths or globs of the same files.
        emit: Called as `emit(kind, **fields)` with progress.

    Returns:
        The artifact, and whether it was built now.

    Raises:
        NanodlmError: When a file cannot be read as `data` says.
    """
    lookup, _ = stages.ready("download", config, store)
    assert lookup.identity is not None
    assert lookup.fingerprint is not None
    if lookup.artifact:
        return lookup.artifact, False
    with (
        store.lease("download", lookup.fingerprint),
        stages.room(store),
        store.attempt("download", lookup.fingerprint) as attempt,
    ):
        if there := store.find("download", lookup.fingerprint):  # another process may have been quicker
            return there, False
        metrics = corpus.download(config, {}, attempt, emit, adopted=files)
        artifact = attempt.commit(
            identity=lookup.identity, config=config.model_dump(mode="json"), metrics={**metrics, "adopted": True}
        )
    return artifact, True


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _time(text: str) -> float:
    """Unix time of a manifest's time stamp."""
    return datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC).timestamp()


def age(artifact: Artifact) -> float:
    """Seconds since an artifact was made."""
    return time.time() - _time(artifact.manifest["created"])


def size(count: int) -> str:
    """Bytes, for a person.

    >>> size(1_234_000)
    '1.23 MB'
    """
    for unit, length in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= length:
            return f"{count / length:.2f} {unit}"
    return f"{count} B"


AGE = r"^[0-9]+(\.[0-9]+)?[smhd]$"


def seconds(text: str) -> float:
    """Of an age.

    Raises:
        UsageError: When it is no number with s, m, h or d behind it.

    >>> seconds("12h")
    43200.0
    """
    units = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
    if not re.fullmatch(AGE, text):
        raise UsageError(f"{text!r} is no age: give a number and s, m, h or d, such as 30d")
    return float(text[:-1]) * units[text[-1]]
