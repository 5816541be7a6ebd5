"""Measure what passes before the first update, and what a run takes that has nothing to do.

    python -m benchmarks.startup                          # two CPU cores: two minutes

Every run is a command in a process of its own, as a user would start it. Stores, caches and Prefect's home are new.
"""

import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import psutil
import tyro

from nanodlm.config import PRESETS, Config

SHORT = PRESETS["demo"].replace(
    train={"max_steps": 20, "warmup_steps": 5, "cooldown_steps": 10},
    eval={"max_rows": 64},
    sample={"num_samples": 2},
    exp={"log_every": 1, "save_every": 20},
)
LOGS = "train/*/attempts/*/logs.jsonl"
LOOK_SECONDS = 0.02  # between two looks whether an update is logged
PARTS = {  # of a training process before its first update: JAX's own clocks, by the ends of their names
    "jaxpr_trace_duration": "tracing",
    "jaxpr_to_mlir_module_duration": "lowering",
    "backend_compile_duration": "compilation, or loading what was compiled",
}


def startup(
    config: Annotated[Config, tyro.conf.arg(name="")] = SHORT, repeats: int = 3, folder: str = ""
) -> dict[str, Any]:
    """Time imports, runs and the way to the first update; by the clock, and as `cpu`, which other work changes less.

    Args:
        config: The run's configuration: the demo, with few updates.
        repeats: Runs of what is short, of which medians are told.
        folder: Where stores and caches are made; by default a temporary folder.

    Returns:
        `import`, a process that imports nanodlm and ends; `built`, a run that finds all stages in the store; `first`
        and `second`, the command `run` up to the first update, with nothing there at first, then with other seeds and
        learning rates; `first_training` and `second_training`, the training process alone, likewise; each `seconds` and
        `cpu`, those of the processors, and the `parts` of the former.
    """
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory(dir=folder or None) as scratch:
        place = Path(scratch)
        store = place / "store"
        other = config.replace(
            train={"seed": config.train.seed + 1, "lr": config.train.lr / 2, "muon_lr": config.train.muon_lr / 2},
            model={"init_seed": config.model.init_seed + 1},
        )
        found = {"import": _median([_command(["-c", "import nanodlm"], place, "a") for _ in range(repeats)])}
        _told("import", found)
        for name, of in (("first", config), ("second", other)):
            found[name] = _whole(of, store, place)
            _told(name, found)
        found["built"] = _median([_command(_run(other, store, place), place, "a") for _ in range(repeats)])
        _told("built", found)
        for name, of in (("first_training", config), ("second_training", other)):
            found[name] = _training(of, store, place)
            _told(name, found)
    return found


def _told(name: str, found: dict[str, Any]) -> None:
    parts = [f"{part} {seconds:.2f}" for part, seconds in found[name].get("parts", {}).items()]
    seconds = f"{found[name]['seconds']:6.2f} s, CPU {found[name]['cpu']:6.2f} s"
    print(f"{name:<16} {seconds}" + f"; {', '.join(parts)}" * bool(parts), flush=True)


def _median(runs: list[dict[str, float]]) -> dict[str, Any]:
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def _environment(place: Path, cache: str) -> dict[str, str]:
    """Return the environment of a user who has neither the cache nor a server yet, in a folder."""
    own = {"NANODLM_CACHE": str(place / cache), "PREFECT_HOME": str(place / "prefect"), "PREFECT_API_URL": ""}
    return {name: value for name, value in os.environ.items() if not name.startswith("JAX_")} | own


