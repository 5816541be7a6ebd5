"""Storages that are no disk: a bucket of S3, through obstore, and any other that fsspec has a driver for."""

import base64
import contextlib
import errno
import hashlib
import itertools
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

from nanodlm.errors import redact
from nanodlm.store.disk import Found, sha256_of

PIECE, PART = 1 << 25, 1 << 24  # bytes of a file that one request asks for, and that one sends
REQUEST = {"timeout": timedelta(seconds=60), "connect_timeout": timedelta(seconds=5)}
# By obstore itself; `retry.ask` goes on where this ends, for nothing can interrupt it.
RETRIES: Any = {"max_retries": 3, "retry_timeout": timedelta(seconds=10)}
# Answers that will not change: all of 4xx but these, that the server does not know such a request, and keys of others
# below the store's address that obstore does not list, such as a//b.
FINAL = re.compile(r"status code: (?:4(?!08|09|25|29)\d\d|501)|object with invalid path")


class Bucket:
    """Files of one bucket; paths begin with its name, as fsspec has it. See `Disk` for the methods."""

    def __init__(self, name: str):
        self.name = name
        self.store = _connect(name, *sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))

    def _key(self, path: str) -> str:
        return path.removeprefix(self.name).strip("/")

    def read(self, path: str, limit: int) -> bytes:
        with _as_of_a_disk():
            found = self.store.get(self._key(path))
            if found.meta["size"] > limit:
                raise ValueError(f"has {found.meta['size']} bytes")
            return bytes(found.bytes())

    def write(self, path: str, data: bytes, create_only: bool = False) -> bool:
        with _as_of_a_disk():
            self.store.put(self._key(path), data, mode="create" if create_only else "overwrite")
        return True

    def files(self, folder: str) -> dict[str, Found]:
        below, found = f"{self._key(folder)}/".lstrip("/"), {}
        with _as_of_a_disk():
            for file in itertools.chain.from_iterable(self.store.list(below or None, chunk_size=1000)):
                if file["path"].startswith(below):
                    changed = file["last_modified"].timestamp()
                    found[file["path"].removeprefix(below)] = Found(file["size"], changed, file["e_tag"] or "")
        return found

    def get(self, path: str, target: Path, size: int) -> str:
        with _as_of_a_disk():
            return _write(target, size, lambda start, end: self.store.get_range(self._key(path), start=start, end=end))

    def put(self, source: Path, path: str) -> tuple[str, str]:
        with ThreadPoolExecutor(1) as hashing:
            hashed = hashing.submit(sha256_of, source)
            with _as_of_a_disk():
                sent = self.store.put(self._key(path), source, chunk_size=PART)
            return hashed.result(), sent["e_tag"] or ""

    def remove(self, *paths: str) -> None:
        with contextlib.suppress(FileNotFoundError), _as_of_a_disk():
            self.store.delete([self._key(path) for path in paths])

    def remove_folder(self, folder: str) -> None:
        self.remove(*(f"{folder}/{path}" for path in self.files(folder)))

    def uploads(self, folder: str) -> Iterator[tuple[str, float, Callable[[], Any]]]:
        """Yield uploads in several parts below a folder that nobody finished: path, Unix time, and what ends them."""
        from botocore.session import get_session  # obstore does not list them

        client = get_session().create_client("s3")
        below = f"{self._key(folder)}/".lstrip("/")
        for page in client.get_paginator("list_multipart_uploads").paginate(Bucket=self.name, Prefix=below):
            for upload in page.get("Uploads", ()):
                named = {"Bucket": self.name, "Key": upload["Key"], "UploadId": upload["UploadId"]}
                end = lambda named=named: client.abort_multipart_upload(**named)  # noqa: E731
                yield upload["Key"].removeprefix(below), upload["Initiated"].timestamp(), end


