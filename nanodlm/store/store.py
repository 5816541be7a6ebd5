"""A store: artifacts under one URL, found by their fingerprints; their files are verified before anybody reads them."""

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from nanodlm.config import parse_address
from nanodlm.errors import Damaged, NanodlmError
from nanodlm.store.disk import Found
from nanodlm.store.files import Storage
from nanodlm.store.manifest import MANIFEST, RECORDS, Item, Json, is_sealed, problem_with, safe
from nanodlm.store.part import Part

LATEST = "latest"  # the folder of links to what was made last


@dataclass(frozen=True)
class Artifact(Part):
    """A committed artifact: where it is and what its manifest says."""

    store: "Store"

    @property
    def name(self) -> str:
        """Its stage and the beginning of its fingerprint, which commands take in place of its address."""
        return f"{self.stage}/{self.fingerprint[:12]}"

    @property
    def folder(self) -> str:
        """Path of its own attempt's folder in its store."""
        return f"{self.place}/attempts/{self.manifest['attempt']}"

    @property
    def uri(self) -> str:
        """Its address; `nanodlm show URI` and `nanodlm.load(uri)` take it."""
        return self.store.address(self.place)

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

    @cached_property
    def adopted(self) -> dict[str, str]:
        """The attempts of others in which files lie, by path; on a local disk there are links in its own."""
        return {file["path"]: file["attempt"] for file in self.manifest["files"] if "attempt" in file}

    def _lies(self, path: str) -> str:
        own = self.manifest["attempt"]
        return f"attempts/{own if self.store.is_local else self.adopted.get(path, own)}/{safe(path)}"

    def strays(self, listed: dict[str, Found]) -> list[str]:
        """Return the files among its own, of those that a listing shows, that its manifest does not name."""
        own, named = f"attempts/{self.manifest['attempt']}/", {file["path"] for file in self.manifest["files"]}
        found = {path.removeprefix(own) for path in listed if path.startswith(own)}
        return sorted(path for path in found - named if not path.startswith(RECORDS))  # earlier versions named none

    def remedy(self, problem: str, *, deep: bool = False) -> str:
        """Return the line that says what is wrong with it and what to do."""
        command = f"nanodlm verify {self.uri} {'--deep ' if deep else ''}--repair"
        source = ", if a checkpoint is whole" if self.stage == "train" else ""
        return f"the {self.stage} artifact is damaged: {problem}; `{command}` builds what is bad again{source}"

    def file(self, path: str) -> Path:
        """Return the local path of one of its files; see `local`."""
        return self.local(path) / path


class Store(Storage):
    """Artifacts under one URL; nothing is created until one is built."""

    def find(self, stage: str, fingerprint: str) -> Artifact | None:
        """Return the committed artifact, or None; one whose manifest cannot be read raises `Damaged`."""
        path = self.path(stage, fingerprint, MANIFEST)
        try:
            if (manifest := self.read_json(path)) is None:
                return None
            if problem := problem_with(manifest, stage, fingerprint):
                raise Damaged(f"{self.address(path)} {problem}")
        except Damaged as error:
            uri = self.uri(stage, fingerprint)
            repair = f"`nanodlm verify {uri} --repair` builds it again if something that was made from it is there"
            raise Damaged(str(error), f": {repair}, `nanodlm rm {uri}` removes it") from error
        return Artifact(self, self.path(stage, fingerprint), manifest)

    def part(self, folder: str, name: str, **of: str) -> Part | None:
        """Return a part of the attempt in a folder; None when its record is not whole, or not `of` that stage, say."""
        with contextlib.suppress(Damaged):
            record = self.read_json(f"{folder}/parts/{name}.json")
            if isinstance(record, dict) and is_sealed(record) and {"part": name, **of}.items() <= record.items():
                return Part(self, folder, record)
        return None

    def artifacts(self, items: Iterable[Item]) -> Iterator[tuple[Item, Artifact | Damaged | None]]:
        """Yield what `find` finds of each, or the `Damaged` that it raises; a bucket is asked for several at once."""

        def find(item: Item) -> tuple[Item, Artifact | Damaged | None]:
            try:
                return item, self.find(*item)
            except Damaged as error:
                return item, error

        yield from map(find, items) if self.is_local else self.together(find, items)

    def open(self, uri: str) -> Artifact:
        """Return the artifact at an address, or at the end of one; see `locate`."""
        address = parse_address(uri)
        artifact = self.find(address.stage, address.fingerprint) if address.stage else None
        if artifact := artifact or self.find(*self.locate(uri)):
            return artifact
        raise NanodlmError(f"no artifact at {uri}: `nanodlm ls` shows what is there")

    def locate(self, uri: str) -> Item:
        """Return (stage, fingerprint) of what an address, or the end of one as `train/3f2a`, names, sound or not."""
        _, _, stage, fingerprint, _ = parse_address(uri)
        if stage and MANIFEST in self.files(self.path(stage, fingerprint)):
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
            yield from sorted(item for item in self._folders() if os.path.exists(self.path(*item, MANIFEST)))
        else:
            yield from sorted(item for item, files in self.listed().items() if MANIFEST in files)

    def listed(self) -> dict[Item, dict[str, Found]]:
        """Return all files of each artifact, finished or not, by path below its fingerprint."""
        if self.is_local:
            return {item: self.files(self.path(*item)) for item in self._folders()}
        listed: dict[Item, dict[str, Found]] = {}
        for path, found in self.files(self.root).items():
            stage, fingerprint, below = [*path.split("/", 2), "", ""][:3]
            if below:
                listed.setdefault((stage, fingerprint), {})[below] = found
        return listed

    def _folders(self) -> list[Item]:
        """Return the folders of a local store's artifacts; a stage's folder may be a link to another disk."""

        def names(folder: str) -> list[str]:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # not there, or not any more
                return self.ask(lambda: [entry.name for entry in os.scandir(folder) if entry.is_dir()])
            return []

        stages = [name for name in names(self.root) if name not in (LATEST, "lost+found")]  # which a disk has
        return [(stage, name) for stage in stages for name in names(self.path(stage))]

    def show_latest(self, artifact: Artifact) -> Path | None:
        """Make `latest/STAGE` of a local store a link to an artifact's files, and return it; None where it cannot."""
        link = Path(self.path(LATEST, artifact.stage))
        with contextlib.suppress(OSError):  # a file system without links, or one that is not ours to write
            link.parent.mkdir(exist_ok=True)
            (new := link.with_name(f".{link.name}.tmp")).unlink(missing_ok=True)  # of a process that was killed
            new.symlink_to(os.path.relpath(artifact.folder, link.parent))
            new.replace(link)
            return link
        return None

    def retire(self, item: Item) -> None:
        """Remove the manifest of (stage, fingerprint), so that the next run builds it from the parts that are good."""
        self.remove(self.path(*item, MANIFEST))
