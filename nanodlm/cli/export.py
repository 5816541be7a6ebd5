"""The command that writes a trained model as a folder to share."""

from pathlib import Path
from typing import Annotated

from typing_extensions import Doc
from tyro.conf import arg

from nanodlm.checkpoints.finding import find_model
from nanodlm.cli.arguments import Output
from nanodlm.cli.store import OpenStore
from nanodlm.errors import UsageError

Words = Annotated[tuple[str, ...], Doc("Model, else the newest, and a new folder."), arg(metavar="[MODEL] FOLDER")]


def export(words: Words, /, *, store: OpenStore, out: Output) -> None:
    """Write a trained model into a folder: safetensors, settings, tokenizer, card, PyTorch code; `load` reads it."""
    if len(words) not in (1, 2):
        raise UsageError("name one new folder, after a model or none: nanodlm export [MODEL] FOLDER")
    from nanodlm.checkpoints.exported import load_exported, read_record
    from nanodlm.checkpoints.exporting import export as write
    from nanodlm.checkpoints.loading import load_folder, locate, read_config
    from nanodlm.evaluation.model_card import model_card

    folder, step, train = locate(find_model("".join(words[:-1]), store))
    if step is None:
        (_, config), (model, encoding) = read_record(folder), load_exported(folder)
    else:
        config, (model, encoding) = read_config(folder), load_folder(folder, step)
    new = Path(words[-1])
    write(model, encoding, config, new, model_card(config, model, train))
    size, sha256 = sum(file.stat().st_size for file in new.iterdir()), read_record(new)[0]["parameters_sha256"]
    out.text(f"{new}: {size:,} bytes in {len([*new.iterdir()])} files, parameters_sha256 {sha256}")
    out.json(folder=str(new.absolute()), bytes=size, parameters_sha256=sha256)
