"""What nobody needs is collected, and nothing else."""

import time
from pathlib import Path
from typing import Any

import fsspec
import pytest

from nanodlm.errors import NanodlmError, UsageError
from nanodlm.store import Store, hold_lease, new_attempt
from nanodlm.upkeep import collect
from tests.support.helpers import copied, fill, identity
from tests.support.upkeep import CHAIN, EVERYTHING, Made, age, files, made_from, said, told


def left(store: Store) -> list[str]:
    return sorted(fingerprint for _, fingerprint in store)


def collected(store: Store, **options: Any) -> list[tuple[str, str]]:
    """Kind of what a collection removed, but of leftovers, and its path in the store."""
    rows = [row for row in collect.collect(store, **options) if row["kind"] != "leftover"]
    return [(row["kind"], row["uri"].removeprefix(store.uri() + "/").partition("/attempts")[0]) for row in rows]


def test_a_collection_without_wishes_keeps_every_artifact(made: Made) -> None:
    assert collected(made.store, grace=EVERYTHING) == []
    assert len(left(made.store)) == len(CHAIN)


def test_a_dry_run_removes_nothing_and_says_what_would_go(store: Store) -> None:
    shard = made_from(store, "shard", "f1", ago=9000)
    for number, ago in ((2, 8000), (3, 7500)):
        made_from(store, "train", f"f{number}", shard, ago=ago)
    before = files(store)
    would = collected(store, keep_last=1, dry_run=True)
    assert would == [("artifact", "train/f2")]
    assert files(store) == before
    assert collected(store, keep_last=1) == would


def test_the_newest_results_are_kept_with_all_they_were_made_from_and_what_others_share(store: Store) -> None:
    download = made_from(store, "download", "d", ago=9000)
    used, unused = (made_from(store, "shard", name, download, ago=8900) for name in ("used", "unused"))
    made_from(store, "train", "old", used, ago=8000)
    made_from(store, "train", "oldest", unused, ago=8500)
    made_from(store, "train", "new", used, ago=7000)
    gone = [("artifact", "shard/unused"), ("artifact", "train/old"), ("artifact", "train/oldest")]
    assert sorted(collected(store, keep_last=1)) == gone
    assert left(store) == ["d", "new", "used"]


def test_a_frontier_counts_as_no_result_and_stays_and_goes_with_its_model(store: Store) -> None:
    for name, ago in (("old", 9000), ("new", 8000)):
        model = made_from(store, "train", name, ago=ago)
        made_from(store, "evaluate", f"{name}-score", model, ago=ago - 500)
        made_from(store, "frontier", f"{name}-front", model, ago=7000 if name == "old" else 7100)
    gone = [("artifact", "evaluate/old-score"), ("artifact", "frontier/old-front"), ("artifact", "train/old")]
    assert sorted(collected(store, keep_last=1)) == gone
    assert left(store) == ["new", "new-front", "new-score"]


def test_older_results_are_given_up_unless_they_are_among_the_last(store: Store) -> None:
    for name, ago in (("a", 90_000), ("b", 80_000), ("c", 10_000)):
        made_from(store, "train", name, ago=ago)
    assert collected(store, older_than=86_400, keep_last=2, dry_run=True) == [("artifact", "train/a")]
    assert collected(store, older_than=50_000, keep_last=1) == [("artifact", "train/a"), ("artifact", "train/b")]
    assert left(store) == ["c"]


def test_what_changed_within_the_grace_is_left_alone(store: Store) -> None:
    shard = made_from(store, "shard", "f1", ago=9000)
    made_from(store, "train", "young", shard, ago=60)
    made_from(store, "train", "old", ago=9000)
    assert collected(store, keep_last=0) == [("artifact", "train/old")]
    assert left(store) == ["f1", "young"]


def test_files_of_a_retired_artifact_stay_for_the_grace_and_a_run_may_adopt_them(store: Store) -> None:
    old = made_from(store, "train", "old", ago=9000)
    assert collected(store, keep_last=0) == [("artifact", "train/old")]
    assert store.find("train", "old") is None
    assert collected(store) == [], "whoever reads it may finish"
    with new_attempt(store, "train", "old") as attempt:
        assert attempt.adopt("x") == {}
        assert attempt.commit(identity=identity("train"), metrics={}).digest == old.digest
    assert collected(store, grace=EVERYTHING) == [("attempt", "train/old")]
    assert store.open("train/old").problems(deep=True) == {}


