"""Storages: what is asked again, what is refused, and one suite of tests on each kind of them."""

import errno
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import fsspec
import httpx
import pytest
from fsspec.exceptions import FSTimeoutError
from obstore import exceptions

from nanodlm.checkpoints.finding import find_checkpoint
from nanodlm.errors import Damaged, NanodlmError, Unreachable, UsageError
from nanodlm.stages import run, table
from nanodlm.store import Artifact, Store, bucket, cache, hold_lease, lease, new_attempt, retry
from nanodlm.store.files import Storage
from nanodlm.upkeep import collect
from tests.support import store as support
from tests.support.faults import Fault, Faulty, answer, busy, no_space, scripted
from tests.support.helpers import committed, copied, fill, identity, prose, tiny_config
from tests.support.servers import Server, forget_connections, let_go_of_the_cache, s3_environ
from tests.support.store import Killed, killed_attempt, read
from tests.support.training import tiny

FILES = {**support.FILES, "empty": b""}


# What may pass


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses between tries, which are not made; the clock moves on by each."""
    made: list[float] = []
    monkeypatch.setattr(time, "sleep", made.append)
    monkeypatch.setattr(time, "monotonic", lambda: sum(made))
    return made


@pytest.fixture
def faulty() -> Iterator[type[Faulty]]:
    with scripted() as file_system:
        yield file_system


PASSING: dict[str, Callable[[], Any]] = {
    "GCS 503": busy,
    "GCS 429": lambda: answer(429),
    "S3": lambda: as_of_a_disk(exceptions.GenericError("Server returned non-2xx status code: 503 Slow Down")),
    "S3 conflict": lambda: as_of_a_disk(exceptions.GenericError("Server returned non-2xx status code: 409 Conflict")),
    "reset": lambda: ConnectionResetError(errno.ECONNRESET, "reset by peer"),
    "server hung up": aiohttp.ServerDisconnectedError,
    "payload cut off": lambda: aiohttp.ClientPayloadError("payload is not completed"),
    "time-out": TimeoutError,
    "fsspec's time-out": FSTimeoutError,
}
REFUSED: dict[str, Callable[[], Any]] = {
    "S3 403": lambda: as_of_a_disk(exceptions.PermissionDeniedError("<Code>AccessDenied</Code><Message>no</Message>")),
    "S3 401": lambda: as_of_a_disk(exceptions.UnauthenticatedError("not you")),
    "no credentials": lambda: as_of_a_disk(exceptions.GenericError("PUT http://169.254.169.254/latest/api/token")),
    "GCS 403": lambda: answer(403),
    "GCS forbidden": lambda: OSError("Forbidden: https://storage.googleapis.com/b\nyou may not"),
    "permissions": lambda: PermissionError(errno.EACCES, "Permission denied"),
}


def as_of_a_disk(error: Exception) -> BaseException:
    with pytest.raises(OSError) as caught, bucket._as_of_a_disk():
        raise error
    return caught.value


@pytest.mark.parametrize("name", PASSING)
def test_what_may_pass_is_asked_again_until_it_does(name: str, faulty: type[Faulty], pauses: list[float]) -> None:
    faulty.script[:] = [Fault("cat_file", PASSING[name], times=3)]
    there = Storage("faulty://place")
    there.write_json(there.path("x.json"), {"a": 1})
    assert there.read_json(there.path("x.json")) == {"a": 1}
    assert len(pauses) == 3


def test_pauses_grow_and_are_never_the_same_for_two(faulty: type[Faulty], pauses: list[float]) -> None:
    faulty.script[:] = [Fault("cat_file", busy, times=12)]
    there = Storage("faulty://place")
    there.write_json(there.path("x.json"), 1)
    there.read_json(there.path("x.json"))
    longest = [min(retry.FIRST_PAUSE * 2**i, retry.LONGEST_PAUSE) for i in range(12)]
    assert all(0 < pause <= limit for pause, limit in zip(pauses, longest, strict=True))
    assert len(set(pauses)) == 12


@pytest.mark.parametrize("name", PASSING)
def test_what_does_not_pass_is_given_up_after_the_time_that_is_set(
    name: str, faulty: type[Faulty], pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANODLM_RETRY_SECONDS", "40")
    faulty.script[:] = [Fault("cat_file", PASSING[name], times=1000)]
    there = Storage("faulty://place")
    with pytest.raises(Unreachable, match=r"faulty://.*place does not answer: .*run again to continue") as caught:
        there.read_json(there.path("x.json"))
    assert "\n" not in str(caught.value)
    assert 40 - retry.LONGEST_PAUSE <= sum(pauses) <= 40


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_is_one_line_at_once(name: str, faulty: type[Faulty], pauses: list[float]) -> None:
    faulty.script[:] = [Fault(request, REFUSED[name], times=9) for request in ("cat_file", "pipe_file", "find")]
    there = Store("faulty://place")
    begin = new_attempt(there, "shard", "f0").__enter__
    for ask in (lambda: there.find("shard", "f0"), lambda: there.files("/place"), there.require_create_only, begin):
        with pytest.raises(NanodlmError, match=r"refuses access: .*credentials in the environment") as caught:
            ask()
        assert "\n" not in str(caught.value)
        assert not isinstance(caught.value, Unreachable)
    assert pauses == []


@pytest.mark.parametrize("error", [no_space, lambda: OSError(errno.EIO, "broken"), lambda: ValueError("bug")])
def test_what_stays_as_it_is_is_not_asked_again(
    error: Callable[[], BaseException], faulty: type[Faulty], pauses: list[float]
) -> None:
    faulty.script[:] = [Fault("pipe_file", error, times=1000)]
    there = Storage("faulty://place")
    with pytest.raises(type(error())):
        there.write_json(there.path("x.json"), 1)
    assert pauses == []
    assert [request for request, _ in faulty.asked] == ["pipe_file"]


def test_transfers_are_tried_again(faulty: type[Faulty], tmp_path: Path, pauses: list[float]) -> None:
    there, names = Storage("faulty://place"), [f"{i:03d}" for i in range(30)]
    for name in names:
        (tmp_path / name).write_text(name)
    faulty.script[:] = [Fault("put_file", busy, times=7), Fault("cat_file", ConnectionResetError, times=7)]
    arrived: list[int] = []
    there.put([(tmp_path / name, f"/place/{name}") for name in names], arrived.append)
    assert sum(arrived) == 30 * 3
    (tmp_path / "back").mkdir()
    list(there.together(lambda name: there.get(f"/place/{name}", tmp_path / "back" / name, 3), names))
    assert {path.name: path.read_text() for path in (tmp_path / "back").iterdir()} == {name: name for name in names}
    asked = [request for request, _ in faulty.asked]
    assert min(asked.count("put_file"), asked.count("cat_file")) >= 37


def test_a_time_or_a_size_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANODLM_RETRY_SECONDS", "soon")
    with pytest.raises(UsageError, match="NANODLM_RETRY_SECONDS must be a number above 0, not 'soon'"):
        Storage("memory://place").files("/x")
    for text in ("0", "-1", "many", "nan", "inf"):
        monkeypatch.setenv("NANODLM_CACHE_GB", text)
        with pytest.raises(NanodlmError, match=f"NANODLM_CACHE_GB must be a number above 0, not '{text}'"):
            cache.limit()


# Creating once


@pytest.mark.parametrize("error", [ConnectionResetError, FileExistsError])
def test_an_artifact_whose_commit_was_not_acknowledged_is_there_whole(
    error: Callable[[], BaseException], faulty: type[Faulty], pauses: list[float]
) -> None:
    faulty.script[:] = [Fault("pipe_file", error, path="manifest.json", after=True)]
    artifact = committed(Store("faulty://place"), FILES)
    found = Store("faulty://place").find("shard", "f0")
    assert found is not None
    assert found.manifest == artifact.manifest
    assert {name: (found.local() / name).read_bytes() for name in FILES} == FILES


def test_a_creation_lost_to_another_writer_does_not_count(faulty: type[Faulty], pauses: list[float]) -> None:
    there = Storage("faulty://place")

    def meanwhile() -> BaseException:
        there.driver.write(there.path("x.json"), b'{"by": "another"}')
        return busy()

    faulty.script[:] = [Fault("pipe_file", meanwhile)]
    assert not there.write_json(there.path("x.json"), {"by": "me"}, create_only=True)
    assert there.read_json(there.path("x.json")) == {"by": "another"}


def test_a_server_that_ignores_the_condition_is_refused_by_name_before_any_work(faulty: type[Faulty]) -> None:
    faulty.ignores_conditions = True
    with pytest.raises(NanodlmError, match=r"faulty://.*place lets an existing file be created again.*If-None-Match"):
        new_attempt(Store("faulty://place"), "shard", "f0").__enter__()
    assert not any("create-only" in path for path in faulty.store)


# Addresses


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("ftp://host/folder", r"ftp:// cannot create a file only once.*use a folder, or a bucket at s3:// or gs://"),
        ("simplecache::s3://bucket/x", r"cannot open the store simplecache::s3://bucket/x.*use a folder"),
        ("nosuch://x", r"nosuch:// is not known.*use a folder, or a bucket at s3:// or gs://"),
        ("s3:/bucket/x", "write s3://bucket/x, or ./s3:/bucket/x for a folder"),
        ("file:/data/store", "write file:///data/store, or"),
        ("", "it has no name"),
        ("s3://", "cannot open the store s3://: it names no bucket"),
        ("gs:///prefix", "it names no bucket"),
        ("s3://bucket/a*b", r"prefix must not hold \*, \? or \["),  # or what is below `axb` would be removed with it
        ("memory://bucket/a[b]", r"prefix must not hold \*, \? or \["),
    ],
)
def test_an_address_where_no_store_can_be_is_refused_with_what_to_write(url: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Storage(url)


# One suite for every kind of storage

REMOTE = ("memory", "seaweedfs", "gcs")


@pytest.fixture
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """URL of a folder that is empty, on the kind of storage that the test asks for."""
    kind = getattr(request, "param", "path")
    folder = f"{request.node.originalname}-{tmp_path.name}"
    if kind == "path":
        yield str(tmp_path / "stores" / folder)
    elif kind == "file":
        yield f"file://{tmp_path / 'stores' / folder}"
    elif kind == "memory":
        yield f"memory://{folder}"
        fsspec.filesystem("memory").store.clear()
    else:
        server: Server = request.getfixturevalue(f"{kind}_server")
        server.enter(monkeypatch)
        yield f"{server.store}/{folder}"


everywhere = pytest.mark.parametrize("place", ["path", *REMOTE], indirect=True)
remotely = pytest.mark.parametrize("place", REMOTE, indirect=True)


def in_parts(store: Store, fingerprint: str = "f0") -> Artifact:
    """An artifact that adopts what parts it can and makes the others."""
    with new_attempt(store, "shard", fingerprint) as attempt:
        for name, content in FILES.items():
            if attempt.adopt(name) is None:
                fill(attempt, {name: content})
                attempt.finish(name, [name])
        return attempt.commit(identity=identity(), metrics={})


@everywhere
def test_a_stage_is_built_once_and_found_from_then_on(place: str, tmp_path: Path) -> None:
    source = tmp_path / "corpus.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in prose(60)))
    config = tiny_config(source)
    built, record = run.run_stage("download", config, Store(place))
    found, again = run.run_stage("download", config, Store(place))
    assert (record["status"], again["status"]) == ("built", "cached")
    assert found.manifest == built.manifest
    assert found.check(deep=True).metrics["documents"] == 60
    here, _ = run.run_stage("download", config, Store(str(tmp_path / "here")))
    assert here.digest == built.digest
    assert read(found) == read(here)
    left = [path for path in Store(place).files(Store(place).root) if "/attempts/" not in path]
    assert left == [f"download/{built.fingerprint}/manifest.json"]


@everywhere
def test_finished_parts_are_adopted_when_whole_and_made_again_when_altered(place: str) -> None:
    store = Store(place)
    killed = killed_attempt(store, {name: {name: content} for name, content in FILES.items() if name != "empty"})
    base = ("shard", "f0", "attempts", killed)
    store.driver.write(store.path(*base, "b.bin"), b"OTHER FILE")
    store.driver.remove(store.path(*base, "sub", "c.bin"))
    with new_attempt(Store(place), "shard", "f0") as attempt:
        assert [name for name in FILES if attempt.adopt(name) is not None] == ["a.bin"]
    first = in_parts(Store(place))
    assert read(first) == FILES
    Store(place).retire(("shard", "f0"))
    assert Store(place).find("shard", "f0") is None
    again = in_parts(Store(place))
    assert again.manifest["attempt"] != first.manifest["attempt"]
    assert (again.digest, read(again)) == (first.digest, FILES)


@everywhere
def test_each_damage_is_named_and_nothing_damaged_is_read(place: str) -> None:
    store = Store(place)

    def damaged(name: str, damage: Callable[[Callable[[str], str]], object]) -> list[list[str]]:
        artifact = committed(store, FILES, fingerprint=name)
        damage(artifact.remote)
        with pytest.raises(Damaged, match=r"nanodlm verify .*--repair"):
            artifact.local()
        return [list(artifact.problems(deep=deep)) for deep in (False, True)]

    def swap(path: Callable[[str], str]) -> None:
        for name, other in (("a.bin", "b.bin"), ("b.bin", "a.bin")):
            store.driver.write(path(name), FILES[other])

    assert damaged("missing", lambda path: store.driver.remove(path("b.bin"))) == [["b.bin"], ["b.bin"]]
    assert damaged("cut", lambda path: store.driver.write(path("a.bin"), b"first fil")) == [["a.bin"], ["a.bin"]]
    assert damaged("flipped", lambda path: store.driver.write(path("a.bin"), b"first filf")) == [[], ["a.bin"]]
    assert damaged("swapped", swap) == [[], ["a.bin", "b.bin"]]


@everywhere
def test_a_collection_removes_what_nobody_needs_and_nothing_else(place: str) -> None:
    store = Store(place)
    abandoned = killed_attempt(store, {"a": {"a.bin": b"aa"}})
    kept = committed(store, FILES)
    to_continue = killed_attempt(store, {"a": {"a.bin": b"aa"}}, fingerprint="f1")
    assert list(collect.collect(store)) == []  # all is young
    said = [row["uri"] for row in collect.collect(store, grace=-60)]
    assert said == [store.uri("shard", "f0", "attempts", abandoned)]
    assert list(collect.collect(store, grace=-60)) == []
    assert read(Store(place).open("shard/f0")) == FILES
    with new_attempt(Store(place), "shard", "f1") as attempt:
        assert attempt.earlier == {"a": [to_continue]}
        assert attempt.adopt("a") == {"rows": 1}
    said = [row["uri"] for row in collect.collect(store, keep_last=0, grace=-60)]
    assert kept.uri in said
    assert Store(place).find("shard", "f0") is None
    list(collect.collect(store, grace=-60, older_than=-60))
    assert not [path for path in store.files(store.root) if path.startswith("shard/f0/attempts")]


@everywhere
def test_a_copy_in_another_store_is_equal_and_made_once(place: str, tmp_path: Path) -> None:
    digest = committed(Store(f"{place}/one"), FILES).digest
    one, other, here, back = f"{place}/one", f"{place}/other", str(tmp_path / "here"), f"{place}/back"
    for source, target in ((one, other), (one, here), (here, back)):
        assert copied(Store(source), Store(target)) == {"shard": True}
        assert copied(Store(source), Store(target)) == {"shard": False}
        found = Store(target).open("shard/f0")
        assert (found.digest, read(found)) == (digest, FILES)


@pytest.mark.parametrize("place", ["path", "seaweedfs", "gcs"], indirect=True)
def test_of_writers_at_once_one_creates_and_all_read_its_file(place: str) -> None:
    """A dictionary in memory cannot promise this to threads; it is for tests."""
    there, writers, rounds = Storage(place), 3, 4
    together = threading.Barrier(writers)

    def write(number: int) -> list[bool]:
        won = []
        for i in range(rounds):
            together.wait(30)
            won.append(there.write_json(there.path(f"{i}.json"), {"by": number}, create_only=True))
        return won

    with ThreadPoolExecutor(writers) as pool:
        won = list(pool.map(write, range(writers)))
    for i in range(rounds):
        winners = [number for number in range(writers) if won[number][i]]
        assert len(winners) == 1
        assert there.read_json(there.path(f"{i}.json")) == {"by": winners[0]}


@pytest.mark.parametrize("place", ["path", "file", *REMOTE], indirect=True)
def test_prefixes_may_have_odd_names(place: str) -> None:
    prefix = "a b/plus+minus/per%20cent/ümlaut/日本/a=b&c,d;e@f/dots.../x..y"
    prefix += "" if "://" in place else "/[ab]*?"  # a bucket's are refused
    store = Store(f"{place}/{prefix}")
    odd = {"x y+z%41.bin": b"odd", "ü/ñ": b"letters"}
    artifact = committed(store, odd)
    assert list(Store(f"{place}/{prefix}")) == [("shard", "f0")]
    assert read(Store(store.uri()).open(artifact.uri)) == odd
    paths = {f"shard/f0/attempts/{artifact.manifest['attempt']}/{name}" for name in odd}
    assert set(store.files(store.root)) == {"shard/f0/manifest.json", *paths}
    assert list(collect.collect(store, grace=-60)) == []
    assert read(store.open("shard/f0")) == odd


@everywhere
def test_a_forgotten_part_is_gone_and_is_neither_committed_nor_adopted_later(place: str) -> None:
    store = Store(place)
    with pytest.raises(Killed), new_attempt(store, "shard", "f0") as attempt:
        fill(attempt, {"a.bin": b"aa", "b.bin": b"bb"})
        attempt.finish("a", ["a.bin"])
        attempt.finish("b", ["b.bin"])
        attempt.forget("a")
        raise Killed
    assert set(store.files(store.path("shard", "f0", "attempts", attempt.id))) == {"b.bin", "parts/b.json"}
    with new_attempt(store, "shard", "f0") as later:
        assert later.adopt("a") is None
        assert later.adopt("b") == {}
        artifact = later.commit(identity=identity(), metrics={})
    assert [file["path"] for file in artifact.files()] == ["b.bin", "parts/b.json"]


def sizes(there: Storage, folder: str) -> dict[str, int]:
    return {path: found.size for path, found in there.files(folder).items()}


@everywhere
def test_a_listing_is_never_stale(place: str) -> None:
    there = Storage(place)
    elsewhere = Storage(place).driver
    assert sizes(there, there.root) == {}
    there.write_json(there.path("sub", "x.json"), 1)
    assert sizes(there, there.root) == {"sub/x.json": 1}
    elsewhere.write(there.path("sub", "y.json"), b"22")
    assert sizes(there, there.root) == {"sub/x.json": 1, "sub/y.json": 2}
    elsewhere.remove(there.path("sub", "x.json"))
    assert sizes(there, there.root) == {"sub/y.json": 2}
    assert sizes(there, there.path("sub")) == {"y.json": 2}
    assert sizes(there, there.path("su")) == {}
    (found,) = there.files(there.root).values()
    assert abs(found.changed - time.time()) < 60


@everywhere
def test_reading_and_removing_what_is_not_there_is_told_apart(place: str, tmp_path: Path) -> None:
    there = Storage(place)
    there.write_json(there.path("x.json"), "abc")
    there.driver.write(there.path("torn.json"), b'{"a"')
    assert there.read_json(there.path("no.json")) is None
    with pytest.raises(Damaged, match=r"torn\.json holds no record"):
        there.read_json(there.path("torn.json"))
    with pytest.raises(FileNotFoundError):
        there.driver.read(there.path("no.json"), 9)
    with pytest.raises(FileNotFoundError):
        there.get(there.path("no.json"), tmp_path / "no.json", 3)
    there.remove(there.path("no.json"), there.path("torn.json"))
    there.remove_folder(there.path("no"))
    assert sizes(there, there.root) == {"x.json": 5}
    there.remove_folder(there.root)
    assert sizes(there, there.root) == {}


@everywhere
def test_a_checkpoint_is_found_by_its_address_and_verified(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, name = Store(place), "checkpoints/step_000100"
    files = {f"{name}/model/a": b"weights", f"{name}/model/b": b"more"}
    with new_attempt(store, "train", "f0") as attempt:
        fill(attempt, files)
        attempt.finish(name, list(files), loss=1.5)
        under_way = find_checkpoint(f"{attempt.uri('checkpoints')}/step_100")
        attempt.commit(identity=identity("train"), metrics={})
    for base in (store.uri("train", "f0"), store.uri("train", "f0", "checkpoints")):
        part = find_checkpoint(f"{base}/step_0100")
        assert (part.info, part.digest, part.uri) == ({"loss": 1.5}, under_way.digest, under_way.uri)
    folder = part.local()
    assert (folder / name / "model" / "a").read_bytes() == b"weights"
    with pytest.raises(UsageError, match=r"no finished checkpoint step_000007 .*there are step_000100"):
        find_checkpoint(f"{store.uri('train', 'f0')}/step_7")
    store.driver.write(f"{part.folder}/{name}/model/b", b"mere")
    monkeypatch.setenv("NANODLM_CACHE", str(tmp_path / "empty"))
    with pytest.raises(Damaged, match=r"model/b has been altered.*; start from another checkpoint"):
        part.local()
    store.driver.remove(f"{part.folder}/{name}/model/b")
    with pytest.raises(Damaged, match=r"model/b is missing"):
        part.local()


# The cache of what lies in remote stores


@remotely
def test_the_cache_throws_out_what_was_used_longest_ago_and_never_what_is_in_use(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def entries() -> set[str]:
        copies = {path.name for path in (cache.cache_dir() / "files").iterdir()}
        return {name for name, artifact in artifacts.items() if artifact.files()[0]["sha256"] in copies}

    monkeypatch.setenv("NANODLM_CACHE_GB", "0.000025")
    store = Store(place)
    artifacts = {name: committed(store, {"x": name.encode() * 5000}, fingerprint=name) for name in ("f0", "f1", "f2")}
    for name in ("f0", "f1"):
        artifacts[name].local()
    used = cache.cache_dir() / "files" / artifacts["f0"].files()[0]["sha256"]
    os.utime(used, (9, 9))
    with pytest.raises(NanodlmError, match=r"may hold 2.5e-05 GB, of which 2e-05 are in use, and 1e-05 more"):
        artifacts["f2"].local()
    assert {"f0", "f1"} <= entries()
    let_go_of_the_cache()
    os.utime(used, (9, 9))
    assert (artifacts["f2"].local() / "x").read_bytes() == b"f2" * 5000
    assert entries() == {"f1", "f2"}
    assert (artifacts["f1"].local() / "x").read_bytes() == b"f1" * 5000
    let_go_of_the_cache()
    assert (artifacts["f0"].local() / "x").read_bytes() == b"f0" * 5000  # it is fetched again


@remotely
def test_a_scribbled_copy_is_fetched_again(place: str) -> None:
    artifact = committed(Store(place), FILES)
    (own,) = (cache.cache_dir() / "processes").iterdir()
    assert list(own.iterdir()) == [], "an attempt leaves nothing there"
    folder = artifact.local()
    kept = (folder / "b.bin").stat().st_ino
    (folder / "a.bin").write_bytes(b"scribbled!")
    assert read(artifact) == FILES
    assert (folder / "b.bin").stat().st_ino == kept, "what is whole is not fetched again"


# What only servers do


@pytest.mark.parametrize("place", ["moto", "gcs"], indirect=True)
def test_a_bucket_that_is_not_there_is_one_clear_error_before_any_work(place: str) -> None:
    protocol = place.partition("://")[0]
    store = Store(f"{protocol}://nobody-made-this/runs")
    assert store.find("shard", "f0") is None
    for look in (lambda: list(store), lambda: list(collect.collect(store)), lambda: store.locate("shard/f0")):
        with pytest.raises(NanodlmError, match=rf"cannot list {protocol}://nobody-made-this/runs: .*no such bucket"):
            look()
    with pytest.raises(NanodlmError, match=rf"cannot write to the store {protocol}://nobody-made-this/runs: .*bucket"):
        new_attempt(store, "shard", "f0").__enter__()


def test_a_wrong_secret_is_one_line_at_once(
    seaweedfs_server: Server, monkeypatch: pytest.MonkeyPatch, pauses: list[float]
) -> None:
    environ = s3_environ(seaweedfs_server.endpoint, secret="hunter2-not-it")
    replace(seaweedfs_server, environ=environ).enter(monkeypatch)
    store = Store(f"{seaweedfs_server.store}/refused")
    for ask in (lambda: store.find("shard", "f0"), lambda: list(store), store.require_create_only):
        with pytest.raises(NanodlmError, match=r"refuses access: .*credentials in the environment") as caught:
            ask()
        assert "hunter2" not in str(caught.value)
        assert "\n" not in str(caught.value)
    forget_connections()
    assert pauses == []


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("place", ["seaweedfs", "gcs"], indirect=True)
def test_the_whole_pipeline_on_a_server_gives_the_digests_of_a_local_run(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def built(url: str, status: str) -> dict[str, str]:
        found = {}
        for name in table.NAMES:
            artifact, record = run.run_stage(name, tiny(exp={"save_every": 6, "val_rows": 0}), Store(url))
            assert record["status"] == status
            found[name] = artifact.check(deep=True).digest
        return found

    monkeypatch.chdir(tmp_path)
    assert built("here", "built") == built(place, "built") == built(place, "cached")
    assert {path.name for path in tmp_path.iterdir()} <= {"cache", "here"}  # no folder named s3: or gs:


def test_leases_are_taken_over_on_remote_storage(
    moto_server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    moto_server.enter(monkeypatch)
    monkeypatch.setattr(lease, "LEASE_SECONDS", 0.6)
    monkeypatch.setattr(lease, "SETTLE_SECONDS", 0.1)
    store = Store(f"{moto_server.store}/{tmp_path.name}")
    path = store.path("shard", "f0", "lease.json")
    store.write_json(path, {"holder": "gone", "host": "another", "pid": 1, "beat": 3})
    with hold_lease(store, "shard", "f0") as mine:
        assert store.read_json(path)["holder"] == mine["holder"]
    assert store.files(store.root) == {}


@pytest.mark.parametrize("after", ["7", "Wed, 21 Oct 2015 07:28:07 GMT", "", "soon"])
def test_a_server_that_asks_for_a_pause_by_seconds_or_by_a_date_is_given_it(
    monkeypatch: pytest.MonkeyPatch, pauses: list[float], after: str
) -> None:
    monkeypatch.setattr(time, "time", lambda: 1445412480.0)
    answers = iter([httpx.Response(429, headers={"Retry-After": after}), httpx.Response(200)])

    def call() -> int:
        answer = next(answers)
        answer.request = httpx.Request("GET", "http://127.0.0.1")
        return answer.raise_for_status().status_code

    assert retry.ask("x", call) == 200
    assert pauses == [7.0] if "7" in after else pauses[0] < 1
