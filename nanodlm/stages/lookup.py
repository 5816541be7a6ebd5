"""What the store holds of each stage of a configuration, and why a stage would be built, field by field."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Self

from nanodlm.checkpoints.finding import find_model, of_stage
from nanodlm.config import Config, differences
from nanodlm.errors import Damaged, NanodlmError, SourceGone, UsageError
from nanodlm.evaluation.artifacts import frontier_of
from nanodlm.precision import measured
from nanodlm.provenance import changed_since
from nanodlm.stages.table import STAGES, Stage
from nanodlm.store import SCHEMA, Artifact, Store, fingerprint_of


@dataclass(frozen=True)
class Lookup:
    """All that determines a stage's bytes, the sha256 of that, and what the store holds; or the inputs `lacking`."""

    stage: Stage
    inputs: dict[str, Artifact]
    identity: dict[str, Any]
    fingerprint: str
    artifact: Artifact | None = None
    lacking: tuple[str, ...] = ()  # stages that are not built: there is no fingerprint without them
    note: str = ""  # what people should know of how it was found

    @property
    def input_fingerprints(self) -> dict[str, str]:
        """Fingerprints of the inputs by stage, as another process is told them."""
        return {name: artifact.fingerprint for name, artifact in self.inputs.items()}

    @property
    def changed(self) -> list[str]:
        """Source files that are not what they were when the artifact was made."""
        return changed_since(self.artifact) if self.artifact else []

    def is_again(self, rebuild: str | None) -> bool:
        """Say if a run is to build the stage again, by its name or because its code has `changed`."""
        return rebuild == self.stage.name or (rebuild == "changed" and bool(self.changed))

    def find_in(self, store: Store, *, may_be_damaged: bool = False) -> Self:
        """Return this lookup with the artifact that the store holds now, which is checked unless it may be damaged."""
        try:
            found = store.find(self.stage.folder, self.fingerprint)
            artifact = found.check() if found else None
        except Damaged:
            if not may_be_damaged:
                raise
            artifact = None
        return replace(self, artifact=artifact)


def identify(stage: Stage, config: Config, inputs: dict[str, Artifact]) -> Lookup:
    """Return a stage's identity and fingerprint, without asking the store."""
    identity = {
        "schema": SCHEMA,
        "stage": stage.folder,
        "version": stage.version,
        "parameters": stage.parameters(measured(config) if stage.own_process else config),
        "inputs": {name: artifact.digest for name, artifact in inputs.items()},
    }
    return Lookup(stage, inputs, identity, fingerprint_of(identity))


def _find(stage: Stage, config: Config, inputs: dict[str, Artifact], store: Store, rebuild: bool) -> Lookup:
    """Look up one stage; a download whose source is gone is the one that was made of it, unless it is to be rebuilt."""
    try:
        lookup = identify(stage, config, inputs)
    except SourceGone as gone:
        if rebuild:
            raise
        lookup = _downloaded_before(stage, config, store, gone)
    return lookup.find_in(store, may_be_damaged=rebuild)


def _downloaded_before(stage: Stage, config: Config, store: Store, gone: SourceGone) -> Lookup:
    """Return the lookup of the one download that a store holds of a source whose files are gone."""
    wanted = {**config.data.model_dump(mode="json"), "version": stage.version, "schema": SCHEMA}
    found: dict[str, Artifact] = {}  # by digest: the same documents may have come from files of several kinds
    for artifact in of_stage(stage.name, store):
        source = (artifact.manifest.get("config") or {}).get("data", {}).get("source")
        has = {**comparable(artifact.manifest), "source": source}
        if all(wanted.get(name, value) == value for name, value in has.items()):  # all but what the files held
            found[artifact.digest] = artifact
    if not found:
        raise gone
    files = f"the files of {', '.join(config.data.source)} are gone"
    names = " and ".join(artifact.name for artifact in found.values())
    if len(found) > 1:
        raise SourceGone(f"{files}, and {names} differ: `nanodlm rm` the wrong ones, or bring the files back") from gone
    (artifact,) = found.values()
    identity = {k: artifact.manifest[k] for k in ("schema", "stage", "version", "parameters", "inputs")}
    note = f"{files}: {names} is used, which was made of them on {artifact.manifest['created'][:10]}"
    return Lookup(stage, {}, identity, artifact.fingerprint, note=note)


