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
TASKS = {
    "choice": ("multiple_choice", "{{asked}}", "right", ["acc"], {"doc_to_choice": "{{answers}}"}),
    "whole": ("loglikelihood_rolling", "", "{{asked}}{{answers[1]}}", ["bits_per_byte"], {}),
    "next": ("loglikelihood", "{{asked}}", "{{answers[0]}}", ["perplexity", "acc"], {}),
    "told": ("generate_until", "{{asked}}", "{{answers[0]}}", ["exact_match"],
             {"generation_kwargs": {"until": ["e"], "max_gen_toks": 12}}),
}  # fmt: skip


def request(*arguments: Any) -> Any:
    return SimpleNamespace(args=arguments)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> "TaskManager":
    """The tasks as the harness reads them, which is imported only here, for it takes seconds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what its many packages say of each other
        from lm_eval.tasks import TaskManager
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    files = {"data_files": {"test": str(folder / "rows.jsonl")}, "cache_dir": str(folder / "cache")}
    read = {"dataset_path": "json", "dataset_kwargs": files, "test_split": "test", "target_delimiter": ""}
    for name, (kind, prompt, answer, metrics, more) in TASKS.items():
        task = {"task": name, "output_type": kind, "doc_to_text": prompt, "doc_to_target": answer, **read, **more}
        task["metric_list"] = [{"metric": metric} for metric in metrics]
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return TaskManager(include_path=str(folder), include_defaults=False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["absorbing", "autoregressive", "hybrid", "block"])
def test_the_harness_scores_tasks_of_every_sort_by_the_bound(tasks: "TaskManager", models: Store, kind: str) -> None:
    import lm_eval

    from nanodlm.evaluation.harness import Harness

    model = Harness(nanodlm.train(tiny(objective={"kind": kind}), models.uri()).uri, draws=8)
    exact = kind == "autoregressive"  # likelihoods of several tasks are asked for at once, and so share their noise
    asked = [*TASKS] if exact else ["choice", "whole", "told"]
    found = lm_eval.simple_evaluate(model, tasks=asked, task_manager=tasks, log_samples=True, bootstrap_iters=10)
    assert found is not None

    def nats(pairs: list[tuple[str, str]]) -> np.ndarray:
        text = text_of(pairs, model._encoding, 32)
        return draw(model._network, text.rows, text.given, ScoreConfig(repeats=8)).by_row.mean(axis=0)

    results, samples = found["results"], found["samples"]
    of = nats([(row["asked"], answer) for row in ROWS for answer in row["answers"]]).reshape(-1, 2)
    scored = [[one[0][0] for one in s["resps"]] for s in sorted(samples["choice"], key=lambda s: s["doc_id"])]
    assert np.allclose(scored, -of, rtol=1e-4)
    assert results["choice"]["acc,none"] == pytest.approx((of.argmin(axis=1) == [r["right"] for r in ROWS]).mean())
    texts = [row["asked"] + row["answers"][1] for row in ROWS]
    bits = nats([("", text) for text in texts]).sum() / np.log(2) / sum(map(len, texts))
    assert results["whole"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-4)
    assert all(len(s["resps"][0][0]) <= 12 and "e" not in s["resps"][0][0] for s in samples["told"])
    if exact:
        told = model.generate_until([request(row["asked"], {"max_gen_toks": 2}) for row in ROWS])
        right = [answer == row["answers"][0] for row, answer in zip(ROWS, told, strict=True)]
        assert results["next"]["acc,none"] == pytest.approx(np.mean(right))
        assert results["next"]["perplexity,none"] == pytest.approx(np.exp(of[:, 0].mean()), rel=1e-4)


@pytest.mark.slow
def test_an_answer_is_greedy_when_it_is_what_the_model_goes_on_with(trained: Artifact) -> None:
    from nanodlm.evaluation.harness import Harness

    model, prompt = Harness(trained.uri, draws=2), "The people of"
    (told,) = model.generate_until([request(prompt, {"max_gen_toks": 5})])
    found = model.loglikelihood([request(prompt, told), request(prompt, "~" * len(told))])
    assert [greedy for _, greedy in found] == [True, False]
    assert found[0][0] > found[1][0]
    (drawn,) = model.generate_until([request("x" * 100, {"do_sample": True, "temperature": 5.0})])
    assert 0 < len(drawn) <= 16
