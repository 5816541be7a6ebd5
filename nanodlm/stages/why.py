"""Why a stage would be built, field by field."""

import contextlib
from collections.abc import Iterator

from nanodlm.config import Config, differences
from nanodlm.errors import Damaged
from nanodlm.stages.lookup import Lookup, Missing, comparable
from nanodlm.stages.table import STAGES
from nanodlm.store import SCHEMA, Artifact, Store


def why(lookup: Lookup | Missing, store: Store) -> str:
    """Say why a stage would be built: which settings and inputs differ from the most similar artifact there is."""
    if isinstance(lookup, Missing):
        return "an input is not built yet"
    if not store.asked:
        return "it was not fetched before, and the store is not asked while NANODLM_OFFLINE is set"
    wanted = comparable(lookup.identity)
    like_it: list[tuple[list[str], str]] = []
    for stage, fingerprint in store:
        with contextlib.suppress(Damaged):
            if stage == lookup.stage.name and (other := store.find(stage, fingerprint)):
                has = comparable({k: other.manifest[k] for k in lookup.identity})
                reasons = [f"{field}: {values}" for field, values in differences(has, wanted).items()]
                like_it.append((reasons, fingerprint[:12]))
    if not like_it:
        return "nothing like it has been built yet"
    reasons, nearest = min(like_it, key=lambda one: len(one[0]))
    return f"{'; '.join(reasons)} (against {nearest})"


def explain(artifact: Artifact, config: Config) -> Iterator[str]:
    """Say why a configuration would not reuse an artifact: what differs, in it and in all it was made from.

    Lines are such as `train: train.lr: 0.001 -> 0.002`; one may come twice.
    """
    stage, made = STAGES[artifact.stage], artifact.manifest
    has = {**made["parameters"], "version": made["version"], "schema": made["schema"]}
    wanted = {**stage.parameters(config), "version": stage.version, "schema": SCHEMA}
    for field, values in differences(has, wanted).items():
        yield f"{stage.name}: {field}: {values}"
    names = stage.inputs(config)
    for name in STAGES:  # in the pipeline's order
        if name not in made["inputs"] and name not in names:
            continue
        if (name in made["inputs"]) != (name in names):
            yield f"{stage.name}: {'is now made' if name in names else 'is no longer made'} from {name}"
            continue
        source = artifact.store.find(name, made["inputs"][name]["fingerprint"])
        if source is None:
            yield f"{stage.name}: the {name} artifact that it was made from is not there any more"
            continue
        if source.digest != made["inputs"][name]["digest"]:
            yield f"{stage.name}: the {name} artifact was rebuilt with other bytes since"
        yield from explain(source, config)
