"""A store: artifacts under one URL, found by their fingerprints."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from nanodlm.config import parse_address
from nanodlm.errors import Damaged, Emit, NanodlmError, silent
from nanodlm.store import cache
from nanodlm.store.artifact import Artifact
from nanodlm.store.disk import Found, write_whole
from nanodlm.store.files import Storage, T
from nanodlm.store.manifest import MANIFEST, Item, problem_with

LATEST = "latest"  # the folder of links to what was made last


class Store(Storage):
    """Artifacts under one URL; nothing is created until one is built. `emit` is told how far transfers are."""

    def __init__(self, url: str):
        super().__init__(url)
        self.emit: Emit = silent
        self.asked = self.is_local or os.environ.get("NANODLM_OFFLINE", "").lower() not in ("1", "true", "yes")

    def ask(self, call: Callable[[], T]) -> T:
        """Do as `Storage.ask`, but ask no remote store while `$NANODLM_OFFLINE` is set."""
        if not self.asked:
            raise NanodlmError(f"{self.uri()} is not asked while NANODLM_OFFLINE is set: unset it")
        return super().ask(call)

    def find(self, stage: str, fingerprint: str) -> Artifact | None:
        """Return the committed artifact, or None; one whose manifest cannot be read raises `Damaged`."""
        path, kept = self.path(stage, fingerprint, MANIFEST), None
        if not self.is_local:  # for when nobody may be asked
            place = hashlib.sha256(self.uri().encode()).hexdigest()[:16]
            kept = cache.cache_dir() / "manifests" / place / stage / fingerprint / MANIFEST
        try:
            manifest = self.read_json(path) if self.asked else Storage(str(kept)).read_json(str(kept))
            if manifest is not None and (problem := problem_with(manifest, stage, fingerprint)):
                raise Damaged(f"{self.address(path)} {problem}")
        except Damaged as error:
            uri = self.uri(stage, fingerprint)
            remedy = f"`nanodlm verify {uri} --repair` builds it again, `nanodlm rm {uri}` removes it"
            raise Damaged(f"{error}: {remedy}") from error
        if manifest is None:
            return None
        if kept and self.asked:
            with contextlib.suppress(OSError):  # a cache that cannot be written is no error
                data = json.dumps(manifest).encode()
                if not kept.exists() or kept.read_bytes() != data:
                    write_whole(kept, data)
        return Artifact(self, stage, fingerprint, manifest)

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
        artifact = artifact or self.find(*self.locate(uri))
        if artifact is None:
            raise NanodlmError(f"no artifact at {uri}: `nanodlm ls` shows what is there")
        return artifact

    def locate(self, uri: str) -> Item:
        """Return (stage, fingerprint) of what an address names, or the end of one, such as `train/3f2a…`; sound or not.

        Of a fingerprint the first four letters or more will do, with its stage or without, when they are its alone.
        """
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

        return [(stage, name) for stage in names(self.root) if stage != LATEST for name in names(self.path(stage))]

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
