"""What the tests of checkpoints share."""

from pathlib import Path
from typing import Any

import pytest

import nanodlm
from nanodlm.config import Config
from nanodlm.store import Store
from tests.support.store import Killed

EVERY = {"save_every": 4, "keep": 3, "keep_best": 0}  # checkpoints after updates 4, 8 and 12


def cut(config: Config, store: Store, after: int) -> None:
    """Train until the record of an update, and no further."""

    def emit(kind: str, **fields: Any) -> None:
        if kind == "progress" and fields["unit"] == "updates" and fields["done"] == after:
            raise Killed

    with pytest.raises(Killed):
        nanodlm.train(config, store.uri(), emit)


def words_for(config: Config, store: Path) -> tuple[str, ...]:
    """What follows `nanodlm train`."""
    file = store.parent / "config.json"
    file.write_text(config.model_dump_json())
    return (str(file), "--store", str(store))
