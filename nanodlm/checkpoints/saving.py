"""Saving and restoring the state of a training, with Orbax, as parts of an attempt.

    checkpoints/step_000100/{model_state, ema_state, optimizer_state}

A checkpoint counts once its files are recorded with their sha256 (`Attempt.finish`); a killed save leaves none. With
them is recorded what the run was: its settings, the digests of its data, its key, how many rows it has seen, its logs.
"""

import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental.multihost_utils import process_allgather

from nanodlm.checkpoints import State
from nanodlm.checkpoints.finding import find_checkpoint, step_name, step_of
from nanodlm.checkpoints.identity import check_run
from nanodlm.devices.hosts import from_leader
from nanodlm.errors import NanodlmError, UsageError
from nanodlm.store import Attempt, Json

BOUND = "val_nats_per_token"  # which ranks checkpoints
QUEUE = 4  # saves that may wait to be published


def retained(scores: dict[int, float | None], keep: int, keep_best: int) -> set[int]:
    """Return the steps of the checkpoints that stay: the latest `keep`, at least 1, and the `keep_best` best.

    >>> sorted(retained({10: 3.0, 20: 1.0, 30: 2.0, 40: None}, keep=1, keep_best=1))
    [20, 40]
    """
    ranked = sorted((score, step) for step, score in scores.items() if score is not None)
    return {*sorted(scores)[-keep:], *(step for _, step in ranked[:keep_best])}


