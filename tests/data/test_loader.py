import os
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
from nanodlm.errors import Damaged

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
    return train_batches(config, {"rows_per_shard": counts, "dtype": dtype}, folder, **at)


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
    with pytest.raises(Damaged, match=r"train-00001\.arrayrecord is not a whole ArrayRecord file"):
        batches(tmp_path, 1, counts=[15, 15])


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """Forty shards of one row each."""
    for i in range(40):
        data_rows.write(tmp_path / data_rows.name(i), np.full((1, LENGTH), i, "<u2"))
    return tmp_path


def test_the_rows_of_all_shards_are_shuffled_together(many: Path) -> None:
    epochs = batches(many, 2, size=40)[..., 0]
    assert [sorted(epoch) for epoch in epochs.tolist()] == [[*range(40)]] * 2
    for epoch in range(2):
        order = np.random.default_rng((0, epoch)).permutation(np.arange(40, dtype=np.uint32))
        np.testing.assert_array_equal(epochs[epoch], order)


@pytest.mark.parametrize(("shards", "steps"), [("folder", 1), ("folder", 6), ("folder", 40), ("many", 5)])
def test_a_later_first_row_gives_the_batches_of_an_uninterrupted_run(
    shards: str, steps: int, request: pytest.FixtureRequest
) -> None:
    source = request.getfixturevalue(shards)
    whole = batches(source, steps + 8)
    np.testing.assert_array_equal(batches(source, 8, first_row=steps * STEP), whole[steps:])


def test_no_more_files_are_open_than_the_process_may_have(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "open_files", lambda: 8)
    stream = updates(many)
    visited = [next(stream)[0, :, 0] for _ in range(60)]
    assert np.unique(np.concatenate(visited)).size == 40
    open_now = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
    assert 0 < sum(path.startswith(f"{many.resolve()}/") for path in open_now) <= 9  # and the one that comes


def test_half_of_the_files_that_a_process_may_open_hold_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit, found in ((1024, 512), (-1, 64)):
        monkeypatch.setattr("resource.getrlimit", lambda _, limit=limit: (limit, limit))
        assert data_rows.open_files() == found
