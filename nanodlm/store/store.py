"""A store and its committed artifacts, whose files are verified before anybody reads them."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from nanodlm.config import parse_address
from nanodlm.errors import Damaged, Emit, NanodlmError, silent
from nanodlm.store import cache
from nanodlm.store.disk import Found, is_within, write_whole
from nanodlm.store.files import Storage, T, show_transfer
from nanodlm.store.manifest import MANIFEST, Item, Json, problem_with, safe

LATEST = "latest"  # the folder of links to what was made last


@dataclass(frozen=True)
class Artifact:
    """A committed artifact: where it is and what its manifest says."""

    store: "Store"
    stage: str
    fingerprint: str
    manifest: Json

    @property
    def uri(self) -> str:
        """Its address; `nanodlm show URI` and `nanodlm.load(uri)` take it."""
        return self.store.uri(self.stage, self.fingerprint)

    @property
    def name(self) -> str:
        """Its stage and the beginning of its fingerprint, which commands take in place of its address."""
        return f"{self.stage}/{self.fingerprint[:12]}"

    @property
    def digest(self) -> str:
        """The sha256 over the paths, sizes and sha256 of its files: equal bytes, equal digest."""
        return self.manifest["digest"]

    @property
    def metrics(self) -> Json:
        """Counts and measurements that its stage recorded."""
        return self.manifest["metrics"]

    @property
    def inputs(self) -> list[Item]:
        """Stage and fingerprint of each artifact that it was made from."""
        return [(stage, made["fingerprint"]) for stage, made in self.manifest["inputs"].items()]

    @property
    def folder(self) -> str:
        """Path of its files' folder on the store's file system."""
        return self.store.path(self.stage, self.fingerprint, "attempts", self.manifest["attempt"])

    def remote(self, relative: str) -> str:
        """Return the path of one file on the store's file system."""
        return f"{self.folder}/{safe(relative)}"

    def files(self, *only: str) -> list[Json]:
        """Return `path`, `size` and `sha256` of its files: of those whose paths begin so, or of all."""
        return [file for file in self.manifest["files"] if not only or file["path"].startswith(only)]

    def problems(self, *only: str, deep: bool = False, emit: Emit = silent) -> list[str]:
        """Say what is wrong with its files, one line each: by names and sizes, with `deep` also by sha256."""
        found = {path: size for path, size in self.store.sizes(self.folder).items() if not path.startswith("parts/")}
        listed = {safe(file["path"]) for file in self.manifest["files"]}
        lines = [f"{path} is not in its manifest" for path in sorted(found.keys() - listed)]
        was_read = show_transfer(emit, f"MB of {self.stage} read", self.files(*only))
        for file in self.files(*only):
            if problem := self._problem(file, found.get(file["path"]), deep):
                lines.append(f"{file['path']} {problem}")
            if deep:
                was_read(file["size"])
        return lines

    def _problem(self, file: Json, size: int | None, deep: bool) -> str:
        root, path = Path(self.store.path(self.stage, self.fingerprint)), self.remote(file["path"])
        if size is None:
            return "is missing"
        if self.store.is_local and not is_within(root, Path(path)):
            return "is a link that leaves its artifact"
        if size != file["size"]:
            return f"has {size} bytes, not {file['size']}"
        try:
            same = not deep or self.store.sha256(path) == file["sha256"]
        except FileNotFoundError:
            return "is missing"
        except OSError as error:  # a disk that fails, for one
            return f"cannot be read: {error.strerror or error}"
        return "" if same else "has been altered: its sha256 differs from the manifest's"

    def check(self, *only: str, deep: bool = False) -> "Artifact":
        """Return self, or raise `Damaged`, which names the first bad file and the remedy."""
        if self.store.asked and (lines := self.problems(*only, deep=deep)):
            more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
            raise Damaged(self.remedy(f"{lines[0]}{more}", deep=deep))
        return self

    def remedy(self, problem: str, *, deep: bool = False) -> str:
        """Return the line that says what is wrong with it and what to do."""
        command = f"nanodlm verify {self.uri} {'--deep ' if deep else ''}--repair"
        return f"the {self.stage} artifact is damaged: {problem}; `{command}` builds what is bad again"

    def local(self, *only: str) -> Path:
        """Return a local folder with its files, fetched if they are remote, each compared with its sha256."""
        self.check(*only, deep=self.store.is_local)
        if self.store.is_local:
            return Path(self.folder)
        files = self.files(*only)
        arrived = show_transfer(self.store.emit, f"MB of {self.stage} fetched", files)
        return self._fetch(self._entry(files), files, arrived)

    def file(self, path: str) -> Path:
        """Return the local path of one of its files; see `local`."""
        return self.local(path) / path

    def on_demand(self) -> Callable[[str], Path]:
        """Return a function that does as `file`, and fetches a file of a remote store when it is first asked for."""
        if self.store.is_local:
            return self.local().joinpath
        folder = self._entry(self.check().files())
        return lambda path: self._fetch(folder, self.files(path), lambda _: None) / path

    def _entry(self, files: list[Json]) -> Path:
        """Return the cache's folder for it, with room for those of these files that are not there yet."""
        name = f"{self.stage}-{self.fingerprint[:16]}-{self.manifest['attempt']}"
        there = cache.cache_dir() / "entries" / name / "files"
        missing = sum(file["size"] for file in files if not (there / safe(file["path"])).is_file())
        return cache.hold(name, missing)

    def _fetch(self, folder: Path, files: list[Json], arrived: Callable[[int], None]) -> Path:
        def get(pairs: list[tuple[str, Path]]) -> None:
            if not self.store.asked:
                lacking = f"is not wholly in the cache ({pairs[0][0]} is missing)"
                raise NanodlmError(f"{self.uri} {lacking}: unset NANODLM_OFFLINE")
            self.store.get([(self.remote(path), target) for path, target in pairs])

        try:
            cache.fetch(folder, files, get, arrived)
        except FileNotFoundError as error:
            raise Damaged(self.remedy(f"a file is missing ({error.filename or error})")) from error
        except Damaged as error:
            raise Damaged(self.remedy(str(error), deep=True)) from error
        except OSError as error:
            raise cache.cannot_write_cache(error) from error
        return folder


