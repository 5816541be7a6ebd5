"""Which model a command takes: the one that is named, or the newest, which a person is then told."""

import sys
from typing import Annotated

from rich.console import Console
from rich.markup import escape
from typing_extensions import Doc

from nanodlm.checkpoints.finding import find_model
from nanodlm.errors import counted
from nanodlm.store import Store

Model = Annotated[str, Doc("A model, by its run's name or its address; by default the newest.")]


def short(address: str) -> str:
    """Return the end of a model's address that tells it from others, such as `train/d2d6bdeddbb7`."""
    return "/".join(address.rstrip("/").split("/")[-2:])[:18]


def choose(model: str, store: Store) -> str:
    """Return the address of a model, as `find_model` does; of one that was not named, a line on standard error tells.

    Such a line is `train/d2d6bdeddbb7, autoregressive, 1,200 updates, the newest`, with the run's name if it has one.
    """
    address = find_model(model, store)
    if not model:
        trained = store.open(address)
        config, updates = trained.manifest.get("config") or {}, trained.metrics.get("updates")
        words = [trained.name, config.get("exp", {}).get("run_name"), config.get("objective", {}).get("kind")]
        words += ["" if updates is None else counted(updates, "updates"), "the newest"]
        Console(file=sys.stderr, highlight=False, emoji=False).print(
            f"[dim]{escape(', '.join(filter(None, words)))}[/dim]", soft_wrap=True
        )
    return address
