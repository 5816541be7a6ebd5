"""The download stage: whatever the source is becomes Arrow files of documents, its parts."""

import dataclasses
import math
from importlib import import_module
from typing import Any

from nanodlm.config import Config, DataConfig
from nanodlm.data.clean import Stream, cleaned
from nanodlm.data.documents import Documents
from nanodlm.data.parts import VALIDATION, Writer, filling
from nanodlm.data.readers import Bad, check_share, read_documents
from nanodlm.data.sources import files_apart, identity, source_files, validation_of
from nanodlm.errors import Emit, NanodlmError
from nanodlm.store import Artifact, Attempt, fingerprint_of


def download(config: Config, inputs: dict[str, Artifact], attempt: Attempt, emit: Emit) -> dict[str, Any]:
    """Copy documents into parts: each ends with the one that fills it or, with weights, where another source begins."""
    data = config.data
    before = identity(data)
    source = fingerprint_of(before)  # parts of what was read from other files are not gone on from
    column, bytes_each = ("tokens", 2) if data.pretokenized else ("text", 1)
    made = _earlier(attempt, source)  # what is known of each part
    writer, of = None, 0  # the number of the source that is being read

    def finish(writer: Writer) -> None:
        writer.close()
        about = {"documents": writer.rows, "size": writer.size, "row_sizes": sorted(writer.sizes)}
        attempt.finish(name := _part(len(made)), [name], **about, source=source, of=of)
        made.append({**about, "of": of})
        emit("progress", done=sum(part["size"] for part in made) * bytes_each / 1e6, unit="MB")

    bad, counts = {"bad_rows": Bad()}, dict[str, int]()
    skip, full = sum(part["documents"] for part in made), data.part_mb * 1e6 / bytes_each
    apart = [import_module("nanodlm.data.hub").hub_files(data, emit)] if data.revision else files_apart(data)
    for number, array in cleaned(data, _first(data, apart, bytes_each, bad["bad_rows"]), attempt.path, counts):
        if writer and number != of:
            writer = finish(writer)
        of = number
        array, skip = array[skip:], max(0, skip - len(array))
        while len(array):
            writer = writer or Writer(attempt.path / _part(len(made)), column)
            fits = filling(array, full - writer.size)
            writer.write(array[:fits])
            array = array[fits:]
            if writer.size >= full:
                writer = finish(writer)
    if writer:
        finish(writer)
    check_share(data, bad["bad_rows"])  # all of it, whatever was finished before
    if data.validation:
        bad["bad_validation_rows"] = _write_validation(data, attempt, column)
    if identity(data) != before:
        for part in range(len(made)):
            attempt.forget(_part(part))
        raise NanodlmError("the source's files changed while they were read: run again")
    if not made:
        all_are = "empty or left out by cleaning" if counts else "empty"
        raise NanodlmError(f"{data.source[0]} holds no documents: every one is {all_are}")
    for rows in bad.values():
        if rows.counts:
            emit("message", text=f"left out {rows}")
    if counts:
        emit("message", text="cleaned: " + ", ".join(f"{count:,} {what}" for what, count in counts.items()))
    sizes, row_sizes = [part["size"] for part in made], {size for part in made for size in part["row_sizes"]}
    found = {"parts": len(made), "documents": sum(part["documents"] for part in made), "bytes": sum(sizes) * bytes_each}
    found |= {name: dataclasses.asdict(rows) for name, rows in bad.items()}
    found |= {"part_sizes": sizes} | ({"cleaned": counts} if counts else {})
    found |= {"part_sources": [part.get("of", 0) for part in made]} if data.weights else {}
    # Rows of one size were cut from a stream, and are no documents.
    return found | ({"row_size": row_sizes.pop()} if data.pretokenized and len(row_sizes) == 1 else {})


def _earlier(attempt: Attempt, source: str) -> list[dict[str, Any]]:
    """Take over the first parts that an earlier attempt has made of the same source, and drop others."""
    finished, made = attempt.adopt_finished(name for name in attempt.earlier if name.startswith("part-")), []
    while (info := finished.get(_part(len(made)), {})).get("source") == source:
        made.append(info)
    for name in finished.keys() - {_part(i) for i in range(len(made))}:
        attempt.forget(name)
    return made


def _write_validation(data: DataConfig, attempt: Attempt, column: str) -> Bad:
    """Write the validation set of its own, and return what was left out of it."""
    writer, bad = Writer(attempt.path / VALIDATION, column), Bad()
    for array in read_documents(data, source_files(validation_of(data)), bad):
        writer.write(array)
    writer.close()
    check_share(data, bad)
    return bad


def _first(data: DataConfig, apart: list[list[str]], bytes_each: int, bad: Bad) -> Stream:
    """Yield the first documents that have `data.limit_tokens` together, or all; text has one in four bytes."""
    left = math.inf if data.limit_tokens is None else data.limit_tokens * (4 if bytes_each == 1 else 1)
    for number, files in enumerate(apart):
        for array in read_documents(data, files, bad):
            yield number, (taken := array[: filling(array, left)])
            left -= len(Documents.of(taken).flat)
            if left <= 0:
                return


def _part(index: int) -> str:
    return f"part-{index:05d}.arrow"
