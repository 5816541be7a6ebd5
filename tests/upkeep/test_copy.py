"""What is copied is the same."""

from pathlib import Path
from typing import Any

import pytest

from nanodlm.checkpoints.finding import find_checkpoint
from nanodlm.errors import NanodlmError
from nanodlm.store import Artifact, Store
from nanodlm.store.files import Storage
from nanodlm.upkeep import collect, copy, verify
from tests.support.helpers import committed, copied, flip
from tests.support.store import Killed
from tests.support.upkeep import EVERYTHING, Made, said, statuses, told


def test_a_store_copied_there_and_back_is_the_same(master: Made, remote: Store, tmp_path: Path) -> None:
    artifacts = verify.chain(master.store, ("sample", master.artifacts["sample"].fingerprint))
    names = [stage for stage, _ in artifacts]
    assert copied(master.store, remote, artifacts) == dict.fromkeys(names, True)
    back = Store(str(tmp_path / "back"))
    copied(remote, back)
    for name in names:
        again = back.open(f"{name}/{master.artifacts[name].fingerprint}")
        assert again.manifest == master.artifacts[name].manifest
        assert again.problems(deep=True) == {}
    assert copied(master.store, back, artifacts) == dict.fromkeys(names, False)
    assert statuses(master.config, back, names) == dict.fromkeys(names, "cached")


def test_a_copy_that_was_cut_off_goes_on_without_sending_again_what_is_there(
    master: Made, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = master.artifacts["shard"]
    sent: list[str] = []
    put = Storage.put

    def counting(self: Storage, pairs: Any, done: Any = lambda _: None, *, until: int = 1000) -> None:
        for local, target in pairs:
            if len(sent) >= until:
                raise Killed
            put(self, [(local, target)], done)
            sent.append(target)

    monkeypatch.setattr(Storage, "put", lambda *args: counting(*args, until=2))
    with pytest.raises(Killed):
        copied(master.store, store, [("shard", shard.fingerprint)])
    assert store.find("shard", shard.fingerprint) is None, "it counts when it is whole"
    flip(Path(sent.pop()))  # it was in the middle of this one
    monkeypatch.setattr(Storage, "put", counting)
    assert copied(master.store, store, [("shard", shard.fingerprint)]) == {"shard": True}
    assert len(sent) == len(set(sent)) == len(shard.manifest["files"])
    assert store.open(shard.uri.removeprefix(f"{master.store.uri()}/")).check(deep=True)


def test_a_copy_is_repaired_and_gone_on_from_like_its_original(made: Made, tmp_path: Path) -> None:
    store = Store(str(tmp_path / "target"))
    assert all(copied(made.store, store).values())
    shard, train = (store.open(made.artifacts[stage].uri) for stage in ("shard", "train"))
    good = {path: path.stat().st_ino for path in Path(shard.folder).glob("train-*")}
    flip(bad := sorted(good)[0])
    (found,) = verify.check(store, [("shard", shard.fingerprint)], deep=True, repair=True)
    assert found.repaired
    again = store.open(shard.uri)
    assert again.digest == shard.digest
    kept = {path.name: inode for path, inode in good.items() if path != bad}
    assert {name: Path(again.remote(name)).stat().st_ino for name in kept} == kept
    assert find_checkpoint(f"{train.uri}/checkpoints/step_6").local().is_dir()


def test_a_collection_beside_a_copy_leaves_what_has_arrived(
    store: Store, remote: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    committed(store, {"x": b"one"})
    check = Artifact.check

    def collecting(self: Artifact, *only: str, deep: bool = False) -> Artifact:
        if deep and self.store is remote:
            assert list(collect.collect(remote, grace=EVERYTHING)) == []
        return check(self, *only, deep=deep)

    monkeypatch.setattr(Artifact, "check", collecting)
    assert copied(store, remote) == {"shard": True}
    assert remote.open("shard/f0").check(deep=True)


def test_a_copy_shows_how_far_it_is(master: Made, remote: Store, tmp_path: Path) -> None:
    shard, told = master.artifacts["shard"], []

    def emit(kind: str, **fields: Any) -> None:
        told.append((kind, fields["unit"], fields["done"], fields["total"]))

    for source, target in ((master.store, remote), (remote, Store(str(tmp_path / "back")))):
        list(copy.copy(source, target, [("shard", shard.fingerprint)], emit))
        kind, unit, done, total = told[-1]
        assert (kind, unit) == ("progress", "MB copied")
        assert done == pytest.approx(total) == pytest.approx(sum(f["size"] for f in shard.manifest["files"]) / 1e6)
    assert "MB of shard fetched" in {unit for _, unit, _, _ in told}


def test_what_is_damaged_is_not_copied_and_stops_only_what_was_made_from_it(made: Made, remote: Store) -> None:
    flip(made.first("shard", "train-*"))
    made.manifest("sample").write_bytes(b"torn")
    names = {stage: artifact.name for stage, artifact in made.artifacts.items()}
    says = rf"{names['shard']}, {names['train']} not copied: .*train-00000\.arrayrecord has been altered.*; "
    with pytest.raises(NanodlmError, match=rf"{says}{names['sample']} not copied: .* holds no record"):
        copied(made.store, remote, list(verify.in_order(dict(made.store.artifacts(made.store)))))
    assert sorted(stage for stage, _ in remote) == ["download", "split", "tokenizer"]


def test_another_artifact_in_the_target_is_not_replaced(store: Store, remote: Store) -> None:
    committed(store, {"x": b"one"})
    theirs = committed(remote, {"x": b"other"})
    with pytest.raises(NanodlmError, match=r"shard/f0 not copied: other bytes are there: `nanodlm rm` those"):
        copied(store, remote)
    assert remote.open("shard/f0").manifest == theirs.manifest


def test_copy_of_one_artifact_takes_what_it_was_made_from_along(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = str(tmp_path / "target")
    out, _ = said(capsys, "copy", made.artifacts["split"].name[:12], target, "--store", made.store.uri())
    assert [line.split()[0] for line in out.splitlines()[:-1]] == ["copied"] * 3
    assert out.splitlines()[-1].startswith("3 artifacts there; ")
    assert sorted(stage for stage, _ in Store(target)) == ["download", "split", "tokenizer"]
    rows = told(capsys, "copy", made.store.uri(), target)["artifacts"]
    assert [row["copied"] for row in rows] == [False] * 3 + [True] * 3
    assert rows[3]["uri"].startswith(f"{target}/shard/")
    assert "no artifact at" in said(capsys, "copy", str(tmp_path / "nothing"), target, code=1)[1]
    out, _ = said(capsys, "copy", made.artifacts["split"].uri[:-50], str(tmp_path / "second"))
    assert out.count("copied   ") == 3
    assert "missing SRC and DST" in said(capsys, "copy", code=2)[1]
