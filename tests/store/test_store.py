import errno
import hashlib
import json
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanodlm.errors import Damaged, NanodlmError
from nanodlm.store import (
    Artifact,
    Attempt,
    Store,
    fingerprint_of,
    hold_lease,
    lease_events,
    new_attempt,
)
from nanodlm.store import (
    lease as store_lease,
)
from nanodlm.store.manifest import canonical_json
from nanodlm.upkeep.collect import collect
from tests.support.helpers import committed, fill, identity
from tests.support.store import FILES, Killed, killed_attempt


def manifest_path(store: Store) -> Path:
    return Path(store.path("shard", "f0", "manifest.json"))


@pytest.fixture
def lease(store: Store) -> Path:
    return Path(store.path("shard", "f0", "lease.json"))


# Canonical JSON and fingerprints


@pytest.mark.parametrize("value", [math.nan, math.inf, {"a": [-math.inf]}])
def test_canonical_json_refuses_numbers_that_json_lacks(value: object) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(value)


@pytest.mark.parametrize("value", [{(1, 2): "a"}, {"a": {1, 2}}, b"bytes", Path("p"), [object()], datetime(2026, 1, 1)])
def test_canonical_json_refuses_types_that_it_would_have_to_guess_a_text_for(value: object) -> None:
    with pytest.raises(TypeError, match=r"not JSON serializable|keys must be str"):
        canonical_json(value)


def test_a_bool_and_a_number_and_a_string_have_different_fingerprints() -> None:
    values: list[object] = [1, 1.0, True, "1", "true", None, [1], {"v": 1}]
    assert len({fingerprint_of({"v": value}) for value in values}) == len(values)


def test_the_fingerprint_of_a_known_identity_never_changes() -> None:
    known = {"stage": "train", "lr": 0.004, "layers": 3, "flags": [True, None], "name": "ä"}
    assert fingerprint_of(known) == "f72ecdfacaa40ae54ef53dca7b9650ca2b3602ba6f7c1fa0518dfd4259d3dd97"


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(derandomize=True, max_examples=50, deadline=None)
@given(value=JSON_VALUES)
def test_canonical_json_says_all_of_a_value_in_ascii(value: object) -> None:
    text = canonical_json(value)
    assert text.isascii()
    assert json.loads(text) == value
    assert canonical_json(json.loads(text)) == text


# Committing


def test_a_committed_artifact_is_found_with_its_files_and_metrics(store: Store) -> None:
    with new_attempt(store, "shard", "f0") as attempt:
        fill(attempt, FILES)
        attempt.commit(identity=identity(), metrics={"rows": 3})
    found = store.find("shard", "f0")
    assert found is not None
    assert found.metrics == {"rows": 3}
    assert {name: (found.local() / name).read_bytes() for name in FILES} == FILES
    assert list(store) == [("shard", "f0")]
    assert store.open(found.uri).digest == store.open("shard/f0").digest == found.digest
    assert store.open(f"{found.uri}/manifest.json").digest == found.digest
    assert manifest_path(store).stat().st_mode & 0o777 == 0o644, "others may read it"


def test_opening_a_store_creates_nothing(store: Store) -> None:
    assert store.find("shard", "f0") is None
    assert list(store) == []
    with pytest.raises(NanodlmError, match=r"no artifact at shard/f0.*nanodlm ls"):
        store.open("shard/f0")
    assert not Path(store.root).exists()


def test_a_store_below_a_regular_file_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    store = Store(str(tmp_path / "file" / "store"))
    assert store.find("shard", "f0") is None
    with pytest.raises(NanodlmError, match=r"cannot write to the store .*Not a directory.*choose another with --store"):
        committed(store, FILES)


