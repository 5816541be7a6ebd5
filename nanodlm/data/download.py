"""The download stage: whatever the source is becomes parquet parts of documents."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nanodlm.config import Config
from nanodlm.data.readers import Bad, read_documents
from nanodlm.data.sources import identity, source_files
from nanodlm.errors import Emit, NanodlmError
from nanodlm.store import Artifact, Attempt, fingerprint_of


def download(
    config: Config, inputs: dict[str, Artifact], attempt: Attempt, emit: Emit, adopted: list[str] | None = None
) -> dict[str, Any]:
    """Copy the source's documents into parquet parts of about `data.part_mb` megabytes each.

    With `adopted`, paths or globs of copies of the source's files, those are read instead.
    """
    data = config.data
    before = identity(data, adopted)
    source = fingerprint_of(before)  # parts of what was read from other files are not gone on from
    column = "tokens" if data.pretokenized else "text"
    done = {"documents": 0, "bytes": 0}
    part = 0
    finished = attempt.adopt_finished(name for name in attempt.earlier if name.startswith("part-"))
    while (info := finished.get(_part(part), {})).get("source") == source:
        done, part = {count: info[count] for count in done}, part + 1
    for name in finished.keys() - {_part(i) for i in range(part)}:
        attempt.forget(name)
    skip, pending, size = done["documents"], [], 0

    def flush() -> None:
        nonlocal part, pending, size
        name = _part(part)
        table = pa.table({column: pa.chunked_array(pending)})
        pq.write_table(table, attempt.path / name, compression="zstd")
        done["documents"] += len(table)
        done["bytes"] += size
        attempt.finish(name, [name], **done, source=source)
        part, pending, size = part + 1, [], 0
        emit("progress", done=done["bytes"] / 1e6, unit="MB")

    bad = Bad()
    for batch in read_documents(data, source_files(data, adopted), bad):
        if skip >= len(batch):
            skip -= len(batch)
            continue
        pending.append(batch[skip:])
        size += pending[-1].nbytes
        skip = 0
        if size >= data.part_mb * 1e6:
            flush()
    if pending:
        flush()
    if identity(data, adopted) != before:
        for index in range(part):
            attempt.forget(_part(index))
        raise NanodlmError("the source's files changed while they were read: run again")
    if part == 0:
        raise NanodlmError(f"{data.source[0]} holds no documents: every one is empty")
    if bad.counts:
        emit("message", text=f"left out {bad}")
    return {"parts": part, **done, "bad_rows": dataclasses.asdict(bad)}


def _part(index: int) -> str:
    return f"part-{index:05d}.parquet"


def parts(download: Artifact) -> list[str]:
    """Return the names of a download's parts, in order; nothing is fetched."""
    return sorted(file["path"] for file in download.files("part-"))


def by_part(download: Artifact) -> list[Iterator[str] | Iterator[list[int]]]:
    """Return the documents of each part of a download."""
    folder = download.local()
    return [documents(folder / name) for name in parts(download)]


def documents(part: Path) -> Iterator[str] | Iterator[list[int]]:
    """Read the documents of one part: texts, or lists of token ids."""
    with pq.ParquetFile(part) as file:
        for batch in file.iter_batches(batch_size=100):
            yield from batch.column(0).to_pylist()