class Store(Storage):
    """Artifacts under one URL; nothing is created until one is built. `emit` is told how far transfers are."""

    def __init__(self, url: str):
        super().__init__(url)
        self.emit: Emit = silent
        self.asked = self.is_local or os.environ.get("NANODLM_OFFLINE", "").lower() not in ("1", "true", "yes")

    def patiently(self, call: Callable[[], T]) -> T:
        """Do as `Storage.patiently`, but ask no remote store while `$NANODLM_OFFLINE` is set."""
        if not self.asked:
            raise NanodlmError(f"{self.uri()} is not asked while NANODLM_OFFLINE is set: unset it")
        return super().patiently(call)

    def find(self, stage: str, fingerprint: str) -> Artifact | None:
        """Return the committed artifact, or None."""
        kept = cache.cache_dir() / "manifests" / hashlib.sha256(self.uri().encode()).hexdigest()[:16]
        known = self if self.asked else Storage(str(kept))
        manifest = known.read_json(known.path(stage, fingerprint, MANIFEST))
        if manifest is None:
            return None
        if problem := problem_with(manifest, stage, fingerprint):
            uri = self.uri(stage, fingerprint)
            remedy = f"`nanodlm verify {uri} --repair` builds it again, or sets it aside for the next run"
            raise Damaged(f"{uri}/{MANIFEST} {problem}: {remedy}")
        if self.asked and not self.is_local:
            with contextlib.suppress(OSError):  # a cache that cannot be written is no error
                write_whole(kept / stage / fingerprint / MANIFEST, json.dumps(manifest).encode())
        return Artifact(self, stage, fingerprint, manifest)

    def open(self, uri: str) -> Artifact:
        """Return the artifact at an address, or at the end of one; see `locate`."""
        address = parse_address(uri)
        artifact = self.find(address.stage, address.fingerprint) if address.stage else None
        artifact = artifact or self.find(*self.locate(uri))
        if artifact is None:
            raise NanodlmError(f"no artifact at {uri}: `nanodlm ls` shows what is there")
        return artifact

    def locate(self, uri: str) -> Item:
        """Return (stage, fingerprint) of what an address names, or the end of one, such as `train/3f2a…`; sound or not.

        Of a fingerprint the first four letters or more will do, with its stage or without, when they are its alone.
        """
        _, _, stage, fingerprint, _ = parse_address(uri)
        if stage and self.read_json(self.path(stage, fingerprint, MANIFEST)) is not None:
            return stage, fingerprint
        begins = fingerprint or uri
        named = [item for item in self if stage in ("", item[0]) and item[1].startswith(begins)]
        if len(begins) < 4 or not named:
            raise NanodlmError(f"no artifact at {uri}: `nanodlm ls` shows what is there")
        if len(named) > 1:
            raise NanodlmError(f"{len(named)} artifacts begin with {uri}: write more of the one that is meant")
        return named[0]

    def __iter__(self) -> Iterator[Item]:
        """Yield (stage, fingerprint) of everything that has a manifest, sorted."""
        # Not fsspec's glob: it takes signs in the root for patterns, and leaves out folders that it could not list.
        if self.is_local:
            found = [item for item in self._folders() if Path(self.path(*item, MANIFEST)).exists()]
        else:
            paths = [path.split("/") for path in self.files(self.root)]
            found = [(path[0], path[1]) for path in paths if len(path) == 3 and path[2] == MANIFEST]
        yield from sorted(found)

    def listed(self) -> dict[str, Found]:
        """Return all files of all artifacts, finished or not, by path below the root."""
        if not self.is_local:
            return self.files(self.root)
        return {
            "/".join((*item, path)): found
            for item in self._folders()
            for path, found in self.files(self.path(*item)).items()
        }

    def _folders(self) -> list[Item]:
        """Return the folders of a local store's artifacts; a stage's folder may be a link to another disk."""

        def names(folder: str) -> list[str]:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # not there, or not any more
                return self.patiently(lambda: [entry.name for entry in os.scandir(folder) if entry.is_dir()])
            return []

        stages = [name for name in names(self.root) if name != LATEST]
        return [(stage, name) for stage in stages for name in names(self.path(stage))]

    def show_latest(self, artifact: Artifact) -> Path | None:
        """Make `latest/STAGE` of a local store a link to an artifact's files, and return it; None where it cannot."""
        link = Path(self.path(LATEST, artifact.stage))
        with contextlib.suppress(OSError):  # a file system without links, or one that is not ours to write
            link.parent.mkdir(exist_ok=True)
            new = link.with_name(f"{link.name}.{os.getpid()}")
            new.symlink_to(os.path.relpath(artifact.folder, link.parent))
            new.replace(link)
            return link
        return None

    def retire(self, item: Item) -> None:
        """Remove the manifest of (stage, fingerprint), so that the next run builds it from the parts that are good."""
        self.remove(self.path(*item, MANIFEST))
