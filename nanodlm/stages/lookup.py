"""What the store holds of each stage of a configuration."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Self

from nanodlm.config import Config
from nanodlm.errors import Damaged, NanodlmError
from nanodlm.stages.table import NAMES, STAGES, Stage
from nanodlm.store import SCHEMA, Artifact, Store, fingerprint_of


@dataclass(frozen=True)
class Lookup:
    """A stage whose inputs are there, and what the store holds of it.

    Its fingerprint is the sha256 of its identity, which is everything that determines its bytes.
    """

    stage: Stage
    inputs: dict[str, Artifact]
    identity: dict[str, Any]
    fingerprint: str
    artifact: Artifact | None = None

    @property
    def input_fingerprints(self) -> dict[str, str]:
        """Fingerprints of the inputs by stage, as another process is told them."""
        return {name: artifact.fingerprint for name, artifact in self.inputs.items()}

    def find_in(self, store: Store, *, may_be_damaged: bool = False) -> Self:
        """Return this lookup with the artifact that the store holds now.

        Raises:
            Damaged: When its files are missing or have other sizes than its manifest says, unless it may be damaged.
        """
        try:
            artifact = store.find(self.stage.name, self.fingerprint)
            if artifact:
                if comparable({k: artifact.manifest[k] for k in self.identity}) != comparable(self.identity):
                    raise Damaged(artifact.remedy("its manifest is that of other settings or inputs"))
                artifact.check()
        except Damaged:
            if not may_be_damaged:
                raise
            artifact = None
        return replace(self, artifact=artifact)


@dataclass(frozen=True)
class Missing:
    """A stage that has no fingerprint yet, because that depends on inputs which are not built: those `lacking`."""

    stage: Stage
    lacking: list[str]
    fingerprint: None = None
    artifact: None = None


def identify(stage: Stage, config: Config, inputs: dict[str, Artifact]) -> Lookup:
    """Return a stage's identity and fingerprint, without asking the store."""
    identity = {
        "schema": SCHEMA,
        "stage": stage.name,
        "version": stage.version,
        "parameters": stage.parameters(config),
        "inputs": {name: artifact.digest for name, artifact in inputs.items()},
    }
    return Lookup(stage, inputs, identity, fingerprint_of(identity))


def look_up(
    config: Config, store: Store, until: str = "report", rebuild: str | None = None
) -> Iterator[Lookup | Missing]:
    """Look up every stage up to `until`, in order; that of `rebuild` may be damaged.

    Raises:
        Damaged: When an artifact's files are missing or have other sizes than its manifest says.
    """
    found: dict[str, Artifact] = {}
    for stage in STAGES.values():
        needed = stage.inputs(config)
        if lacking := sorted(set(needed) - set(found), key=NAMES.index):
            yield Missing(stage, lacking)
        else:
            lookup = identify(stage, config, {name: found[name] for name in needed})
            lookup = lookup.find_in(store, may_be_damaged=stage.name == rebuild)
            if lookup.artifact:
                found[stage.name] = lookup.artifact
            yield lookup
        if stage.name == until:
            return


def ready(
    name: str, config: Config, store: Store, *, rebuild: bool = False, inputs: dict[str, Artifact] | None = None
) -> Lookup:
    """Look up one stage, whose inputs have to be there; where they are not given, from the source on.

    Raises:
        NanodlmError: When an input has not been built.
    """
    if inputs is not None:
        return identify(STAGES[name], config, inputs).find_in(store, may_be_damaged=rebuild)
    *_, last = look_up(config, store, STAGES[name].name, name if rebuild else None)
    if isinstance(last, Missing):
        raise NanodlmError(
            f"{name} needs {' and '.join(last.lacking)}, which {store.uri()} does not hold for this configuration: "
            f"run `nanodlm run --until {last.lacking[-1]}` with the same flags first"
        )
    return last


def comparable(identity: dict[str, Any]) -> dict[str, Any]:
    """Return an identity with its settings at the top and its inputs by digest alone."""
    inputs = {n: i["digest"] if isinstance(i, dict) else i for n, i in identity["inputs"].items()}
    return {**identity["parameters"], "input": inputs, "version": identity["version"], "schema": identity["schema"]}
