"""Any other storage that fsspec has a driver for, if it can create a file only once."""

import base64
import contextlib
import hashlib
import time
from datetime import datetime
from pathlib import Path
from typing import Any, cast

from fsspec import AbstractFileSystem

from nanodlm.store.disk import Found, sha256_of
from nanodlm.store.manifest import Json


class Driver:
    """Files on a file system of fsspec's. See `Disk` for the methods."""

    def __init__(self, fs: AbstractFileSystem):
        self.fs = fs

    def read(self, path: str, limit: int) -> bytes:
        if len(data := self.fs.cat_file(path, end=limit + 1)) > limit:
            raise ValueError(f"has more than {limit} bytes")
        return cast(bytes, data)

    def write(self, path: str, data: bytes, create_only: bool = False) -> bool:
        self.fs.pipe_file(path, data, mode="create" if create_only else "overwrite")
        return True

    def files(self, folder: str) -> dict[str, Found]:
        below, found = f"{folder.strip('/')}/".lstrip("/"), {}
        with contextlib.suppress(FileNotFoundError):
            for path, info in cast(Any, self.fs.find(folder, detail=True)).items():
                if path.lstrip("/").startswith(below) and not path.endswith("/"):  # a console's mark of a folder
                    there = Found(int(info["size"]), _changed(info), info.get("md5Hash", ""))
                    found[path.lstrip("/").removeprefix(below)] = there
        return found

    def sha256(self, path: str, size: int) -> str:
        with self.fs.open(path, "rb", cache_type="readahead") as file:
            return hashlib.file_digest(cast(Any, file), "sha256").hexdigest()

    def get(self, path: str, target: Path, size: int) -> str:
        self.fs.get_file(path, str(target))
        return sha256_of(target)

    def put(self, source: Path, path: str) -> tuple[str, str]:
        self.fs.put_file(str(source), path)
        with source.open("rb") as file:  # which Google's listings show
            md5 = base64.b64encode(hashlib.file_digest(file, "md5").digest()).decode()
        return sha256_of(source), md5

    def remove(self, *paths: str) -> None:
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                self.fs.rm_file(path)

    def remove_folder(self, folder: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm(folder, recursive=True)


def _changed(info: Json) -> float:
    """Return when a file last changed, as a Unix time; drivers name it differently."""
    value = next((info[name] for name in ("mtime", "updated", "created") if info.get(name)), time.time())
    if isinstance(value, str):
        value = datetime.fromisoformat(value)
    return value.timestamp() if isinstance(value, datetime) else float(value)
