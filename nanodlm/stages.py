"""The seven stages as data, and the one way to run any of them: look it up, else build it.

    download -> tokenizer -> split -> shard -> train -> evaluate -> sample   (a report gathers them)

Each stage is a function from verified input artifacts and its own part of the configuration to files in a folder.
Its fingerprint covers just those, so a changed setting rebuilds what depends on it and nothing else.
"""

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from nanodlm.cache import cache_dir
from nanodlm.config import Config, differences
from nanodlm.errors import Damaged, NanodlmError, UsageError
from nanodlm.store import SCHEMA, Artifact, Store, find_checkpoint, fingerprint_of

Emit = Callable[..., None]
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
COMMIT_SECONDS = 600.0  # for process 0 to hash and publish what several processes made


@dataclass(frozen=True)
class Stage:
    """One step of the pipeline.

    Attributes:
        name: Also the name of its folder in the store.
        build: `module:function` that does the work; imported when it runs.
        inputs: Stages whose artifacts it reads.
        parameters: The settings that determine its bytes, given the inputs.
        version: Raised when the function's output changes for equal inputs.
        own_process: Whether it uses JAX, and so runs in a process of its own beside an orchestrator.
        volatile: Prefixes of its files that hold times or logs.
    """

    name: str
    build: str
    inputs: Callable[[Config], tuple[str, ...]]
    parameters: Callable[[Config], dict[str, Any]]
    version: int = 1
    own_process: bool = False
    volatile: tuple[str, ...] = ()


def _source(config: Config) -> dict[str, Any]:
    from nanodlm import corpus

    return corpus.identity(config.data)


def _tokenizer_parameters(config: Config) -> dict[str, Any]:
    fields = {"tokenizer", "vocab_size", "val_tokens", "split_seed"}
    return config.data.model_dump(include=fields if config.data.tokenizer == "bpe" else {"tokenizer"})


def _train_parameters(config: Config) -> dict[str, Any]:
    if not config.exp.resume_path:
        return config.training()
    return {**config.training(), "started_from": find_checkpoint(config.exp.resume_path).digest}


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage("download", "nanodlm.corpus:download", lambda c: (), _source),
        Stage(
            "tokenizer",
            "nanodlm.preparation:build_tokenizer",
            lambda c: ("download",) if c.data.tokenizer == "bpe" else (),
            _tokenizer_parameters,
        ),
        Stage(
            "split",
            "nanodlm.preparation:build_split",
            lambda c: ("download", "tokenizer"),
            lambda c: c.data.model_dump(include={"val_tokens", "split_seed"}),
        ),
        Stage(
            "shard",
            "nanodlm.preparation:build_shards",
            lambda c: ("download", "tokenizer", "split"),
            lambda c: c.model.model_dump(include={"seq_len"}),
            version=2,  # its metrics list the rows of each shard
        ),
        Stage(
            "train",
            "nanodlm.training:train",
            lambda c: ("shard", "tokenizer"),
            _train_parameters,
            own_process=True,
            volatile=("checkpoints/", "config.json", "logs.json"),
        ),
        Stage(
            "evaluate",
            "nanodlm.evaluation:evaluate",
            lambda c: ("shard", "train"),
            lambda c: c.eval.model_dump(),
            own_process=True,
        ),
        Stage(
            "sample",
            "nanodlm.generation:generate",
            lambda c: ("train",),
            lambda c: c.sample.model_dump(),
            own_process=True,
        ),
        Stage(
            "report",
            "nanodlm.report:build",
            lambda c: ("train", "evaluate", "sample"),
            lambda c: c.exp.model_dump(include={"run_name"}),
        ),
    )
}
NAMES = tuple(name for name in STAGES if name != "report")


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


