"""Batches of training rows: step k's rows are a pure function of the seed and k, on any number of hosts."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import grain.python as grain
import numpy as np
from jaxtyping import Int

from nanodlm.config import Config
from nanodlm.data.rows import Rows, name, opener
from nanodlm.store import Json

WINDOW = 16  # shards whose rows are shuffled together; training begins when the first so many are there


def windows(rows_per_shard: Sequence[int], seed: int) -> list[list[int]]:
    """Return which shards are shuffled together, in the order in which an epoch reads them."""
    numbers = list(range(len(rows_per_shard)))
    if len(numbers) > WINDOW:
        numbers = np.random.default_rng(seed).permutation(len(numbers)).tolist()
    found = [numbers[i : i + WINDOW] for i in range(0, len(numbers), WINDOW)]
    return [window for window in found if sum(rows_per_shard[i] for i in window)]


def train_batches(
    config: Config, shards: Json, fetch: Callable[[str], Path], *, first_row: int = 0, share: tuple[int, int] = (0, 1)
) -> Iterator[Int[np.ndarray, "A R L"]]:
    """Yield the rows of update after update without end, int32, reshuffled every epoch within windows of shards.

    `shards` are the shard stage's metrics `rows_per_shard` and `dtype`. `fetch` gives the local path of a shard by its
    file name when its first row is read, and `first_row` counts the rows that earlier updates took. `share` says which
    part of each micro-batch to read, from 0, and of how many equal ones: side by side they are what one process reads.
    """
    counts, seed, (part, parts) = shards["rows_per_shard"], config.data.shuffle_seed, share
    shuffled, opened = [], opener(fetch)
    for number, window in enumerate(windows(counts, seed)):
        source = Rows({name(i): counts[i] for i in window}, opened)
        shuffled.append(grain.MapDataset.source(cast(Any, source)).seed((seed + number) % 2**31).shuffle())
    rows = (grain.MapDataset.concatenate(shuffled) if len(shuffled) > 1 else shuffled[0]).repeat()
    batches = (
        rows[first_row:]
        .map(lambda record: np.frombuffer(record, shards["dtype"]).astype(np.int32))
        .batch(config.train.batch_size // parts, drop_remainder=True)  # endless; rounding up would overflow at 1
    )
    updates = batches[part::parts].batch(config.train.grad_acc_steps, drop_remainder=True)
    return iter(updates.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=16)))
