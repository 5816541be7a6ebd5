"""Stopping on a signal, at the same update in every process."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array


@contextlib.contextmanager
def catch_signals() -> Iterator[threading.Event]:
    """Yield an event that SIGTERM or SIGUSR1 sets; outside the main thread, where none can be caught, nothing does."""
    stop = threading.Event()
    caught = (signal.SIGTERM, signal.SIGUSR1) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in caught}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def make_stop_vote(mesh: Mesh, stop: threading.Event) -> Callable[[dict[str, Array]], bool]:
    """Return a function that every process calls after each update, with its scalars, and that says if all shall stop.

    With several processes the answer comes an update late: their votes are counted on the devices, behind the update,
    and read while the next one runs. So a signal to any process stops all of them at the same update.
    """
    if jax.process_count() == 1:
        return lambda _: stop.is_set()
    everywhere = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    count = jax.jit(lambda votes, _: votes.max(), out_shardings=NamedSharding(mesh, PartitionSpec()))
    counted: list[Array] = []

    def shall_stop(scalars: dict[str, Array]) -> bool:
        vote = np.array([stop.is_set()], np.int32)
        votes = jax.make_array_from_callback((mesh.size,), everywhere, lambda _: vote)
        counted.append(count(votes, scalars["loss"]))
        return len(counted) > 1 and bool(counted.pop(0))

    return shall_stop
