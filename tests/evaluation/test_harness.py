"""The harness itself, on tasks from local files, with a small trained model."""

import json
import warnings
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import yaml

import nanodlm
from nanodlm.config import ScoreConfig
from nanodlm.evaluation.answers import text_of
from nanodlm.evaluation.scoring import draw
from nanodlm.store import Artifact, Store
from tests.support.training import tiny

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

ROWS = [{"asked": f"{n} and one is", "answers": [f" {n + 1}", " the people"], "right": n % 2} for n in range(6)]
NEXT: list[Any] = [SimpleNamespace(args=(row["asked"], {"max_gen_toks": 2})) for row in ROWS]
TASKS: dict[str, dict[str, Any]] = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{asked}}",
        "doc_to_choice": "{{answers}}",
        "doc_to_target": "right",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "whole": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{asked}}{{answers[1]}}",
        "metric_list": [{"metric": "bits_per_byte"}, {"metric": "byte_perplexity"}],
    },
    "next": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{asked}}",
        "doc_to_target": "{{answers[0]}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "told": {
        "output_type": "generate_until",
        "doc_to_text": "{{asked}}",
        "doc_to_target": "{{answers[0]}}",
        "generation_kwargs": {"until": ["e"], "max_gen_toks": 12},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> "TaskManager":
    """The tasks as the harness reads them, which is imported only here, for it takes seconds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what its many packages say of each other
        from lm_eval.tasks import TaskManager
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    source = {"data_files": {"test": str(folder / "rows.jsonl")}, "cache_dir": str(folder / "cache")}
    for name, task in TASKS.items():
        read = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": source,
            "test_split": "test",
            "target_delimiter": "",
            **task,
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(read))
    return TaskManager(include_path=str(folder), include_defaults=False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["absorbing", "autoregressive", "hybrid", "block"])
def test_the_harness_scores_tasks_of_every_sort_by_the_bound(tasks: "TaskManager", models: Store, kind: str) -> None:
    import lm_eval

    from nanodlm.evaluation.harness import Harness

    trained = nanodlm.train(tiny(objective={"kind": kind}), models.uri())
    model = Harness(trained.uri, draws=8)
    exact = kind == "autoregressive"  # likelihoods of several tasks are asked for at once, and so share their noise
    asked = [*TASKS] if exact else ["choice", "whole", "told"]
    found = lm_eval.simple_evaluate(model, tasks=asked, task_manager=tasks, log_samples=True, bootstrap_iters=10)
    assert found is not None
    results, samples = found["results"], found["samples"]
    pairs = [(row["asked"], answer) for row in ROWS for answer in row["answers"]]
    text = text_of(pairs, model._encoding, 32)
    nats = draw(model._network, text.rows, text.given, ScoreConfig(repeats=8)).by_row.mean(axis=0).reshape(-1, 2)
    scored = [[of[0][0] for of in one["resps"]] for one in sorted(samples["choice"], key=lambda one: one["doc_id"])]
    assert np.allclose(scored, -nats, rtol=1e-4)
    right = (nats.argmin(axis=1) == [row["right"] for row in ROWS]).mean()
    assert results["choice"]["acc,none"] == pytest.approx(right)
    whole = text_of([("", row["asked"] + row["answers"][1]) for row in ROWS], model._encoding, 32)
    bound = draw(model._network, whole.rows, whole.given, ScoreConfig(repeats=8)).nats
    assert results["whole"]["bits_per_byte,none"] == pytest.approx(bound.mean() / np.log(2), rel=1e-4)
    if exact:
        right = [answer == row["answers"][0] for row, answer in zip(ROWS, model.generate_until(NEXT), strict=True)]
        assert results["next"]["acc,none"] == pytest.approx(np.mean(right))
        assert results["next"]["perplexity,none"] == pytest.approx(np.exp(nats[:, 0].mean()), rel=1e-4)
    told = [one["resps"][0][0] for one in samples["told"]]
    assert all(len(text) <= 12 and "e" not in text for text in told)


@pytest.mark.slow
def test_an_answer_is_greedy_when_it_is_what_the_model_goes_on_with(trained: Artifact) -> None:
    from nanodlm.evaluation.harness import Harness

    model = Harness(trained.uri, draws=2)

    def asked(*arguments: Any) -> Any:
        return SimpleNamespace(args=arguments)

    (told,) = model.generate_until([asked("The people of", {"max_gen_toks": 5})])
    wrong = "~" * len(told)
    found = model.loglikelihood([asked("The people of", told), asked("The people of", wrong)])
    assert [greedy for _, greedy in found] == [True, False]
    assert found[0][0] > found[1][0]
    assert model.loglikelihood([asked("The people of", told)] * 2)[0][1]
    (drawn,) = model.generate_until([asked("x" * 100, {"do_sample": True, "temperature": 5.0})])
    assert len(drawn) <= 16 * 4