class Driver:
    """Files on a file system of fsspec's. See `Disk` for the methods."""

    def __init__(self, fs: Any):
        self.fs = fs

    def read(self, path: str, limit: int) -> bytes:
        if len(data := self.fs.cat_file(path, end=limit + 1)) > limit:
            raise ValueError(f"has more than {limit} bytes")
        return data

    def write(self, path: str, data: bytes, create_only: bool = False) -> bool:
        self.fs.pipe_file(path, data, mode="create" if create_only else "overwrite")
        return True

    def files(self, folder: str) -> dict[str, Found]:
        below, found = f"{folder.strip('/')}/".lstrip("/"), {}
        for path, info in self.fs.find(folder, detail=True).items():
            if path.lstrip("/").startswith(below) and not path.endswith("/"):  # a console's mark of a folder
                time = info.get("updated") or info["created"]  # Google's, and that in memory
                changed = datetime.fromisoformat(time).timestamp() if isinstance(time, str) else float(time)
                there = Found(int(info["size"]), changed, info.get("md5Hash", ""))
                found[path.lstrip("/").removeprefix(below)] = there
        return found

    def get(self, path: str, target: Path, size: int) -> str:
        return _write(target, size, lambda start, end: self.fs.cat_file(path, start, end))

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


def _write(target: Path, size: int, get: Callable[[int, int], Any]) -> str:
    """Write what comes piece by piece, each hashed while the next one is under way, and return the sha256 of it."""
    digest, hashed = hashlib.sha256(), None
    with target.open("wb") as file, ThreadPoolExecutor(1) as hashing:
        for start in range(0, size, PIECE):
            piece = get(start, min(start + PIECE, size))
            if hashed:
                hashed.result()  # so that no more than two pieces are held
            hashed = hashing.submit(digest.update, piece)
            file.write(piece)
    return digest.hexdigest()


@lru_cache(maxsize=8)
def _connect(name: str, *environ: tuple[str, str]) -> Any:
    """Connect to a bucket as these variables say; nothing is asked yet."""
    from obstore.store import S3Store

    said = dict(environ)
    endpoint = said.get("AWS_ENDPOINT_URL_S3") or said.get("AWS_ENDPOINT_URL") or ""
    more: Any = {"client_options": {**REQUEST, "allow_http": endpoint.startswith("http://")}}
    file = os.path.expanduser(said.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials"))
    if "AWS_PROFILE" in said or ("AWS_ACCESS_KEY_ID" not in said and os.path.exists(file)):
        # Which obstore does not read.
        from botocore.session import get_session
        from obstore.auth.boto3 import Boto3CredentialProvider

        more["credential_provider"] = Boto3CredentialProvider(get_session())
    return S3Store(name, retry_config=RETRIES, **more)


@contextlib.contextmanager
def _as_of_a_disk() -> Iterator[None]:
    """Turn obstore's errors into those that a disk would raise; what may pass becomes a `ConnectionError`."""
    from obstore import exceptions

    try:
        yield
    except exceptions.AlreadyExistsError as error:
        raise FileExistsError(errno.EEXIST, _said(error)) from error
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, _said(error)) from error
    except exceptions.BaseError as error:
        refused = isinstance(error, exceptions.PermissionDeniedError | exceptions.UnauthenticatedError)
        if "NoSuchBucket" in str(error):
            raise FileNotFoundError(errno.ENOENT, "there is no such bucket") from error
        if "169.254.169.254" in str(error):  # where a machine of Amazon's would say what its role is
            raise PermissionError(errno.EACCES, "there are no credentials") from error
        if refused or re.search("status code: 40[13]", str(error)):  # of a listing
            raise PermissionError(errno.EACCES, _said(error)) from error
        kind = OSError if FINAL.search(str(error)) else ConnectionError
        raise kind(errno.EIO, _said(error)) from error


def _said(error: Exception) -> str:
    """Return what a server said, else what obstore did, without the particulars for its developers."""
    text = str(error).partition("\n\nDebug source")[0]
    answer = re.search(r"<Code>(.*?)</Code>.*?<Message>(.*?)</Message>", text, re.DOTALL)
    return f"{answer[1]}: {answer[2]}" if answer else redact(text)  # it quotes the address of the server