def test_what_a_run_has_begun_after_a_retirement_is_not_abandoned(store: Store) -> None:
    made_from(store, "train", "old", ago=9000)
    collected(store, keep_last=0)
    age(Path(store.path("train", "old", "retired.json")))
    with new_attempt(store, "train", "old") as attempt:
        fill(attempt, {"x.bin": b"x"})
        attempt.finish("x", ["x.bin"])
    assert collected(store, grace=EVERYTHING) == [("attempt", "train/old")]
    assert attempt.path.is_dir(), "a run would go on from it"


def test_files_that_a_run_under_way_reads_stay_although_their_manifest_was_given_up_before(store: Store) -> None:
    shard = made_from(store, "shard", "f1", ago=9000)
    made_from(store, "shard", "f2", ago=9000)
    with hold_lease(store, "train", "t", inputs={"shard": shard.fingerprint}):
        assert collected(store, keep_last=0) == [("artifact", "shard/f2")]
    assert collected(store, keep_last=0) == [("artifact", "shard/f1")]
    for name in ("f1", "f2"):
        age(Path(store.path("shard", name, "retired.json")))
    with hold_lease(store, "train", "t", inputs={"shard": shard.fingerprint}):
        assert collected(store) == [("attempt", "shard/f2")]
    assert collected(store) == [("attempt", "shard/f1")]


def test_files_that_others_took_the_place_of_stay_for_the_grace(store: Store) -> None:
    """For whoever reads them."""
    made_from(store, "shard", "f1", ago=9000)
    with new_attempt(store, "shard", "f1", afresh=True) as attempt:
        fill(attempt, {"x.bin": b"other"})
        attempt.commit(identity=identity(), metrics={}, replace=True)
    assert collected(store) == []
    age(Path(store.path("shard", "f1", "manifest.json")))
    assert collected(store) == [("attempt", "shard/f1")]


