"""What orchestration costs: the pipeline as a flow beside the same functions called directly.

nanodlm bench flow --train.max_steps 300
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from prefect.settings import PREFECT_API_URL, PREFECT_LOGGING_LEVEL, temporary_settings

from flows.pipeline import pipeline
from flows.server import ephemeral_server
from nanodlm import launch, stages
from nanodlm.config import Config
from nanodlm.store import Store


def measure(config: Config, *, repeats: int = 3, emit: Callable[..., None] = lambda *_, **__: None) -> dict[str, Any]:
    """Run the pipeline directly and as a flow, in turn, each in new stores on local disk.

    Args:
        config: The run's configuration.
        repeats: Runs of each kind, of which medians are compared.
        emit: Called as `emit(kind, **fields)` with progress.

    Returns:
        `server_seconds` that a server of its own takes to start; `direct_seconds` and `flow_seconds` of whole runs;
        `added_seconds_per_stage` between them, and `added_seconds_per_cached_stage` when all is built;
        `train_ratio`, tokens per second of training in a flow over those of training without; and
        `cached_run_seconds`, all of the command `nanodlm run` when everything is built.
    """
    seconds: dict[str, list[float]] = {
        name: [] for name in ("direct", "flow", "direct cached", "flow cached", "command")
    }
    speeds: dict[str, list[float]] = {"direct": [], "flow": []}
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch, ephemeral_server() as url:
        server_seconds = time.perf_counter() - began
        file = Path(scratch) / "config.json"
        file.write_text(config.model_dump_json())
        with temporary_settings({PREFECT_API_URL: url, PREFECT_LOGGING_LEVEL: "CRITICAL"}):
            for repeat in range(repeats):
                for name, run in (_WAYS, _WAYS[::-1])[repeat % 2]:
                    emit("progress", done=repeat, total=repeats, unit=f"pairs of runs, now {name}")
                    store = f"{scratch}/{name}-{repeat}"
                    seconds[name].append(_seconds(run, config, store))
                    seconds[f"{name} cached"].append(_seconds(run, config, store))
                    speeds[name].append(_tokens_per_second(config, store))
                seconds["command"].append(_seconds(_command, str(file), f"{scratch}/flow-{repeat}"))
    medians = {name: median(taken) for name, taken in seconds.items()}
    names = stages.until("sample")
    return {
        "server_seconds": server_seconds,
        "direct_seconds": medians["direct"],
        "flow_seconds": medians["flow"],
        "added_seconds_per_stage": (medians["flow"] - medians["direct"]) / len(names),
        "added_seconds_per_cached_stage": (medians["flow cached"] - medians["direct cached"]) / len(names),
        "train_ratio": median(speeds["flow"]) / median(speeds["direct"]),
        "cached_run_seconds": medians["command"],
    }


def _seconds(call: Callable[..., Any], *arguments: Any) -> float:
    began = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - began


def _directly(config: Config, url: str) -> None:
    for name in stages.until("sample"):
        lookup, _ = stages.ready(name, config, Store(url))
        if lookup.stage.own_process and not lookup.artifact:
            launch.run_stage(name, config, url, emit=lambda *_, **__: None)
        else:
            stages.run(name, config, Store(url))


def _as_flow(config: Config, url: str) -> None:
    pipeline(config, url)


def _command(config: str, store: str) -> None:
    command = [sys.executable, "-P", "-m", "nanodlm", "run", config, "--store", store]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


_WAYS = (("direct", _directly), ("flow", _as_flow))


def _tokens_per_second(config: Config, url: str) -> float:
    lookup, _ = stages.ready("train", config, Store(url))
    assert lookup.artifact is not None
    return lookup.artifact.metrics["train_tokens_per_second"]
