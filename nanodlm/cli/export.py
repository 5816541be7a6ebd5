"""The command that writes a trained model as a folder to share."""

from pathlib import Path
from typing import Annotated

from typing_extensions import Doc
from tyro.conf import arg

from nanodlm.cli.arguments import Output
from nanodlm.cli.models import choose
from nanodlm.cli.store import OpenStore
from nanodlm.errors import UsageError

Words = Annotated[
    tuple[str, ...],
    Doc("Model, else the newest, and a new folder."),
    arg(metavar="[MODEL] FOLDER", help_behavior_hint="(required)"),
]


def export(words: Words, /, *, store: OpenStore, out: Output) -> None:
    """Write a trained model into a folder that `load` and other libraries read."""
    if len(words) not in (1, 2):
        raise UsageError("name one new folder, after a model or none: nanodlm export [MODEL] FOLDER")
    from nanodlm.checkpoints import exported
    from nanodlm.checkpoints.loading import load_folder, locate, read_config
    from nanodlm.evaluation.model_card import model_card

    address = choose("".join(words[:-1]), store)
    folder, step, train = locate(address)
    config = exported.read_record(folder)[1] if step is None else read_config(folder)
    model, encoding = exported.load_exported(folder) if step is None else load_folder(folder, step)
    new = Path(words[-1])
    exported.export(model, encoding, config, new, model_card(config, model, train))
    size = sum(file.stat().st_size for file in new.iterdir())
    out.text(
        f"{new}: {size:,} bytes; `nanodlm.load({str(new)!r})` reads it, and its {exported.CARD} says how others do"
    )
    out.json(model=address, folder=str(new.absolute()), bytes=size)
