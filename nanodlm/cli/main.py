"""The command line. Each command is a function; what it needs is imported when it runs, so `--help` is quick.

nanodlm run demo --train.lr 1e-3
"""

import contextlib
import io
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from nanodlm.errors import NanodlmError, Stopped, UsageError, redact

if TYPE_CHECKING:
    from nanodlm.config import Config
    from nanodlm.store import Artifact, Store

COMMANDS = {
    "run": "text to samples: build what the store lacks, stage by stage",
    "plan": "say what `run` would build or reuse, and why; with --devices what one of so many would hold",
    "train": "the train stage alone, without Prefect",
    "evaluate": "the evaluate stage alone",
    "sample": "the sample stage alone",
    "launch": "train on a cluster: a Slurm job or a Kubernetes JobSet",
    "bench": "measure: bench train, sample, loader, store, flow, variance, race or ablation",
    "ls": "list the store's artifacts",
    "show": "one artifact: where it came from, what it holds",
    "explain": "why a configuration would not reuse an artifact, field by field",
    "verify": "check artifacts against their manifests, and repair them",
    "gc": "remove what abandoned attempts left behind, and old results",
    "copy": "copy artifacts to another store",
    "adopt": "take files at hand for a configuration's download",
    "automate": "have the server of flows end lost runs, notify a webhook, let trainings take turns",
    "doctor": "check this machine and the store",
}
HELP = f"""usage: nanodlm COMMAND [PRESET] [--store URL] [flags]

Diffusion language models, from text to samples.

commands:
{chr(10).join(f"  {name:<10} {text}" for name, text in COMMANDS.items())}

PRESET is demo (the default), owt, owt-1b, or a config.json that a run has written.
`nanodlm COMMAND --help` lists a command's flags. The store is --store, else $NANODLM_STORE, else data/store.
"""


def main(argv: list[str] | None = None) -> NoReturn:
    """Run one command and exit: 0 done, 1 failed, 2 bad usage, 75 stopped by a signal after saving."""
    argv = sys.argv[1:] if argv is None else argv
    debug = "--debug" in argv
    argv = [a for a in argv if a != "--debug"]
    try:
        if not argv or argv[0] in ("-h", "--help"):
            print(HELP, end="")
            sys.exit(0 if argv else 2)
        if argv[0] == "--version":
            from importlib.metadata import version

            print(version("nanodlm"))
            sys.exit(0)
        if argv[0] not in COMMANDS:
            raise UsageError(f"unknown command {argv[0]!r}: choose one of {', '.join(COMMANDS)}")
        globals()[argv[0]](argv[1:])
        sys.exit(0)
    except NanodlmError as error:
        if debug:
            print(redact(traceback.format_exc()), end="", file=sys.stderr)
        print(f"nanodlm: {error}", file=sys.stderr)
        _exit(error.exit_code)
    except KeyboardInterrupt:
        print("nanodlm: interrupted; finished stages and parts are kept: run again to continue", file=sys.stderr)
        sys.exit(Stopped.exit_code)
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        if debug:
            print(redact(traceback.format_exc()), end="", file=sys.stderr)
        text = redact(" ".join(str(error).split()))[:500]
        hint = "" if debug else " (add --debug for the traceback)"
        print(f"nanodlm: {type(error).__name__}: {text}{hint}", file=sys.stderr)
        _exit(1)


def _exit(code: int) -> NoReturn:
    """End; of several processes one that failed does not wait for the others, which then end as well."""
    from nanodlm.devices.hosts import is_one_of_several

    if is_one_of_several() and code != Stopped.exit_code:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


# Arguments


