"""The names of checkpoints, and how one is found by its address without being read."""

import contextlib
import re
from pathlib import Path

from nanodlm.config import is_twin, parse_address
from nanodlm.errors import Damaged, NanodlmError, UsageError
from nanodlm.store import Artifact, Part, Store
from nanodlm.store.manifest import MANIFEST, NAME


def step_name(step: int) -> str:
    """Return the name of the part that holds the checkpoint after an update, such as `checkpoints/step_000100`."""
    return f"checkpoints/step_{step:06d}"


def step_of(name: str) -> int:
    """Return how many updates were done at a checkpoint; -1 for a name that is not one's.

    >>> step_of("checkpoints/step_000100"), step_of("step_100"), step_of("step_000100.orbax-checkpoint-tmp-7")
    (100, 100, -1)
    """
    found = re.fullmatch(r"(?:.*/)?step_([0-9]+)", name)
    return int(found[1]) if found else -1


def find_checkpoint(address: str) -> Part:
    """Find the checkpoint at an address; its files are not read yet.

    `BASE/step_100` or `BASE/checkpoints/step_100`: BASE is a run's or an attempt's folder, or a train artifact's URI.
    """
    parsed = parse_address(address)
    if parsed.checkpoint is None:
        raise UsageError(f"{address!r} names no checkpoint: it must end in step_ and a number")
    store, name, manifest = Store(parsed.folder), step_name(parsed.checkpoint), None
    with contextlib.suppress(Damaged):
        manifest = store.read_json(store.path(MANIFEST))
    folder = store.root
    if isinstance(manifest, dict) and NAME.fullmatch(str(manifest.get("attempt", ""))):
        folder = store.path("attempts", str(manifest["attempt"]))
    if part := store.part(folder, name, stage="train"):
        return part
    finished = sorted(path.removesuffix(".json") for path in store.files(f"{folder}/parts/checkpoints"))
    have = f"there are {', '.join(finished)}" if finished else "there are none"
    raise UsageError(f"no finished checkpoint {Path(name).name} in {store.address(folder)}: {have}")


def is_exported(address: str) -> bool:
    """Say if an address is a folder that `nanodlm export` wrote."""
    return all((Path(address) / name).is_file() for name in ("config.json", "model.safetensors"))


def of_stage(name: str, store: Store) -> list[Artifact]:
    """Return the artifacts of one stage whose records are whole."""
    found = store.artifacts(item for item in store if item[0] == name)
    return [artifact for _, artifact in found if isinstance(artifact, Artifact)]


def find_model(model: str, store: Store) -> str:
    """Return the address that `load` takes of a model: of a run's name, an address, its beginning, an exported folder.

    Of several runs of one name, and where nothing is said, it is that of the last one. Twins have to be named.
    """
    if "://" in model or (model and is_exported(model)):
        return model
    trained = of_stage("train", store)
    names = [(one.manifest["config"] or {}).get("exp", {}).get("run_name", "") for one in trained]
    named = [one for one, name in zip(trained, names, strict=True) if model == name or not (model or is_twin(name))]
    if named:
        return max(named, key=lambda one: (one.manifest["created"], one.fingerprint)).uri
    if re.fullmatch("([a-z]+/)?[0-9a-f]{4,64}", model):
        return store.open(model).uri
    if "/" in model:  # which names may hold as well
        return model
    known = "name a run, an address as `nanodlm ls` prints it, a checkpoint's folder or an exported one"
    if not model:
        raise NanodlmError(f"{store.uri()} holds no trained model: `nanodlm run` trains one, or {known}")
    raise NanodlmError(f"no model {model!r} in {store.uri()}: {known}")
