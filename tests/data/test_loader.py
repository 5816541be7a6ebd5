from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanodlm.config import Config
from nanodlm.data import loader
from nanodlm.data import rows as data_rows
from nanodlm.data.loader import train_batches

ROWS, STEP, LENGTH = 22, 4, 3  # rows that steps do not divide, so that steps lie across the ends of epochs
EPOCH = 11  # steps in which two whole epochs are visited


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards, the middle one empty; row i is (i, i, i)."""
    folder = tmp_path_factory.mktemp("shards")
    rows = np.repeat(np.arange(ROWS, dtype="<u2")[:, None], LENGTH, axis=1)
    for i, part in enumerate((rows[:15], rows[:0], rows[15:])):
        data_rows.write(folder / f"train-{i:05d}.arrayrecord", part)
    data_rows.write(folder / "validation.arrayrecord", rows + 1000)
    return folder


def updates(
    folder: Path, counts: Any = None, dtype: str = "<u2", size: int = STEP, micro: int = 1, seed: int = 0, **at: Any
) -> Iterator[np.ndarray]:
    """The updates' rows of the shards in a folder."""
    counts = counts or [len(data_rows.read(path, dtype)) for path in sorted(folder.glob("train-*"))]
    sizes = {"batch_size": size, "grad_acc_steps": micro}
    config = Config().replace(train=sizes, data={"shuffle_seed": seed})
    return train_batches(config, {"rows_per_shard": counts, "dtype": dtype}, folder.joinpath, **at)


def batches(folder: Path, count: int, **options: Any) -> np.ndarray:
    """The first `count` batches, stacked."""
    return np.stack([update[0] for update in islice(updates(folder, **options), count)])


def test_every_epoch_visits_every_training_row_once_in_an_order_of_its_own(folder: Path) -> None:
    found = batches(folder, 2 * EPOCH)
    assert (found == found[..., :1]).all()  # whole rows
    epochs = found[..., 0].reshape(4, ROWS)
    assert all(sorted(epoch) == list(range(ROWS)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, np.arange(ROWS)]}) == 5


def test_the_order_is_that_of_the_seed(folder: Path) -> None:
    np.testing.assert_array_equal(batches(folder, EPOCH), batches(folder, EPOCH))
    assert (batches(folder, EPOCH) != batches(folder, EPOCH, seed=1)).any()


@pytest.mark.parametrize(("shares", "micro", "first_row"), [(2, 1, 20), (4, 1, 0), (2, 3, 20), (4, 3, 0)])
def test_the_shares_of_each_micro_batch_side_by_side_are_what_one_process_reads(
    folder: Path, shares: int, micro: int, first_row: int
) -> None:
    options = {"micro": micro, "first_row": first_row}
    whole = list(islice(updates(folder, **options), EPOCH))
    assert (whole[0].shape, whole[0].dtype) == ((micro, STEP, LENGTH), np.int32)
    parts = [islice(updates(folder, **options, share=(i, shares)), EPOCH) for i in range(shares)]
    for expected, *found in zip(whole, *parts, strict=True):
        np.testing.assert_array_equal(np.concatenate(found, axis=1), expected)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 22, 33])  # more than there are, too
def test_batches_of_any_size_visit_the_same_rows_in_the_same_order(folder: Path, batch_size: int) -> None:
    visited = batches(folder, 66 // batch_size, size=batch_size)[..., 0].ravel()
    np.testing.assert_array_equal(visited, batches(folder, 17)[..., 0].ravel()[:66])


def test_rows_of_32_bits_keep_their_ids(tmp_path: Path) -> None:
    data_rows.write(tmp_path / "train-00000.arrayrecord", np.array([[70_000, 2**31 - 1]], "<u4"))
    assert batches(tmp_path, 1, dtype="<u4", size=1).tolist() == [[[70_000, 2**31 - 1]]]


def test_a_truncated_shard_stops_the_loader_rather_than_shrinking_the_data(folder: Path, tmp_path: Path) -> None:
    whole = (folder / "train-00000.arrayrecord").read_bytes()
    (tmp_path / "train-00000.arrayrecord").write_bytes(whole)
    (tmp_path / "train-00001.arrayrecord").write_bytes(whole[:-10])
    with pytest.raises(RuntimeError, match="Riegeli"):
        batches(tmp_path, 1, counts=[15, 15])


@pytest.fixture
def many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Seven shards of two rows each, of which three are shuffled together."""
    monkeypatch.setattr(loader, "WINDOW", 3)
    for i in range(7):
        data_rows.write(tmp_path / data_rows.name(i), np.full((2, LENGTH), 2 * i, "<u2") + np.array([[0], [1]], "<u2"))
    return tmp_path


def test_an_epoch_reads_window_by_window_and_every_row_once(many: Path) -> None:
    visited = batches(many, 14, size=2)[..., 0].ravel()
    windows = loader.windows([2] * 7, seed=0)
    assert sorted(i for window in windows for i in window) == list(range(7))
    assert windows[0] != [0, 1, 2]
    for epoch in visited.reshape(2, 14):
        ends = np.cumsum([2 * len(window) for window in windows])
        for window, rows in zip(windows, np.split(epoch, ends[:-1]), strict=True):
            assert sorted(rows) == sorted(row for i in window for row in (2 * i, 2 * i + 1))
    assert visited[:14].tolist() != visited[14:].tolist()


@pytest.mark.parametrize(("shards", "steps"), [("folder", 1), ("folder", 6), ("folder", 40), ("many", 5)])
def test_a_later_first_row_gives_the_batches_of_an_uninterrupted_run(
    shards: str, steps: int, request: pytest.FixtureRequest
) -> None:
    source = request.getfixturevalue(shards)
    whole = batches(source, steps + 8)
    np.testing.assert_array_equal(batches(source, 8, first_row=steps * STEP), whole[steps:])


def test_no_more_files_are_open_than_are_read_together(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_rows, "OPEN", 2)
    fetched: list[str] = []
    counts = {"train-00000.arrayrecord": 15, "train-00002.arrayrecord": 7, "validation.arrayrecord": ROWS}
    rows = data_rows.Rows(counts, data_rows.opener(lambda name: (fetched.append(name), folder / name)[1]))
    values = [int(np.frombuffer(rows[i], "<u2")[0]) for i in range(ROWS * 2)]
    assert values == [*range(ROWS), *range(1000, 1000 + ROWS)]
    assert fetched == list(counts)
    assert [int(np.frombuffer(rows[i], "<u2")[0]) for i in (15, 0)] == [15, 0]
    assert fetched == [*counts, "train-00000.arrayrecord"]  # it was closed, the others were not