def look_up(config: Config, store: Store, until: str = "report", rebuild: str | None = None) -> Iterator[Lookup]:
    """Look up every stage up to `until`, in order; that of `rebuild` may be damaged."""
    found = named_judge(config, store)
    for stage in filter(lambda stage: stage.is_wanted(config), STAGES.values()):
        needed = stage.inputs(config)
        if lacking := tuple(name for name in STAGES if name in needed and name not in found):
            yield Lookup(stage, {}, {}, "", lacking=lacking)
        else:
            lookup = _find(stage, config, read_by(stage, config, found), store, stage.name == rebuild)
            if lookup.artifact:
                found[stage.name] = lookup.artifact
            yield lookup
        if stage.name == until:
            return


def read_by(stage: Stage, config: Config, found: dict[str, Artifact]) -> dict[str, Artifact]:
    """Return what a stage reads of the artifacts that were found, each by the stage in whose folder it lies."""
    beside = frontier_of(found["train"]) if stage.name == "report" else {}
    return {STAGES[name].folder: found[name] for name in stage.inputs(config)} | beside


def named_judge(config: Config, store: Store) -> dict[str, Artifact]:
    """Return the network of ours that a configuration names as its judge, in the place of a twin, if it names one."""
    if config.sample.judge in ("", "twin") or config.sample.judge.startswith("hf:"):
        return {}
    judge = store.open(find_model(config.sample.judge, store))
    kind = judge.manifest["config"]["objective"]["kind"] if judge.stage == "train" else "no model"
    if kind != "autoregressive":
        raise UsageError(f"{judge.name} is {kind}, and cannot judge: name an autoregressive model, or twin")
    return {"twin": judge}


def ready(
    name: str, config: Config, store: Store, *, rebuild: bool = False, inputs: dict[str, Artifact] | None = None
) -> Lookup:
    """Look up one stage, whose inputs have to be there; where they are not given, from the source on."""
    if inputs is not None:
        return _find(STAGES[name], config, inputs, store, rebuild)
    *before, last = look_up(config, store, STAGES[name].name, name if rebuild else None)
    if last.lacking:
        needs = f"{name} needs {' and '.join(last.lacking)}, which {store.uri()} does not hold for this configuration"
        raise NanodlmError(f"{needs}: run `nanodlm run --until {last.lacking[-1]}` with the same flags first")
    return replace(last, note=" ".join(lookup.note for lookup in (*before, last) if lookup.note))


def comparable(identity: dict[str, Any]) -> dict[str, Any]:
    """Return an identity with its settings at the top and its inputs by digest alone."""
    inputs = {n: i["digest"] if isinstance(i, dict) else i for n, i in identity["inputs"].items()}
    return {**identity["parameters"], "input": inputs, "version": identity["version"], "schema": identity["schema"]}


def why(lookup: Lookup, stored: Callable[[str], list[Artifact]]) -> str:
    """Say why a stage would be built: which settings and inputs differ from the most similar artifact there is."""
    if lookup.lacking:
        return "an input is not built yet"
    wanted, there = comparable(lookup.identity), stored(lookup.stage.folder)
    others = {other.fingerprint[:12]: differences(comparable(other.manifest), wanted) for other in there}
    if not others:
        return "nothing like it has been built yet"
    nearest = min(others, key=lambda name: len(others[name]))
    return "; ".join(f"{field}: {values}" for field, values in others[nearest].items()) + f" (against {nearest})"