def test_a_commit_that_was_said_to_have_failed_keeps_its_files(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a network's disk whose server made the link and went down before it could say so."""
    link = os.link

    def made_but_refused(source: Path, target: Path) -> None:
        link(source, target)
        raise FileExistsError(17, "File exists")

    with new_attempt(store, "shard", "f0") as attempt:
        fill(attempt, {"a.bin": b"a"})
        monkeypatch.setattr(os, "link", made_but_refused)
        artifact = attempt.commit(identity=identity(), metrics={})
    assert store.open("shard/f0").manifest == artifact.manifest
    assert artifact.check(deep=True)


def test_a_manifest_that_an_earlier_version_sealed_is_read(store: Store) -> None:
    manifest = committed(store, FILES).manifest
    rest = {key: value for key, value in manifest.items() if key != "checksum"}
    checksum = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    assert checksum != manifest["checksum"]
    store.write_json(store.path("shard", "f0", "manifest.json"), {**rest, "checksum": checksum})
    assert store.open("shard/f0").check(deep=True)
    store.write_json(store.path("shard", "f0", "manifest.json"), {**rest, "created": "now", "checksum": checksum})
    with pytest.raises(Damaged, match="has been altered"):
        store.open("shard/f0")


def test_a_link_to_the_latest_is_made_over_what_a_killed_process_left(store: Store) -> None:
    artifact = committed(store, FILES)
    Path(store.path("latest")).mkdir()
    with pytest.MonkeyPatch.context() as killed, pytest.raises(Killed):
        killed.setattr(Path, "replace", mock.Mock(side_effect=Killed))
        store.show_latest(artifact)
    link = store.show_latest(artifact)
    assert link
    assert list(link.parent.iterdir()) == [link]
    assert link.samefile(artifact.folder)


def test_a_link_that_leads_nowhere_is_no_manifest(store: Store) -> None:
    manifest_path(store).parent.mkdir(parents=True)
    manifest_path(store).symlink_to("gone")
    assert committed(store, FILES).manifest == store.open("shard/f0").manifest


def test_a_create_only_write_leaves_an_existing_file_and_no_temporary_ones(store: Store, tmp_path: Path) -> None:
    path = str(tmp_path / "folder" / "x.json")
    assert store.write_json(path, 1, create_only=True)
    assert not store.write_json(path, 2, create_only=True)
    assert json.loads(Path(path).read_text()) == 1
    assert store.write_json(path, 3)
    assert json.loads(Path(path).read_text()) == 3
    assert [p.name for p in Path(path).parent.iterdir()] == ["x.json"]


def rebuilt(store: Store, files: dict[str, bytes]) -> tuple[Attempt, Artifact]:
    with new_attempt(store, "shard", "f0", afresh=True) as attempt:
        fill(attempt, files)
        return attempt, attempt.commit(identity=identity(), metrics={"other": 1}, replace=True)


def test_a_rebuild_with_equal_bytes_keeps_the_manifest(store: Store) -> None:
    committed(store, FILES)
    before = manifest_path(store).read_bytes()
    attempt, artifact = rebuilt(store, FILES)
    assert artifact.manifest["attempt"] != attempt.id
    assert manifest_path(store).read_bytes() == before
    assert not attempt.path.exists(), "nobody needs the same twice"


def test_a_rebuild_with_other_bytes_replaces_the_manifest(store: Store) -> None:
    old = committed(store, FILES)
    attempt, new = rebuilt(store, {**FILES, "a.bin": b"changed!!!"})
    found = store.open("shard/f0")
    assert found.manifest["attempt"] == new.manifest["attempt"] == attempt.id
    assert found.digest != old.digest
    assert (found.local() / "a.bin").read_bytes() == b"changed!!!"


def test_a_rebuild_with_equal_bytes_replaces_a_manifest_whose_files_are_damaged(store: Store) -> None:
    old = committed(store, FILES)
    Path(old.remote("a.bin")).write_bytes(b"FIRST FILE")
    attempt, new = rebuilt(store, FILES)
    assert (new.manifest["attempt"], new.digest) == (attempt.id, old.digest)
    assert (new.local() / "a.bin").read_bytes() == b"first file"


# Digests


def test_equal_files_have_equal_digests_wherever_and_whenever_they_were_made(tmp_path: Path) -> None:
    one = committed(Store(str(tmp_path / "one")), FILES)
    other = committed(Store(str(tmp_path / "other")), dict(reversed(FILES.items())), fingerprint="another")
    assert one.digest == other.digest
    assert one.manifest["attempt"] != other.manifest["attempt"]


def test_other_files_have_another_digest(store: Store) -> None:
    altered, one_more = {**FILES, "a.bin": b"First file"}, {**FILES, "d.bin": b""}
    swapped = {**FILES, "a.bin": FILES["b.bin"], "b.bin": FILES["a.bin"]}
    one_less = {name: content for name, content in FILES.items() if name != "a.bin"}
    sets = [FILES, altered, swapped, one_more, one_less]
    assert len({committed(store, files, fingerprint=f"f{i}").digest for i, files in enumerate(sets)}) == len(sets)


def test_volatile_files_are_verified_but_do_not_change_the_digest(store: Store) -> None:
    def commit(fingerprint: str, log: bytes) -> Artifact:
        with new_attempt(store, "train", fingerprint) as attempt:
            fill(attempt, {"model.bin": b"parameters", "logs/now.txt": log})
            return attempt.commit(identity=identity("train"), metrics={}, volatile=["logs/"])

    one, other = commit("f1", b"at noon"), commit("f2", b"at midnight")
    assert one.digest == other.digest
    Path(one.remote("logs/now.txt")).write_bytes(b"at NOON")
    with pytest.raises(Damaged, match=r"logs/now.txt has been altered"):
        one.local()
    assert other.local().is_dir()


# Damage


def test_each_kind_of_damage_is_named_and_refused(store: Store) -> None:
    missing, truncated, flipped = (committed(store, FILES, fingerprint=f) for f in ("missing", "truncated", "flipped"))
    Path(missing.remote("sub/c.bin")).unlink()
    Path(truncated.remote("b.bin")).write_bytes(b"other")
    Path(flipped.remote("a.bin")).write_bytes(b"first fild")
    for artifact, message in ((missing, "sub/c.bin is missing"), (truncated, "b.bin has 5 bytes, not 10")):
        for reader in (artifact.check, artifact.local):
            with pytest.raises(Damaged, match=f"the shard artifact is damaged: {message}; .*--repair"):
                reader()
    assert flipped.check() is flipped  # sizes alone cannot tell
    for reader in (flipped.local, lambda: flipped.check(deep=True)):
        # The remedy has to look as deep as the check did, or it would find nothing to repair.
        with pytest.raises(Damaged, match=r"a\.bin has been altered.*verify .*/flipped --deep --repair"):
            reader()


def test_a_file_that_the_disk_cannot_read_is_named_and_the_others_are_read(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = committed(store, FILES)
    get, seen = Store.get, []

    def failing(self: Store, path: str, target: Path, size: int) -> str:
        seen.append(path)
        if path.endswith("/a.bin"):
            raise OSError(errno.EIO, "Input/output error")
        return get(self, path, target, size)

    monkeypatch.setattr(Store, "get", failing)
    assert artifact.problems(deep=True) == {"a.bin": "cannot be read: Input/output error"}
    assert len(seen) == len(FILES)


@pytest.mark.parametrize("content", [b"", b'{"schema": 1, "files": [', b"[]", b'{"schema": 1}', b"\xff\xfe"])
def test_a_torn_manifest_is_refused_by_name(store: Store, content: bytes) -> None:
    committed(store, FILES)
    manifest_path(store).write_bytes(content)
    with pytest.raises(
        Damaged, match=r"shard/f0/manifest\.json (holds no rec|is not a man).*`nanodlm verify .*--repair`"
    ):
        store.find("shard", "f0")


def test_two_artifacts_that_changed_places_are_refused(store: Store) -> None:
    one, other = committed(store, FILES, fingerprint="f1"), committed(store, {"c.bin": b"c"}, fingerprint="f2")
    for old, new in ((one.uri, f"{one.uri}x"), (other.uri, one.uri), (f"{one.uri}x", other.uri)):
        Path(old).rename(new)
    with pytest.raises(Damaged, match="belongs to shard/f2"):
        store.find("shard", "f1")


# Parts and attempts


def test_a_later_attempt_adopts_the_parts_that_a_killed_one_finished(store: Store) -> None:
    parts = {"a": {"a.bin": b"aa"}, "steps/one": {"sub/b": b"bb", "sub/c": b"cc"}}
    killed_attempt(store, parts)
    with new_attempt(store, "shard", "f0") as attempt:
        assert set(attempt.earlier) == {"a", "steps/one"}
        assert attempt.adopt("a") == {"rows": 1}
        assert attempt.adopt("steps/one") == {"rows": 2}
        assert attempt.adopt("unfinished") is None
        fill(attempt, {"d": b"dd"})
        resumed = attempt.commit(identity=identity(), metrics={})
    undisturbed = committed(store, {"a.bin": b"aa", "sub/b": b"bb", "sub/c": b"cc", "d": b"dd"}, fingerprint="f1")
    assert resumed.digest == undisturbed.digest
    assert resumed.local().is_dir()


def test_half_a_damaged_part_does_not_stay_behind_to_be_committed(store: Store) -> None:
    id_ = killed_attempt(store, {"step": {"one.bin": b"1", "two.bin": b"2"}})
    earlier = Path(store.path("shard", "f0", "attempts", id_))
    (earlier / "two.bin").write_bytes(b"!")
    with new_attempt(store, "shard", "f0") as attempt:
        assert attempt.adopt("step") is None
        assert not (attempt.path / "one.bin").exists()
        artifact = attempt.commit(identity=identity(), metrics={})
    assert artifact.manifest["files"] == []
    assert (earlier / "one.bin").read_bytes() == b"1"


def test_an_attempt_falls_back_to_an_older_attempt_whose_part_is_whole(store: Store) -> None:
    older = killed_attempt(store, {"a": {"a.bin": b"aa"}})
    newer = killed_attempt(store, {"a": {"a.bin": b"aa"}})
    newest = max(older, newer)  # within one second the ids are in no particular order
    Path(store.path("shard", "f0", "attempts", newest, "a.bin")).write_bytes(b"xx")
    with new_attempt(store, "shard", "f0") as attempt:
        assert attempt.adopt("a") == {"rows": 1}
        assert (attempt.path / "a.bin").read_bytes() == b"aa"


def test_a_part_in_the_place_of_another_is_not_adopted(store: Store) -> None:
    id_ = killed_attempt(store, {"a": {"a.bin": b"aa"}, "b": {"b.bin": b"bb"}})
    parts = Path(store.path("shard", "f0", "attempts", id_, "parts"))
    (parts / "a.json").write_bytes((parts / "b.json").read_bytes())
    with new_attempt(store, "shard", "f0") as attempt:
        assert attempt.adopt("a") is None
        assert attempt.adopt("b") == {"rows": 1}


def test_a_part_of_another_artifact_is_not_adopted(store: Store) -> None:
    killed_attempt(store, {"a": {"a.bin": b"aa"}})
    Path(store.path("shard", "f0")).rename(store.path("shard", "f1"))
    with new_attempt(store, "shard", "f1") as attempt:
        assert attempt.adopt("a") is None


def test_what_an_attempt_adopted_can_be_adopted_again_from_it(store: Store) -> None:
    first = killed_attempt(store, {"a": {"a.bin": b"aa"}})
    with pytest.raises(Killed), new_attempt(store, "shard", "f0") as second:
        second.adopt("a")
        raise Killed
    Path(store.path("shard", "f0", "attempts", first, "parts", "a.json")).unlink()
    with new_attempt(store, "shard", "f0") as third:
        assert third.earlier == {"a": [second.id]}
        assert third.adopt("a") == {"rows": 1}


def test_an_interrupted_rebuild_is_continued_but_not_what_was_there_before(store: Store) -> None:
    with new_attempt(store, "shard", "f0") as attempt:
        fill(attempt, FILES)
        attempt.finish("a", ["a.bin"])
        attempt.commit(identity=identity(), metrics={})
    with pytest.raises(Killed), new_attempt(store, "shard", "f0", afresh=True) as rebuild:
        assert rebuild.adopt("a") is None
        fill(rebuild, FILES)
        rebuild.finish("a", ["a.bin"])
        raise Killed
    with new_attempt(store, "shard", "f0", afresh=True) as again:
        assert again.earlier == {"a": [rebuild.id]}


def test_an_attempt_that_changed_lately_is_not_abandoned(store: Store) -> None:
    folder = Path(store.path("shard", "f0", "attempts", killed_attempt(store, {"a": {"a.bin": b"aa"}})))
    for path in (p for p in folder.rglob("*") if p.is_file()):
        assert list(collect(store, grace=600)) == [], "one file is still fresh"
        os.utime(path, (time.time() - 3600,) * 2)
    Path(store.path("shard", "f0", "attempts", folder.name, "parts", "a.json")).unlink()
    assert [row["uri"] for row in collect(store, grace=600)] == [str(folder)]


# Leases

HOLD_LEASE = """
import sys
from nanodlm.store import Store, hold_lease
with hold_lease(Store(sys.argv[1]), "shard", "f0"):
    print("holding", flush=True)
    sys.stdin.readline()
print("released", flush=True)
"""


@pytest.fixture
def holder(store: Store) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lease of shard/f0 until it reads a line."""
    command = [sys.executable, "-c", HOLD_LEASE, store.root]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "holding\n"
        yield process
        process.kill()


def test_the_lease_is_there_while_it_is_held_and_gone_after_it(store: Store, lease: Path) -> None:
    with hold_lease(store, "shard", "f0") as mine:
        held = json.loads(lease.read_text())
        assert (held["holder"], held["pid"], held["host"]) == (mine["holder"], os.getpid(), socket.gethostname())
    assert not lease.exists()
    with pytest.raises(Killed), hold_lease(store, "shard", "f0"):
        raise Killed
    assert not lease.exists()


def test_a_holder_leaves_the_lease_alone_that_another_has_taken_over(store: Store, lease: Path) -> None:
    with hold_lease(store, "shard", "f0"):
        other = {"holder": "another run", "host": "elsewhere", "pid": 1, "beat": 7}
        lease.write_text(json.dumps(other))
    assert json.loads(lease.read_text()) == other


def test_a_second_process_waits_until_the_holder_is_done(
    store: Store, lease: Path, holder: subprocess.Popen[str]
) -> None:
    told: list[str] = []

    def release(_: str, text: str) -> None:
        told.append(text)
        assert lease.exists()
        print(file=holder.stdin, flush=True)

    with hold_lease(store, "shard", "f0", emit=release):
        assert told == [f"process {holder.pid} on {socket.gethostname()} is building it; waiting"]
        assert holder.wait(10) == 0
    assert not lease.exists()


def test_the_lease_of_a_killed_process_is_taken_over_at_once(
    store: Store, lease: Path, holder: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    holder.kill()
    holder.wait()
    monkeypatch.setattr("time.sleep", slept.append)
    with hold_lease(store, "shard", "f0") as mine:
        assert json.loads(lease.read_text())["holder"] == mine["holder"]
    assert slept == [store_lease.SETTLE_SECONDS]  # not waited out
    assert not lease.exists()


@pytest.mark.parametrize("text", [None, '{"holder"', "null"])
def test_no_lease_and_a_torn_one_are_not_waited_for(store: Store, lease: Path, text: str | None) -> None:
    lease.parent.mkdir(parents=True)
    if text:
        lease.write_text(text)
    assert lease_events(store, "shard", "f0") == {}
    assert list(collect(store)) == []
    started = time.monotonic()
    with hold_lease(store, "shard", "f0") as mine:
        assert json.loads(lease.read_text())["holder"] == mine["holder"]
    assert time.monotonic() - started < store_lease.LEASE_SECONDS / 2


def test_the_beginning_of_a_fingerprint_names_an_artifact_when_it_is_its_alone(store: Store) -> None:
    for stage, fingerprint in (("shard", "abcd1"), ("shard", "abcd2"), ("train", "abce1")):
        committed(store, FILES, stage, fingerprint)
    assert store.open("abce").uri == store.open("train/abce").uri == store.uri("train", "abce1")
    assert store.open("shard/abcd2").fingerprint == "abcd2"
    with pytest.raises(NanodlmError, match="2 artifacts begin with shard/abcd: write more"):
        store.open("shard/abcd")
    for few in ("abc", "train/abcd"):
        with pytest.raises(NanodlmError, match="no artifact at"):
            store.open(few)
