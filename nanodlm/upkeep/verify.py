"""Checking artifacts against their manifests, and building again what is bad."""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from nanodlm.config import Config
from nanodlm.errors import Damaged, NanodlmError
from nanodlm.stages.lookup import ready
from nanodlm.stages.progress import Emit
from nanodlm.stages.run import run_stage
from nanodlm.stages.table import STAGES
from nanodlm.store import Artifact, Store, hold_lease, sealed
from nanodlm.store.manifest import MANIFEST


@dataclass(frozen=True)
class Checked:
    """An artifact's address and what is wrong with it, one line each; whether that was mended."""

    stage: str
    fingerprint: str
    problems: list[str]
    repaired: bool = False


def chain(store: Store, stage: str, fingerprint: str) -> list[tuple[str, str]]:
    """An artifact and all that it was made from, in the order of the pipeline.

    What a manifest that cannot be read was made from is not known, and left out.
    """
    found: dict[tuple[str, str], None] = {}

    def walk(stage: str, fingerprint: str) -> None:
        try:
            artifact = store.find(stage, fingerprint)
        except Damaged:
            artifact = None
        for name, made in (artifact.manifest["inputs"] if artifact else {}).items():
            walk(name, made["fingerprint"])
        found.setdefault((stage, fingerprint))

    walk(stage, fingerprint)
    return in_order(found)


def in_order(artifacts: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Stages and fingerprints in the order of the pipeline."""
    order = list(STAGES)
    return sorted(artifacts, key=lambda item: order.index(item[0]) if item[0] in order else len(order))


def named(store: Store) -> list[tuple[str, str]]:
    """All artifacts of a store, and those that they were made from, whether these are there or not, in order."""
    found = dict.fromkeys(store)
    for item in list(found):
        with contextlib.suppress(Damaged):
            artifact = store.find(*item)
            inputs = artifact.manifest["inputs"] if artifact else {}
            found |= dict.fromkeys((name, made["fingerprint"]) for name, made in inputs.items())
    return in_order(found)


def check(
    store: Store,
    artifacts: list[tuple[str, str]],
    *,
    deep: bool = False,
    repair: bool = False,
    emit: Emit = lambda *_, **__: None,
) -> Iterator[Checked]:
    """Compare artifacts with their manifests, and each with what it was made from.

    Args:
        store: Where they lie.
        artifacts: Their stages and fingerprints, in the order of the pipeline, so that inputs are repaired first.
        deep: Whether to read every file and compare its sha256, not only its size.
        repair: Build again what is bad, from what is good: finished parts that are whole are kept.
        emit: Called as `emit(kind, **fields)` with progress.
    """
    for stage, fingerprint in artifacts:
        artifact, problems = None, []
        try:
            artifact = store.find(stage, fingerprint)
            problems = _problems(artifact, deep, emit) if artifact else ["its manifest is missing"]
        except Damaged as error:
            problems = [str(error)]
        if not (problems and repair):
            yield Checked(stage, fingerprint, problems)
            continue
        settings = _settings(store, (stage, fingerprint), artifacts)
        remedy = _repair(store, stage, fingerprint, artifact, settings, emit)
        yield Checked(stage, fingerprint, [*problems, *([remedy] if remedy else [])], repaired=not remedy)


def _problems(artifact: Artifact, deep: bool, emit: Emit) -> list[str]:
    lines = artifact.problems(deep=deep, emit=emit)
    for name, made in artifact.manifest["inputs"].items():
        try:
            source = artifact.store.find(name, made["fingerprint"])
        except Damaged:
            continue  # named by itself
        if source and source.digest != made["digest"]:
            lines.append(f"it was made from another {name} than the one that is there now")
    return lines


def _settings(store: Store, item: tuple[str, str], artifacts: list[tuple[str, str]]) -> dict[str, Any] | None:
    """The settings an artifact was made with, from its own manifest, else from that of one that was made from it."""
    for stage, fingerprint in [item, *artifacts]:
        with contextlib.suppress(Damaged):
            found = store.find(stage, fingerprint)
            if found is None or not found.manifest.get("config"):
                continue
            made = found.manifest["inputs"].get(item[0], {})
            if item in ((stage, fingerprint), (item[0], made.get("fingerprint"))):
                return found.manifest["config"]
    return None


def _repair(
    store: Store,
    stage: str,
    fingerprint: str,
    artifact: Artifact | None,
    settings: dict[str, Any] | None,
    emit: Emit,
) -> str:
    """Build an artifact again; what stands in the way, or nothing."""
    manifest = None if artifact else store.read_json(store.path(stage, fingerprint, MANIFEST))
    if whose := _misplaced(manifest, stage, fingerprint):
        return f"not repaired, for it is not damaged but out of place: move its folder to {whose}, or remove it"
    if settings is None:
        store.retire((stage, fingerprint))
        return "its settings are not known, so it was set aside: `nanodlm run` with those it was made with rebuilds it"
    try:
        config, inputs = Config(**settings), None
        if artifact:  # then the source need not be there, unless it is the download that is bad
            lineage = artifact.manifest["inputs"].items()
            inputs = {name: store.open(f"{name}/{made['fingerprint']}").check() for name, made in lineage}
        lookup = ready(stage, config, store, rebuild=True, inputs=inputs)
        if lookup.fingerprint != fingerprint:
            raise NanodlmError("this version of nanodlm, or the source's files now, would make another one")
    except (NanodlmError, ValueError) as error:
        return f"not repaired: {_short(error)}"
    with hold_lease(store, stage, fingerprint):  # of two repairs at once the second finds what the first has made
        there = None
        with contextlib.suppress(Damaged):
            there = store.find(stage, fingerprint)
        if there is None or (artifact and there.manifest == artifact.manifest):
            store.retire((stage, fingerprint))
    try:
        run_stage(stage, config, store, inputs=inputs, emit=emit)
    except BaseException as error:
        if artifact is not None:  # what was there is there again
            with contextlib.suppress(OSError, NanodlmError):
                store.write_json(store.path(stage, fingerprint, "manifest.json"), artifact.manifest, create_only=True)
        if not isinstance(error, NanodlmError):
            raise
        return f"not repaired: {_short(error)}"
    return ""


def _misplaced(manifest: Any, stage: str, fingerprint: str) -> str:
    """Where an intact manifest belongs, if that is somewhere else; such as that of a renamed folder, or of a backup."""
    if not isinstance(manifest, dict) or manifest != sealed(manifest):
        return ""
    whose = (str(manifest.get("stage", stage)), str(manifest.get("fingerprint", fingerprint)))
    return "" if whose == (stage, fingerprint) else "/".join(whose)


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
