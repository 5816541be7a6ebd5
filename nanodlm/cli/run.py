"""Commands that build artifacts: the whole pipeline, one stage alone, or one on a cluster."""

import contextlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Literal

import yaml
from typing_extensions import Doc
from tyro.conf import arg

from nanodlm.bench import memory
from nanodlm.cli.arguments import Output, Settings
from nanodlm.cli.console import Console
from nanodlm.cli.store import OpenStore
from nanodlm.cluster.follow import SCHEDULERS, run_on_cluster
from nanodlm.cluster.settings import Launch, Work
from nanodlm.config import Config, Group, unread
from nanodlm.errors import NanodlmError, UsageError
from nanodlm.flows import quiet_prefect
from nanodlm.flows.server import ephemeral_server
from nanodlm.precision import measured
from nanodlm.provenance import remark
from nanodlm.stages import table
from nanodlm.stages.lookup import look_up, of_stage, ready, why
from nanodlm.stages.process import end_with_parent
from nanodlm.stages.progress import event_log
from nanodlm.stages.run import record, run_stage
from nanodlm.stages.table import StageName
from nanodlm.store import Artifact, Store

Until = Annotated[StageName, Doc("Last stage to go through.")]
Rebuild = Annotated[
    StageName | Literal["changed"] | None,
    Doc("A stage to build again even though it is stored, or all that were made before their code was `changed`."),
]
Again = Annotated[bool, Doc("Build again even though the store holds it.")]
SHORT = 100e6  # bytes of a source that nobody waits for


def run(
    config: Settings,
    *,
    store: OpenStore,
    until: Until = "sample",
    rebuild: Rebuild = None,
    out: Output,
) -> None:
    """Build what the store lacks, from text to samples, and reuse the rest."""
    table.check_rebuild(config, rebuild, until)
    lookups = list(look_up(config, store, table.until(until, config)[-1], rebuild))
    lacking = [lookup.stage.name for lookup in lookups if not lookup.artifact or lookup.is_again(rebuild)]
    table.check(config, lacking)
    if not lacking:
        for lookup in lookups:
            if lookup.note:
                out.emit("message", text=lookup.note)
            if lookup.artifact:
                out.done(lookup.artifact, record(lookup.artifact, "cached", 0.0, lookup.stage.name))
    else:
        quiet_prefect()
        own = not os.environ.get("PREFECT_API_URL")
        if own:
            out.line("[dim]starting the local Prefect server[/dim]")
        with ephemeral_server() if own else contextlib.nullcontext(str) as server, ThreadPoolExecutor(1) as beside:
            beside.submit(measured, config)  # it takes seconds once a machine; the flow finds it, or fails likewise
            from nanodlm.flows.pipeline import run_pipeline

            run_pipeline(config, store.uri(), until, rebuild, out, server)
    out.finish()


def plan(
    config: Settings,
    *,
    store: OpenStore,
    until: Until = "sample",
    rebuild: Rebuild = None,
    devices: Annotated[int | None, Doc("Instead, say what each of so many devices would hold; none is needed.")] = None,
    out: Output,
) -> None:
    """Say what `run` would build or reuse, why, and about how long it takes."""
    table.check_rebuild(config, rebuild, until)
    last = table.until(until, config)[-1] if config.sample.judge or rebuild == "report" else until
    if devices is not None:
        planned = memory.plan(config, devices)
        out.text(memory.table(planned))
        out.json(devices=planned)
        return
    for name, value in unread(config).items():
        out.text(f"{name} {value} is read by nothing beside the other settings, and builds nothing again")
    rows, lookups, stored = [], list(look_up(config, store, last, rebuild)), cache(partial(of_stage, store=store))
    for lookup in lookups:
        stage, fingerprint, changed = lookup.stage.name, lookup.fingerprint or None, lookup.changed
        action = "reuse" if lookup.artifact and not lookup.is_again(rebuild) else "build"
        reason = "; ".join(filter(None, [lookup.note, remark(changed)])) if lookup.artifact else why(lookup, stored)
        reason = "asked for" if stage == rebuild else reason
        rows.append({"stage": stage, "action": action, "fingerprint": fingerprint, "why": reason, "changed": changed})
        out.text(f"{stage:<10} {action:<6} {(fingerprint or '')[:12]:<12}  {reason}".rstrip())
    lacking = [row["stage"] for row in rows if row["action"] == "build"]
    trained = stored("train") if "train" in lacking else []
    expected = _expected(config, lacking, lookups[0].artifact, trained)
    for line in expected:
        out.text(line)
    out.json(stages=rows, expected=expected)