def run(
    name: str,
    config: Config,
    store: Store,
    *,
    rebuild: bool = False,
    follow: bool = False,
    inputs: dict[str, Artifact] | None = None,
    emit: Emit = lambda *_, **__: None,
) -> tuple[Artifact, dict[str, Any]]:
    """Find a stage's artifact or build it, here and now, its inputs being there.

    When another process is building the same artifact, wait for it.

    Args:
        name: One of `STAGES`.
        config: The run's configuration.
        store: Where artifacts lie.
        rebuild: Build even when the artifact exists; equal bytes leave the old manifest in place.
        follow: Whether this process helps another one, which has the attempt and commits it.
        inputs: Its input artifacts, where they are known; else they are looked up, from the source on.
        emit: Called as `emit(kind, **fields)` with progress.

    Returns:
        The artifact, and a record with `stage`, `status` (built or cached), `uri`, `fingerprint`, `seconds`.
    """
    started = time.monotonic()
    store.emit = emit
    lookup, inputs = ready(name, config, store, rebuild=rebuild, inputs=inputs)
    assert lookup.identity is not None
    assert lookup.fingerprint is not None
    stage, artifact, status = lookup.stage, lookup.artifact, "cached"
    if follow and (artifact is None or rebuild):
        module, function = stage.build.split(":")
        getattr(import_module(module), function)(config, inputs, None)
        done = time.monotonic()
        while (artifact := store.find(name, lookup.fingerprint)) is None:
            if time.monotonic() > done + COMMIT_SECONDS:
                raise NanodlmError(f"process 0 did not commit the {name} artifact: see what it says")
            time.sleep(0.2)
        return artifact, record(artifact, "built", time.monotonic() - started)
    if artifact is None or rebuild:
        reads = {input_: found.fingerprint for input_, found in inputs.items()}
        with store.lease(name, lookup.fingerprint, lambda text: emit("message", text=text), reads) as mine:

            def publish(kind: str, **fields: Any) -> None:
                mine["events"] = {**mine["events"], kind: fields}  # whoever waits elsewhere reads the lease
                emit(kind, **fields)

            store.emit = publish
            artifact = None if rebuild else store.find(name, lookup.fingerprint)  # another run may have been quicker
            if artifact is None:
                artifact, status = _build(lookup, config, store, inputs, rebuild, publish), "built"
    return artifact, record(artifact, status, time.monotonic() - started)


def _build(
    lookup: Lookup, config: Config, store: Store, inputs: dict[str, Artifact], rebuild: bool, emit: Emit
) -> Artifact:
    assert lookup.identity is not None
    assert lookup.fingerprint is not None
    module, function = lookup.stage.build.split(":")
    afresh = rebuild and lookup.artifact is not None
    with room(store), store.attempt(lookup.stage.name, lookup.fingerprint, afresh=afresh) as attempt:
        metrics = getattr(import_module(module), function)(config, inputs, attempt, emit)
        # Beside the digests that are part of the identity, the fingerprints tell where the inputs lie.
        lineage = {n: {"digest": a.digest, "fingerprint": a.fingerprint} for n, a in inputs.items()}
        return attempt.commit(
            identity={**lookup.identity, "inputs": lineage},
            config=config.model_dump(mode="json"),
            metrics=metrics,
            volatile=lookup.stage.volatile,
            replace=rebuild,
        )


@contextmanager
def room(store: Store) -> Iterator[None]:
    """Say in one line when a disk is full, whoever wrote to it."""
    try:
        yield
    except Exception as error:  # libraries that write by themselves say it in words of their own
        said = {getattr(error, "errno", None), *(code for code in FULL if os.strerror(code) in str(error))}
        if isinstance(error, NanodlmError) or not (full := said & FULL):
            raise
        where = store.uri() if store.is_local else f"{store.uri()}, or into the cache {cache_dir()}"
        raise NanodlmError(
            f"nothing more fits into {where}: {os.strerror(full.pop())}; make room and run again, what is finished is "
            "kept"
        ) from error


def record(artifact: Artifact, status: str, seconds: float) -> dict[str, Any]:
    """What `--json` and the flows say of a stage."""
    return {
        "stage": artifact.stage,
        "status": status,
        "uri": artifact.uri,
        "fingerprint": artifact.fingerprint,
        "seconds": round(seconds, 3),
    }


