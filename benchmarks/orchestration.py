"""Measure what orchestration costs: the pipeline as a flow beside the same functions called directly.

    python -m benchmarks.orchestration --train.max_steps 300 --train.cooldown_steps 150 --eval.max_rows 500 \
        --sample.num_samples 2                        # two CPU cores: a quarter of an hour

It starts a Prefect server of its own, and new stores on local disk for every run.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Annotated, Any

os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")  # read when Prefect is imported
os.environ.setdefault("DO_NOT_TRACK", "1")

import psutil
import tyro
from prefect.settings import PREFECT_API_URL, PREFECT_LOGGING_LEVEL, temporary_settings

from nanodlm.config import PRESETS, Config, as_changes
from nanodlm.flows.pipeline import WATCHER, pipeline
from nanodlm.flows.reporting import RunLog
from nanodlm.flows.server import ephemeral_server
from nanodlm.stages.lookup import ready
from nanodlm.stages.process import run_in_process
from nanodlm.stages.run import run_stage
from nanodlm.stages.table import until
from nanodlm.store import Artifact, Store

STAGES = until("sample")


def orchestration(
    config: Annotated[Config, tyro.conf.arg(name="")] = PRESETS["demo"], repeats: int = 3
) -> dict[str, Any]:
    """Run the pipeline directly and as a flow, in turn, each in new stores, and compare.

    Args:
        config: The run's configuration.
        repeats: Runs of each kind, of which medians are compared.

    Returns:
        `server_seconds` that a server of its own takes to start; `direct_seconds` and `flow_seconds` of whole runs;
        `added_seconds` between them, of each pair and for each stage, with the updates of training left out but not its
        start, and `added_seconds_per_stage`, their median; `added_seconds_per_cached_stage`, when all is built;
        `train_ratios`, of each pair the tokens per second of training in a flow over those of training without, which
        other loads of the machine change as well, and `train_ratio`, their median; `train_beside_direct` and
        `train_beside_flow`, the CPU cores that this process and the server take while the trainer works, which they do
        not; and `cached_run_seconds`, all of the command `nanodlm run` when everything is built.
    """
    runs: dict[str, list[dict[str, float | None]]] = {"direct": [], "flow": []}
    command_seconds = []
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch, ephemeral_server() as server:
        url = server()
        server_seconds = time.perf_counter() - began
        processes = [psutil.Process(), *psutil.Process().children()]
        file = Path(scratch) / "config.json"
        file.write_text(config.model_dump_json())
        with temporary_settings({PREFECT_API_URL: url, PREFECT_LOGGING_LEVEL: "CRITICAL"}):
            for repeat in range(repeats):
                for name in sorted(runs, reverse=repeat % 2 == 1):
                    print(f"run {repeat + 1} of {repeats}, {name}", file=sys.stderr)
                    runs[name].append(_measure(WAYS[name], config, f"{scratch}/{name}-{repeat}", processes))
                command_seconds.append(_seconds(partial(_command, file, f"{scratch}/flow-{repeat}")))

    def of(name: str, field: str) -> list[float]:
        return [value for run in runs[name] if (value := run[field]) is not None]

    def pairs(field: str) -> list[tuple[float, float]]:
        return list(zip(of("flow", field), of("direct", field), strict=True))

    added = [(flow - direct) / len(STAGES) for flow, direct in pairs("seconds_but_updates")]
    ratios = [flow / direct for flow, direct in pairs("tokens_per_second")]
    cached = {name: median(of(name, "cached_seconds")) for name in runs}
    result = {
        "server_seconds": server_seconds,
        "direct_seconds": median(of("direct", "seconds")),
        "flow_seconds": median(of("flow", "seconds")),
        "added_seconds_per_stage": median(added),
        "added_seconds": [round(value, 3) for value in added],
        "added_seconds_per_cached_stage": (cached["flow"] - cached["direct"]) / len(STAGES),
        "train_ratio": median(ratios),
        "train_ratios": [round(ratio, 4) for ratio in ratios],
        **{f"train_beside_{name}": mean(of(name, "cores") or [float("nan")]) for name in runs},
        "cached_run_seconds": median(command_seconds),
    }
    for name, value in result.items():
        print(f"{name:<32} {value}")
    return result


class Meter:
    """Shows events as a flow does, and notes what processes take of the CPU between the first and last of training."""

    def __init__(self, processes: list[psutil.Process]) -> None:
        self._processes = processes
        self._noted: list[tuple[float, float]] = []  # time and CPU time, in seconds

    def note(self, kind: str, **fields: Any) -> None:
        """Note the CPU time when an event is one of training."""
        if kind == "progress" and fields["unit"] == "updates":
            taken = [process.cpu_times() for process in self._processes]
            self._noted.append((time.perf_counter(), sum(times.user + times.system for times in taken)))

    def cores(self) -> float | None:
        """Return the CPU cores that the processes took; None when one event at most was seen."""
        if len(self._noted) < 2:
            return None
        (first, before), (last, after) = self._noted[0], self._noted[-1]
        return (after - before) / (last - first)

    def showing(self, stage: str) -> AbstractContextManager[Any]:
        """Show a stage, as the flow's own log does."""
        self._log = RunLog()
        return self._log.showing(stage)

    def emit(self, kind: str, **fields: Any) -> None:
        """Note an event and show it."""
        self.note(kind, **fields)
        self._log.emit(kind, **fields)

    def done(self, artifact: Artifact, record: dict[str, Any]) -> None:
        """Show what a finished stage holds."""
        (RunLog() if record["status"] == "cached" else self._log).done(artifact, record)


def _measure(
    run: Callable[[Config, str, Meter], None], config: Config, store: str, processes: list[psutil.Process]
) -> dict[str, float | None]:
    """Run the pipeline twice in a store, the second time with all stages cached."""
    meter = Meter(processes)
    seconds, cached = _seconds(lambda: run(config, store, meter)), _seconds(lambda: run(config, store, meter))
    trained = ready("evaluate", config, Store(store)).inputs["train"].metrics
    speed = trained["train_tokens_per_second"]
    return {
        "seconds": seconds,
        "cached_seconds": cached,
        "seconds_but_updates": seconds - trained["trained_tokens"] / speed,
        "tokens_per_second": speed,
        "cores": meter.cores(),
    }


def _seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _directly(config: Config, url: str, meter: Meter) -> None:
    for name in STAGES:
        lookup = ready(name, config, Store(url))
        if lookup.stage.own_process and not lookup.artifact:
            run_in_process(lookup, config, Store(url), emit=meter.note)
        else:
            run_stage(name, config, Store(url))


def _as_flow(config: Config, url: str, meter: Meter) -> None:
    token = WATCHER.set(meter)
    try:
        pipeline(*as_changes(config), url)  # type: ignore[arg-type]
    finally:
        WATCHER.reset(token)


def _command(config: Path, store: str) -> None:
    command = [sys.executable, "-P", "-m", "nanodlm", "run", str(config), "--store", store]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


WAYS = {"direct": _directly, "flow": _as_flow}

if __name__ == "__main__":
    tyro.cli(orchestration, use_underscores=True)
