"""What pages read of a run's artifacts: those before them, the data card, texts, and records of the training."""

import json
from typing import Any

from nanodlm.data.card import CARD
from nanodlm.data.tokenizer import END_OF_TEXT
from nanodlm.store import Artifact, Store


def lineage(*last: Artifact) -> dict[str, Artifact]:
    """Return artifacts and all that they were made from, as far as it is still there, by stage: what is read is first.

    Each manifest is opened once, and none of those given.
    """
    given, found = {one.stage: one for one in last}, dict[str, Artifact]()

    def add(artifact: Artifact) -> None:
        for item in artifact.inputs:
            read = found.get(item[0]) or given.get(item[0]) or next(artifact.store.artifacts([item]))[1]
            if isinstance(read, Artifact) and read.stage not in found:
                add(read)
        found[artifact.stage] = artifact

    for artifact in last:
        add(artifact)
    return found


def judging(judge: Artifact, others: dict[str, Artifact]) -> dict[str, Artifact]:
    """Return what judged samples as `twin`, as far as it is still there and none of the others, and as `judge`."""
    network = next((one for _, one in judge.store.artifacts(of for of in judge.inputs if of[0] == "train")), None)
    if isinstance(network, Artifact) and network.uri not in {other.uri for other in others.values()}:
        return {"twin": network, "judge": judge}
    return {"judge": judge}


def twin(evaluate: Artifact) -> Artifact | None:
    """Return the newest evaluation of an autoregressive model of the same shards on the same rows, if one is there."""
    m = evaluate.metrics
    same = [
        one
        for one in _all("evaluate", evaluate.store)
        if one.fingerprint != evaluate.fingerprint
        and (one.manifest["config"] or {}).get("objective", {}).get("kind") == "autoregressive"
        and one.manifest["inputs"]["shard"] == evaluate.manifest["inputs"]["shard"]
        and all(one.metrics.get(name) == m[name] for name in ("scored_tokens", "scored_bytes"))
    ]
    return max(same, key=lambda one: one.manifest["created"], default=None)


def frontier_of(train: Artifact) -> dict[str, Artifact]:
    """Return the newest undamaged frontier of a model by that name, if `nanodlm bench frontier` has measured one."""
    mine = [one for one in _all("frontier", train.store) if one.manifest["inputs"]["train"]["digest"] == train.digest]
    mine = [one for one in mine if not one.problems()]
    return {"frontier": max(mine, key=lambda one: one.manifest["attempt"])} if mine else {}  # which begins with a time


def _all(stage: str, store: Store) -> list[Artifact]:
    there = {path.split("/")[0] for path in store.files(store.path(stage))}
    found = store.artifacts((stage, fingerprint) for fingerprint in sorted(there))
    return [artifact for _, artifact in found if isinstance(artifact, Artifact)]


def card_of(shard: Artifact | None) -> dict[str, Any] | None:
    """Return the data card of shards, if they are there and have one."""
    return json.loads(shard.file(CARD).read_text()) if shard and has(shard, CARD) else None


def has(artifact: Artifact, file: str) -> bool:
    """Say if an artifact has a file, which earlier versions may not have made."""
    return any(made["path"] == file for made in artifact.manifest["files"])


def texts_of(sample: Artifact) -> list[str]:
    """Return the sampled texts for people, with an empty line where a document ends."""
    lines = sample.file("samples.jsonl").read_text().splitlines()
    return [json.loads(line)["text"].replace(END_OF_TEXT, "\n\n") for line in lines]


def logs_of(train: Artifact) -> list[dict[str, Any]]:
    """Return the records of a training, as `logs.json` holds them."""
    return json.loads(train.file("logs.json").read_text())
