"""Texts from a trained model."""

import json

import numpy as np
import pytest

from nanodlm.data.tokenizer import plain_bytes
from nanodlm.errors import UsageError
from nanodlm.generation.watch import Recording, pieces
from nanodlm.stages import run as stages_run
from nanodlm.store import Artifact, Store
from tests.support.training import tiny


def test_samples_begin_with_the_prompt_and_repeat_for_a_seed(trained: Artifact, models: Store) -> None:
    config, events = tiny(sample={"prompt": "The people", "sampler": "ancestral"}), []
    artifact, _ = stages_run.run_stage("sample", config, models, emit=lambda _, **fields: events.append(fields))
    assert [(event["done"], event["total"]) for event in events if "done" in event] == [(i, 4) for i in range(5)]
    texts = [json.loads(line)["text"] for line in (artifact.local() / "samples.jsonl").read_text().splitlines()]
    assert len(texts) == 2
    assert all(text.startswith("The people") for text in texts)
    tokens = np.load(artifact.local() / "tokens.npy", allow_pickle=False)
    assert tokens.max() < 257  # real tokens alone
    first, second = (Recording(**one) for one in json.loads((artifact.local() / "steps.json").read_text()))
    assert ["".join(pieces(plain_bytes(), row)) for row in tokens.tolist()] == [first.text, second.text]  # type: ignore[arg-type]
    assert first.start[:11] == [*"The people", None]
    assert (artifact.local() / "slider.html").read_text().count("<figure>") == 2
    again, _ = stages_run.run_stage("sample", config, models, rebuild=True)
    assert again.digest == artifact.digest
    other, _ = stages_run.run_stage("sample", tiny(sample={"prompt": "The people", "seed": 1}), models)
    assert other.digest != artifact.digest


def test_a_prompt_as_long_as_a_row_is_refused(trained: Artifact, models: Store) -> None:
    with pytest.raises(UsageError, match=r"shorten --sample\.prompt"):
        stages_run.run_stage("sample", tiny(sample={"prompt": "x" * 32}), models)
