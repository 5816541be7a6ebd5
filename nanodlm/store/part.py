"""Finished parts of attempts (shards, checkpoints): a later attempt adopts them, for what they hold is recorded."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from nanodlm.errors import Damaged, Emit, silent
from nanodlm.store import cache
from nanodlm.store.disk import Found
from nanodlm.store.files import Storage, show_transfer
from nanodlm.store.manifest import RECORDS, Json, digest_of, record_text, safe


@dataclass(frozen=True)
class Part:
    """A finished part of an attempt: files, each with size and sha256, and the `info` that it was finished with."""

    store: Storage
    place: str  # path below which its files lie
    manifest: Json  # its record

    @property
    def stage(self) -> str:
        """The stage that made it."""
        return self.manifest["stage"]

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the artifact, or of that whose part it is."""
        return self.manifest["fingerprint"]

    @property
    def folder(self) -> str:
        """Path of its own attempt's folder in its store."""
        return self.place

    @property
    def uri(self) -> str:
        """Its address: a plain path on local disk, else a URL."""
        return self.store.address(f"{self.folder}/{self.manifest['part']}")

    @property
    def digest(self) -> str:
        """The sha256 over the paths, sizes and sha256 of its files: equal bytes, equal digest."""
        return digest_of(self.files(), [])

    @property
    def info(self) -> Json:
        """What it was finished with."""
        return self.manifest["info"]

    @property
    def record(self) -> Json:
        """Its record as a file, as the manifest of its artifact names it."""
        text, path = record_text(self.manifest), f"{RECORDS}{self.manifest['part']}.json"
        return {"path": path, "size": len(text), "sha256": hashlib.sha256(text).hexdigest()}

    def _lies(self, path: str) -> str:
        return safe(path)

    def remote(self, relative: str) -> str:
        """Return the path of one file in its store."""
        return f"{self.place}/{self._lies(relative)}"

    def files(self, *only: str) -> list[Json]:
        """Return `path`, `size` and `sha256` of its files: of those whose paths begin so, or of all."""
        return [file for file in self.manifest["files"] if not only or file["path"].startswith(only)]

    def problems(
        self, *only: str, deep: bool = False, emit: Emit = silent, listed: Mapping[str, Found] | None = None
    ) -> dict[str, str]:
        """Return what is wrong with bad files, by path: by what is `listed` there, with `deep` also by sha256."""
        bad, listed = {}, self.store.files(self.place) if listed is None else listed
        was_read = show_transfer(emit, f"MB of {self.stage} read", self.files(*only))
        for file in self.files(*only):
            if problem := self._problem(file, listed.get(self._lies(file["path"])), deep):
                bad[file["path"]] = problem
            if deep:
                was_read(file["size"])
        return bad

    def _problem(self, file: Json, found: Found | None, deep: bool) -> str:
        path = self.remote(file["path"])
        if found is None:
            return "is missing"
        if self.store.is_local and os.path.islink(path):
            return "is a link, which may leave its artifact"
        if found.size != file["size"]:
            return f"has {found.size} bytes, not {file['size']}"
        try:
            same = not deep or self.store.get(path, Path(os.devnull), file["size"]) == file["sha256"]
        except OSError as error:  # a disk that fails, for one
            return f"cannot be read: {error.strerror or error}"
        return "" if same else "has been altered: its sha256 differs from the manifest's"

    def check(self, *only: str, deep: bool = False) -> Self:
        """Return self, or raise `Damaged`, which names the first bad file and the remedy."""
        if bad := self.problems(*only, deep=deep):
            more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
            raise Damaged(self.remedy(f"{' '.join(next(iter(bad.items())))}{more}", deep=deep))
        return self

    def remedy(self, problem: str, *, deep: bool = False) -> str:
        """Return the line that says what is wrong with it and what to do."""
        return f"{self.uri} is damaged: {problem}; start from another checkpoint"

    def local(self, *only: str) -> Path:
        """Return a local folder with its files, fetched if they are remote, each compared with its sha256."""
        return self.check(*only, deep=self.store.is_local).fetch(*only, emit=self.store.emit)

    def fetch(self, *only: str, emit: Emit = silent) -> Path:
        """Return a local folder with its files: of a local store, those there; remote ones are copied and compared."""
        if self.store.is_local:
            return Path(self.folder)
        # Nobody but another attempt needs the records of parts, of which there may be thousands.
        files = [file for file in self.files(*only) if only or not file["path"].startswith(RECORDS)]
        copies = cache.cache_dir() / "files"
        lacking = sum(file["size"] for file in files if not (copies / file["sha256"]).is_file())
        folder = cache.hold(f"{self.stage}-{self.fingerprint[:16]}-{Path(self.folder).name}", lacking)
        arrived = show_transfer(emit, f"MB of {self.stage} fetched", files)

        def take(file: Json) -> int:
            path, size = file["path"], file["size"]
            cache.take(file, folder / safe(path), lambda target: self.store.get(self.remote(path), target, size))
            return size

        try:
            for size in self.store.together(take, files):
                arrived(size)
        except FileNotFoundError as error:
            raise Damaged(self.remedy(f"a file is missing ({error})")) from error
        except Damaged as error:
            raise Damaged(self.remedy(str(error), deep=True)) from error
        except OSError as error:
            raise cache.cannot_write_cache(error) from error
        return folder
