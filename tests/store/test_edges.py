"""What the store promises beside power cuts, odd caches, other containers, and buckets that count requests."""

import errno
import fcntl
import json
import os
import pwd
import shutil
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import fsspec
import pytest

from nanodlm.data import rows as data_rows
from nanodlm.errors import NanodlmError
from nanodlm.stages import run
from nanodlm.store import Store, cache, hold_lease, new_attempt, owner
from nanodlm.store import lease as store_lease
from nanodlm.store.disk import list_files
from nanodlm.upkeep import collect, verify
from tests.support.helpers import committed, copied, fill, identity, prose, tiny_config
from tests.support.servers import Server, flaky
from tests.support.store import FILES, Killed, killed_attempt, read

# Power cuts


class Flushed:
    """Looks on while files appear, and says what a power cut at that moment would take of what they name."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch):
        self.root, self.files, self.lost = root, set[str](), list[str]()
        self.names: dict[str, set[str]] = defaultdict(set)  # of files and folders, by the folder that was flushed since
        self.appeared: list[str] = []
        for name in ("fsync", "link", "replace"):
            monkeypatch.setattr(os, name, getattr(self, name)(getattr(os, name)))

    def fsync(self, real: Callable[[int], None]) -> Callable[[int], None]:
        def fsync(descriptor: int) -> None:
            real(descriptor)
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            if os.path.isdir(path):
                self.names[path] |= set(os.listdir(path))
            self.files.add(path)

        return fsync

    def link(self, real: Callable[..., None]) -> Callable[..., None]:
        def appears(source: Any, target: Any, **how: Any) -> None:
            real(source, target, **how)
            self.files |= {str(target)} if str(source) in self.files else set()
            if str(target).endswith("manifest.json") or "/parts/" in str(target):
                if Path(target).is_relative_to(self.root):
                    self.appeared.append(str(target))
                    self.lost += self.lacking(Path(target))

        return appears

    replace = link

    def outlives(self, path: Path, root: Path | None = None) -> bool:
        """Whether the name of a file is in its flushed folder, and that in its own, up to the store."""
        below = [one for one in (path, *path.parents) if one.is_relative_to(root or self.root) and one != root]
        return all(one.name in self.names[str(one.parent)] for one in below)

    def lacking(self, record: Path) -> list[str]:
        """What a manifest names, or a part's record, whose own folders go with it."""
        value = json.loads(record.read_text())
        if "attempt" in value:
            folder, root = record.parent / "attempts" / value["attempt"], None
        else:
            folder = root = next(above.parent for above in record.parents if above.name == "parts")
        named = [folder / file["path"] for file in value["files"]]
        lost = [path for path in named if not (str(path) in self.files and self.outlives(path, root))]
        return [f"{path} when {record.name} appeared" for path in lost]


