"""What orchestration costs: the pipeline as a flow beside the same functions called directly.

nanodlm bench flow --train.max_steps 300
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median
from typing import Any

import psutil
from prefect.settings import PREFECT_API_URL, PREFECT_LOGGING_LEVEL, temporary_settings

from flows.pipeline import WATCHER, pipeline
from flows.reporting import Pages
from flows.server import ephemeral_server
from nanodlm.config import Config
from nanodlm.stages.lookup import ready
from nanodlm.stages.process import run_in_process
from nanodlm.stages.run import run_stage
from nanodlm.stages.table import until
from nanodlm.store import Artifact, Store


def measure(config: Config, *, repeats: int = 3, emit: Callable[..., None] = lambda *_, **__: None) -> dict[str, Any]:
    """Run the pipeline directly and as a flow, in turn, each in new stores on local disk.

    Args:
        config: The run's configuration.
        repeats: Runs of each kind, of which medians are compared.
        emit: Called as `emit(kind, **fields)` with progress.

    Returns:
        `server_seconds` that a server of its own takes to start; `direct_seconds` and `flow_seconds` of whole runs;
        `added_seconds` between them, of each pair and for each stage, with the updates of training left out but not its
        start, and `added_seconds_per_stage`, their median; `added_seconds_per_cached_stage`, when all is built;
        `train_ratios`, of each pair the tokens per second of training in a flow over those of training without, which
        other loads of the machine change as well, and `train_ratio`, their median; `train_beside_direct` and
        `train_beside_flow`, the CPU cores that this process and the server take while the trainer works, which they do
        not; and `cached_run_seconds`, all of the command `nanodlm run` when everything is built.
    """
    kinds = [f"{name}{kind}" for name in ("direct", "flow") for kind in ("", " cached", " but training")]
    seconds: dict[str, list[float]] = {name: [] for name in (*kinds, "command")}
    speeds: dict[str, list[float]] = {"direct": [], "flow": []}
    beside: dict[str, list[float | None]] = {"direct": [], "flow": []}
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch, ephemeral_server() as url:
        server_seconds = time.perf_counter() - began
        here = psutil.Process()
        processes = [here, *here.children()]
        file = Path(scratch) / "config.json"
        file.write_text(config.model_dump_json())
        with temporary_settings({PREFECT_API_URL: url, PREFECT_LOGGING_LEVEL: "CRITICAL"}):
            for repeat in range(repeats):
                for name, run in (_WAYS, _WAYS[::-1])[repeat % 2]:
                    emit("progress", done=repeat, total=repeats, unit=f"pairs of runs, now {name}")
                    store = f"{scratch}/{name}-{repeat}"
                    meter = _Meter(processes)
                    seconds[name].append(_seconds(run, config, store, meter))
                    seconds[f"{name} cached"].append(_seconds(run, config, store, meter))
                    beside[name].append(meter.cores())
                    metrics = _train_metrics(config, store)
                    speeds[name].append(metrics["train_tokens_per_second"])
                    trained = metrics["trained_tokens"] / metrics["train_tokens_per_second"]
                    seconds[f"{name} but training"].append(seconds[name][-1] - trained)
                seconds["command"].append(_seconds(_command, str(file), f"{scratch}/flow-{repeat}"))
    medians = {name: median(taken) for name, taken in seconds.items()}
    names = until("sample")
    whole = zip(seconds["flow but training"], seconds["direct but training"], strict=True)
    added = [(flow - direct) / len(names) for flow, direct in whole]
    ratios = [flow / direct for flow, direct in zip(speeds["flow"], speeds["direct"], strict=True)]
    return {
        "server_seconds": server_seconds,
        "direct_seconds": medians["direct"],
        "flow_seconds": medians["flow"],
        "added_seconds_per_stage": median(added),
        "added_seconds": [round(value, 3) for value in added],
        "added_seconds_per_cached_stage": (medians["flow cached"] - medians["direct cached"]) / len(names),
        "train_ratio": median(ratios),
        **{f"train_beside_{name}": _mean(cores) for name, cores in beside.items()},
        "train_ratios": [round(ratio, 4) for ratio in ratios],
        "cached_run_seconds": medians["command"],
    }


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return mean(known) if known else None


def _seconds(call: Callable[..., Any], *arguments: Any) -> float:
    began = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - began


class _Meter:
    """Shows events as a flow does, and notes what processes take of the CPU between the first and last of training."""

    def __init__(self, processes: list[psutil.Process]) -> None:
        self._processes = processes
        self._noted: list[tuple[float, float]] = []  # time and CPU time, in seconds

    def note(self, kind: str, **fields: Any) -> None:
        if kind == "progress" and fields["unit"] == "updates":
            taken = [process.cpu_times() for process in self._processes]
            self._noted.append((time.perf_counter(), sum(times.user + times.system for times in taken)))

    def cores(self) -> float | None:
        """CPU cores that they took; None when one event at most was seen."""
        if len(self._noted) < 2:
            return None
        (first, before), (last, after) = self._noted[0], self._noted[-1]
        return (after - before) / (last - first)

    def start(self, stage: str) -> None:
        self._pages = Pages()
        self._pages.start(stage)

    def emit(self, kind: str, **fields: Any) -> None:
        self.note(kind, **fields)
        self._pages.emit(kind, **fields)

    def end(self) -> None:
        self._pages.end()

    def done(self, artifact: Artifact, record: dict[str, Any]) -> None:
        (Pages() if record["status"] == "cached" else self._pages).done(artifact, record)


def _directly(config: Config, url: str, meter: _Meter) -> None:
    for name in until("sample"):
        lookup = ready(name, config, Store(url))
        if lookup.stage.own_process and not lookup.artifact:
            run_in_process(name, config, url, inputs=lookup.input_fingerprints, emit=meter.note)
        else:
            run_stage(name, config, Store(url))


def _as_flow(config: Config, url: str, meter: _Meter) -> None:
    token = WATCHER.set(meter)
    try:
        pipeline(config, url)
    finally:
        WATCHER.reset(token)


def _command(config: str, store: str) -> None:
    command = [sys.executable, "-P", "-m", "nanodlm", "run", config, "--store", store]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


_WAYS = (("direct", _directly), ("flow", _as_flow))


def _train_metrics(config: Config, url: str) -> dict[str, Any]:
    artifact = ready("train", config, Store(url)).artifact
    assert artifact is not None
    return artifact.metrics
