"""What the store says about each stage of a configuration."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nanodlm.config import Config
from nanodlm.errors import Damaged, NanodlmError
from nanodlm.stages.table import NAMES, STAGES, Stage
from nanodlm.store import SCHEMA, Artifact, Store, fingerprint_of


@dataclass(frozen=True)
class Lookup:
    """What the store says about a stage: its artifact, or why there is none yet.

    `fingerprint` is None while an input is missing, for then it cannot be known.
    """

    stage: Stage
    identity: dict[str, Any] | None
    fingerprint: str | None
    artifact: Artifact | None


def look_up(config: Config, store: Store, until: str = "report", rebuild: str | None = None) -> Iterator[Lookup]:
    """Look up every stage up to `until`, in order; that of `rebuild` may be damaged.

    Raises:
        Damaged: When an artifact's files are missing or have other sizes than its manifest says.
    """
    found: dict[str, Artifact] = {}
    for stage in STAGES.values():
        missing = [name for name in stage.inputs(config) if name not in found]
        if missing:
            yield Lookup(stage, None, None, None)
        else:
            lookup = _look_up_one(stage, config, store, found, stage.name == rebuild)
            if lookup.artifact:
                found[stage.name] = lookup.artifact
            yield lookup
        if stage.name == until:
            return


def _look_up_one(
    stage: Stage, config: Config, store: Store, inputs: dict[str, Artifact], may_be_damaged: bool
) -> Lookup:
    identity = _identity(stage, config, inputs)
    fingerprint = fingerprint_of(identity)
    try:
        artifact = store.find(stage.name, fingerprint)
        if artifact:
            if _comparable({k: artifact.manifest[k] for k in identity}) != _comparable(identity):
                raise Damaged(artifact.remedy("its manifest is that of other settings or inputs"))
            artifact.check()
    except Damaged:
        if not may_be_damaged:
            raise
        artifact = None
    return Lookup(stage, identity, fingerprint, artifact)


def _identity(stage: Stage, config: Config, found: dict[str, Artifact]) -> dict[str, Any]:
    inputs = {name: found[name] for name in stage.inputs(config) if name in found}
    return {
        "schema": SCHEMA,
        "stage": stage.name,
        "version": stage.version,
        "parameters": stage.parameters(config),
        "inputs": {name: artifact.digest for name, artifact in inputs.items()},
    }


def ready(
    name: str, config: Config, store: Store, *, rebuild: bool = False, inputs: dict[str, Artifact] | None = None
) -> tuple[Lookup, dict[str, Artifact]]:
    """A stage's lookup and its input artifacts.

    Args:
        name: One of `STAGES`.
        config: The run's configuration.
        store: Where artifacts lie.
        rebuild: Whether its own artifact may be damaged.
        inputs: Its input artifacts, where they are known; else they are looked up, from the source on.

    Raises:
        NanodlmError: When an input has not been built.
    """
    if inputs is not None:
        return _look_up_one(STAGES[name], config, store, inputs, rebuild), inputs
    found: dict[str, Artifact] = {}
    for lookup in look_up(config, store, until=name, rebuild=name if rebuild else None):
        if lookup.stage.name == name:
            needed = lookup.stage.inputs(config)
            if lookup.identity is None:
                lacking = sorted((i for i in needed if i not in found), key=NAMES.index)
                raise NanodlmError(
                    f"{name} needs {' and '.join(lacking)}, which {store.uri()} does not hold for this configuration: "
                    f"run `nanodlm run --until {lacking[-1]}` with the same flags first"
                )
            return lookup, {i: found[i] for i in needed}
        if lookup.artifact:
            found[lookup.stage.name] = lookup.artifact
    raise KeyError(name)


def _comparable(identity: dict[str, Any]) -> dict[str, Any]:
    """Inputs by digest alone, with the settings at the top."""
    inputs = {n: i["digest"] if isinstance(i, dict) else i for n, i in identity["inputs"].items()}
    return {**identity["parameters"], "input": inputs, "version": identity["version"], "schema": identity["schema"]}