def _parse(command: str, argv: list[str], fields: dict[str, Any], *, configured: bool) -> tuple["Config | None", Any]:
    """Parse a command's arguments with tyro: its own `fields`, and the groups of the configuration.

    Returns:
        The configuration (None unless `configured`) and an object with the other fields.

    Raises:
        UsageError: One line on what is wrong.
    """
    import tyro
    from pydantic import create_model

    from nanodlm.config import Config, Group, load_config

    if configured:
        preset = argv.pop(0) if argv and not argv[0].startswith("-") else "demo"
        default = load_config(preset)
        model = create_model("Arguments", __base__=Config, **fields)
        start: Any = model(**dict(default))
        argv = _say_true(argv, Config)
    else:
        model = create_model("Arguments", __base__=Group, **fields)
        start = None
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            values = tyro.cli(
                model,
                args=argv,
                default=start if configured else tyro.MISSING_NONPROP,
                prog=f"nanodlm {command}" + (" [PRESET]" if configured else ""),
                description={**COMMANDS, **{f"bench {k}": v for k, v in BENCHES.items()}}[command].capitalize() + ".",
                use_underscores=True,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as exit_:
        if exit_.code in (0, None):
            raise
        raise UsageError(f"{_one_line(said.getvalue())} (nanodlm {command} --help lists the flags)") from None
    groups = {name: getattr(values, name) for name in Config.model_fields} if configured else {}
    return (Config(**groups) if configured else None), values


def _say_true(argv: list[str], config: type["Config"]) -> list[str]:
    """Give a switch of the configuration without a value, such as `--exp.resume`, the value True."""
    switches = {
        f"--{group}.{name}"
        for group, of in config.model_fields.items()
        for name, field in of.annotation.model_fields.items()  # type: ignore[union-attr]
        if field.annotation is bool
    }
    said = []
    for word, following in zip(argv, [*argv, "--"][1:], strict=True):
        said.append(word)
        if word.replace("-", "_").replace("__", "--", 1) in switches and following.startswith("-"):
            said.append("True")
    return said


def _one_line(box: str) -> str:
    """The message inside one of tyro's boxes, without its frame, advice and pydantic's links."""
    lines = [line.strip(" │\n") for line in box.splitlines()]
    lines = [line for line in lines if line and not line.startswith("╭") and not line.startswith("╰")]
    rules = [i for i, line in enumerate(lines) if set(line) == {"─"}]
    text = " ".join(lines[: rules[0]] if rules else lines)
    if "Perhaps you meant:" in lines and len(rules) > 1:
        text += f"; perhaps you meant {lines[rules[0] + 2].split()[0]}"
    text = re.sub(r"\s*\[type=.*?(https?://\S+|$)", "", text)
    return re.sub(r"\d+ validation errors? for \w+ ", "", text).replace("Value error, ", "")


def _flag(text: str, default: Any = False, kind: Any = bool) -> tuple[Any, Any]:
    from pydantic import Field

    return kind, Field(default, description=text)


def _store_flag() -> tuple[Any, Any]:
    from nanodlm.config import refuse_secrets
    from nanodlm.stages.run import default_store

    # --help shows the default
    return _flag("Where artifacts lie: a folder or an fsspec URL.", refuse_secrets(default_store()), str)


def _positional(text: str, default: Any = "") -> tuple[Any, Any]:
    from pydantic import Field
    from tyro.conf import Positional

    return Positional[str], Field(default, description=text)


def _json_flag() -> tuple[Any, Any]:
    from typing import Annotated

    import tyro

    return _flag(
        "Print one JSON object as the last line of standard output.", False, Annotated[bool, tyro.conf.arg(name="json")]
    )


def _print_json(value: Any) -> None:
    print(json.dumps(value, sort_keys=True))


# The pipeline


def run(argv: list[str]) -> None:
    """Text to samples."""
    from nanodlm.cli.console import Console
    from nanodlm.stages import run as stages_run
    from nanodlm.stages.lookup import look_up
    from nanodlm.stages.run import run_stage
    from nanodlm.stages.table import NAMES, check_rebuild, until
    from nanodlm.store import Store

    stage = Literal[NAMES]  # type: ignore[valid-type]
    stage_or_none: Any = Literal[(*NAMES, None)]  # type: ignore[valid-type]
    runner: Any = Literal["threads", "processes", "dask", "ray", None]
    config, args = _parse(
        "run",
        argv,
        {
            "store": _store_flag(),
            "until": _flag("Last stage to run.", "sample", stage),
            "rebuild": _flag("A stage to build again even though the store holds it.", None, stage_or_none),
            "runner": _flag("Where shards are made; by default $NANODLM_RUNNER, else threads.", None, runner),
            "workers": _flag("How many at a time; by default $NANODLM_WORKERS, else one a core.", None, int | None),
            "as_json": _json_flag(),
            "verbose": _flag("Show Prefect's own log."),
        },
        configured=True,
    )
    assert config is not None
    check_rebuild(args.rebuild, args.until)
    console = Console(sys.stderr if args.as_json else sys.stdout)
    store = Store(args.store)
    lookups = list(look_up(config, store, until(args.until)[-1], args.rebuild))
    if args.rebuild is None and all(lookup.artifact for lookup in lookups):
        artifacts = [lookup.artifact for lookup in lookups if lookup.artifact]
        records = [stages_run.record(artifact, "cached", 0.0) for artifact in artifacts]
        for artifact, record in zip(artifacts, records, strict=True):
            console.done(artifact, record)
    elif args.store.startswith("memory://"):  # which no other process could see, an orchestrator's neither
        records = []
        for name in until(args.until):
            console.start(name)
            try:
                artifact, record = run_stage(name, config, store, rebuild=name == args.rebuild, emit=console.emit)
            finally:
                console.end()
            console.done(artifact, record)
            records.append(record)
    else:
        _quiet_prefect(args.verbose)
        console.line("[dim]starting the local Prefect server[/dim]" if not os.environ.get("PREFECT_API_URL") else "")
        from flows.pipeline import run_pipeline

        records = run_pipeline(
            config, args.store, args.until, args.rebuild, console, args.verbose, args.runner, args.workers
        )
    by_stage = console.artifacts
    console.finish(by_stage)
    if args.as_json:
        _print_json(_result(records, by_stage))


def _quiet_prefect(verbose: bool = False) -> None:
    """Before Prefect is imported: let it report nothing home, start no server by itself, and log what is asked for."""
    for name in ("PREFECT_SERVER_ANALYTICS_ENABLED", "PREFECT_SERVER_EPHEMERAL_ENABLED"):
        os.environ.setdefault(name, "false")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "INFO" if verbose else "CRITICAL")


def _result(records: list[dict[str, Any]], artifacts: dict[str, "Artifact"]) -> dict[str, Any]:
    """The object that `--json` prints."""
    metrics: dict[str, Any] = {}
    for artifact in artifacts.values():
        metrics.update({k: v for k, v in artifact.metrics.items() if k != "first_sample"})
    report = artifacts.get("report")
    return {
        "stages": [r for r in records if r["stage"] != "report"],
        "metrics": metrics,
        "report": f"{report.uri}" if report else None,
    }