def why(lookup: Lookup, store: Store) -> str:
    """Why a stage would be built: which settings and inputs differ from the most similar artifact there is."""
    if lookup.identity is None:
        return "an input is not built yet"
    if not store.asked:
        return "it was not fetched before, and the store is not asked while NANODLM_OFFLINE is set"
    wanted = _comparable(lookup.identity)
    best: tuple[list[str], str] | None = None
    for stage, fingerprint in store:
        if stage != lookup.stage.name:
            continue
        try:
            other = store.find(stage, fingerprint)
        except Damaged:
            continue
        if other is None:
            continue
        has = _comparable({k: other.manifest[k] for k in lookup.identity})
        reasons = [f"{field}: {values}" for field, values in differences(has, wanted).items()]
        if best is None or len(reasons) < len(best[0]):
            best = (reasons, fingerprint[:12])
    return f"{'; '.join(best[0])} (against {best[1]})" if best else "nothing like it has been built yet"


def explain(artifact: Artifact, config: Config) -> Iterator[str]:
    """Why a configuration would not reuse an artifact: what differs, in it and in all it was made from.

    Yields:
        Lines such as `train: train.lr: 0.001 -> 0.002`; one may come twice.
    """
    stage, made = STAGES[artifact.stage], artifact.manifest
    has = {**made["parameters"], "version": made["version"], "schema": made["schema"]}
    wanted = {**stage.parameters(config), "version": stage.version, "schema": SCHEMA}
    for field, values in differences(has, wanted).items():
        yield f"{stage.name}: {field}: {values}"
    names = stage.inputs(config)
    for name in made["inputs"].keys() | set(names):
        if (name in made["inputs"]) != (name in names):
            yield f"{stage.name}: {'is now made' if name in names else 'is no longer made'} from {name}"
            continue
        source = artifact.store.find(name, made["inputs"][name]["fingerprint"])
        if source is None:
            yield f"{stage.name}: the {name} artifact that it was made from is not there any more"
            continue
        if source.digest != made["inputs"][name]["digest"]:
            yield f"{stage.name}: the {name} artifact was rebuilt with other bytes since"
        yield from explain(source, config)


def _comparable(identity: dict[str, Any]) -> dict[str, Any]:
    """Inputs by digest alone, with the settings at the top."""
    inputs = {n: i["digest"] if isinstance(i, dict) else i for n, i in identity["inputs"].items()}
    return {**identity["parameters"], "input": inputs, "version": identity["version"], "schema": identity["schema"]}


def until(last: str) -> tuple[str, ...]:
    """Names of the stages up to one; the report comes with the samples.

    >>> until("split")
    ('download', 'tokenizer', 'split')
    """
    return tuple(STAGES) if last == "sample" else NAMES[: NAMES.index(last) + 1]


def check_rebuild(rebuild: str | None, last: str) -> None:
    """Whether a stage that is to be rebuilt is among those up to one.

    Raises:
        UsageError: When it is not.
    """
    if rebuild is not None and rebuild not in until(last):
        raise UsageError(f"--rebuild {rebuild} comes after --until {last}: nothing would be rebuilt")


def train(config: Config, store: str | None = None, emit: Emit = lambda *_, **__: None) -> Artifact:
    """Train a model, first building whatever data it needs, all in this process.

    A finished run is found rather than repeated, and an interrupted one continues from its last checkpoint.

    Args:
        config: The run's configuration.
        store: Folder or fsspec URL of the artifacts; by default `$NANODLM_STORE`, else `data/store`.
        emit: Called as `emit(kind, **fields)` with progress; `nanodlm.console.Console(sys.stderr).emit` shows it.

    Returns:
        The train artifact: `.uri` is what `nanodlm.load` takes, `.metrics` what was measured.

    Example:
        run = nanodlm.train(nanodlm.PRESETS["demo"])
        print(run.uri, run.metrics["train_nats_per_token"])
    """
    opened = Store(store or default_store())
    for name in until("train"):
        artifact, _ = run(name, config, opened, emit=emit)
    return artifact  # type: ignore[possibly-unbound]


def default_store() -> str:
    """`$NANODLM_STORE`, else `data/store`."""
    return os.environ.get("NANODLM_STORE") or "data/store"
