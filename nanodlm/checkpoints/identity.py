"""What a checkpoint remembers of its run, and what may differ when a run goes on from it."""

import jax

from nanodlm.config import Config, differences, training_settings
from nanodlm.errors import UsageError
from nanodlm.store import Json

FIXED = ("tokenizer", "train.optimizer")  # what a checkpoint makes no sense without, like most of `model`
FREE = ("model.init_seed", "model.seq_len", "model.dtype")  # settings of `model` that leave its arrays as they are


def describe_run(config: Config, dataset: str, encoding: str, key: jax.Array) -> Json:
    """Return what every checkpoint of a run remembers, with the digests of its `dataset` and token `encoding`."""
    return {
        "config": training_settings(config),
        "corpus": config.data.model_dump(mode="json"),
        "dataset": dataset,
        "tokenizer": encoding,
        "key": {"implementation": str(jax.random.key_impl(key)), "data": jax.random.key_data(key).tolist()},
    }


def check_run(saved: Json, now: Json, allowed: tuple[str, ...], what: str) -> None:
    """Refuse to continue a checkpoint (`what`) that has `saved` another run, but for the fields that are `allowed`."""
    if not now.keys() <= saved.keys():
        raise UsageError(f"{what} does not say what it was trained with: start anew with --exp.resume False")
    changed = differences(_compared(saved), _compared(now))
    if changed.keys() <= set(allowed):
        return
    if "dataset" in changed:  # the settings that the data were made with tell more than two digests
        made = differences({"data": saved["corpus"]}, {"data": now["corpus"]})
        why = "; ".join(f"{field}: {values}" for field, values in made.items() if field not in changed)
        changed["dataset"] += f" ({why})" if why else ""
    fixed = [name for name in changed if name in FIXED or (name.startswith("model.") and name not in FREE)]
    if fixed:
        remedy = f"{' and '.join(fixed)} cannot change in mid-training: train anew, without --exp.resume_path"
    else:
        remedy = f"if that is meant, add --exp.allow_changed {' '.join(changed)}"
    fields = "; ".join(f"{field}: {values}" for field, values in changed.items())
    raise UsageError(f"{what} is of another run ({fields}): {remedy}")


def _compared(run: Json) -> Json:
    digests = {name: run[name] for name in ("dataset", "tokenizer")}
    return {**run["config"], **digests, "key": run["key"]["implementation"]}