def plan(argv: list[str]) -> None:
    """What `run` would do."""
    from nanodlm.stages.lookup import look_up
    from nanodlm.stages.table import NAMES, check_rebuild
    from nanodlm.stages.why import why
    from nanodlm.store import Store

    stage = Literal[NAMES]  # type: ignore[valid-type]
    stage_or_none: Any = Literal[(*NAMES, None)]  # type: ignore[valid-type]
    config, args = _parse(
        "plan",
        argv,
        {
            "store": _store_flag(),
            "until": _flag("Last stage to look at.", "sample", stage),
            "rebuild": _flag("A stage that `run` would be told to build again.", None, stage_or_none),
            "devices": _flag(
                "Instead, compile one update for so many devices, which need not exist, and say what each would hold.",
                None,
                int | None,
            ),
            "as_json": _json_flag(),
        },
        configured=True,
    )
    assert config is not None
    check_rebuild(args.rebuild, args.until)
    if args.devices is not None:
        from nanodlm.bench import memory
        from nanodlm.bench.memory import table

        planned = memory.plan(config, args.devices)
        if args.as_json:
            _print_json({"devices": planned})
        else:
            print(table(planned))
        return
    store = Store(args.store)
    rows = []
    for lookup in look_up(config, store, args.until, args.rebuild):
        if lookup.stage.name not in NAMES:
            continue
        again = lookup.stage.name == args.rebuild
        action = "reuse" if lookup.artifact and not again else "build"
        reason = "asked for" if again else "" if lookup.artifact else why(lookup, store)
        rows.append({"stage": lookup.stage.name, "action": action, "fingerprint": lookup.fingerprint, "why": reason})
    if args.as_json:
        _print_json({"stages": rows})
        return
    for row in rows:
        print(f"{row['stage']:<10} {row['action']:<6} {(row['fingerprint'] or '')[:12]:<12}  {row['why']}".rstrip())


def _hosts_flags() -> dict[str, Any]:
    return {
        "coordinator": _flag("HOST:PORT of the first of several processes that train together.", "", str),
        "processes": _flag("How many there are.", None, int | None),
        "process": _flag("Which one this is, from 0.", None, int | None),
    }


def _one_stage(name: str, argv: list[str]) -> None:
    from nanodlm.cli.console import Console
    from nanodlm.devices.hosts import join
    from nanodlm.stages.process import end_with_parent
    from nanodlm.stages.progress import EventLog
    from nanodlm.stages.run import run_stage
    from nanodlm.store import Store
    from nanodlm.store.cache import cache_dir

    config, args = _parse(
        name,
        argv,
        {
            "store": _store_flag(),
            "rebuild": _flag("Build again even though the store holds it."),
            "inputs": _flag(
                "The artifacts it reads, as STAGE=FINGERPRINT; else they are looked up.", (), tuple[str, ...]
            ),
            "events": _flag("File to which progress is written as JSON lines.", "", str),
            "as_json": _json_flag(),
            **(_hosts_flags() if name == "train" else {}),
        },
        configured=True,
    )
    assert config is not None
    end_with_parent()
    # What one process has compiled serves the next, a resumed run above all.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_dir() / "compiled"))
    helping = name == "train" and join(args.coordinator, args.processes, args.process) > 0
    console = Console(sys.stderr if args.as_json else sys.stdout)
    if args.events:
        emit: Callable[..., None] = EventLog(Path(args.events))
    else:
        console.start(name)
        emit = console.emit
    store, told = Store(args.store), dict(word.split("=", 1) for word in args.inputs)
    try:
        inputs = {stage: store.open(f"{stage}/{fingerprint}") for stage, fingerprint in told.items()} or None
        artifact, record = run_stage(
            name, config, store, rebuild=args.rebuild, helping=helping, inputs=inputs, emit=emit
        )
    finally:
        console.end()
    console.done(artifact, record)
    console.text(artifact.uri)
    if args.as_json:
        _print_json(_result([record], {name: artifact}))


def train(argv: list[str]) -> None:
    """The train stage alone."""
    _one_stage("train", argv)


def evaluate(argv: list[str]) -> None:
    """The evaluate stage alone."""
    _one_stage("evaluate", argv)


def sample(argv: list[str]) -> None:
    """The sample stage alone."""
    _one_stage("sample", argv)


