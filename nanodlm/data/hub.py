"""Data sets of the Hugging Face hub: in its own cache, at a pinned commit, whatever the network does meanwhile.

Beside what `huggingface_hub` keeps of a data set, its folder `nanodlm/` has the files of a commit, `{commit}.json`, and
what has arrived of a file, `{sha256}`. For the library begins anew when it was cut off, and compares no sha256.
"""

import errno
import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import TypeVar

import httpx
from huggingface_hub import HfApi, constants, get_hf_file_metadata, get_session, hf_hub_url, hf_raise_for_status
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import WeakFileLock, build_hf_headers

from nanodlm.config import DataConfig
from nanodlm.errors import Emit, NanodlmError, Unreachable
from nanodlm.store.disk import sha256_of, write_whole
from nanodlm.store.retry import ask, code_of, may_pass, one_line, retrying_for

T = TypeVar("T")
SUFFIXES = (".txt", ".jsonl", ".parquet")  # on the hub, .md and .json files describe a data set
TOGETHER = 8  # files that are fetched at the same time
FIRST_ANSWER = 3.0  # seconds that the hub has before it counts as gone, and 0.5 for trying again
COPIES = "or give copies as --data.source"
TOKEN = "check its name, or set HF_TOKEN to a token that may read it"  # the hub says 401 of what is not there, too
REMEDIES = {401: TOKEN, 403: TOKEN, 404: "check its name and --data.revision"}
REMEDIES[errno.ENOSPC] = "set HF_HOME to a folder with room"


def hub_files(data: DataConfig, emit: Emit) -> Iterator[str]:
    """Yield the URLs of a data set's files by name, all fetched first, or with `limit_tokens` each when it is taken."""
    snapshot = Snapshot(data)
    if data.limit_tokens:
        yield from map(snapshot.file, snapshot.arrived)
        return
    pool = futures.ThreadPoolExecutor(TOGETHER)
    try:
        files = [pool.submit(snapshot.file, name) for name in snapshot.arrived]
        waiting = set(files)
        while waiting:
            done, waiting = futures.wait(waiting, timeout=1, return_when=futures.FIRST_EXCEPTION)
            emit("progress", done=round(sum(snapshot.arrived.values()), 1), total=len(files), unit="files")
            for file in done:
                file.result()
    finally:
        snapshot.stopped.set()
        pool.shutdown(cancel_futures=True)
    yield from (file.result() for file in files)


