"""Batches of training rows: step k's rows are a pure function of the seed and k, on any number of hosts."""

import sys
from collections.abc import Generator
from functools import lru_cache
from pathlib import Path

import grain.python as grain
import numpy as np
from jaxtyping import Int

from nanodlm.config import Config
from nanodlm.data.rows import name, open_files, open_rows
from nanodlm.store import Json

TOGETHER = 512  # rows that a thread reads at a time, at least: small updates one by one would cost twice the time
AHEAD = 4  # how often it may do so before they are asked for


def train_batches(
    config: Config, shards: Json, folder: Path, *, first_row: int = 0, share: tuple[int, int] = (0, 1)
) -> Generator[Int[np.ndarray, "A R L"], None, None]:
    """Yield the rows of update after update without end, int32; each epoch visits all rows in an order of its own.

    `shards` are the shard stage's metrics `rows_per_shard` and `dtype`, the files lie in `folder`, and `first_row`
    counts the rows that earlier updates took. `share` says which part of each micro-batch to read, from 0, and of how
    many equal ones: side by side they are what one process reads. A thread reads ahead.
    """
    (part, parts), shape = share, (config.train.grad_acc_steps, config.train.batch_size)
    updates = -(-TOGETHER // (shape[0] * shape[1]))
    ends = np.cumsum(shards["rows_per_shard"])
    starts, total = ends - shards["rows_per_shard"], int(ends[-1])
    opened = lru_cache(open_files())(lambda shard: open_rows(folder / name(shard)))

    @lru_cache(2)  # an update may lie across the end of an epoch
    def order(epoch: int) -> Int[np.ndarray, "N"]:
        rows = np.arange(total, dtype=np.uint32)
        return np.random.default_rng((config.data.shuffle_seed, epoch)).permutation(rows)

    def read_updates(first: int) -> Int[np.ndarray, "U A R L"]:
        places = np.arange(first, first + updates * shape[0] * shape[1]).reshape(updates * shape[0], parts, -1)
        epochs, places = np.divmod(places[:, part].ravel(), total)
        rows = np.concatenate([order(e)[places[epochs == e]] for e in range(epochs[0], epochs[-1] + 1)])
        files = np.searchsorted(ends, rows, side="right")
        inside = rows - starts[files]
        # A record at a time takes 3 µs in any number of files; a list of them waits, in each, for a pool of threads.
        records = [opened(file).read(i, i + 1)[0] for file, i in zip(files.tolist(), inside.tolist(), strict=True)]
        ids = np.frombuffer(b"".join(records), shards["dtype"]).astype(np.int32)
        return ids.reshape(updates, shape[0], shape[1] // parts, -1)

    firsts = grain.MapDataset.range(first_row, sys.maxsize, updates * shape[0] * shape[1])
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=AHEAD)
    for several in firsts.map(read_updates).to_iter_dataset(options):
        yield from several