@pytest.mark.parametrize("links", [True, False])
def test_a_power_cut_takes_nothing_that_a_record_or_a_manifest_names(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(source: Any, target: Any, link: Any = os.link) -> None:
        if not str(source).endswith(".tmp") and Path(target).parent.is_dir():
            raise OSError(errno.EPERM, "Operation not permitted")
        link(source, target)

    if not links:
        monkeypatch.setattr(os, "link", refused)
    here = Flushed(tmp_path / "store", monkeypatch)
    store, target = Store(str(tmp_path / "store")), Store(str(tmp_path / "target"))
    killed_attempt(store, {"checkpoints/one": {"checkpoints/one/a.bin": b"a", "checkpoints/one/sub/b.bin": b"b"}})
    with new_attempt(store, "shard", "f0") as attempt:
        assert here.lost == []
        assert attempt.adopt("checkpoints/one") == {"rows": 2}
        here.lost.clear()  # the earlier attempt has it as well, and whoever adopts a part looks at it
        fill(attempt, FILES)
        attempt.finish("a", ["a.bin"])
        artifact = attempt.commit(identity=identity(), metrics={})
    assert here.outlives(Path(artifact.uri, "manifest.json"))
    assert len(here.appeared) >= 3
    there = Flushed(tmp_path / "target", monkeypatch)
    assert copied(store, target) == {"shard": True}
    assert there.outlives(Path(target.uri("shard", "f0", "manifest.json")))
    assert len(there.appeared) == 3
    assert here.lost == []
    assert [line for line in there.lost if "manifest.json" in line] == []


# The cache


@pytest.fixture
def remote() -> Iterator[Store]:
    yield Store("memory://edges/runs")
    fsspec.filesystem("memory").store.clear()


@pytest.mark.parametrize("code", [None, errno.EBADF, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_cache_on_a_disk_without_locks_is_a_cache(
    code: int | None, remote: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Locks do nothing there, or are refused."""

    def flock(descriptor: int, operation: int) -> None:
        if code:
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert read(committed(remote, FILES)) == FILES


def test_a_cache_on_a_disk_without_hard_links_is_a_cache(remote: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(source: Any, target: Any) -> None:
        assert os.stat(source), "which a kernel looks at first"
        assert os.stat(Path(target).parent)
        raise OSError(errno.EPERM, "Operation not permitted")

    artifact = committed(remote, FILES)
    monkeypatch.setattr(os, "link", refused)
    assert read(artifact) == FILES
    monkeypatch.setattr(Store, "get", None)  # whatever fetches fails
    assert read(artifact) == FILES


@pytest.mark.parametrize("when", ["before", "while", "after"])
@pytest.mark.parametrize("again", [False, True], ids=["gone", "made again by another"])
def test_a_cache_that_is_deleted_in_the_middle_of_a_fetch_is_filled_again(
    when: str, again: bool, remote: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nobody says of the store that it is damaged."""
    artifact, get, deleted = committed(remote, FILES), Store.get, threading.Event()

    def delete() -> None:
        if not deleted.is_set():
            deleted.set()
            shutil.rmtree(cache.cache_dir())
            if again:
                (cache.cache_dir() / "files").mkdir(parents=True)

    def getting(self: Store, path: str, target: Path, size: int) -> str:
        if when == "before":
            delete()
        if when == "while":
            with target.open("wb"):
                delete()
                return get(self, path, target, size) if target.exists() else artifact.files()[0]["sha256"]
        sha256 = get(self, path, target, size)
        delete()
        return sha256

    monkeypatch.setattr(Store, "get", getting)
    monkeypatch.setattr("nanodlm.store.files.REQUESTS", 1)
    assert read(artifact) == FILES
    assert deleted.is_set()
    assert read(artifact) == FILES


def test_what_another_process_has_linked_stays_readable_when_its_copy_is_thrown_out(
    remote: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = committed(remote, FILES)
    with monkeypatch.context() as other:
        other.setattr(cache, "this_process", lambda: "another-machine.1.2")
        theirs = artifact.local()
    shutil.rmtree(cache.cache_dir() / "files")
    assert {name: (theirs / name).read_bytes() for name in FILES} == FILES
    assert read(artifact) == FILES


def test_processes_that_fetch_the_same_at_once_all_have_it(remote: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a disk whose locks do nothing; threads stand for processes."""
    artifact, get, together = committed(remote, {"a.bin": b"a" * 9999}), Store.get, threading.Barrier(3)
    one_at_a_time = threading.Lock()  # a storage in memory has one position in a file for all

    def getting(self: Store, path: str, target: Path, size: int) -> str:
        together.wait(20)
        with one_at_a_time:
            sha256 = get(self, path, target, size)
        together.wait(20)
        return sha256

    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    monkeypatch.setattr(cache, "this_process", lambda: f"another-machine.{threading.get_ident()}.1")
    monkeypatch.setattr(Store, "get", getting)
    with ThreadPoolExecutor(3) as processes:
        found = [processes.submit(read, artifact) for _ in range(3)]
        assert [one.result() for one in found] == [{"a.bin": b"a" * 9999}] * 3


def test_threads_that_begin_to_use_a_cache_at_once_all_may(monkeypatch: pytest.MonkeyPatch) -> None:
    mkdir = Path.mkdir

    def after_another(self: Path, **how: Any) -> None:
        os.makedirs(self, exist_ok=True)
        mkdir(self, **how)

    monkeypatch.setattr(Path, "mkdir", after_another)
    assert cache.hold("one").is_dir()


def test_folders_of_processes_that_have_ended_go_and_those_of_others_stay(remote: Store) -> None:
    artifact = committed(remote, FILES)
    ended = owner.this_process().rpartition(".")[0] + ".7"  # its number was given again
    names = {ended: False, owner.this_process(): True, "another-machine.1.2": True, "gone-for-long.1.2": False}
    idle = f"{owner._namespace()}.1.{owner._started(1)}"
    names[idle] = True
    for name in names:
        (cache.cache_dir() / "processes" / name / "x").mkdir(parents=True, exist_ok=True)
    for name in ("gone-for-long.1.2", idle):
        os.utime(cache.cache_dir() / "processes" / name, (9, 9))
    assert read(artifact) == FILES
    assert {name: (cache.cache_dir() / "processes" / name).exists() for name in names} == names


def test_without_a_home_the_cache_is_a_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(_: int) -> None:
        raise KeyError

    for name in ("NANODLM_CACHE", "HOME"):
        monkeypatch.delenv(name)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    assert cache.cache_dir() == tmp_path / f"nanodlm-{os.getuid()}"


# Leases


def test_a_container_with_the_same_host_name_and_process_number_keeps_its_lease(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_lease, "LEASE_SECONDS", 2.0)
    path, waited = store.path("shard", "f0", "lease.json"), threading.Event()
    with monkeypatch.context() as other:
        other.setattr(owner, "_namespace", lambda: "another-container")
        other.setattr(owner, "_started", lambda _: "1")
        held = hold_lease(store, "shard", "f0")
        theirs = held.__enter__()["holder"]

    def wait() -> str:
        with hold_lease(store, "shard", "f0", lambda *_, **__: waited.set()) as mine:
            return mine["holder"]

    with ThreadPoolExecutor(1) as pool:
        mine = pool.submit(wait)
        assert waited.wait(20)
        for _ in range(3):
            threading.Event().wait(0.2)
            assert store.read_json(path)["holder"] == theirs
        held.__exit__(None, None, None)
        assert mine.result(20) != theirs


def test_the_number_of_a_dead_holder_that_was_given_again_is_not_waited_for(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    dead = owner.this_process().rpartition(".")[0] + ".7"
    store.write_json(store.path("shard", "f0", "lease.json"), {"holder": "x", "pid": os.getpid(), "process": dead})
    monkeypatch.setattr("time.sleep", slept.append)
    with hold_lease(store, "shard", "f0"):
        assert slept == [store_lease.SETTLE_SECONDS]


def test_a_process_that_is_another_users_and_cannot_be_seen_has_not_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(number: int, signal: int) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    hidden = f"{owner._namespace()}.4194305.1"  # beyond what a kernel gives
    assert owner.has_ended(hidden)
    monkeypatch.setattr(os, "kill", refused)
    assert not owner.has_ended(hidden)


def test_a_listed_file_that_went_since_is_no_error_and_not_old(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("abc")
    (tmp_path / "gone").write_text("abc")
    listed = list_files(str(tmp_path))
    (tmp_path / "gone").unlink()
    assert (listed["there"].size, listed["gone"].size) == (3, 0)
    assert listed["gone"].changed >= listed["there"].changed


# What others may read


def test_what_is_written_has_the_permissions_that_the_umask_leaves(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        store, target = Store(str(tmp_path / "store")), Store(str(tmp_path / "target"))
        with hold_lease(store, "shard", "f0"), new_attempt(store, "shard", "f0") as attempt:
            fill(attempt, FILES)
            attempt.finish("a", ["a.bin"])
            attempt.commit(identity=identity(), metrics={})
            copied(store, target)
            found = {path: path.stat().st_mode & 0o777 for path in tmp_path.glob("[st]*/**/*")}
    finally:
        os.umask(before)
    assert {path for path, mode in found.items() if mode != (0o750 if path.is_dir() else 0o640)} == set()
    assert {"lease.json", "manifest.json", "a.json", "c.bin"} <= {path.name for path in found}


# Buckets


class Asked:
    """What is asked of an S3 server from now on: the method and path of each request."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str]] = []

    def __call__(self, method: str, path: str) -> str:
        self.requests.append((method, path))
        return ""

    def listings(self) -> int:
        return sum(method == "GET" and "list-type=2" in path for method, path in self.requests)

    def others(self) -> list[str]:
        """The requests that are no listings, by method and the end of their path."""
        found = [(method, path) for method, path in self.requests if "list-type=2" not in path]
        return sorted(f"{method} {path.partition('?')[0].rpartition('/')[2]}" for method, path in found)


@contextmanager
def counted(moto_server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Asked]:
    asked = Asked()
    with flaky(moto_server, asked) as server:
        server.enter(monkeypatch)
        yield asked


@pytest.fixture
def url(moto_server: Server, s3_environment: None, tmp_path: Path) -> str:
    """URL of an empty store in a bucket."""
    return f"{moto_server.store}/{tmp_path.name}"


def test_slashes_too_many_name_the_same_bucket_and_prefix(url: str) -> None:
    odd = url.replace("s3://bucket/", "s3://bucket//")
    one, other = Store(f"{url}/x"), Store(f"{odd}///x/")
    artifact = committed(other, FILES)
    assert one.uri() == other.uri() == f"{url}/x"
    assert list(one) == list(other) == [("shard", "f0")]
    assert artifact.uri == one.open(f"{odd}/x//shard/f0").uri == f"{url}/x/shard/f0"
    assert read(one.open("shard/f0")) == FILES


def test_objects_of_others_with_keys_that_cannot_be_listed_are_one_clear_line(url: str) -> None:
    boto3.client("s3").put_object(Bucket="bucket", Key=f"{url.removeprefix('s3://bucket/')}/a//b", Body=b"")
    with pytest.raises(NanodlmError, match=r"cannot list s3://bucket/.*invalid path.*a//b") as caught:
        list(Store(url))
    assert "\n" not in str(caught.value)


def test_a_copy_to_a_bucket_that_is_not_there_is_one_clear_line(url: str, tmp_path: Path) -> None:
    committed(Store(str(tmp_path / "here")), FILES)
    with pytest.raises(NanodlmError, match=r"cannot write to the store s3://.*: there is no such bucket"):
        copied(Store(str(tmp_path / "here")), Store("s3://nobody-made-this/x"))


def test_what_a_bucket_holds_is_told_by_listings_and_one_request_for_each_manifest(
    moto_server: Server, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(12):
        committed(Store(url), {"a.bin": b"a"}, fingerprint=f"f{number}")
    with counted(moto_server, monkeypatch) as asked:
        store = Store(url)
        assert len(dict(store.artifacts(store))) == 12
        assert asked.others() == ["GET manifest.json"] * 12
        assert asked.listings() == 1
        assert not any(found.problems for found in verify.check(store, list(store)))
        assert asked.others() == ["GET manifest.json"] * 24
        assert asked.listings() == 3


def test_finished_parts_of_a_bucket_are_taken_over_by_one_request_each_and_altered_ones_are_not(
    moto_server: Server, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"{number:02d}.bin" for number in range(30)]
    killed = killed_attempt(Store(url), {name: {name: name.encode()} for name in names})
    with counted(moto_server, monkeypatch) as asked, new_attempt(Store(url), "shard", "f0") as attempt:
        asked.requests.clear()
        assert list(attempt.adopt_finished(names)) == names
        assert asked.others() == sorted(f"GET {name}.json" for name in names)
        assert asked.listings() <= 2
        artifact = attempt.commit(identity=identity(), metrics={})
    moto_server.enter(monkeypatch)
    store = Store(url)
    assert [file["attempt"] for file in artifact.files()] == [killed] * 60, "with the records"
    assert list(collect.collect(store, grace=-60)) == []
    assert read(store.open("shard/f0")) == {name: name.encode() for name in names}
    store.retire(("shard", "f0"))
    store.driver.write(f"{store.path('shard', 'f0', 'attempts', killed)}/07.bin", b"70.bin")
    monkeypatch.setenv("NANODLM_CACHE", str(tmp_path / "empty"))  # or a good copy would be taken from there
    with new_attempt(store, "shard", "f0") as attempt:
        assert list(attempt.adopt_finished(names)) == [name for name in names if name != "07.bin"]


def test_an_artifact_in_two_attempts_of_a_bucket_is_copied_collected_and_repaired_as_any_other(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in prose(400)))
    config, store = tiny_config(tmp_path / "corpus.jsonl", part_mb=0.02), Store(url)
    for name in ("download", "tokenizer", "split"):
        run.run_stage(name, config, store)
    write, here, back = data_rows.write, Store(str(tmp_path / "here")), Store(f"{store.uri()}-back")

    def killed(path: Path, rows: Any) -> None:
        if "00002" in path.name:
            raise Killed
        write(path, rows)

    monkeypatch.setattr(data_rows, "write", killed)
    with pytest.raises(Killed):
        run.run_stage("shard", config, store)
    monkeypatch.setattr(data_rows, "write", write)
    artifact, _ = run.run_stage("shard", config, store)
    item, content = ("shard", artifact.fingerprint), read(artifact)
    assert len({file.get("attempt") for file in artifact.files()}) == 2
    for source, target in ((store, here), (here, back)):
        copied(source, target)
        assert read(target.open(artifact.uri.removeprefix(f"{store.uri()}/"))) == content
        assert [found.problems for found in verify.check(target, [item], deep=True)] == [[]]
    for place in (store, back):
        assert list(collect.collect(place, grace=-60)) == []
        for path in ("train-00000.arrayrecord", "train-00002.arrayrecord"):
            place.driver.write(place.open("shard/" + artifact.fingerprint).remote(path), bytes(len(content[path])))
        (found,) = verify.check(place, [item], deep=True, repair=True)
        assert [line.split()[0] for line in found.problems] == ["train-00000.arrayrecord", "train-00002.arrayrecord"]
        assert found.repaired
        assert [found.problems for found in verify.check(place, [item], deep=True)] == [[]]
        list(collect.collect(place, grace=-60))
        assert read(place.open(f"shard/{artifact.fingerprint}")) == content
