"""Checking artifacts against their manifests, and building again what is bad."""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from nanodlm.config import Config
from nanodlm.errors import Damaged, Emit, NanodlmError, silent
from nanodlm.stages.lookup import ready
from nanodlm.stages.run import run_stage
from nanodlm.stages.table import STAGES
from nanodlm.store import Artifact, Item, Json, Store, hold_lease, sealed
from nanodlm.store.manifest import MANIFEST
from nanodlm.store.retry import one_line


@dataclass(frozen=True)
class Checked:
    """An artifact's address and what is wrong with it, one line each; whether that was mended."""

    stage: str
    fingerprint: str
    problems: list[str]
    repaired: bool = False


def chain(store: Store, *artifacts: Item) -> list[Item]:
    """Return artifacts and all that they were made from, there or not, as far as manifests can be read, in order."""
    found, todo = set(), list(artifacts)
    while todo:
        item = todo.pop()
        if item not in found:
            found.add(item)
            artifact = _find(store, item)
            todo += artifact.inputs if artifact else []
    return in_order(found)


def in_order(artifacts: Iterable[Item]) -> list[Item]:
    """Return stages and fingerprints in the order of the pipeline; those of unknown stages last."""
    order = list(STAGES)
    return sorted(artifacts, key=lambda item: (order.index(item[0]) if item[0] in order else len(order), item))


def _find(store: Store, item: Item) -> Artifact | None:
    """Return an artifact, or None where there is none whose manifest can be read."""
    with contextlib.suppress(Damaged):
        return store.find(*item)
    return None


def check(
    store: Store, artifacts: list[Item], deep: bool = False, repair: bool = False, emit: Emit = silent
) -> Iterator[Checked]:
    """Compare artifacts with their manifests, and each with what it was made from.

    With `deep` every file's sha256 is compared, not only its size. With `repair` what is bad is built again, from what
    is good: finished parts that are whole are kept.
    """
    for item in artifacts:
        artifact, repaired = None, False
        try:
            artifact = store.find(*item)
            problems = _problems(artifact, deep, emit) if artifact else ["its manifest is missing"]
        except Damaged as error:
            problems = [str(error)]
        if problems and repair:
            obstacle = _repair(store, item, artifact, _settings(store, item, artifacts), emit)
            repaired, problems = not obstacle, [*problems, *filter(None, [obstacle])]
        yield Checked(*item, problems, repaired)


def _problems(artifact: Artifact, deep: bool, emit: Emit) -> list[str]:
    lines = artifact.problems(deep=deep, emit=emit)
    for name, made in artifact.manifest["inputs"].items():
        source = _find(artifact.store, (name, made["fingerprint"]))
        if source and source.digest != made["digest"]:
            lines.append(f"it was made from another {name} than the one that is there now")
    return lines


def _settings(store: Store, item: Item, artifacts: list[Item]) -> Json | None:
    """Return the settings an artifact was made with: its own manifest's, else those of one that was made from it."""
    for other in [item, *artifacts]:
        found = _find(store, other)
        if found and (other == item or item in found.inputs) and found.manifest.get("config"):
            return found.manifest["config"]
    return None


def _repair(store: Store, item: Item, artifact: Artifact | None, settings: Json | None, emit: Emit) -> str:
    """Build an artifact again, and return what stands in the way, or nothing."""
    stage, fingerprint = item
    manifest = None if artifact else store.read_json(store.path(*item, MANIFEST))
    if isinstance(manifest, dict) and manifest == sealed(manifest):  # such as that of a renamed folder, or of a backup
        home = f"{manifest.get('stage', stage)}/{manifest.get('fingerprint', fingerprint)}"
        if home != f"{stage}/{fingerprint}":
            return f"not repaired, for it is not damaged but out of place: move its folder to {home}, or remove it"
    if settings is None:
        store.retire(item)
        return "its settings are not known, so it was set aside: `nanodlm run` with those it was made with rebuilds it"
    try:
        config, inputs = Config(**settings), None
        if artifact:  # then the source need not be there, unless it is the download that is bad
            inputs = {name: store.open(f"{name}/{made}").check() for name, made in artifact.inputs}
        lookup = ready(stage, config, store, rebuild=True, inputs=inputs)
        if lookup.fingerprint != fingerprint:
            raise NanodlmError("this version of nanodlm, or the source's files now, would make another one")
    except (NanodlmError, ValueError) as error:
        return f"not repaired: {one_line(error)}"
    with hold_lease(store, stage, fingerprint):  # of two repairs at once the second finds what the first has made
        there = _find(store, item)
        if there is None or (artifact and there.manifest == artifact.manifest):
            store.retire(item)
    try:
        run_stage(stage, config, store, inputs=inputs, emit=emit)
    except BaseException as error:
        if artifact is not None:  # what was there is there again
            with contextlib.suppress(OSError, NanodlmError):
                store.write_json(store.path(*item, MANIFEST), artifact.manifest, create_only=True)
        if not isinstance(error, NanodlmError):
            raise
        return f"not repaired: {one_line(error)}"
    return ""
