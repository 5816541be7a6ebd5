"""Batches of training rows: step k's rows are a pure function of the seed and k, on any number of hosts."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import grain.python as grain
import numpy as np
from jaxtyping import Int


def train_batches(
    folder: Path,
    *,
    dtype: str,
    batch_size: int,
    grad_acc_steps: int = 1,
    seed: int,
    first_row: int = 0,
    share: int = 0,
    shares: int = 1,
) -> Iterator[Int[np.ndarray, "A R L"]]:
    """Endless updates' rows, reshuffled every epoch.

    Args:
        folder: Where the `train-*.arrayrecord` files lie.
        dtype: Their token type.
        batch_size: Rows of a micro-batch over all processes.
        grad_acc_steps: Micro-batches of an update, A.
        seed: Seed of the order.
        first_row: Rows that earlier updates took.
        share: Which part of every micro-batch to read: the parts of all, side by side, are what one process would read.
        shares: How many equal parts there are; must divide `batch_size`.

    Yields:
        int32 rows, (A, batch_size / shares, L).
    """
    source = grain.ArrayRecordDataSource([str(p) for p in sorted(folder.glob("train-*.arrayrecord"))])
    rows = grain.MapDataset.source(cast(Any, source)).seed(seed).shuffle().repeat()
    parts = (
        rows[first_row:]
        .map(lambda record: np.frombuffer(record, dtype).astype(np.int32))
        .batch(batch_size // shares, drop_remainder=True)  # endless; rounding up would overflow at 1
    )
    updates = parts[share::shares].batch(grad_acc_steps, drop_remainder=True)
    return iter(updates.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=16)))