def test_a_stage_on_another_disk_is_collected_as_any_other(store: Store, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    Path(store.root).mkdir()
    Path(store.path("train")).symlink_to(elsewhere)
    made_from(store, "train", "f2", ago=9000)
    assert collected(store, keep_last=0) == [("artifact", "train/f2")]
    age(Path(store.path("train", "f2", "retired.json")))
    assert collected(store) == [("attempt", "train/f2")]


def test_what_was_copied_here_within_the_grace_is_young_whatever_its_age(store: Store, tmp_path: Path) -> None:
    made_from(store, "train", "old", ago=9000)
    target = Store(str(tmp_path / "target"))
    copied(store, target)
    assert collected(target, keep_last=0) == []
    assert collected(target, keep_last=0, grace=EVERYTHING) == [("artifact", "train/old"), ("attempt", "train/old")]


def test_a_dry_run_needs_no_right_to_write(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    made_from(store, "train", "old", ago=9000)

    def refused(*_: Any, **__: Any) -> bool:
        raise NanodlmError("refuses access")

    monkeypatch.setattr(Store, "write_json", refused)
    assert collected(store, keep_last=0, dry_run=True) == [("artifact", "train/old")]
    with pytest.raises(NanodlmError, match="refuses access"):
        collected(store, keep_last=0)


def test_the_lease_of_a_dead_run_protects_nothing_for_ever(store: Store) -> None:
    with new_attempt(store, "train", "t") as attempt:
        fill(attempt, {"half": b"written"})
    store.write_json(store.path("train", "t", "lease.json"), {"holder": "gone", "host": "elsewhere", "pid": 1})
    for path in Path(store.path("train", "t")).rglob("*"):
        age(path)
    assert collected(store) == [("attempt", "train/t")]


def test_no_result_is_given_up_while_a_manifest_cannot_be_read(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    """Neither what it was made from is known, nor which attempt it names."""
    made_from(store, "train", "f1", ago=9000)
    made_from(store, "shard", "f2", ago=9000)
    Path(store.path("train", "f1", "manifest.json")).write_text("{")
    before = files(store)
    assert collected(store, keep_last=0, older_than=0, grace=EVERYTHING) == []
    assert "no result is given up" in caplog.text
    assert files(store) == before


def test_a_collectors_clock_that_is_a_day_ahead_ends_nothing_under_way(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hold_lease(store, "shard", "f0"), new_attempt(store, "shard", "f0") as attempt:
        (attempt.path / "a.bin").write_bytes(b"a")
        ahead = time.time() + 86400
        monkeypatch.setattr(time, "time", lambda: ahead)
        assert list(collect.collect(store)) == []


def test_results_are_not_counted_below_0(store: Store) -> None:
    with pytest.raises(UsageError, match="--keep-last counts results"):
        list(collect.collect(store, keep_last=-1))


def test_a_collection_follows_no_link_out_of_the_store(store: Store, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "mine.txt").write_text("mine")
    attempts = Path(store.path("train", "f1", "attempts"))
    attempts.mkdir(parents=True)
    (attempts / "a").symlink_to(outside)
    (attempts / "b").mkdir()
    (attempts / "b" / "link.txt").symlink_to(outside / "mine.txt")
    (attempts / "b" / "folder").symlink_to(outside)
    collected(store, grace=EVERYTHING)
    assert (outside / "mine.txt").read_text() == "mine"


def test_unfinished_uploads_in_several_parts_are_ended(s3_environment: None, tmp_path: Path) -> None:
    fs = fsspec.filesystem("s3")
    fs.mkdir("uploads-bucket")
    store = Store("s3://uploads-bucket/runs")
    others = ["runs-of-others/big.bin", "runs/backups/2026/disk.img"]
    for key in ("runs/train/f1/attempts/a/big.bin", *others):
        fs.call_s3("create_multipart_upload", Bucket="uploads-bucket", Key=key)

    def open_uploads() -> list[str]:
        listed = fs.call_s3("list_multipart_uploads", Bucket="uploads-bucket")
        return [upload["Key"] for upload in listed.get("Uploads", [])]

    assert list(collect.collect(store, grace=1e9)) == [], "it may be under way"  # moto says that all began in 2010
    with hold_lease(store, "train", "f1"):
        assert list(collect.collect(store, grace=3600)) == [], "a large file may be under way for long"
    (row,) = collect.collect(store, grace=EVERYTHING, dry_run=True)
    assert (row["kind"], row["uri"]) == ("upload", "s3://uploads-bucket/runs/train/f1/attempts/a/big.bin")
    assert len(open_uploads()) == 3
    assert len(list(collect.collect(store, grace=EVERYTHING))) == 1
    assert open_uploads() == others


def test_gc_says_what_goes_and_when(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    made_from(store, "train", "old", ago=9000)
    made_from(store, "train", "new", ago=8000)
    command = ["gc", "--store", store.uri(), "--keep-last", "1"]
    out, _ = said(capsys, *command, "--dry-run")
    assert out.splitlines()[0] == f"would remove      293 B  artifact {store.uri('train', 'old')}"
    row = {"kind": "artifact", "uri": store.uri("train", "old"), "bytes": 293}
    assert told(capsys, *command, "--dry-run") == {"removed": [row], "dry_run": True}
    out, _ = said(capsys, *command, "--older-than", "1h")
    assert out.startswith("removed      293 B  artifact")
    assert "the first collection after 1h" in out
    assert said(capsys, *command)[0] == "nothing to remove\n"
    _, error = said(capsys, "gc", "--store", store.uri(), "--older-than", "soon", code=2)
    assert "'soon' is no age: give a number and s, m, h or d" in error


@pytest.mark.parametrize("stage", ["shard", "train"])
def test_attempts_with_finished_parts_stay_until_what_they_are_of_is_done_or_they_are_older_than_was_asked(
    stage: str, store: Store
) -> None:
    for finished in ("1", "2", "2", ""):
        with new_attempt(store, stage, "f0") as attempt:
            fill(attempt, {"x": b"x"})
            if finished:
                attempt.finish(finished, ["x"])
    assert len(collected(store, grace=EVERYTHING)) == 1
    assert collected(store, grace=EVERYTHING, older_than=60.0) == []
    for path in Path(store.path(stage, "f0")).rglob("*"):
        age(path)
    assert len(collected(store, older_than=3600.0, dry_run=True)) == 3
    with new_attempt(store, stage, "f0") as attempt:
        attempt.commit(identity=identity(stage), metrics={})
    assert len(collected(store, grace=EVERYTHING)) == 3