class Checkpoints(AbstractContextManager["Checkpoints"]):
    """Saves in the background, and keeps the last few and the best; use as a context manager."""

    def __init__(self, attempt: Attempt | None, run: Json, *, keep: int, keep_best: int = 0):
        """Work in an attempt's folder, which all processes can write; `run` is what `describe_run` says of it."""
        self._attempt, self._run, self._keep, self._keep_best = attempt, run, keep, keep_best
        folder, self._uri = from_leader([str(attempt.path.absolute()), attempt.uri("")] if attempt else None)
        self._folder = Path(folder)
        deadline = time.monotonic() + 70  # a network's disk may remember for a minute that there was no such folder
        while not self._folder.is_dir() and time.monotonic() < deadline:
            time.sleep(0.2)
        if not process_allgather(np.array([self._folder.is_dir()])).all():
            raise NanodlmError(f"{folder} is not on every host: several hosts need a --store on a disk that they share")
        self._checkpointer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="written")
        self._recorder = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._pending: deque[Future[None]] = deque()  # of saves that are not recorded yet
        self._written: Future[None] | None = None
        self._scores: dict[int, float | None] = {}
        self._origin = ""  # address of the checkpoint that the run started from

    def __exit__(self, *_: object) -> None:
        """Record the saves under way, even when the training failed after them."""
        try:
            self.finish()
        finally:
            self._writer.shutdown()
            self._recorder.shutdown(cancel_futures=True)  # those behind one that failed would fail as slowly
            self._checkpointer.close()

    def save(self, state: State, step: int, **info: Any) -> None:
        """Start saving after update `step`; the save before it is written first.

        It counts once it is written, hashed and published, in the background: training goes on while a storage does not
        answer, until `QUEUE` saves wait. The state may be donated at once; `info` is JSON that `restore` gives back.
        """
        if self._written:
            self._written.result()
        while self._pending and (len(self._pending) >= QUEUE or self._pending[0].done()):
            self._pending.popleft().result()
        args = {name: ocp.args.StandardSave(item) for name, item in _items(state).items()}  # type: ignore[call-arg]
        folder, items = self._folder / step_name(step), ocp.args.Composite(**args)
        trained = {"config": self._run["config"]}  # so that whoever loads the folder alone can tell
        self._checkpointer.save(folder, args=items, custom_metadata=trained)
        skipped = {"skipped": int(state["skipped"])} if "skipped" in state else {}
        self._written = self._writer.submit(self._checkpointer.wait_until_finished)
        self._pending.append(self._recorder.submit(self._record, step, {**self._run, **skipped, **info}, self._written))

    def finish(self) -> None:
        """Wait until every save is recorded, and raise what went wrong with one."""
        while self._pending:
            self._pending.popleft().result()

    def _record(self, step: int, info: Json, written: Future[None]) -> None:
        """Wait for a save, record it, and drop the checkpoints that neither `keep` nor `keep_best` holds."""
        written.result()
        if self._attempt:
            found = [path for path in (self._folder / step_name(step)).rglob("*") if path.is_file()]
            self._attempt.finish(step_name(step), (path.relative_to(self._folder).as_posix() for path in found), **info)
        self._scores[step] = info.get(BOUND)
        for old in self._scores.keys() - retained(self._scores, self._keep, self._keep_best):
            if self._attempt:
                self._attempt.forget(step_name(old))
            del self._scores[old]

    def last(self, before: int) -> str:
        """Return the address of the newest checkpoint of an update before this one; empty when there is none."""
        self.finish()
        steps = [step for step in self._scores if step < before]
        return self._uri + step_name(max(steps)) if steps else self._origin

    def best(self) -> int | None:
        """Return the update of the best checkpoint that is kept; None when none was scored."""
        return min(((score, step) for step, score in self._scores.items() if score is not None), default=(0, None))[1]

    def restore(self, abstract: State, allowed: tuple[str, ...] = ()) -> tuple[State, Json] | None:
        """Read the newest whole checkpoint of earlier attempts, and its info, or return None; take over all kept ones.

        `abstract` is the state's shapes and shardings; the checkpoint's run may differ in what is `allowed`.
        """
        found = from_leader(self._adopt(self._attempt) if self._attempt else None)
        if found is None:
            return None
        step, info, scores = found
        check_run(info, self._run, allowed, f"the checkpoint {self._uri}{step_name(step)}")
        self._scores = dict(scores)
        return _restore(self._checkpointer, self._folder / step_name(step), abstract, info), info

    def _adopt(self, attempt: Attempt) -> tuple[int, Json, list[tuple[int, float | None]]] | None:
        """Take over the newest whole checkpoint and those kept beside it: its step and info, the scores of all."""
        steps = sorted((step_of(name) for name in attempt.earlier if name.startswith("checkpoints/")), reverse=True)
        whole = ((step, info) for step in steps if (info := attempt.adopt(step_name(step))) is not None)
        if (newest := next(whole, None)) is None:
            if attempt.restore:
                train = "`nanodlm run --rebuild train` would have to train it from the beginning"
                raise NanodlmError(f"no checkpoint of it is whole, so {train}")
            return None
        step, info = newest
        infos = {earlier: attempt.info(step_name(earlier)) for earlier in steps if earlier < step}
        scores = {earlier: found.get(BOUND) for earlier, found in infos.items() if found} | {step: info.get(BOUND)}
        kept = retained(scores, self._keep, self._keep_best)
        return step, info, [(k, scores[k]) for k in kept if k == step or attempt.adopt(step_name(k))]

    def start(self, address: str, abstract: State, allowed: tuple[str, ...] = ()) -> tuple[State, Json]:
        """Return the checkpoint at an address, of any run, and its info; the other arguments are those of `restore`."""
        part = find_checkpoint(address)
        check_run(part.info, self._run, allowed, f"the checkpoint {part.uri}")
        name = part.manifest["part"]
        self._origin = part.uri
        folder = part.local() / name
        try:
            return _restore(self._checkpointer, folder, abstract, part.info), part.info
        except (ValueError, KeyError, TypeError) as error:
            fixed = f"one of these cannot change in mid-training: {', '.join(allowed)}"
            raise UsageError(f"the arrays of {part.uri} do not fit this configuration: {fixed}") from error


def _items(state: State) -> State:
    """Return what goes into a checkpoint, by the names of its folders."""
    items = {name: state[name] for name in ("model_state", "ema_state") if name in state}
    return {**items, "optimizer_state": {"optimizer": state["optimizer_state"], "step": state["step"]}}


def _restore(checkpointer: ocp.AsyncCheckpointer, folder: Path, abstract: State, info: Json) -> State:
    """Read a checkpoint's folder onto the devices that `abstract` names."""
    items = _items(abstract)
    if not (folder / "ema_state").exists():
        items.pop("ema_state", None)
    args = {name: ocp.args.StandardRestore(item) for name, item in items.items()}  # type: ignore[call-arg]
    found = checkpointer.restore(folder.absolute(), args=ocp.args.Composite(**args))
    held = found["optimizer_state"]
    state = {**{name: found[name] for name in args}, "optimizer_state": held["optimizer"], "step": held["step"]}
    if "ema_state" in abstract:  # an average that begins now begins at the parameters
        state.setdefault("ema_state", jax.tree.map(jnp.copy, state["model_state"]))
    if "skipped" in abstract:
        state["skipped"] = jax.device_put(jnp.int32(info.get("skipped", 0)), abstract["skipped"].sharding)
    return state
