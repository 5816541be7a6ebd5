"""Kills a command at each change that it makes to files, and compares what is left: `python -m tests.support.kills`.

Everything happens in forks of one process that has imported what it needs, and has no threads.
"""

import contextlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nanodlm.cli import main as cli
from nanodlm.cli import store as cli_store  # noqa: F401  imported before the forks
from nanodlm.config import Config
from nanodlm.data import download, shard  # noqa: F401
from nanodlm.stages.run import run_stage
from nanodlm.stages.table import until
from nanodlm.store import Store, lease, new_attempt, sealed
from nanodlm.upkeep.verify import check
from tests.support.helpers import fill, flip, prose, tiny_config

COMMANDS = {
    "repair": "verify --deep --repair --store {store}",
    "gc": "gc --grace 0s --store {store}",
    "gc of all": "gc --keep_last 0 --grace 0s --store {store}",
    "copy": "copy {store} {target}",
    "rebuild": "",
    "rm": "rm {shard} --store {store}",
}
# Where the events of Python's audit name the path that is changed, and the folder that it is relative to.
CHANGES = {"open": (0, None), "os.truncate": (0, None), "os.remove": (0, 1), "os.rmdir": (0, 1), "os.mkdir": (0, 2)}
CHANGES |= {"os.symlink": (1, 2), "os.rename": (1, 3), "os.link": (1, 3)}
State = dict[str, Any]  # of each artifact, by its address: digests of its bytes and of its code, or "damaged"


def die_at(moment: int, folder: Path) -> None:
    """Let this process be killed just before its change of that number below a folder, or just after it opened one."""
    left = moment

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event not in CHANGES or (event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            return
        path, base = (None if at is None else arguments[at] for at in CHANGES[event])
        if isinstance(path, int) or not os.path.join(_folder(base), os.fsdecode(path)).startswith(f"{folder}/"):
            return
        left -= 1
        if left == 0:
            if event == "open":
                with contextlib.suppress(OSError):
                    os.open(path, arguments[2], 0o644)
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def _folder(descriptor: int | None) -> str:
    return "" if descriptor in (None, -1) else os.readlink(f"/proc/self/fd/{descriptor}")


def fork(call: Callable[[], Any], log: Path) -> Any:
    """Return what a call in a process of its own returns, as JSON; None when that was killed."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        os.dup2(1, 2)
        try:
            os.write(writer, json.dumps(call()).encode())
        except BaseException as error:
            os.write(writer, json.dumps(f"{error!r}").encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as pipe:
        told = pipe.read()
    os.waitpid(child, 0)
    return json.loads(told) if told else None


def run(case: str, folder: Path, trial: Path) -> int:
    """Run the command of a case to its end, and return its exit code."""
    lease.SETTLE_SECONDS = 0.02
    store = trial / "store"
    if case == "rebuild":
        config = Config.model_validate_json((folder / "config.json").read_text())
        run_stage("shard", config, Store(str(store)), rebuild=True)
        return 0
    named = {"store": store, "target": trial / "target"}
    shards = "".join(f"{stage}/{fingerprint}" for stage, fingerprint in Store(str(store)) if stage == "shard")
    try:
        cli.main([word.format(**named, shard=shards) for word in COMMANDS[case].split()])
    except SystemExit as ended:
        return int(ended.code or 0)


def state(trial: Path) -> State:
    """Return what is told of every artifact there is."""
    found: State = {}
    for place in ("store", "target"):
        store = Store(str(trial / place))
        for checked in check(store, list(store), deep=True):
            address = f"{place}/{checked.stage}/{checked.fingerprint}"
            manifest = {} if checked.problems else store.open(f"{checked.stage}/{checked.fingerprint}").manifest
            found[address] = [manifest["digest"], manifest["code"]["digest"]] if manifest else "damaged"
    return found


def prepare(case: str, folder: Path, trial: Path) -> State:
    """Make the store that a command begins with, and return its state."""
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in prose(120)))
    config, store = tiny_config(folder / "corpus.jsonl"), Store(str(trial / "store"))
    (folder / "config.json").write_text(config.model_dump_json())
    for name in until("shard"):
        made, _ = run_stage(name, config, store)
    if case == "repair":
        flip(Path(made.local() / "train-00000.arrayrecord"))
    if case == "rebuild":  # by code that was another
        code = {**made.manifest["code"], "digest": "0" * 64}
        Path(made.uri, "manifest.json").write_text(json.dumps(sealed({**made.manifest, "code": code})))
    if case.startswith("gc"):
        for fingerprint in (made.fingerprint, "f" * 64):
            with new_attempt(store, "shard", fingerprint) as attempt:  # which is abandoned
                fill(attempt, {"train-00000.arrayrecord": b"rows", "sub/unfinished": b"half writ"})
                attempt.finish("train-00000.arrayrecord", ["train-00000.arrayrecord"])
    return state(trial)


def kill_at_each(case: str, folder: Path, step: int) -> list[str]:
    """Kill a command at every `step`-th change, and return what was wrong then, or after it was run again.

    Whatever an artifact was before the command, or is after it when nothing disturbs it, is right at each moment. The
    last line says how many changes there were.
    """
    template, trial, log = folder / "template", folder / "trial", folder / "log"
    before = fork(lambda: prepare(case, folder, template), log)
    assert isinstance(before, dict), f"{before} {log.read_text()}"
    shutil.copytree(template, trial)
    code, after = fork(lambda: (run(case, folder, trial), state(trial)), log)
    assert code == 0, log.read_text()
    assert "damaged" not in after.values()
    wrong, moment = [], 1
    while True:
        shutil.rmtree(trial)
        shutil.copytree(template, trial)
        if fork(lambda moment=moment: (die_at(moment, trial), run(case, folder, trial)), log) is not None:
            return [*wrong, f"{moment - 1} changes"]
        left, code, then = fork(lambda: (state(trial), run(case, folder, trial), state(trial)), log)
        for address in sorted({*before, *after, *left}):
            if left.get(address) not in (before.get(address), after.get(address)):
                wrong.append(f"killed at change {moment}: {address} is {left.get(address, 'gone')}")
        if then != after or (code and case != "rm"):  # what was removed cannot be removed again
            amiss = {address: then.get(address, "gone") for address in after if then.get(address) != after[address]}
            wrong.append(f"killed at change {moment} and run again, it ended with {code}, and left {amiss}")
        moment += step


if __name__ == "__main__":
    print(*kill_at_each(sys.argv[1], Path(sys.argv[2]).resolve(), int(sys.argv[3])), sep="\n")
