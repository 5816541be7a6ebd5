"""Parts of what was read from other files are not gone on from."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanodlm.data import download
from nanodlm.errors import NanodlmError, silent
from nanodlm.stages import run
from nanodlm.stages.lookup import ready
from nanodlm.store import Store
from tests.support.helpers import prose, tiny_config


@pytest.fixture
def at_hand(tmp_path: Path) -> list[str]:
    paths = [str(tmp_path / f"text-{i}.parquet") for i in range(3)]
    for i, path in enumerate(paths):
        pq.write_table(pa.table({"text": prose(300)[100 * i : 100 * (i + 1)]}), path)
    return paths


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


def test_documents_of_other_files_are_not_gone_on_from(
    store: Store, at_hand: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source was others for a while, and a run was stopped by the last of them."""
    config, wrong = tiny_config(at_hand, part_mb=0.001), [f"{tmp_path}/wrong-{i}.parquet" for i in range(2)]
    for path, column in zip(wrong, ("text", "other"), strict=True):
        pq.write_table(pa.table({column: [f"wrong {n}" for n in range(200)]}), path)
    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(download, "identity", lambda _: {"files": wrong})
        meanwhile.setattr(download, "files_apart", lambda _: [wrong])
        with pytest.raises(NanodlmError, match="has no column 'text'"):
            run.run_stage("download", config, store)
    assert list(Path(store.root).glob("download/*/attempts/*/parts/*")), "it had finished parts"
    clean = Store(str(tmp_path / "clean"))
    assert len({run.run_stage("download", config, place)[0].digest for place in (store, clean)}) == 1


def test_documents_of_files_that_changed_while_they_were_read_are_not_kept(
    store: Store, at_hand: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, first = tiny_config(at_hand, part_mb=0.001), Path(at_hand[0])
    before, read = first.read_bytes(), download.read_documents

    def changing(*args: Any) -> Any:
        pq.write_table(pa.table({"text": ["other"] * 100}), first)
        yield from read(*args)

    monkeypatch.setattr(download, "read_documents", changing)
    with pytest.raises(NanodlmError, match="changed while they were read: run again"):
        run.run_stage("download", config, store)
    monkeypatch.setattr(download, "read_documents", read)
    first.write_bytes(before)
    clean = Store(str(tmp_path / "clean"))
    assert len({run.run_stage("download", config, place)[0].digest for place in (store, clean)}) == 1


def test_documents_of_files_that_changed_before_they_were_read_are_not_committed(
    store: Store, at_hand: list[str]
) -> None:
    config = tiny_config(at_hand)
    lookup = ready("download", config, store)
    pq.write_table(pa.table({"text": ["other"] * 100}), at_hand[0])
    with pytest.raises(NanodlmError, match="changed since they were looked up: run again"):
        run.build(lookup, config, store, False, silent)
    assert store.find("download", lookup.fingerprint) is None


@pytest.mark.parametrize("data", [{}, {"limit_tokens": 1000}])
def test_max_bad_is_asked_of_all_that_is_read_whoever_has_read_it_before(
    store: Store, tmp_path: Path, data: dict[str, int]
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"text": "{text.strip()}"}}\n{"bad" * (i < 5)}\n' for i, text in enumerate(prose(200))))

    def stopped(kind: str, **fields: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.run_stage("download", tiny_config(path, part_mb=0.001, max_bad=1, **data), store, emit=stopped)
    with pytest.raises(NanodlmError, match=r"too many rows are no documents: 5 not JSON .*raise --data.max_bad \(0.01"):
        run.run_stage("download", tiny_config(path, part_mb=0.001, **data), store)
    done, _ = run.run_stage("download", tiny_config(path, part_mb=0.001, max_bad=0.5, **data), store)
    assert done.metrics["bad_rows"]["counts"] == {"not JSON": 5}


def test_the_bad_rows_of_all_sources_count_together(store: Store, tmp_path: Path) -> None:
    good = '{"text": "good"}\n'
    for name, text in (("a.jsonl", good * 2 + "bad\n"), ("b.jsonl", good * 200)):
        (tmp_path / name).write_text(text)
    sources = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl")]
    done, _ = run.run_stage("download", tiny_config(sources, weights=[1, 2]), store)
    assert done.metrics["documents"] == 202
