"""Batches of training rows: step k's rows are a pure function of the seed and k, on any number of hosts."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import grain.python as grain
import numpy as np
from jaxtyping import Int

from nanodlm.data.rows import Rows, name

WINDOW = 16  # shards whose rows are shuffled together; training begins when the first so many are there


def windows(rows_per_shard: Sequence[int], seed: int) -> list[list[int]]:
    """Return which shards are shuffled together, in the order in which an epoch reads them.

    >>> windows([10, 10, 10], seed=0)
    [[0, 1, 2]]
    """
    numbers = list(range(len(rows_per_shard)))
    if len(numbers) > WINDOW:
        numbers = np.random.default_rng(seed).permutation(len(numbers)).tolist()
    found = [numbers[i : i + WINDOW] for i in range(0, len(numbers), WINDOW)]
    return [window for window in found if sum(rows_per_shard[i] for i in window)]


def train_batches(
    rows_per_shard: Sequence[int],
    fetch: Callable[[str], Path],
    *,
    dtype: str,
    batch_size: int,
    grad_acc_steps: int = 1,
    seed: int,
    first_row: int = 0,
    share: tuple[int, int] = (0, 1),
) -> Iterator[Int[np.ndarray, "A R L"]]:
    """Yield the rows of update after update without end, int32, reshuffled every epoch within windows of shards.

    `fetch` gives the local path of a shard by its file name when its first row is read, and `first_row` counts the rows
    that earlier updates took. An update has A = `grad_acc_steps` micro-batches of `batch_size` rows over all processes.
    `share` says which part of each to read, from 0, and of how many equal ones: all parts, side by side, are what one
    process would read.
    """
    shuffled, opened = [], {}
    for number, window in enumerate(windows(rows_per_shard, seed)):
        source = Rows({name(i): rows_per_shard[i] for i in window}, fetch, opened)
        shuffled.append(grain.MapDataset.source(cast(Any, source)).seed((seed + number) % 2**31).shuffle())
    rows = (grain.MapDataset.concatenate(shuffled) if len(shuffled) > 1 else shuffled[0]).repeat()
    parts = (
        rows[first_row:]
        .map(lambda record: np.frombuffer(record, dtype).astype(np.int32))
        .batch(batch_size // share[1], drop_remainder=True)  # endless; rounding up would overflow at 1
    )
    updates = parts[share[0] :: share[1]].batch(grad_acc_steps, drop_remainder=True)
    return iter(updates.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=16)))
