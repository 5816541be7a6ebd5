"""Checking artifacts against their manifests, and building again what is bad."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from nanodlm.config import Config
from nanodlm.errors import Damaged, Emit, NanodlmError, silent
from nanodlm.stages.lookup import ready
from nanodlm.stages.run import run_stage
from nanodlm.stages.table import STAGES
from nanodlm.store import Artifact, Item, Json, Store
from nanodlm.store.retry import one_line

MANY = 8  # artifacts, from which on a listing of the whole store is cheaper
Chain = Mapping[Item, Artifact | Damaged | None]  # what is found of each, in order


@dataclass(frozen=True)
class Checked:
    """An artifact's address and what is wrong with it, one line each; whether that was mended."""

    stage: str
    fingerprint: str
    problems: list[str]
    repaired: bool = False
    strays: list[str] = field(default_factory=list)  # files of nobody's among its own, which are no damage


def chain(store: Store, *artifacts: Item) -> dict[Item, Artifact | Damaged | None]:
    """Return artifacts and all that they were made from, there or not, as far as manifests can be read, in order."""
    found: dict[Item, Artifact | Damaged | None] = {}
    todo = set(artifacts)
    while todo:
        found |= store.artifacts(sorted(todo))
        todo = {made for item in todo if isinstance(of := found[item], Artifact) for made in of.inputs} - found.keys()
    return in_order(found)


def in_order(found: Chain) -> dict[Item, Artifact | Damaged | None]:
    """Sort by the order of the pipeline, and within a stage by time; unknown stages come last."""
    order = {stage: place for place, stage in enumerate(STAGES)}

    def place(item: Item) -> tuple[int, str, Item]:
        artifact = found[item]
        made = artifact.manifest["created"] if isinstance(artifact, Artifact) else ""
        return order.get(item[0], len(order)), made, item

    return {item: found[item] for item in sorted(found, key=place)}


def check(
    store: Store, artifacts: Chain | Iterable[Item], deep: bool = False, repair: bool = False, emit: Emit = silent
) -> Iterator[Checked]:
    """Compare artifacts with their manifests, with `deep` by every sha256 and record, and with what made them.

    With `repair` what is bad is built again beside it, from what is good, and takes its place when its bytes are equal.
    """
    found = artifacts if isinstance(artifacts, Mapping) else dict(store.artifacts(artifacts))
    listings = store.listed() if len(found) > MANY else {}
    for item, artifact in found.items():
        problems, strays = [artifact.problem if isinstance(artifact, Damaged) else "its manifest is missing"], []
        if isinstance(artifact, Artifact):
            listed = listings.get(item) or store.files(store.path(*item))
            bad = artifact.problems(deep=deep, listed=listed, emit=emit)
            problems = [*(f"{path} {problem}" for path, problem in bad.items()), *_other_inputs(artifact, found)]
            strays = artifact.strays(listed)
        obstacle = _repair(store, item, found, emit) if problems and repair else None
        yield Checked(*item, [*problems, obstacle] if obstacle else problems, obstacle == "", strays)


def _other_inputs(artifact: Artifact, found: Chain) -> Iterator[str]:
    for name, made in artifact.manifest["inputs"].items():
        source = found.get((name, made["fingerprint"]))
        if isinstance(source, Artifact) and source.digest != made["digest"]:
            yield f"it was made from another {name} than the one that is there now"


def _known(item: Item, found: Chain) -> Json:
    """Return an artifact's manifest, else what one that was made from it says of its `digest` and `config`."""
    if isinstance(artifact := found[item], Artifact):
        return artifact.manifest
    for made in found.values():
        if isinstance(made, Artifact) and item in made.inputs:
            return {"digest": made.manifest["inputs"][item[0]]["digest"], "config": made.manifest["config"]}
    return {}


def _repair(store: Store, item: Item, found: Chain, emit: Emit) -> str:
    """Build an artifact again, and return what stands in the way, or nothing. What is there stays until then."""
    (stage, fingerprint), artifact = item, found[item]
    if home := re.search(r" belongs to (\S+): ", str(artifact)):  # such as a renamed folder, or a backup
        return f"not repaired, for it is not damaged but out of place: move its folder to {home[1]}, or remove it"
    if isinstance(artifact, Artifact) and list(_other_inputs(artifact, found)):
        remedy = f"`nanodlm run` makes one anew, `nanodlm rm {artifact.uri}` removes this"
        return f"not repaired, for it is of an input that was rebuilt since: {remedy}"
    known = _known(item, found)
    try:
        if not known.get("config"):
            remedy = f"`nanodlm run --rebuild {stage}` with those builds it, `nanodlm rm {store.uri(*item)}` removes it"
            raise NanodlmError(f"the settings that it was made with are not known: {remedy}")
        config, inputs = Config(**known["config"]), None
        if isinstance(artifact, Artifact):  # then the source need not be there, unless it is the download that is bad
            inputs = {name: store.open(f"{name}/{made}").check() for name, made in artifact.inputs}
        if ready(stage, config, store, rebuild=True, inputs=inputs).fingerprint != fingerprint:
            raise NanodlmError("this version of nanodlm, or the source's files now, would make another one")
        config = config.replace(exp={"resume": True})
        run_stage(stage, config, store, rebuild=True, restore=known, inputs=inputs, emit=emit)
    except (NanodlmError, ValueError, OSError) as error:
        return f"not repaired: {one_line(error)}"
    return ""
