"""One try at building an artifact: its folder, its finished parts, and the commit."""

import contextlib
import dataclasses
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import version
from operator import itemgetter
from pathlib import Path
from typing import Any

from nanodlm.errors import Damaged, Emit, NanodlmError, silent
from nanodlm.store.cache import hold
from nanodlm.store.disk import Found, describe, flush_folders, link, list_files
from nanodlm.store.files import show_transfer
from nanodlm.store.manifest import FLOW_RUN, MANIFEST, PACKAGES, RECORDS, Json, digest_of, safe, sealed, utc_now
from nanodlm.store.part import Part
from nanodlm.store.store import Artifact, Store

# Files that systems leave in folders.
NOBODYS = re.compile(r"(.*/)?(\.DS_Store|\._.*|Thumbs\.db|desktop\.ini|\.nfs[0-9a-f]+)", re.DOTALL)


class Attempt:
    """One try at building an artifact: a local folder whose files become the artifact at `commit`."""

    def __init__(self, store: Store, stage: str, fingerprint: str, afresh: bool = False, restore: Json | None = None):
        self.store, self.stage, self.fingerprint = store, stage, fingerprint
        self._of = {"stage": stage, "fingerprint": fingerprint}
        self.id = f"{datetime.now(UTC):%Y%m%dT%H%M%S%f}-{secrets.token_hex(4)}"  # people see them in order of time
        # A rebuild says what it is to take the place of, and goes on from no attempt but one that was to do the same.
        self._over = ""
        if afresh:
            artifact = store.find(stage, fingerprint)
            self._over = f"-over-{artifact.manifest['attempt'].split('-')[1] if artifact else self.id[-8:]}"
        self.id += self._over
        self.restore = restore  # a manifest, as far as it is known, of what is to be made again to the same bytes
        self.started = time.monotonic()
        self._parts: dict[str, Part] = {}  # those in the folder of another attempt were taken over where they lie
        self.path = Path(self._remote()) if store.is_local else hold(f"attempt-{self.id}")
        self.path.mkdir(parents=True, exist_ok=not store.is_local)

    def _remote(self, *relative: str) -> str:
        return self.store.path(self.stage, self.fingerprint, "attempts", self.id, *relative)

    def finish(self, name: str, files: Iterable[str], **info: Any) -> None:
        """Record files (relative paths), which will not change any more, as a finished part, with JSON as `info`."""
        described = self._publish(sorted(name for name in files if not NOBODYS.fullmatch(name)), silent)
        self._flush(described, self.path)
        record = sealed({**self._of, "part": name, "files": described, "info": info})
        self.store.write_json(self._remote("parts", f"{name}.json"), record)
        self._parts[name] = Part(self.store, self._remote(), record)

    def _flush(self, files: list[Json], root: Path) -> None:
        if self.store.is_local:
            flush_folders((self.path / file["path"] for file in files), root)

    def _publish(self, names: list[str], emit: Emit) -> list[Json]:
        """Hash files, and copy them to the store unless they are in it; return what they are."""
        if self.store.is_local:
            return list(self.store.together(lambda name: describe(self.path, name), names))
        arrived = show_transfer(emit, "MB published", [{"size": (self.path / name).stat().st_size} for name in names])
        sent = self.store.put([(self.path / name, self._remote(name)) for name in names], arrived)
        return [{"path": name, **file} for name, file in zip(names, sent, strict=True)]

    def forget(self, name: str) -> None:
        """Drop a finished part and its files, here and in the store; what lies in another attempt's folder stays."""
        part = self._parts.pop(name)
        if part.place == self._remote():
            for path in (self.path / safe(file["path"]) for file in part.files()):
                path.unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # a folder is not empty
                    for folder in path.relative_to(self.path).parents[:-1]:
                        (self.path / folder).rmdir()
            files = () if self.store.is_local else (self._remote(file["path"]) for file in part.files())
            self.store.remove(self._remote("parts", f"{name}.json"), *files)

    @cached_property
    def _listed(self) -> dict[str, Found]:
        return self.store.files(self.store.path(self.stage, self.fingerprint, "attempts"))

    @cached_property
    def earlier(self) -> dict[str, list[str]]:
        """Names of the parts that earlier attempts finished, each with the attempts that did."""
        found: dict[str, list[str]] = {}
        for path in sorted(self._listed, reverse=True):
            record = re.fullmatch("([^/]+)/parts/(.+)[.]json", path, re.DOTALL)
            if record and record[1] != self.id and self._goes_on_from(record[1]):
                found.setdefault(record[2], []).append(record[1])
        return found

    def _goes_on_from(self, attempt: str) -> bool:
        """Say if another attempt made what this is to make: of what is to be restored others may hold other bytes."""
        if not self.restore:
            return attempt.endswith(self._over)
        named = {file.get("attempt", self.restore["attempt"]) for file in self.restore.get("files", ())}
        return attempt in named if named else "-over-" not in attempt

    def uri(self, name: str) -> str:
        """Return the address, in the store, of a file or folder of this attempt."""
        return self.store.uri(self.stage, self.fingerprint, "attempts", self.id, name)

    def info(self, name: str) -> Json | None:
        """Return what a part that an earlier attempt finished was finished with; its files are not looked at."""
        return next((part.info for part, _ in self._earlier_parts(name)), None)

    def adopt(self, name: str, *, in_place: bool = False) -> Json | None:
        """Take over a part that an earlier attempt finished and that is whole; return its `info`, or None: build it.

        Its files are here then, and `forget` may drop them. With `in_place` those in a bucket whose e-tags are those
        recorded stay where they are instead, and the manifest will name where they lie.
        """
        for part, listed in self._earlier_parts(name):
            e_tags = {file["path"]: file.get("e_tag") for file in part.files()}
            there = {path: found.e_tag for path, found in listed.items()}
            if in_place and e_tags and e_tags == there and all(there.values()):
                self._parts[name] = part
                return part.info
            if part.problems(deep=self.store.is_local, listed=listed):
                continue
            with contextlib.suppress(Damaged):
                folder, paths = part.fetch(), [file["path"] for file in part.files()]
                for path in [*paths, f"parts/{name}.json"] if self.store.is_local else paths:
                    link(folder / path, self.path / path)  # none of them will change
                if self.store.is_local:
                    self._parts[name] = dataclasses.replace(part, place=self._remote())
                else:
                    self.finish(name, paths, **part.info)
                return part.info
        return None

    def adopt_finished(self, names: Iterable[str]) -> dict[str, Json]:
        """Take over those of these parts that are whole, in place, and return the `info` of each."""
        wanted = [name for name in names if name in self.earlier]
        taken = self.store.together(lambda name: self.adopt(name, in_place=True), wanted)
        return {name: info for name, info in zip(wanted, taken, strict=True) if info is not None}

    def _earlier_parts(self, name: str) -> Iterator[tuple[Part, dict[str, Found]]]:
        """Yield the records of a part that earlier attempts finished, and those of its files that are there."""
        for attempt in self.earlier.get(name, ()):
            folder = self.store.path(self.stage, self.fingerprint, "attempts", attempt)
            if part := self.store.part(folder, name, **self._of):
                paths = {file["path"]: f"{attempt}/{file['path']}" for file in part.files()}
                yield part, {path: self._listed[at] for path, at in paths.items() if at in self._listed}

    def commit(
        self,
        *,
        identity: Json,
        metrics: Json,
        config: Json | None = None,
        code: Json | None = None,
        volatile: Iterable[str] = (),
        replace: bool = False,
    ) -> Artifact:
        """Publish every file of the folder, write the manifest, and return the artifact, or that of who was first.

        The fingerprint was made of the `identity`; from `config` `verify --repair` builds it again, and `code` is what
        `code_record` says. Files whose paths begin as one of `volatile` (times, logs) are verified like all others, but
        left out of the digest. `replace` (a rebuild) puts this in the place of an existing manifest whose digest
        differs. With a manifest to `restore` another digest is an error, and what else that says is kept.
        """
        finished = {}
        for part in self._parts.values():
            lies = {} if part.place == self._remote() else {"attempt": Path(part.place).name}
            finished |= {file["path"]: {**file, **lies} for file in (*part.files(), part.record)}
        there = {name for name in list_files(str(self.path)) if not NOBODYS.fullmatch(name)}
        made = self._publish(sorted(there - finished.keys()), self.store.emit)
        files = sorted([*made, *finished.values()], key=itemgetter("path"))
        self._flush(files, Path(self.store.root).parent)
        volatile = sorted({*volatile, RECORDS})
        digest = digest_of(files, volatile)
        if self.restore and self.restore["digest"] != digest:
            remedy = f"`nanodlm run --rebuild {self.stage}` puts them in the place of"
            other = f"built again here it has other bytes, so nothing was changed: {remedy}"
            raise NanodlmError(f"{other} {self.store.uri(self.stage, self.fingerprint)}")
        manifest = sealed({
            **identity,
            "fingerprint": self.fingerprint,
            "attempt": self.id,
            "files": files,
            "volatile": volatile,
            "digest": digest,
            "metrics": metrics,
            "config": config,
            "code": code,
            "flow_run": os.environ.get(FLOW_RUN),
            "packages": {package: version(package) for package in PACKAGES},
            "created": utc_now(),
            "seconds": round(time.monotonic() - self.started, 3),
            **{key: said for key, said in (self.restore or {}).items() if key not in ("attempt", "files", "volatile")},
        })  # fmt: skip
        return self._write_manifest(manifest, replace)

    def give_up(self) -> None:
        """Remove all that it has in the store."""
        with contextlib.suppress(OSError, NanodlmError):
            self.store.remove_folder(self._remote())

    def _write_manifest(self, manifest: Json, replace: bool) -> Artifact:
        """Create the manifest, or return the artifact that another attempt has committed before."""
        target = self.store.path(self.stage, self.fingerprint, MANIFEST)
        while not self.store.write_json(target, manifest, create_only=True):
            existing = None
            with contextlib.suppress(Damaged):
                existing = self.store.find(self.stage, self.fingerprint)
                if existing is None and not os.path.islink(target):  # it has been removed since
                    continue
            if existing:
                if existing.manifest["attempt"] == self.id:  # by a creation that was said to have failed
                    return existing
                codes = [(made.get("code") or {}).get("digest") for made in (existing.manifest, manifest)]
                same = existing.digest == manifest["digest"] and codes[0] == codes[1]
                if not replace or (same and not existing.problems(deep=True)):
                    self.give_up()  # nobody needs the same twice
                    return existing
            self.store.write_json(target, manifest)
            break
        return Artifact(self.store, self.store.path(self.stage, self.fingerprint), manifest)


@contextlib.contextmanager
def new_attempt(
    store: Store, stage: str, fingerprint: str, *, afresh: bool = False, restore: Json | None = None
) -> Iterator[Attempt]:
    """Make a new attempt at an artifact. Any number may go on at once: the first to commit wins.

    It adopts only what an interrupted rebuild left (`afresh`), or what a manifest's artifact was made of (`restore`).
    """
    store.require_create_only()
    with store.beginning():
        attempt = Attempt(store, stage, fingerprint, afresh, restore)
    try:
        yield attempt
    except BaseException:
        if restore:  # nothing goes on from what is in nobody's place
            attempt.give_up()
        raise
    finally:
        if not store.is_local:
            shutil.rmtree(attempt.path, ignore_errors=True)