def _command(words: list[str], place: Path, cache: str) -> dict[str, float]:
    began, used = time.perf_counter(), sum(os.times()[2:4])
    env = _environment(place, cache)
    subprocess.run([sys.executable, *words], env=env, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return {"seconds": time.perf_counter() - began, "cpu": sum(os.times()[2:4]) - used}


def _run(config: Config, store: Path, place: Path) -> list[str]:
    file = place / "config.json"
    file.write_text(config.model_dump_json())
    return ["-P", "-m", "nanodlm", "run", str(file), "--store", str(store)]


def _whole(config: Config, store: Path, place: Path) -> dict[str, Any]:
    """Run the pipeline, and tell when the first update was logged, and in a new store, what was done before that."""
    known = set(store.glob(LOGS))
    with _started(_run(config, store, place), place, "a") as process:
        began = process.create_time()
        told = _until(process, lambda: any(log.stat().st_size for log in set(store.glob(LOGS)) - known))
    if known:
        return told
    (download,), (shard,) = (list(store.glob(f"{stage}/*/manifest.json")) for stage in ("download", "shard"))
    data = download.stat().st_mtime - json.loads(download.read_text())["seconds"] - began
    done = shard.stat().st_mtime - began
    parts = {"code and server": data, "preparing data": done - data, "training": told["seconds"] - done}
    return {**told, "parts": parts}


def _training(config: Config, store: Path, place: Path) -> dict[str, Any]:
    """Train alone in a process, with an empty cache at first, and tell what it did until the first update."""
    file, events, clocks = (place / name for name in ("config.json", "events.jsonl", "clocks.json"))
    file.write_text(config.model_dump_json())
    events.unlink(missing_ok=True)
    words = ["train", str(file), "--store", str(store), "--rebuild", "--events", str(events)]
    words = ["-P", __file__, "--clocks", str(clocks), *words]
    with _started(words, place, "b") as process:
        began = process.create_time()
        told = _until(process, lambda: events.exists() and '"progress"' in events.read_text())
    clocked = json.loads(clocks.read_text())
    parts = {"loading code": clocked["loaded"] - began} | dict.fromkeys(PARTS.values(), 0.0)
    for when, part, seconds in clocked["clocks"]:
        parts[part] += seconds if when < began + told["seconds"] else 0.0
    rest = told["seconds"] - sum(parts.values())
    return {**told, "parts": {**parts, "restoring, reading, updating": rest}}


@contextmanager
def _started(words: list[str], place: Path, cache: str) -> Iterator[psutil.Popen]:
    """Yield a Python command under way, and wait for its end, which must be a good one."""
    with tempfile.TemporaryFile("w+") as said:
        pipes = {"stdout": subprocess.DEVNULL, "stderr": said}
        process = psutil.Popen([sys.executable, *words], env=_environment(place, cache), **pipes)
        try:
            yield process
        finally:
            if process.wait():
                said.seek(0)
                raise RuntimeError(f"{' '.join(words)} failed: {said.read()}")


def _until(process: psutil.Popen, happened: Callable[[], bool]) -> dict[str, Any]:
    """Wait until something has happened; return the seconds since a process began, and those of the processors."""
    while not happened():
        if process.poll() is not None:
            raise RuntimeError("the command ended before its first update")
        time.sleep(LOOK_SECONDS)
    seconds, cpu = time.time() - process.create_time(), 0.0
    for one in (process, *process.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            times = one.cpu_times()
            cpu += times.user + times.system + times.children_user + times.children_system
    return {"seconds": seconds, "cpu": cpu}


def _clocked(words: list[str]) -> None:
    """Run a command of nanodlm in this process, and write what JAX's clocks told into a file."""
    gc.set_threshold(20_000)  # as the command line does before it loads anything
    from nanodlm.cli.main import main

    file, *words = words
    import nanodlm.cli.run
    import nanodlm.training.loop  # noqa: F401  # the code that is loaded in any case

    loaded, clocks = time.time(), []
    import jax

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if part := PARTS.get(event.split("/")[-1]):
            clocks.append((time.time(), part, duration_secs))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        main(words)
    finally:
        Path(file).write_text(json.dumps({"loaded": loaded, "clocks": clocks}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--clocks"]:
        _clocked(sys.argv[2:])
    else:
        tyro.cli(startup, use_underscores=True)