def launch(argv: list[str]) -> None:
    """Train, evaluate or sample on a cluster."""
    from pydantic import ValidationError

    from nanodlm.cli.console import Console
    from nanodlm.cluster.follow import SCHEDULERS, run_on_cluster
    from nanodlm.cluster.kubernetes import jobset
    from nanodlm.cluster.settings import Launch, Work
    from nanodlm.cluster.slurm import slurm_script
    from nanodlm.config import explain as explained
    from nanodlm.stages import run as stages_run
    from nanodlm.stages.lookup import ready
    from nanodlm.store import Store

    where: dict[str, Any] = {
        name: (field.annotation, field) for name, field in Launch.model_fields.items() if name != "target"
    }
    config, args = _parse(
        "launch",
        argv,
        {
            "target": _flag("A Slurm job or a Kubernetes JobSet.", "slurm", Literal["slurm", "k8s"]),
            **where,
            "stage": _flag("What to do there.", "train", Literal["train", "evaluate", "sample"]),
            "store": _store_flag(),
            "rebuild": _flag("Build again even though the store holds it."),
            "dry_run": _flag("Print the batch script or the manifest, and do nothing."),
            "wait": _flag("Show how it goes, until it is done; interrupted, the job is cancelled."),
        },
        configured=True,
    )
    assert config is not None
    try:
        to = Launch(**{name: getattr(args, name) for name in Launch.model_fields})
    except ValidationError as error:
        raise UsageError(explained(error)) from None
    store, console, lookup = Store(args.store), Console(sys.stdout), None
    with contextlib.suppress(NanodlmError) if args.dry_run else contextlib.nullcontext():
        # A folder that is not here is a disk that only the cluster has: the job then looks its inputs up.
        if args.wait or not store.is_local or Path(store.root).is_dir():
            lookup = ready(args.stage, config, store, rebuild=args.rebuild)
    inputs = lookup.input_fingerprints if lookup else {}
    work = Work(config, args.store, to, args.stage, inputs, args.rebuild)
    if args.dry_run and to.target == "slurm":
        print(slurm_script(work), end="")
        return
    if args.dry_run:
        import yaml

        manifest = jobset(work)
        print(yaml.safe_dump(manifest, sort_keys=False, width=1000), end="")
        return
    if args.wait and lookup:
        console.start(args.stage)
        began = time.monotonic()
        artifact, status = lookup.artifact, "cached"
        try:
            if artifact is None or args.rebuild:
                status = "built"
                artifact = run_on_cluster(lookup, config, store, to, rebuild=args.rebuild, emit=console.emit)
        finally:
            console.end()
        console.done(artifact, stages_run.record(artifact, status, time.monotonic() - began))
        console.text(artifact.uri)
        return
    job = SCHEDULERS[to.target].submit(work)
    print(f"{job}\n`nanodlm ls --store {store.uri()}` shows what is done")


BENCHES = {
    "train": "speed of updates on random tokens; --baseline times the plain recipe beside them",
    "sample": "speed of the sampler, with a network that knows nothing",
    "loader": "speed of reading training rows",
    "store": "what a bucket costs: requests, and transfers beside those of plain fsspec",
    "flow": "what orchestration costs: the pipeline as a flow beside the same functions called directly",
    "variance": "how much the estimators of the bound and of its gradient vary (needs the trained run)",
    "race": "how much sooner the preset reaches the bound of a plain recipe",
    "ablation": "what each part of the preset is worth",
}


def bench(argv: list[str]) -> None:
    """Measure something; see `BENCHES`."""
    which = argv.pop(0) if argv and not argv[0].startswith("-") else ""
    if not which and {"-h", "--help"} & set(argv):
        print("usage: nanodlm bench WHAT [PRESET] [flags]\n")
        print("\n".join(f"  {name:<10} {text}" for name, text in BENCHES.items()))
        return
    if which not in BENCHES:
        raise UsageError(f"nanodlm bench cannot measure {which or 'nothing'}: choose one of {', '.join(BENCHES)}")
    globals()[f"_bench_{which}"](argv)


def _measure(
    which: str, argv: list[str], fields: dict[str, Any], measure: Callable[["Config", Any, Callable[..., None]], Any]
) -> tuple[Any, Any]:
    """Parse a bench's arguments and take its measurement, showing progress: the result, and the arguments."""
    from nanodlm.cli.console import Console

    config, args = _parse(f"bench {which}", argv, {**fields, "as_json": _json_flag()}, configured=True)
    assert config is not None
    console = Console(sys.stderr if args.as_json else sys.stdout)
    console.start("bench")
    try:
        return measure(config, args, console.emit), args
    finally:
        console.end()


def _print_measured(result: dict[str, Any], as_json: bool) -> None:
    for name, value in result.items():
        print(f"{name:<20} {'unknown' if value is None else f'{value:,.6g}' if isinstance(value, float) else value}")
    if as_json:
        _print_json(result)


def _bench_train(argv: list[str]) -> None:
    from nanodlm.bench.speed import train

    fields = {
        "steps": _flag("Updates to time.", 10, int),
        "baseline": _flag("Whether to time updates of the plain recipe, of the same sizes, in turn with ours."),
    }
    result, args = _measure(
        "train",
        argv,
        fields,
        lambda config, args, emit: train(config, steps=args.steps, baseline=args.baseline, emit=emit),
    )
    _print_measured(result, args.as_json)


def _bench_sample(argv: list[str]) -> None:
    from nanodlm.bench.speed import sample

    fields = {"repeats": _flag("Draws to time, of sample.num_samples texts each.", 5, int)}
    result, args = _measure(
        "sample", argv, fields, lambda config, args, emit: sample(config, repeats=args.repeats, emit=emit)
    )
    _print_measured(result, args.as_json)


def _bench_loader(argv: list[str]) -> None:
    from nanodlm.bench.speed import loader

    fields = {
        "batches": _flag("Batches to time.", 200, int),
        "against": _flag("Tokens per second that a trainer takes, to compare with.", None, float | None),
    }
    result, args = _measure(
        "loader",
        argv,
        fields,
        lambda config, args, emit: loader(config, batches=args.batches, against=args.against, emit=emit),
    )
    _print_measured(result, args.as_json)


