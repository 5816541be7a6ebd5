from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanodlm import shards
from nanodlm.loader import train_batches

ROWS, STEP, LENGTH = 22, 4, 3  # rows that steps do not divide, so that steps lie across the ends of epochs
EPOCH = 11  # steps in which two whole epochs are visited


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards, the middle one empty; row i is (i, i, i)."""
    folder = tmp_path_factory.mktemp("shards")
    rows = np.repeat(np.arange(ROWS, dtype="<u2")[:, None], LENGTH, axis=1)
    for i, part in enumerate((rows[:15], rows[:0], rows[15:])):
        shards.write(folder / f"train-{i:05d}.arrayrecord", part)
    shards.write(folder / "validation.arrayrecord", rows + 1000)
    return folder


def batches(folder: Path, count: int, **options: Any) -> np.ndarray:
    """The first `count` batches, stacked."""
    options = {"dtype": "<u2", "batch_size": STEP, "seed": 0, **options}
    return np.stack([update[0] for update in islice(train_batches(folder, **options), count)])


def test_batches_are_whole_rows_as_int32(folder: Path) -> None:
    found = batches(folder, 3)
    assert found.shape == (3, STEP, LENGTH)
    assert found.dtype == np.int32
    assert (found == found[..., :1]).all()


@pytest.mark.parametrize("steps", [1, 5, 6, 11, 40])
def test_a_later_first_row_gives_the_batches_of_an_uninterrupted_run(folder: Path, steps: int) -> None:
    whole = batches(folder, steps + 8)
    np.testing.assert_array_equal(batches(folder, 8, first_row=steps * STEP), whole[steps:])


@pytest.mark.parametrize("size", [2, 5])
def test_batches_of_another_size_continue_where_the_last_ones_ended(folder: Path, size: int) -> None:
    whole = batches(folder, 30)[:, :, 0].ravel()
    found = batches(folder, 3, first_row=6 * STEP, batch_size=size)
    np.testing.assert_array_equal(found[:, :, 0].ravel(), whole[6 * STEP : 6 * STEP + 3 * size])


def test_every_epoch_visits_every_row_once(folder: Path) -> None:
    visited = batches(folder, 2 * EPOCH)[..., 0].ravel()
    for epoch in visited.reshape(4, ROWS):
        assert sorted(epoch) == list(range(ROWS))


def test_no_validation_row_is_ever_visited(folder: Path) -> None:
    assert batches(folder, 2 * EPOCH).max() == ROWS - 1


def test_epochs_differ_in_their_order(folder: Path) -> None:
    epochs = batches(folder, 2 * EPOCH)[..., 0].reshape(4, ROWS)
    assert len({tuple(epoch) for epoch in [*epochs, np.arange(ROWS)]}) == 5


def test_the_order_is_that_of_the_seed(folder: Path) -> None:
    np.testing.assert_array_equal(batches(folder, EPOCH), batches(folder, EPOCH))
    assert (batches(folder, EPOCH) != batches(folder, EPOCH, seed=1)).any()


@pytest.mark.parametrize("first_row", [0, 20])
@pytest.mark.parametrize("shares", [2, 4])
@pytest.mark.parametrize("micro", [1, 3])
def test_the_shares_of_each_micro_batch_side_by_side_are_what_one_process_reads(
    folder: Path, shares: int, micro: int, first_row: int
) -> None:
    options = {"dtype": "<u2", "batch_size": STEP, "grad_acc_steps": micro, "seed": 0, "first_row": first_row}
    whole = list(islice(train_batches(folder, **options), EPOCH))
    assert whole[0].shape == (micro, STEP, LENGTH)
    parts = [islice(train_batches(folder, **options, share=i, shares=shares), EPOCH) for i in range(shares)]
    for expected, *found in zip(whole, *parts, strict=True):
        np.testing.assert_array_equal(np.concatenate(found, axis=1), expected)


def test_a_step_may_hold_more_rows_than_there_are(folder: Path) -> None:
    visited = batches(folder, 2, batch_size=ROWS + 11)[..., 0].ravel()
    assert [sorted(epoch) for epoch in visited.reshape(3, ROWS)] == [list(range(ROWS))] * 3


@pytest.mark.parametrize("batch_size", [1, 2, 3, 22])
def test_batches_of_any_size_visit_the_same_rows_in_the_same_order(folder: Path, batch_size: int) -> None:
    visited = batches(folder, 66 // batch_size, batch_size=batch_size)[..., 0].ravel()
    np.testing.assert_array_equal(visited, batches(folder, 17)[..., 0].ravel()[:66])


def test_rows_of_32_bits_keep_their_ids(tmp_path: Path) -> None:
    shards.write(tmp_path / "train-00000.arrayrecord", np.array([[70_000, 2**31 - 1]], "<u4"))
    assert batches(tmp_path, 1, dtype="<u4", batch_size=1).tolist() == [[[70_000, 2**31 - 1]]]


def test_a_truncated_shard_stops_the_loader_rather_than_shrinking_the_data(folder: Path, tmp_path: Path) -> None:
    whole = (folder / "train-00000.arrayrecord").read_bytes()
    (tmp_path / "train-00000.arrayrecord").write_bytes(whole)
    (tmp_path / "train-00001.arrayrecord").write_bytes(whole[:-10])
    with pytest.raises(RuntimeError, match="Riegeli"):
        batches(tmp_path, 1)