def _expected(config: Config, lacking: list[str], download: Artifact | None, trained: list[Artifact]) -> list[str]:
    """Return lines on how long stages will take; preparing a small source takes no time that needs telling."""
    lines, names = [], [name for name in ("download", "split", "shard") if name in lacking]
    unit, each = ("billion tokens", 2e9) if config.data.pretokenized else ("GB of text", 1e9)
    if names:
        from nanodlm.bench.data import rates, size_of
        from nanodlm.data.sources import CLEANING

        size = download.metrics["bytes"] if download else size_of(config.data)
        if size is None or size > SHORT:
            speeds, made_up = rates(config)
            about = (
                f"about {size / each:.2g} {unit}" if size else f"each {unit} of a source that does not tell its size"
            )
            spent = ", ".join(f"{name} {_duration((size or each) / speeds[name])}" for name in names)
            cleaning = config.data.model_dump(include=CLEANING, exclude_defaults=True)
            more = f", without {' and '.join(cleaning)}" if cleaning else ""
            lines.append(
                f"{about}: {spent} on {os.cpu_count()} cores, as {made_up / 1e6:.2g} made-up MB took just now{more}; "
                f"much shorter documents than {'1,024 ids' if config.data.pretokenized else '5 kB'} take longer"
            )
    model = config.model.model_dump(mode="json")
    if like := [one for one in trained if (one.manifest.get("config") or {}).get("model") == model]:
        last, t = max(like, key=lambda one: one.manifest["created"]), config.train
        m, tokens = last.metrics, t.max_steps * t.batch_size * t.grad_acc_steps * config.model.seq_len
        speed = f"{m['train_tokens_per_second']:,.0f} tokens/s of {last.name} on {m['devices']} {m['device']}"
        spent = _duration(tokens / m["train_tokens_per_second"])
        lines.append(f"training on {tokens:,} tokens: {spent} at the {speed}")
    return lines


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.2g} {unit}"
    return f"{max(1, seconds):.0f} s"


def config(config: Settings, *, out: Output) -> None:
    """Print the whole configuration as YAML, to be edited and given as PRESET."""
    out.text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True).rstrip())
    out.json(**config.model_dump(mode="json"))


class Alone(Group):
    """How a stage runs in this process, without Prefect."""

    rebuild: Again = False
    inputs: Annotated[tuple[str, ...], arg(metavar="[STAGE=FINGERPRINT ...]", help_behavior_hint="")] = ()
    """What the stage reads, each as STAGE=FINGERPRINT; by default it is looked up, from the source on."""
    events: Annotated[str, Doc("File to which progress is written as JSON lines."), arg(metavar="FILE")] = ""


class AloneOrTogether(Alone):
    """How training runs in this process, alone or as one of several."""

    coordinator: Annotated[str, Doc("Address of the first of several processes."), arg(metavar="HOST:PORT")] = ""
    processes: Annotated[int | None, Doc("How many there are.")] = None
    process: Annotated[int | None, Doc("Which one this is, from 0.")] = None


def train(config: Settings, how: Annotated[AloneOrTogether, arg(name="")], *, store: OpenStore, out: Output) -> None:
    """Run the train stage alone, in this process, from what the store holds."""
    _run_alone("train", config, how, store, out)


