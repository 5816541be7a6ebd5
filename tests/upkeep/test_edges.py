"""What cannot be read, is nobody's, or is removed: of these upkeep makes the least that it can."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nanodlm.cli import main
from nanodlm.errors import NanodlmError
from nanodlm.store import Attempt, Store, hold_lease, new_attempt, sealed
from nanodlm.store import attempt as store_attempt
from nanodlm.store import files as store_files
from nanodlm.upkeep import collect
from tests.support.helpers import committed, copied, fill, identity
from tests.support.servers import Server
from tests.support.store import FILES, Killed
from tests.support.upkeep import EVERYTHING, age, files, made_from, said, told


def removed(store: Store, **how: Any) -> list[str]:
    """What a collection removed, by its path in the store."""
    return [row["uri"].removeprefix(f"{store.uri()}/") for row in collect.collect(store, **how)]


def age_all(store: Store, seconds: float = 7200.0) -> None:
    for path in sorted(Path(store.root).rglob("*"), reverse=True):
        age(path, seconds)


# Manifests that cannot be read


def folder(path: Path) -> None:
    path.mkdir()


def full_folder(path: Path) -> None:
    path.mkdir()
    (path / "x").touch()


MANIFESTS: dict[str, Callable[[Path], object]] = {
    "fifo": os.mkfifo,
    "folder": folder,
    "folder with files": full_folder,
    "refused": lambda path: path.write_text("{}"),
    "too large": lambda path: path.write_text(" " * 99_999),
    "nested": lambda path: path.write_text("[" * 100_000 + "]" * 100_000),
    "nested less": lambda path: path.write_text(json.dumps({"a": 1})[:-1] + ', "b": ' + "[" * 900 + "]" * 900 + "}"),
    "null": lambda path: path.write_text("null"),
    "empty": lambda path: path.touch(),
    "not UTF-8": lambda path: path.write_bytes(b'{"a": "\xff"}'),
    "other types": lambda path: path.write_text(json.dumps(sealed(dict.fromkeys(FIELDS, 1)))),
}
FIELDS = ("schema", "digest", "files", "volatile", "attempt", "metrics", "inputs", "parameters", "stage")


@pytest.mark.parametrize("kind", MANIFESTS)
def test_one_manifest_that_cannot_be_read_is_named_and_stops_nothing_for_the_others(
    kind: str, store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in (1, 2, 3):
        made_from(store, "report", f"f{number}", ago=9000 - number)
    path, where = Path(store.path("report", "f2", "manifest.json")), ("--store", store.uri())
    path.unlink()
    MANIFESTS[kind](path)
    age(path, 9000)
    monkeypatch.setattr(store_files, "RECORD", 50_000 if kind == "too large" else store_files.RECORD)
    real = os.open

    def refused(name: Any, *args: Any, **kwargs: Any) -> int:
        if kind == "refused" and str(name) == str(path):
            raise PermissionError(13, "Permission denied")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(os, "open", refused)
    before = {name for name in files(store) if "f2" in name}
    with pytest.raises(SystemExit) as ended:
        main.main(["ls", *where, "--json"])
    out, error = capsys.readouterr()
    assert ended.value.code == 0
    assert [row["uri"][-2:] for row in json.loads(out.splitlines()[-1])["artifacts"]] == ["f1", "f3"]
    assert error.count("\n") == 1
    assert "report/f2" in error
    rows = told(capsys, "verify", *where, "--deep", code=1)["artifacts"]
    assert [row["uri"][-2:] for row in rows if row["problems"]] == ["f2"]
    assert told(capsys, "verify", *where, "--repair", code=1)["repaired"] == 0
    assert removed(store, keep_last=0, older_than=0, grace=EVERYTHING) == []
    assert {name for name in files(store) if "f2" in name} == before
    rows = told(capsys, "rm", store.uri("report", "f2"), *where)["removed"]
    assert [row["uri"] for row in rows] == [store.uri("report", "f2")]
    assert not path.parent.exists()
    assert len(removed(store, keep_last=1, grace=EVERYTHING)) > 0


# Files of nobody's

STRAYS = (".DS_Store", "Thumbs.db", "desktop.ini", ".nfs0000001", "._a.bin", "notes of mine.txt")


@pytest.mark.parametrize("place", ["disk", "s3"])
def test_files_of_nobodys_are_named_and_harm_nothing(
    place: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    if place == "s3":
        request.getfixturevalue("moto_server").enter(monkeypatch)
    url = str(tmp_path / "store") if place == "disk" else f"s3://bucket/{tmp_path.name}"
    store, target = Store(url), Store(str(tmp_path / "target"))
    artifact = committed(store, FILES, "report")
    strays, report = [*STRAYS, "sub/Thumbs.db", "folder/x"], store.path("report")
    for name in strays:
        store.driver.write(f"{artifact.folder}/{name}", b"stray")
    for name in STRAYS:
        for above in (store.root, report, f"{report}/f0", f"{report}/f0/attempts"):
            store.driver.write(f"{above}/{name}", b"stray")
    assert artifact.local().is_dir()
    out, _ = said(capsys, "verify", "--store", url, "--deep")
    assert all(f"{name} is nobody's file" in out for name in strays)
    (row,) = told(capsys, "verify", artifact.uri, "--store", url)["artifacts"]
    assert (row["problems"], row["strays"]) == ([], sorted(strays))
    assert len(told(capsys, "ls", "--store", url)["artifacts"]) == 1
    assert list(collect.collect(store)) == []
    list(collect.collect(store, grace=EVERYTHING))
    found = store.open("report/f0").check(deep=True)
    assert found.strays(store.files(store.path("report", "f0"))) == sorted(strays)
    copied(store, target)
    there = {path.rpartition("/attempts/")[2].partition("/")[2] for path in files(target) if "/attempts/" in path}
    assert there == set(FILES)


def test_a_file_that_a_system_leaves_in_an_attempt_is_neither_recorded_nor_committed(store: Store) -> None:
    with new_attempt(store, "shard", "f0") as attempt:
        fill(attempt, {**FILES, ".DS_Store": b"x", "sub/.DS_Store": b"x", "Thumbs.db": b"x"})
        attempt.finish("sub", ["sub/c.bin", "sub/.DS_Store"])
        artifact = attempt.commit(identity=identity(), metrics={})
    assert [file["path"] for file in artifact.files()] == sorted({*FILES, "parts/sub.json"})
    (attempt.path / "sub" / ".DS_Store").unlink()
    with new_attempt(store, "shard", "f0") as later:
        assert later.adopt("sub") == {}


def test_a_disk_of_its_own_may_hold_a_store(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file system keeps a folder there that only the administrator may look into."""
    committed(store, FILES)
    (Path(store.root) / "lost+found").mkdir()
    age(Path(store.root) / "lost+found")
    scandir = os.scandir

    def refused(path: Any) -> Any:
        if str(path).endswith("lost+found"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    assert list(store) == [("shard", "f0")]
    assert list(collect.collect(store)) == []
    assert (Path(store.root) / "lost+found").is_dir()


def test_a_stage_that_may_not_be_listed_is_named(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    committed(store, FILES)
    scandir = os.scandir

    def refused(path: Any) -> Any:
        if str(path).endswith("shard"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(NanodlmError, match=rf"refuses access: Permission denied {store.path('shard')}; mend"):
        list(store)


# Collections


def test_an_age_is_believed_only_when_the_manifest_and_its_file_agree(store: Store) -> None:
    for name, created, file in (("said", 9e5, 60), ("touched", 60, 9e5), ("old", 9e5, 9e5), ("ahead", -9e4, 9e5)):
        made_from(store, "train", name, ago=created)
        for path in Path(store.path("train", name)).rglob("*"):
            age(path, file)
    assert removed(store, older_than=86400) == ["train/old"]


def test_whatever_is_left_of_what_was_cut_off_goes_once_it_is_old(store: Store) -> None:
    kept = made_from(store, "shard", "f0", ago=9000)
    with new_attempt(store, "train", "t0"):
        pass
    left = [
        "shard/f0/.0123456789abcdef.tmp",
        "shard/f0/retired.json",
        "shard/f0/lease.json",
        f"shard/f0/attempts/{kept.manifest['attempt']}/parts/.0123456789abcdef.tmp",
        "shard/f1/lease.json",
        "shard/f1/retired.json",
        ".probes/0123456789abcdef/probe",
    ]
    for name in left:
        Path(store.path(name)).parent.mkdir(parents=True, exist_ok=True)
        Path(store.path(name)).write_text("{}")
    before = {str(path) for path in Path(store.root).rglob("*")}
    assert removed(store) == []
    assert {str(path) for path in Path(store.root).rglob("*")} == before, "all that is young stays"
    age_all(store)
    assert sorted(removed(store)) == sorted(left)
    for _ in range(4):  # a folder that is empty now changed now
        age_all(store)
        assert removed(store) == []
    assert {path.name for path in Path(store.root).iterdir()} <= {"shard", ".probes"}
    assert {path.name for path in Path(store.path("shard")).iterdir()} == {"f0"}
    stays = {path.name for path in Path(kept.uri).rglob("*") if path.is_file()}
    assert stays == {"manifest.json", "x.bin", "x.json"}


def test_a_file_of_an_artifact_is_no_leftover_whatever_its_name(store: Store) -> None:
    artifact = committed(store, {".metadata": b"x", "sub/.manifest": b"y", "z": b"z"})
    age_all(store)
    assert removed(store) == []
    assert artifact.check(deep=True)


def test_folders_of_what_is_being_built_stay_while_nothing_is_in_them(store: Store) -> None:
    with hold_lease(store, "train", "f0"), new_attempt(store, "train", "f0") as attempt:
        (attempt.path / "checkpoints").mkdir()
        for path in (attempt.path / "checkpoints", attempt.path):
            age(path)
        assert removed(store) == []
        fill(attempt, {"checkpoints/x": b"x"})
        assert attempt.commit(identity=identity("train"), metrics={}).check(deep=True)


def test_a_file_that_somebody_has_open_on_a_networks_disk_stops_no_collection(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gets another name there until they close it, and the folder cannot be removed before."""
    for name in ("f0", "f1"):
        with new_attempt(store, "shard", name) as attempt:
            fill(attempt, {"a.bin": b"a", "open.bin": b"b"})
    age_all(store)
    unlink = os.unlink

    def renamed(path: Any, *, dir_fd: int | None = None) -> None:
        if path == "open.bin":
            os.rename(path, ".nfs0000001", src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
        else:
            unlink(path, dir_fd=dir_fd)

    with monkeypatch.context() as somebody:
        somebody.setattr(os, "unlink", renamed)
        assert len(removed(store)) == 2
        assert {Path(name).name for name in files(store)} == {".nfs0000001"}
    age_all(store)
    assert len(removed(store)) == 2
    assert files(store) == {}


@pytest.mark.parametrize("days", [-1, 0, 1])
def test_a_rebuild_goes_on_only_from_the_same_rebuild_whatever_the_clocks_say(
    days: int, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(afresh: bool) -> str:
        with pytest.raises(Killed), new_attempt(store, "shard", "f0", afresh=afresh) as attempt:
            fill(attempt, {"a.bin": b"a"})
            attempt.finish("a", ["a.bin"])
            raise Killed
        return attempt.id

    class Elsewhere(store_attempt.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return super().now(tz) + days * store_attempt.datetime.resolution * 86400 * 10**6

    killed(False)
    committed(store, {"a.bin": b"a"})
    killed(False)
    first = killed(True)
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(store_attempt, "datetime", Elsewhere)
        with new_attempt(store, "shard", "f0", afresh=True) as again:
            assert again.earlier == {"a": [first]}
            fill(again, {"a.bin": b"b"})
            again.commit(identity=identity(), metrics={}, replace=True)
        with new_attempt(store, "shard", "f0", afresh=True) as another:
            assert another.earlier == {}


# Removing


@pytest.fixture(params=["disk", "s3"])
def place(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Store:
    if request.param == "disk":
        return Store(str(tmp_path / "store"))
    server: Server = request.getfixturevalue("moto_server")
    server.enter(monkeypatch)
    return Store(f"{server.store}/{tmp_path.name}")


def built(store: Store, stage: str, fingerprint: str, *sources: Any) -> Any:
    with new_attempt(store, stage, fingerprint) as attempt:
        fill(attempt, {"x.bin": b"123"})
        inputs = {source.stage: {"digest": source.digest, "fingerprint": source.fingerprint} for source in sources}
        return attempt.commit(identity={**identity(stage), "inputs": inputs}, metrics={})


def test_rm_removes_one_artifact_and_what_others_were_made_from_only_with_them(
    place: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = built(place, "shard", "s" * 8)
    train = built(place, "train", "t" * 8, shard)
    built(place, "sample", "u" * 8, train)
    built(place, "shard", "o" * 8)
    everything = set(place)
    assert "sample/uuuuuuuu, train/tttttttt would lack it: --recursive" in said(capsys, "rm", shard.uri, code=1)[1]
    row = {"kind": "artifact", "bytes": 3}
    rows = [{**row, "uri": place.uri(*item)} for item in (("sample", "u" * 8), ("train", "t" * 8), ("shard", "s" * 8))]
    assert told(capsys, "rm", shard.uri, "--recursive", "--dry-run") == {"removed": rows, "dry_run": True}
    assert set(place) == everything
    assert said(capsys, "rm", "sample/uuuu", "--store", place.uri())[0] == f"removed        3 B  {rows[0]['uri']}\n"
    assert told(capsys, "rm", shard.uri, "--recursive")["removed"] == rows[1:]
    assert list(place) == [("shard", "o" * 8)]
    assert not [path for path in place.files(place.root) if not path.startswith("shard/oooooooo")]
    assert place.open("shard/oooo").check(deep=True)


def test_rm_refuses_what_is_being_built_or_read(place: Store, capsys: pytest.CaptureFixture[str]) -> None:
    shard = built(place, "shard", "s" * 8)
    with hold_lease(place, "train", "t" * 8, inputs={"shard": shard.fingerprint}):
        for name in (shard.uri, place.uri("train", "t" * 8)):
            assert f"{name} is being built or read by a run: wait for it" in said(capsys, "rm", name, code=1)[1]
    assert place.open(shard.uri).check(deep=True)
    assert len(told(capsys, "rm", shard.uri)["removed"]) == 1


def test_rm_removes_what_is_damaged_and_what_was_removed_in_part(
    place: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    torn, half, lacking = (built(place, "shard", name * 8) for name in "abc")
    place.driver.write(place.path("shard", torn.fingerprint, "manifest.json"), b"{")
    place.retire(("shard", half.fingerprint))
    place.driver.remove(lacking.remote("x.bin"))
    for artifact in (torn, half, lacking):
        assert len(told(capsys, "rm", artifact.uri)["removed"]) == 1
        assert f"no artifact at {artifact.uri}" in said(capsys, "rm", artifact.uri, code=1)[1]
    assert place.files(place.root) == {}


def test_rm_removes_nothing_for_an_address_of_less_than_an_artifact_or_of_none(
    place: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    train = built(place, "train", "t" * 8)
    attempt = place.uri("train", "t" * 8, "attempts", train.manifest["attempt"])
    for uri in (f"{train.uri}/checkpoints/step_100", f"{train.uri}/step_100", attempt):
        assert "names a part of an artifact" in said(capsys, "rm", uri, code=2)[1]
    for uri in ("ttt", "train/xxxxxxxx", "xxxxxxxx", place.uri("train", "x"), place.uri()):
        assert "no artifact at" in said(capsys, "rm", uri, "--store", place.uri(), code=1)[1]
    assert train.check(deep=True)


def test_rm_removes_no_folder_that_is_not_an_artifacts(place: Store, capsys: pytest.CaptureFixture[str]) -> None:
    mine = ["letters/2026/to mother.txt", "site/app/index.html", "site/app/manifest.json"]
    for name in mine:
        place.driver.write(place.path(name), b"{}")
    for name in ("letters/2026", "site/app"):
        assert f"no artifact at {place.uri(name)}, which holds" in said(capsys, "rm", place.uri(name), code=1)[1]
    assert sorted(place.files(place.root)) == mine


# Copies


def test_a_copy_goes_on_with_the_others_where_other_bytes_are_there_and_says_so_at_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = Store(str(tmp_path / "source")), Store(str(tmp_path / "target"))
    shard, other = built(source, "shard", "s" * 8), built(source, "shard", "o" * 8)
    train = built(source, "train", "t" * 8, shard)
    for made in (train, built(source, "train", "v" * 8, other)):
        built(source, "evaluate", f"e{made.fingerprint[1:]}", made)
    committed(source, {"report.md": b"quick"}, "report", "r" * 8)
    theirs = [committed(target, {"x.bin": b"other"}, "shard", "s" * 8)]
    theirs += [committed(target, {"report.md": b"slow"}, "report", "r" * 8)]
    out, error = said(capsys, "copy", source.uri(), target.uri(), code=1)
    left = "shard/ssssssss, train/tttttttt, evaluate/ettttttt"
    assert f"{left} not copied: other bytes are there: `nanodlm rm` those, or choose" in error
    lines = [tuple(line.split()) for line in out.splitlines()]
    assert lines[:3] == [("copied", name) for name in ("shard/oooooooo", "train/vvvvvvvv", "evaluate/evvvvvvv")]
    assert lines[3:] == [("there", "report/rrrrrrrr")]
    assert [target.open(one.uri).manifest for one in theirs] == [one.manifest for one in theirs]
    assert {item[1][1] for item in target} == set("sovr")
    said(capsys, "rm", theirs[0].uri)
    out, _ = said(capsys, "copy", source.uri(), target.uri())
    assert out.count("copied   ") == 3
    assert set(source) == set(target)


def test_a_repair_goes_on_from_what_made_the_artifact_and_not_from_a_rebuild_beside_it(store: Store) -> None:
    """Which, as on another number of devices, may hold other bytes."""

    def finished(content: bytes, **how: Any) -> Attempt:
        with new_attempt(store, "shard", "f0", **how) as attempt:
            fill(attempt, {"a.bin": content})
            attempt.finish("a", ["a.bin"])
        return attempt

    finished(b"left of an earlier build")
    with new_attempt(store, "shard", "f0", afresh=True) as made:
        fill(made, {"a.bin": b"sound"})
        made.finish("a", ["a.bin"])
        manifest = made.commit(identity=identity(), metrics={}).manifest
    finished(b"left of a rebuild", afresh=True)
    with new_attempt(store, "shard", "f0", restore=manifest) as repair:
        assert repair.earlier == {"a": [made.id]}
    with new_attempt(store, "shard", "f0", restore={"digest": manifest["digest"]}) as of_a_torn_one:
        assert made.id not in str(of_a_torn_one.earlier), "nobody can tell whose it was"


def test_a_repair_makes_no_result_the_newest(store: Store) -> None:
    made_from(store, "train", "older", ago=9000)
    made_from(store, "train", "newest", ago=8000)
    age(Path(store.path("train", "older", "manifest.json")), 7000.0)  # as a repair writes it again
    assert not [row for row in collect.collect(store, keep_last=1) if row["uri"].endswith("newest")]
    assert store.find("train", "newest") is not None


def test_a_copy_does_not_leave_the_lost_record_of_a_part_out_without_a_word(store: Store, tmp_path: Path) -> None:
    artifact = made_from(store, "train", "t")
    Path(artifact.folder, "parts", "x.json").unlink()
    with pytest.raises(NanodlmError, match=r"parts/x\.json is missing.*--repair"):
        copied(store, Store(str(tmp_path / "target")))
