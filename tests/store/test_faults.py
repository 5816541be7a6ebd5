"""What goes wrong and what becomes of it: each row of the table in docs/storage.md, by script and by real kills."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import nanodlm
from nanodlm.errors import Damaged, NanodlmError, Unreachable
from nanodlm.stages import run as stages_run
from nanodlm.stages import table as stages_table
from nanodlm.store import (
    Artifact,
    Store,
    hold_lease,
    new_attempt,
)
from nanodlm.store import (
    attempt as store_attempt,
)
from nanodlm.store import (
    lease as store_lease,
)
from nanodlm.upkeep import collect, verify
from tests.support.faults import Fault, busy, no_space, scripted
from tests.support.helpers import committed, copied, fill, flip, identity, prose, tiny_config
from tests.support.servers import Server, flaky
from tests.support.store import FILES
from tests.support.training import tiny

ROOT = Path(nanodlm.__file__).parents[1]


def test_every_row_of_the_table_names_a_test_that_is_there() -> None:
    text = (ROOT / "docs/storage.md").read_text()
    table = text[text.index("| fault |") :].split("\n\n")[0].splitlines()[2:]
    assert len(table) >= 20
    assert all("::test_" in row.split("|")[3] for row in table)


# Processes that are killed

# A process that builds a stage, and kills itself when it has come to a certain point.
BUILD = """
import os, signal, sys
from nanodlm.config import Config
from nanodlm.data import rows as data_rows
from nanodlm.stages.run import run_stage
from nanodlm.store import Store, files
from nanodlm.store.bucket import Bucket

config, url, moment = Config.model_validate_json(sys.argv[1]), sys.argv[2], sys.argv[3]
store = Store(url)

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