class Snapshot:
    """One commit of a data set, as far as it is here; no network is needed for one that is here in whole."""

    def __init__(self, data: DataConfig):
        self.name, self.commit = data.source[0].removeprefix("hf://"), data.revision
        self.stopped, self.reached = threading.Event(), False
        self.home = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=self.name, repo_type="dataset"))
        self.own = self.home / "nanodlm"
        known = [file for folder in ("nanodlm", "trees") for file in (self.home / folder).glob(f"{self.commit}*.json")]
        if known and {file.stem for file in known} == {known[0].stem}:
            self.commit, names = known[0].stem, json.loads(known[0].read_bytes())["files"]
        else:
            self._reach()
            self.commit, names = self._asked("the list of files", self._listing)
            write_whole(self.own / f"{self.commit}.json", json.dumps({"files": names}).encode())
        names = sorted(name for name in names if name.endswith(SUFFIXES))
        self.arrived = dict.fromkeys(names, 0.0)  # the share of each
        if outside := [name for name in names if name.startswith("/") or ".." in name.split("/")]:
            raise NanodlmError(f"hf://{self.name} names {outside[0]!r}, which leaves its folder: do not use it")
        if not names:
            raise NanodlmError(f"hf://{self.name} holds no {', '.join(SUFFIXES)} files")

    def file(self, name: str) -> str:
        """Return the URL of a file, which is fetched unless it is here with the bytes that the hub says."""
        link = self.home / "snapshots" / self.commit / name
        if not _is_right(link, link.readlink().name if link.is_symlink() else ""):
            self._reach()
            if not any(self._fetch(name, link) for _ in range(2)):
                raise NanodlmError(f"{name} of hf://{self.name} arrived twice altered: run again later, {COPIES}")
        self.arrived[name] = 1.0
        return f"file://{link}"

    def _asked(self, what: str, call: Callable[[], T]) -> T:
        """Return the answer to a request, asked as storages are; a refusal is one line, not cut before its advice."""
        what = f"{what} of hf://{self.name} at {self.commit} from {constants.ENDPOINT}"

        def once() -> T:
            if self.stopped.is_set():
                raise futures.CancelledError
            try:
                return call()
            except Exception as error:  # whatever a server may send
                if isinstance(error, NanodlmError) or may_pass(error):
                    raise
                remedy = REMEDIES.get(code_of(error) or getattr(error, "errno", 0), "run again later")
                raise NanodlmError(f"cannot fetch {what}: {one_line(error)}; {remedy}, {COPIES}") from error

        return ask(what, once)

    def _reach(self) -> None:
        """Say soon that the hub is gone from the beginning; once it has answered, requests have more patience."""
        if not self.reached:
            try:
                with retrying_for(0.5):
                    ask(constants.ENDPOINT, lambda: get_session().head(constants.ENDPOINT, timeout=FIRST_ANSWER))
            except Unreachable as error:
                raise NanodlmError(f"hf://{self.name} is not all in the cache, and {error}, {COPIES}") from error
            self.reached = True

    def _listing(self) -> tuple[str, list[str]]:
        """Return the full commit and the names of its files, as the hub tells them."""
        commit = self.commit
        if len(commit) < 40:  # by which the hub finds nothing
            commits = [c.commit_id for c in HfApi().list_repo_commits(self.name, repo_type="dataset")]
            found = [c for c in commits if c.startswith(commit)]
            if len(found) != 1:
                said = f"{len(found)} commits of {self.name} begin with {commit}"
                raise NanodlmError(f"{said}: give --data.revision in full")
            (commit,) = found
        info = HfApi().dataset_info(self.name, revision=commit, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
        return commit, [file.rfilename for file in info.siblings or ()]

    def _fetch(self, name: str, link: Path) -> bool:
        """Fetch what is missing of a file, and say if it is as the hub says; if not, it is dropped."""
        url = hf_hub_url(self.name, name, repo_type="dataset", revision=self.commit)
        told = self._asked(name, lambda: get_hf_file_metadata(url))
        etag, size = told.etag, told.size
        if not etag or not re.fullmatch(r"[\w-]+", etag) or size is None:  # which will be the name of a file
            raise NanodlmError(f"{url} has no ETag or no size, as a hub tells them: check HF_ENDPOINT")
        blob, part = self.home / "blobs" / etag, self.own / etag
        self.own.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(f"{part}.lock"):
            if not _is_right(blob, etag):
                part.touch()
                while part.stat().st_size < size:
                    self._asked(name, lambda: self._go_on(name, url, part, size))
                if part.stat().st_size != size or not _is_right(part, etag):
                    part.unlink()
                    return False
                blob.parent.mkdir(exist_ok=True)
                part.replace(blob)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
        return True

    def _go_on(self, name: str, url: str, part: Path, size: int) -> None:
        """Fetch the rest of a file. If any arrives, an early end is no error, so that patience begins anew."""
        had = part.stat().st_size
        headers = {**build_hf_headers(), "Range": f"bytes={had}-", "Accept-Encoding": "identity"}
        stream = get_session().stream("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
        error: Exception = ConnectionError("it ends early")
        try:
            with part.open("ab") as file, stream as answer:
                hf_raise_for_status(answer)
                if answer.status_code != 206:  # this server knows no ranges
                    file.truncate(0)
                for chunk in answer.iter_bytes():
                    file.write(chunk)
                    self.arrived[name] = min(1.0, file.tell() / size)
                    if self.stopped.is_set():
                        raise futures.CancelledError
        except httpx.TransportError as broken:
            error = broken
        if part.stat().st_size <= had:
            raise error


def _is_right(file: Path, etag: str) -> bool:
    """Say if a file is there with the bytes of which an ETag is the sha256, as it is of large files."""
    return file.exists() and (not re.fullmatch("[0-9a-f]{64}", etag) or sha256_of(file) == etag)