def evaluate(config: Settings, how: Annotated[Alone, arg(name="")], *, store: OpenStore, out: Output) -> None:
    """Run the evaluate stage alone, in this process, from what the store holds."""
    _run_alone("evaluate", config, how, store, out)


def sample(config: Settings, how: Annotated[Alone, arg(name="")], *, store: OpenStore, out: Output) -> None:
    """Run the sample stage alone, in this process, from what the store holds."""
    _run_alone("sample", config, how, store, out)


def judge(config: Settings, how: Annotated[Alone, arg(name="")], *, store: OpenStore, out: Output) -> None:
    """Run the judge stage alone, in this process, from what the store holds."""
    if not config.sample.judge:
        raise UsageError("nothing is named that judges: set --sample.judge twin, an autoregressive model, or hf:gpt2")
    _run_alone("judge", config, how, store, out)


def _run_alone(name: str, config: Config, how: Alone, store: Store, out: Console) -> None:
    end_with_parent()
    inputs, helping = None, False
    needed = [table.STAGES[read].folder for read in table.STAGES[name].inputs(config)]
    if how.inputs:
        named = {stage: fingerprint for stage, _, fingerprint in (word.partition("=") for word in how.inputs)}
        if set(named) != set(needed) or not all(named.values()):
            raise UsageError(f"{name} reads --inputs {' '.join(f'{stage}=FINGERPRINT' for stage in needed)}")
        inputs = {stage: store.open(f"{stage}/{fingerprint}") for stage, fingerprint in named.items()}
    if isinstance(how, AloneOrTogether):
        from nanodlm.devices.hosts import join

        helping = join(how.coordinator, how.processes, how.process) > 0
    with event_log(Path(how.events)) if how.events else out.showing(name) as emit:
        artifact, done = run_stage(name, config, store, rebuild=how.rebuild, helping=helping, inputs=inputs, emit=emit)
    out.done(artifact, done)
    out.text(artifact.uri)
    of = store.open(f"sample/{dict(artifact.inputs)['sample']}") if name == "judge" else artifact
    out.results(model=artifact.uri if name == "train" else f"{store.uri()}/train/{dict(of.inputs)['train']}")


class Cluster(Launch):
    """Where the job runs, and with what."""

    target: Literal["slurm", "k8s"] = "slurm"  # type: ignore[assignment]
    """A Slurm job or a Kubernetes JobSet."""


def launch(
    config: Settings,
    to: Annotated[Cluster, arg(name="")],
    *,
    stage: Annotated[Literal["train", "evaluate", "sample"], Doc("What to do there.")] = "train",
    store: OpenStore,
    rebuild: Again = False,
    dry_run: Annotated[bool, Doc("Print the batch script or the manifest, and do nothing.")] = False,
    wait: Annotated[bool, Doc("Show how it goes until it is done; interrupted, the job is cancelled.")] = False,
) -> None:
    """Run a stage on a cluster, as a Slurm job or a Kubernetes JobSet."""
    out, lookup = Console(), None
    with contextlib.suppress(NanodlmError) if dry_run else contextlib.nullcontext():
        # A folder that is not here is a disk that only the cluster has: the job then looks its inputs up.
        if wait or not store.is_local or Path(store.root).is_dir():
            lookup = ready(stage, config, store, rebuild=rebuild)
    work = Work(config, store.uri(), to, stage, lookup.input_fingerprints if lookup else {}, rebuild)
    if dry_run:
        print(SCHEDULERS[to.target].job_text(work), end="")
    elif wait and lookup:
        began, artifact, status = time.monotonic(), lookup.artifact, "cached"
        if artifact is None or rebuild:
            with out.showing(stage) as emit:
                artifact = run_on_cluster(lookup, config, store, to, rebuild=rebuild, emit=emit)
            status = "built"
        out.done(artifact, record(artifact, status, time.monotonic() - began, stage))
        out.text(artifact.uri)
    else:
        out.text(str(SCHEDULERS[to.target].submit(work)), f"`nanodlm ls --store {store.uri()}` shows what is done")