if moment == "in mid-shard":
    write = data_rows.write
    def torn(rows):
        rows = list(rows)
        yield from rows[: len(rows) // 2]
        die()
    data_rows.write = lambda path, rows: write(path, torn(rows) if "train-00002" in path.name else rows)
elif moment == "in mid-upload":
    import boto3
    put = Bucket.put
    def put_half(self, source, target):
        if "train-00002" not in target:
            return put(self, source, target)
        bucket, _, key = target.partition("/")
        named, s3 = {"Bucket": bucket, "Key": key}, boto3.client("s3")
        upload = s3.create_multipart_upload(**named)
        s3.upload_part(**named, PartNumber=1, UploadId=upload["UploadId"], Body=b"half of it")
        die()
    Bucket.put = put_half
elif moment == "just before the manifest":
    write_json = files.Storage.write_json
    def write_but_manifests(self, path, *args, **kwargs):
        return die() if path.endswith("manifest.json") else write_json(self, path, *args, **kwargs)
    files.Storage.write_json = write_but_manifests
run_stage("shard", config, store)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 400 documents, which become several parts."""
    path = tmp_path_factory.mktemp("source") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in prose(400)))
    return path


@pytest.fixture(scope="module")
def undisturbed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the data stages of `tiny_config(source)`."""
    store = tmp_path_factory.mktemp("undisturbed")
    for name in stages_table.until("shard"):
        stages_run.run_stage(name, tiny_config(source), Store(str(store)))
    return store


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take leases over without long pauses."""
    monkeypatch.setattr(store_lease, "SETTLE_SECONDS", 0.05)


def the(store: Store, stage: str = "shard") -> Artifact:
    """The one artifact of a stage."""
    (fingerprint,) = [fingerprint for name, fingerprint in store if name == stage]
    return store.open(f"{stage}/{fingerprint}")


def without_shards(undisturbed: Path, url: str) -> Store:
    """A store that has all but the shards."""
    source, target = Store(str(undisturbed)), Store(url)
    assert len(copied(source, target, [item for item in source if item[0] != "shard"])) == 3
    return target


@pytest.fixture(params=["disk", "s3"])
def place(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """URL of an empty store, on disk or on S3."""
    if request.param == "disk":
        return str(tmp_path / "store")
    server: Server = request.getfixturevalue("moto_server")
    server.enter(monkeypatch)
    return f"{server.store}/{tmp_path.name}"


MOMENTS = [("disk", "in mid-shard"), ("disk", "just before the manifest"), ("s3", "in mid-upload")]


@pytest.mark.parametrize(("place", "moment"), MOMENTS, indirect=["place"])
def test_a_build_killed_at_any_moment_is_continued_to_the_same_digest(
    place: str, moment: str, source: Path, undisturbed: Path
) -> None:
    store, config = without_shards(undisturbed, place), tiny_config(source)
    done = subprocess.run([sys.executable, "-c", BUILD, config.model_dump_json(), place, moment], timeout=100)
    assert done.returncode == -signal.SIGKILL
    assert not [item for item in store if item[0] == "shard"]
    finished = [path for path in store.files(store.path("shard")) if "/parts/" in path]
    assert len(finished) >= 2
    artifact, record = stages_run.run_stage("shard", config, store)
    assert record["status"] == "built"
    assert artifact.digest == the(Store(str(undisturbed))).digest
    assert artifact.problems(deep=True) == {}
    name = finished[0].split("/parts/")[1].removesuffix(".json")
    with new_attempt(store, "shard", artifact.fingerprint) as attempt:  # in a bucket it stays where it was made
        assert len(attempt.earlier[name]) == (2 if store.is_local else 1)
    if moment == "in mid-upload":
        assert "upload" in [row["kind"] for row in collect.collect(store, grace=-60)]


# What is damaged


def altered(content: bytes) -> Iterator[bytes]:
    """A file with its last byte cut off, with each byte flipped, and with nothing left."""
    yield content[:-1]
    yield b""
    for i in range(len(content)):
        yield content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :]


def test_no_altered_byte_of_a_manifest_goes_unnoticed(store: Store) -> None:
    artifact = committed(store, FILES)
    path = Path(store.path("shard", "f0", "manifest.json"))
    refused = 0
    for content in altered(path.read_bytes()):
        path.write_bytes(content)
        try:
            found = store.find("shard", "f0")
        except Damaged:
            refused += 1
        else:  # a byte that JSON does not care about
            assert found == artifact
    assert refused > 1000


def test_no_altered_byte_of_a_parts_record_goes_unnoticed(store: Store) -> None:
    with new_attempt(store, "shard", "f0") as attempt:
        fill(attempt, FILES)
        attempt.finish("all", list(FILES), rows=3)
    path = attempt.path / "parts" / "all.json"
    record = store.part(str(attempt.path), "all")
    assert record is not None
    for content in altered(path.read_bytes()):
        path.write_bytes(content)
        assert store.part(str(attempt.path), "all") in (None, record)


def test_no_altered_byte_of_a_file_goes_unnoticed(store: Store) -> None:
    artifact = committed(store, FILES)
    for name, content in FILES.items():
        path = Path(artifact.remote(name))
        for other in altered(content):
            path.write_bytes(other)
            with pytest.raises(Damaged, match=name):
                artifact.local()
        path.write_bytes(content)
    assert artifact.local().is_dir()


def swap(one: Path, other: Path) -> None:
    aside = one.rename(one.with_name("aside"))
    other.rename(one)
    aside.rename(other)


DAMAGES: dict[str, Callable[[Path, Path], object]] = {
    "cut": lambda one, _: one.write_bytes(one.read_bytes()[:-1]),
    "flip": lambda one, _: flip(one),
    "delete": lambda one, _: one.unlink(),
    "swap": swap,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_shards_are_refused_and_repaired_to_the_same_digest(
    damage: str, undisturbed: Path, source: Path, store: Store
) -> None:
    shutil.copytree(undisturbed, store.root)
    artifact = the(store)
    one, other = (Path(artifact.remote(f"train-0000{i}.arrayrecord")) for i in (1, 2))
    DAMAGES[damage](one, other)
    with pytest.raises(Damaged, match=r"train-00001\.arrayrecord .*nanodlm verify .*--repair"):
        artifact.local()
    everything = verify.chain(store, ("shard", artifact.fingerprint))
    found = {item.stage: item.problems for item in verify.check(store, everything, deep=True)}
    assert [line.split()[0] for line in found.pop("shard")] == [one.name, other.name][: 2 if damage == "swap" else 1]
    assert not any(found.values())
    repaired = [item.stage for item in verify.check(store, everything, deep=True, repair=True) if item.repaired]
    assert repaired == ["shard"]
    again, record = stages_run.run_stage("shard", tiny_config(source), store)
    assert (again.check(deep=True).digest, record["status"]) == (artifact.digest, "cached")


# Storage that does not answer


def test_a_wire_that_fails_loses_nothing_and_commits_once(
    moto_server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Every tenth request or so is answered with 503, cut off before or cut off after; with it that of the commit."""
    count, fates = 0, {3: "busy", 11: "reset", 17: "unheard", 29: "busy", 41: "reset", 53: "unheard"}
    commits: list[str] = []

    def fail(method: str, path: str) -> str:
        nonlocal count
        if method == "PUT" and path.partition("?")[0].endswith("/shard/f0/manifest.json"):
            commits.append("unheard" if not commits else "")
            return commits[-1]
        count += 1
        return fates.get(count, "")

    with flaky(moto_server, fail) as server:
        server.enter(monkeypatch)
        store = Store(f"{server.store}/{tmp_path.name}")
        artifact = committed(store, {f"{i:02d}": bytes([i]) * 100 for i in range(20)})
        found = store.open("shard/f0")
        assert found.manifest == artifact.manifest
        assert found.problems(deep=True) == {}
        assert len(list(found.local().iterdir())) == 20
    assert commits[0] == "unheard"
    assert len(commits) > 1  # the driver has asked again
    assert count > 53


@pytest.mark.slow
def test_training_goes_on_while_its_checkpoint_cannot_be_published(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANODLM_RETRY_SECONDS", "60")
    config = tiny(exp={"save_every": 4, "log_every": 1, "keep": 3, "keep_best": 0})
    reached: list[int] = []
    failed_at: list[int] = []

    def emit(kind: str, **fields: Any) -> None:
        if kind == "progress" and fields["unit"] == "updates":
            reached.append(fields["done"])

    def fail() -> Exception:
        failed_at.append(max(reached, default=0))
        return busy()

    # Were the first checkpoint waited for, update 6 would not be reached, and this would be given up after a minute.
    fault = Fault("put_file", fail, "step_000004", times=99, until=lambda: len(failed_at) > 2 and failed_at[-1] > 5)
    with scripted(fault):
        run = nanodlm.train(config, "faulty://place", emit)
        assert run.problems(deep=True) == {}
        assert run.files("checkpoints/step_000004/")
    assert len(failed_at) >= 3


def test_a_storage_that_stays_away_ends_the_run_and_the_next_continues(
    source: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANODLM_RETRY_SECONDS", "0.1")
    with scripted(Fault("put_file", busy, "part-00002", times=float("inf"))) as storage:
        store = Store("faulty://place")
        with pytest.raises(Unreachable, match=r"does not answer: .*what is finished is kept, run again to continue"):
            stages_run.run_stage("download", tiny_config(source), store)
        storage.script.clear()
        storage.asked.clear()
        artifact, _ = stages_run.run_stage("download", tiny_config(source), store)
        assert artifact.digest == the(Store(str(undisturbed)), "download").digest
        sent = {path.rpartition("/")[2] for request, path in storage.asked if request == "put_file"}
        assert "part-00002.arrow" in sent
        assert not {"part-00000.arrow", "part-00001.arrow"} & sent, "what was finished is not sent again"


# Disks that are full or cannot be written

LIMITED = """
import resource, sys
from nanodlm.config import Config
from nanodlm.errors import NanodlmError
from nanodlm.stages.run import run_stage
from nanodlm.store import Store

resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
try:
    run_stage("shard", Config.model_validate_json(sys.argv[2]), Store(sys.argv[3]))
except NanodlmError as error:
    sys.exit(str(error))
"""


def test_a_disk_that_takes_no_more_ends_the_run_in_one_line_and_nothing_torn_is_kept(
    undisturbed: Path, source: Path, store: Store
) -> None:
    """The kernel refuses bytes beyond a limit, whoever writes them, also libraries that are not Python."""
    without_shards(undisturbed, store.root)
    config = tiny_config(source)
    command = [sys.executable, "-c", LIMITED, "6000", config.model_dump_json(), store.root]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert not [item for item in store if item[0] == "shard"]
    artifact, _ = stages_run.run_stage("shard", config, store)
    assert artifact.digest == the(Store(str(undisturbed))).digest
    said = done.stderr.strip().splitlines()
    assert len(said) == 1, done.stderr
    assert "make room" in said[0]


def test_a_full_remote_storage_ends_the_run_in_one_line(source: Path) -> None:
    with scripted(Fault("put_file", no_space, "part-00001", times=float("inf"))) as storage:
        store = Store("faulty://place")
        with pytest.raises(NanodlmError, match=r"nothing more fits.*make room.*run again") as caught:
            stages_run.run_stage("download", tiny_config(source), store)
        assert "\n" not in str(caught.value)
        assert list(store) == []
        storage.script.clear()
        assert stages_run.run_stage("download", tiny_config(source), store)[0].problems(deep=True) == {}


def test_a_cache_that_cannot_be_written_is_one_line(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    with scripted():
        artifact = committed(Store("faulty://place"), FILES)
        for folder in (str(tmp_path / "file" / "cache"), "/proc/nanodlm"):
            monkeypatch.setenv("NANODLM_CACHE", folder)
            build = partial(stages_run.run_stage, "download", tiny_config(source), Store("faulty://place"))
            for use in (artifact.local, build):
                with pytest.raises(NanodlmError, match=rf"cannot write to the cache {folder}: .*NANODLM_CACHE") as said:
                    use()
                assert "\n" not in str(said.value)
    assert stages_run.run_stage("download", tiny_config(source), Store(str(tmp_path / "store")))[0].check()


# Several at once


def test_a_reader_can_finish_although_what_it_reads_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, long = Store(str(tmp_path)), 2 * collect.GRACE_SECONDS

    def a_while_passes() -> None:
        for path in tmp_path.rglob("*"):
            os.utime(path, (time.time() - long,) * 2)

    with monkeypatch.context() as earlier:
        earlier.setattr(time, "gmtime", lambda gmtime=time.gmtime: gmtime(time.time() - long))
        reading = committed(store, FILES)
    a_while_passes()
    assert [row["kind"] for row in collect.collect(store, keep_last=0)] == ["artifact"]
    assert store.find("shard", "f0") is None
    assert list(collect.collect(store)) == []
    assert {name: (reading.local() / name).read_bytes() for name in FILES} == FILES
    a_while_passes()
    assert [row["kind"] for row in collect.collect(store)] == ["attempt", "leftover"]
    with pytest.raises(Damaged, match="is missing"):
        reading.local()


@pytest.mark.parametrize("which", [1, 2])
def test_a_collector_that_cannot_list_everything_removes_nothing(
    which: int, moto_server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    listings = 0

    def fail(method: str, path: str) -> str:
        nonlocal listings
        listings += method == "GET" and "list-type=2" in path
        return "refused" if listings == which and "list-type=2" in path else ""

    moto_server.enter(monkeypatch)
    url = f"{moto_server.store}/{tmp_path.name}"
    committed(Store(url), FILES)
    with flaky(moto_server, fail) as server:
        server.enter(monkeypatch)
        try:
            assert list(collect.collect(Store(url), grace=-60)) == []
        except NanodlmError as error:
            assert "refuses access" in str(error)
    moto_server.enter(monkeypatch)
    assert Store(url).open("shard/f0").check(deep=True)


def test_readers_beside_a_collector_get_all_or_a_clear_error(store: Store) -> None:
    seen, stop = [], threading.Event()

    def collecting() -> None:
        while not stop.is_set():
            committed(store, FILES)
            list(collect.collect(store, keep_last=0, grace=-60))

    with ThreadPoolExecutor(1) as pool:
        collector = pool.submit(collecting)
        while not collector.done() and (len(seen) < 10 or FILES not in seen):
            if found := store.find("shard", "f0"):
                with contextlib.suppress(Damaged, FileNotFoundError):  # it was collected while it was read
                    folder = found.local()
                    seen.append({name: (folder / name).read_bytes() for name in FILES})
        stop.set()
        collector.result()
    assert all(read == FILES for read in seen)


# Processes that begin at the same moment: one imports everything, then forks the others, which have opened nothing yet.
TOGETHER = """
import multiprocessing, sys, time
from nanodlm.config import Config
from nanodlm.data import sources
from nanodlm.stages.run import run_stage
from nanodlm.store import Store, lease, new_attempt
from tests.support.helpers import fill, identity

what, url, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
context = multiprocessing.get_context("fork")
together = context.Barrier(count)
lease.SETTLE_SECONDS = 0.05

def build(number):
    config = Config.model_validate_json(sys.argv[4])
    def emit(kind, **fields):
        if kind == "progress":
            time.sleep(0.05)  # long enough for the others to meet it at work
    together.wait()
    return run_stage("download", config, Store(url), emit=emit)[1]["status"]

def commit(number):
    store = Store(url)
    with new_attempt(store, "shard", "f0") as attempt:
        fill(attempt, {"same.bin": bytes([number]) * 1000, f"only-{number}.bin": b"mine"})
        together.wait()
        artifact = attempt.commit(identity=identity(), metrics={"by": number})
    return artifact.metrics["by"]

def run(number, answers):
    answers.put({"build": build, "commit": commit}[what](number))

answers = context.Queue()
processes = [context.Process(target=run, args=(number, answers)) for number in range(count)]
for process in processes:
    process.start()
print(sorted(answers.get(timeout=90) for _ in processes))
for process in processes:
    process.join()
"""


def together(what: str, url: str, count: int, *more: str) -> Any:
    """What each of several processes says that did something at once."""
    command = [sys.executable, "-c", TOGETHER, what, url, str(count), *more]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.replace("'", '"'))


def test_of_ten_runs_at_once_one_builds_and_nine_find(source: Path, tmp_path: Path) -> None:
    said = together("build", str(tmp_path), 10, tiny_config(source).model_dump_json())
    assert said == ["built", *["cached"] * 9]
    assert len(list(tmp_path.glob("download/*/attempts/*"))) == 1
    assert the(Store(str(tmp_path)), "download").problems(deep=True) == {}
    assert not list(tmp_path.glob("download/*/lease.json"))


def test_without_leases_there_is_one_manifest_and_files_never_mix(place: str) -> None:
    said = together("commit", place, 4)
    assert len(set(said)) == 1
    artifact = the(Store(place))
    assert artifact.metrics == {"by": said[0]}
    folder = artifact.local()
    assert (folder / "same.bin").read_bytes() == bytes([said[0]]) * 1000
    assert sorted(file["path"] for file in artifact.files()) == [f"only-{said[0]}.bin", "same.bin"]
    assert artifact.problems(deep=True) == {}


@pytest.mark.parametrize("days", [-1, 1])
def test_clocks_a_day_apart_change_nothing(days: int, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    shift = timedelta(days=days)

    class Elsewhere(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.now(tz) + shift

    with new_attempt(store, "shard", "f0") as here:
        fill(here, {"a.bin": b"first file", "mine": b"x"})
        here.finish("a.bin", ["a.bin"], rows=1)
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(store_attempt, "datetime", Elsewhere)
            elsewhere.setattr(time, "time", lambda now=time.time: now() + shift.total_seconds())
            with new_attempt(store, "shard", "f0") as there:
                assert (there.id < here.id) == (days < 0)
                assert there.adopt("a.bin") == {"rows": 1}
                fill(there, {"theirs": b"y"})
                won = there.commit(identity=identity(), metrics={})
        lost = here.commit(identity=identity(), metrics={})
    assert lost.manifest == won.manifest
    folder = store.open("shard/f0").local()
    assert {p.name for p in folder.iterdir() if p.is_file()} == {"a.bin", "theirs"}
    monkeypatch.setattr(store_lease, "LEASE_SECONDS", 0.6)  # a lease is not older for a clock that is ahead
    monkeypatch.setattr(time, "time", lambda now=time.time: now() + shift.total_seconds())
    with hold_lease(store, "shard", "f1") as mine:
        time.sleep(1)
        assert store.read_json(store.path("shard", "f1", "lease.json"))["holder"] == mine["holder"]


HELD = """
import sys
from pathlib import Path
from nanodlm.store import Store, hold_lease, lease, new_attempt
from tests.support.helpers import fill, identity

lease.LEASE_SECONDS, lease.SETTLE_SECONDS = 0.6, 0.05
store = Store(sys.argv[1])
with hold_lease(store, "shard", "f0"), new_attempt(store, "shard", "f0") as attempt:
    fill(attempt, {"a.bin": b"of the stopped", "stopped.bin": b"x"})
    print("building", flush=True)
    sys.stdin.readline()
    artifact = attempt.commit(identity=identity(), metrics={})
print(artifact.manifest["attempt"], flush=True)
"""


def test_a_holder_that_was_stopped_past_its_lease_loses_cleanly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_lease, "LEASE_SECONDS", 0.6)
    store, told = Store(str(tmp_path)), []
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", HELD, store.root], cwd=ROOT, text=True, **pipes) as stopped:
        try:
            assert stopped.stdout is not None
            assert stopped.stdout.readline() == "building\n"
            stopped.send_signal(signal.SIGSTOP)
            lease = hold_lease(store, "shard", "f0", lambda _, text: told.append(text))
            with lease, new_attempt(store, "shard", "f0") as attempt:
                assert told == [f"process {stopped.pid} on {os.uname().nodename} is building it; waiting"]
                fill(attempt, {"a.bin": b"of the other"})
                stopped.send_signal(signal.SIGCONT)
                won = attempt.commit(identity=identity(), metrics={})
                said, _ = stopped.communicate("\n", timeout=60)
                held = store.read_json(store.path("shard", "f0", "lease.json"))
                assert held is None or held["pid"] in (os.getpid(), stopped.pid)
        finally:
            stopped.kill()
    assert stopped.returncode == 0
    assert said.strip() == won.manifest["attempt"] == the(store).manifest["attempt"]
    assert [p.name for p in (tmp_path / "shard" / "f0" / "attempts").iterdir()] == [won.manifest["attempt"]]