def _bench_store(argv: list[str]) -> None:
    from nanodlm.bench.bucket import measure

    fields = {
        "store": _store_flag(),
        "files": _flag("Files of an artifact.", 32, int),
        "megabytes": _flag("Size of each.", 4.0, float),
        "repeats": _flag("Transfers of each kind.", 6, int),
    }

    def call(_: "Config", args: Any, emit: Callable[..., None]) -> dict[str, Any]:
        return measure(args.store, files=args.files, megabytes=args.megabytes, repeats=args.repeats, emit=emit)

    result, args = _measure("store", argv, fields, call)
    _print_measured(result, args.as_json)


def _bench_flow(argv: list[str]) -> None:
    _quiet_prefect()
    from flows.overhead import measure

    fields = {"repeats": _flag("Runs of each kind.", 3, int)}
    result, args = _measure(
        "flow", argv, fields, lambda config, args, emit: measure(config, repeats=args.repeats, emit=emit)
    )
    _print_measured(result, args.as_json)


def _bench_variance(argv: list[str]) -> None:
    from nanodlm.bench.experiments import variance
    from nanodlm.store import Store

    fields = {"store": _store_flag(), "draws": _flag("Draws of noise for each estimator.", 1024, int)}
    rows, args = _measure(
        "variance",
        argv,
        fields,
        lambda config, args, emit: variance(config, Store(args.store), draws=args.draws, emit=emit),
    )
    first = rows[0]
    print("| estimator | bound, nats/token | standard deviation | variance | gradient noise | relative |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['estimator']} | {row['bound']:.3f} ± {row['bound_error']:.3f} | {row['bound_sd']:.3f} "
            f"| {(row['bound_sd'] / first['bound_sd']) ** 2:.3f} | {row['gradient_noise']:.1f} "
            f"| {row['gradient_noise'] / first['gradient_noise']:.3f} |"
        )
    if args.as_json:
        _print_json({"variance": rows})


def _eval_rows_flag() -> tuple[Any, Any]:
    return _flag("Held-out rows to score, from the front; by default eval.max_rows.", None, int | None)


def _with_eval_rows(config: "Config", rows: int | None) -> "Config":
    return config if rows is None else config.replace(eval={"max_rows": rows})


def _bench_race(argv: list[str]) -> None:
    from nanodlm.bench.experiments import race
    from nanodlm.store import Store

    fields = {
        "store": _store_flag(),
        "minutes": _flag("Training time of the plain recipe.", 10.0, float),
        "updates": _flag("Numbers of updates to try, each a whole run.", (100, 150, 200, 300, 400), tuple[int, ...]),
        "eval_rows": _eval_rows_flag(),
    }

    def measure(config: "Config", args: Any, emit: Callable[..., None]) -> dict[str, Any]:
        config = _with_eval_rows(config, args.eval_rows)
        return race(config, Store(args.store), minutes=args.minutes, updates=args.updates, emit=emit)

    result, args = _measure("race", argv, fields, measure)
    print("| recipe | updates | tokens | training, s | with compilation, s | bits per byte |")
    print("|---|---|---|---|---|---|")
    for name, row in (("plain", result["plain"]), *(("ours", row) for row in result["ours"])):
        print(
            f"| {name} | {row['updates']:,} | {row['tokens']:,} | {row['seconds']:.1f} "
            f"| {row['seconds'] + row['compile_seconds']:.1f} | {row['bits_per_byte']:.4f} ± {row['stderr']:.4f} |"
        )
    if result["ratio"] is None:
        print("the plain bound was not reached: try more --updates")
    else:
        print(f"{result['ratio']:.1f} times sooner, {result['ratio_with_compilation']:.1f} with compilation")
    if args.as_json:
        _print_json(result)


def _bench_ablation(argv: list[str]) -> None:
    from nanodlm.bench.experiments import ablation
    from nanodlm.store import Store

    fields = {
        "store": _store_flag(),
        "seeds": _flag("Runs of each variant.", 3, int),
        "updates": _flag("Updates of each run; by default train.max_steps.", None, int | None),
        "eval_rows": _eval_rows_flag(),
        "only": _flag("Names of variants; none is all.", (), tuple[str, ...]),
        "out": _flag("File to which runs are appended as JSON lines, and in which finished ones are found.", "", str),
    }

    def measure(config: "Config", args: Any, emit: Callable[..., None]) -> list[dict[str, Any]]:
        config = _with_eval_rows(config, args.eval_rows)
        options = {"seeds": args.seeds, "updates": args.updates, "only": args.only}
        return ablation(config, Store(args.store), **options, out=Path(args.out) if args.out else None, emit=emit)

    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    rows, args = _measure("ablation", argv, fields, measure)
    print("| variant | bits per byte | sd over seeds | difference | standard error | training, s |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        bits = "diverged" if row["bits_per_byte"] is None else f"{row['bits_per_byte']:.4f}"
        print(
            f"| {row['variant']} | {bits} | {number(row['sd'], '.4f')} | {number(row['difference'], '+.4f')} "
            f"| {number(row['difference_stderr'], '.4f')} | {row['seconds']:.1f} |"
        )
    if args.as_json:
        _print_json({"ablation": rows})


# The store


def _open(argv: list[str], command: str, **fields: Any) -> tuple["Store", Any]:
    from nanodlm.store import Store

    _, args = _parse(command, argv, {**fields, "store": _store_flag(), "as_json": _json_flag()}, configured=False)
    return Store(args.store), args


def ls(argv: list[str]) -> None:
    """List artifacts, in the order of the stages."""
    from nanodlm.errors import Damaged
    from nanodlm.upkeep import ages
    from nanodlm.upkeep.ages import age
    from nanodlm.upkeep.verify import in_order

    store, args = _open(argv, "ls")
    rows, total = [], 0
    for stage, fingerprint in in_order(store):
        try:
            artifact = store.find(stage, fingerprint)
        except Damaged as error:
            print(f"nanodlm: {error}", file=sys.stderr)
            continue
        if artifact is None:  # it was removed just now
            continue
        size = sum(file["size"] for file in artifact.manifest["files"])
        made_from = {name: made["fingerprint"] for name, made in artifact.manifest["inputs"].items()}
        row = {"stage": stage, "uri": artifact.uri, "bytes": size, "created": artifact.manifest["created"]}
        rows.append({**row, "age_seconds": round(age(artifact)), "inputs": made_from})
        total += size
        if not args.as_json:
            lineage = " ".join(f"{name} {made[:12]}" for name, made in made_from.items())
            print(f"{stage:<10} {_ago(age(artifact)):>4} {ages.size(size):>10}  {artifact.uri}")
            if lineage:
                print(f"{'':<28}from {lineage}")
    if args.as_json:
        _print_json({"artifacts": rows})
    elif not rows:
        print(f"no artifacts in {store.uri()}")
    else:
        print(f"{_count(len(rows), 'artifact')}, {ages.size(total)}, in {store.uri()}")


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _ago(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f}{unit}"
    return f"{max(seconds, 0):.0f}s"


def show(argv: list[str]) -> None:
    """Print a manifest: identity, lineage, files, metrics, versions."""
    from nanodlm.errors import Damaged
    from nanodlm.upkeep import ages
    from nanodlm.upkeep.ages import age
    from nanodlm.upkeep.verify import chain

    store, args = _open(argv, "show", uri=_positional("Artifact, as `nanodlm ls` prints it."))
    artifact = _artifact(store, args.uri)
    if args.as_json:
        _print_json({"uri": artifact.uri, **artifact.manifest})
        return
    m = artifact.manifest
    size = sum(file["size"] for file in m["files"])
    print(f"{artifact.uri}\nmade    {m['created']} ({_ago(age(artifact))} ago) in {m['seconds']} s")
    print(f"size    {ages.size(size)} in {_count(len(m['files']), 'file')}\ndigest  {m['digest']}")
    print("\nlineage")
    for name, fingerprint in chain(artifact.store, artifact.stage, artifact.fingerprint)[:-1]:
        try:
            there = "" if artifact.store.find(name, fingerprint) else "  (not there any more)"
        except Damaged:
            there = "  (damaged)"
        print(f"  {name:<12} {artifact.store.uri(name, fingerprint)}{there}")
    for title, values in (("inputs", {n: i["digest"] for n, i in m["inputs"].items()}), ("parameters", m["parameters"]),
                          ("metrics", m["metrics"]), ("packages", m["packages"])):  # fmt: skip
        print(f"\n{title}")
        for key, value in values.items():
            print(f"  {key:<28} {json.dumps(value) if not isinstance(value, str) else value}")
    print("\nfiles")
    for file in m["files"]:
        print(f"  {file['size']:>12,}  {file['sha256'][:12]}  {artifact.remote(file['path'])}")


def _artifact(store: "Store", uri: str) -> "Artifact":
    """The artifact at a URI: of another store, or in the given one."""
    address = _address(uri)
    return (address[0] or store).open(uri)


def _address(uri: str) -> tuple["Store | None", list[str]]:
    """What a URI names: its store, unless it has none, and stage and fingerprint, or fewer words."""
    from nanodlm.config import refuse_secrets
    from nanodlm.store import Store

    parts = refuse_secrets(uri).rstrip("/").removesuffix("/manifest.json").rsplit("/", 2)
    names_store = len(parts) == 3 and not re.fullmatch(r"\w+:/?", parts[0])  # s3://bucket/x is a store itself
    return (Store(parts[0] or "/") if names_store else None), parts[-2:]


def verify(argv: list[str]) -> None:
    """Check artifacts and all they were made from; with `--repair` build again what is bad."""
    from nanodlm.cli.console import Console
    from nanodlm.upkeep import verify as upkeep_verify
    from nanodlm.upkeep.verify import chain, named

    store, args = _open(
        argv,
        "verify",
        uri=_positional("Artifact to check, with all it was made from; all artifacts by default."),
        deep=_flag("Read every file and compare its sha256, not only its size."),
        repair=_flag("Build again what is bad, keeping the parts that are good."),
    )
    if args.uri:
        other, parts = _address(args.uri)
        store = other or store
        if len(parts) < 2 or store.read_json(store.path(*parts, "manifest.json")) is None:
            raise NanodlmError(f"no artifact at {args.uri}: `nanodlm ls` shows what is there")
        targets = chain(store, parts[0], parts[1])
    else:
        targets = named(store)
    rows, bad, repaired = [], 0, 0
    console = Console(sys.stderr if args.as_json else sys.stdout)
    console.start("verify")
    try:
        for found in upkeep_verify.check(store, targets, deep=args.deep, repair=args.repair, emit=console.emit):
            bad, repaired = bad + bool(found.problems), repaired + found.repaired
            uri = store.uri(found.stage, found.fingerprint)
            rows.append({"uri": uri, "problems": found.problems, "repaired": found.repaired})
            if not args.as_json:
                status = "REPAIRED" if found.repaired else "DAMAGED" if found.problems else "ok"
                console.text(f"{status:<8} {uri}", *(f"{'':<8} {line}" for line in found.problems))
    finally:
        console.end()
    if args.as_json:
        _print_json({"artifacts": rows, "damaged": bad, "repaired": repaired})
    elif not rows:
        print(f"no artifacts in {store.uri()}")
    elif bad == repaired:
        mended = f", {repaired} repaired" if repaired else ""
        print(f"{_count(len(rows), 'artifact')}{mended}: every file has its {'sha256' if args.deep else 'size'}")
    if bad > repaired:
        advice = "what could not be repaired says why" if args.repair else "add --repair to build again what is bad"
        raise NanodlmError(f"{bad - repaired} of {len(rows)} artifacts are damaged: {advice}")


def explain(argv: list[str]) -> None:
    """Say why the configuration would not reuse an artifact, field by field."""
    from nanodlm.stages import why
    from nanodlm.store import Store

    uri = argv.pop(0) if argv and not argv[0].startswith("-") else ""
    fields = {"store": _store_flag(), "as_json": _json_flag()}
    config, args = _parse("explain", argv, fields, configured=True)
    assert config is not None
    if not uri:
        raise UsageError("nanodlm explain URI [PRESET] [flags]: name an artifact, as `nanodlm ls` prints it")
    artifact = _artifact(Store(args.store), uri)
    reasons = list(dict.fromkeys(why.explain(artifact, config)))
    if args.as_json:
        _print_json({"uri": artifact.uri, "reused": not reasons, "why": reasons})
        return
    print("\n".join(reasons) if reasons else "it would be reused: nothing that it depends on differs")


def copy(argv: list[str]) -> None:
    """Copy an artifact with all it was made from, or a whole store, to another store."""
    from nanodlm.cli.console import Console
    from nanodlm.store import Store
    from nanodlm.upkeep import ages
    from nanodlm.upkeep import copy as upkeep_copy
    from nanodlm.upkeep.verify import chain, in_order

    _, args = _parse(
        "copy",
        argv,
        {
            "source": _positional("A store, or one artifact's URI."),
            "target": _positional("The store to copy to."),
            "as_json": _json_flag(),
        },
        configured=False,
    )
    if not args.source or not args.target:
        raise UsageError("nanodlm copy SRC DST: name a store or an artifact, and a store to copy to")
    source, parts = _address(args.source)
    if source and source.find(parts[0], parts[1]):
        targets = chain(source, parts[0], parts[1])
    else:
        source = Store(args.source)
        targets = in_order(source)
    if not targets:
        raise NanodlmError(f"nothing to copy: {args.source} holds no artifacts")
    console = Console(sys.stderr if args.as_json else sys.stdout)
    rows, sent = [], 0
    console.start("copy")
    try:
        for artifact, copied in upkeep_copy.copy(source, Store(args.target), targets, console.emit):
            rows.append({"uri": artifact.uri, "copied": copied})
            sent += sum(file["size"] for file in artifact.manifest["files"]) if copied else 0
            if not args.as_json:
                console.text(f"{'copied' if copied else 'there':<8} {artifact.uri}")
    finally:
        console.end()
    if args.as_json:
        _print_json({"artifacts": rows})
    else:
        print(f"{_count(len(rows), 'artifact')} there; {ages.size(sent)} copied, each file compared with its sha256")
        if not all(row["copied"] for row in rows):
            print("what was there before was compared by size: `nanodlm verify --deep` reads it")


def adopt(argv: list[str]) -> None:
    """Take files at hand for a configuration's download."""
    from nanodlm.cli.console import Console
    from nanodlm.store import Store
    from nanodlm.upkeep import adopt as upkeep_adopt

    files = []
    while argv and not argv[0].startswith("-") and argv[0] not in _presets():
        files.append(argv.pop(0))
    config, args = _parse("adopt", argv, {"store": _store_flag(), "as_json": _json_flag()}, configured=True)
    assert config is not None
    if not files:
        raise UsageError("nanodlm adopt FILE... [PRESET] [flags]: name the files, or a glob of them, in quotes")
    console = Console(sys.stderr if args.as_json else sys.stdout)
    console.start("download")
    try:
        artifact, built = upkeep_adopt.adopt(config, Store(args.store), files, console.emit)
    finally:
        console.end()
    if args.as_json:
        _print_json({"uri": artifact.uri, "adopted": built})
    else:
        print(f"{'adopted' if built else 'there already'}  {artifact.uri}")


def _presets() -> list[str]:
    from nanodlm.config import PRESETS

    return list(PRESETS)


def gc(argv: list[str]) -> None:
    """Remove what nobody needs: abandoned attempts and uploads, and old results when asked to."""
    from nanodlm.upkeep import ages
    from nanodlm.upkeep.collect import collect

    store, args = _open(
        argv,
        "gc",
        dry_run=_flag("Only say what would be removed."),
        keep_last=_flag("Results to keep, the newest, with all they were made from; all by default.", None, int | None),
        older_than=_flag("Give up results older than this, such as 30d.", None, str | None),
        grace=_flag("Leave alone what changed this lately.", "1h", str),
    )
    older = None if args.older_than is None else ages.seconds(args.older_than)
    grace = ages.seconds(args.grace)
    removed = []
    for row in collect(store, keep_last=args.keep_last, older_than=older, grace=grace, dry_run=args.dry_run):
        removed.append(row)
        if not args.as_json:
            done = "would remove" if args.dry_run else "removed"
            size = "" if row["kind"] == "upload" else ages.size(row["bytes"])  # S3 does not say what it holds
            print(f"{done} {size:>10}  {row['kind']:<8} {row['uri']}")
    if args.as_json:
        _print_json({"removed": removed, "dry_run": args.dry_run})
    elif not removed:
        print("nothing to remove")
    elif any(row["kind"] == "artifact" for row in removed):
        print(
            f"the files of artifacts go with the first collection after {args.grace}; until then a run may adopt them"
        )


def automate(argv: list[str]) -> None:
    """Install on a Prefect server what ends lost runs, notifies a webhook, and lets trainings take turns."""
    from nanodlm.upkeep import ages

    _, args = _parse(
        "automate",
        argv,
        {
            "webhook": _flag(
                "Environment variable with the address to notify, by default NANODLM_WEBHOOK_URL; or block:NAME.",
                "",
                str,
            ),
            "gpu_limit": _flag("Trainings at once, for flows; 1 when nobody has set it.", None, int | None),
            "lost_after": _flag("Mark a run Crashed that has sent no heartbeat for so long.", "15m", str),
            "dry_run": _flag("Only say what would change."),
            "remove": _flag("Take away what was installed."),
            "as_json": _json_flag(),
        },
        configured=False,
    )
    lost_after = ages.seconds(args.lost_after)
    _quiet_prefect()
    from flows.automations import automate as bring_about

    rows = bring_about(
        webhook=args.webhook, gpu_limit=args.gpu_limit, lost_after=lost_after, dry_run=args.dry_run, remove=args.remove
    )
    if args.as_json:
        _print_json({"automated": rows, "dry_run": args.dry_run})
        return
    done = {
        "create": "created",
        "update": "updated",
        "remove": "removed",
        "keep": "kept",
        "absent": "not there",
        "lack": "lacks",
    }
    for row in rows:
        would = args.dry_run and row["action"] in ("create", "update", "remove")
        action = f"would {row['action']}" if would else done[row["action"]]
        print(f"{action:<12} {row['kind']:<10} {row['name']:<24} {row['does']}".rstrip())
    if not args.remove and not any(row["name"].endswith("failed runs") for row in rows):
        print("nobody is notified: set NANODLM_WEBHOOK_URL to an address that takes a POST, and run this again")


def doctor(argv: list[str]) -> None:
    """Check that this machine can do the job: packages, devices, store, corpora, encodings."""
    store, args = _open(argv, "doctor")
    checks: list[tuple[str, bool, str]] = []

    def check(name: str, test: Callable[[], str]) -> None:
        try:
            checks.append((name, True, test()))
        except Exception as error:
            checks.append((name, False, redact(" ".join(str(error).split()))[:200] or type(error).__name__))
        if not args.as_json:
            name, ok, text = checks[-1]
            print(f"{'ok' if ok else 'FAILED':<7} {name:<10} {text}")

    check("python", lambda: sys.version.split()[0])
    check("packages", _packages)
    check("devices", _devices)
    check("store", lambda: _store_writable(store))
    check("corpus", _corpus)
    check("gpt2", lambda: f"{_gpt2():,} entries")
    failed = [name for name, ok, _ in checks if not ok]
    if args.as_json:
        _print_json({"checks": [{"name": n, "ok": ok, "text": text} for n, ok, text in checks], "ok": not failed})
    if failed:
        raise NanodlmError(f"{len(failed)} of {len(checks)} checks failed: {', '.join(failed)}")


def _packages() -> str:
    from importlib.metadata import version

    from packaging.version import Version

    for name, below in (("fastapi", "0.151"), ("sqlalchemy", "2.1"), ("prefect", "3.9")):
        if Version(version(name)) >= Version(below):
            raise NanodlmError(f"{name} {version(name)} does not work here: pip install '{name}<{below}'")
    return ", ".join(f"{name} {version(name)}" for name in ("jax", "flax", "orbax-checkpoint", "grain", "prefect"))


def _devices() -> str:
    import jax

    return ", ".join(f"{d.platform} {d.device_kind}" for d in jax.devices())


def _store_writable(store: "Store") -> str:
    if not store.is_local:
        store.require_create_only()
        return f"{store.uri()} can be written, and creates a file only once"
    probe = store.path(f".doctor-{os.getpid()}-{time.time_ns()}.json")
    try:
        store.write_json(probe, {}, create_only=True)
    except OSError as error:
        raise NanodlmError(f"cannot write to {store.uri()}: {error.strerror or error}") from error
    finally:
        store.remove(probe)
    return f"{store.uri()} can be written"


def _corpus() -> str:
    from nanodlm.config import DataConfig
    from nanodlm.data.sources import source_files

    return f"{len(source_files(DataConfig()))} built-in documents"


def _gpt2() -> int:
    from nanodlm.data.tokenizer import gpt2

    return gpt2().n_vocab
