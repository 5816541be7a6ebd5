"""The frontier: calls counted one by one, points held against each other by one rule, the command and its figure."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jax
import numpy as np
import pytest
from flax import nnx

from nanodlm.build import make_model
from nanodlm.cli.frontier import keep
from nanodlm.cli.main import main
from nanodlm.config import is_twin
from nanodlm.data import tokenizer
from nanodlm.data.vocabulary import Vocabulary
from nanodlm.diffusion.kinds import SAMPLERS
from nanodlm.diffusion.sampling import sample
from nanodlm.errors import UsageError
from nanodlm.evaluation import frontier, fronts, judge
from nanodlm.evaluation.artifacts import frontier_of
from nanodlm.model.transformer import Transformer
from nanodlm.stages.lookup import of_stage
from nanodlm.stages.run import run_stage
from nanodlm.store import Artifact, Store
from tests.support.training import tiny

BYTES = tokenizer.plain_bytes()


def network(**objective: Any) -> Transformer:
    return make_model(tiny(model={"seq_len": 8, "zero_init": False}, objective=objective), Vocabulary.of(BYTES))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_is_counted_and_draws_what_it_draws_uncounted(sampler: str) -> None:
    model, choice = network(), {"sampler": sampler, "num_steps": 3, "temperature": 1.0}
    tokens, point = frontier.drawn(model, choice, (4, 8), seed=0)
    graphdef, params = nnx.split(model)
    draw = jax.jit(lambda params: sample(nnx.merge(graphdef, params), jax.random.key(0), shape=(4, 8), **choice))
    assert np.array_equal(tokens, draw(params))
    calls = point["calls_per_token"] * 8
    assert calls == {"first_hitting": 8}.get(sampler, round(calls))
    assert 1 <= calls <= (8 if sampler == "first_hitting" else 3)
    if sampler == "ancestral" or sampler.startswith("remdm"):
        assert calls == 3
    assert point["seconds_per_text"] > 0


def test_what_reads_blocks_or_from_left_to_right_is_counted_with_what_it_keeps_of_earlier_ones() -> None:
    block = network(kind="block", block_size=4)
    choice = {"sampler": "ancestral", "num_steps": 2, "temperature": 1.0}
    assert (
        frontier.drawn(block, choice, (2, 8), 0)[1]["calls_per_token"] == (2 * 2 + 1) / 8
    )  # the first is read for the next
    (choice,) = frontier.choices(network(kind="autoregressive"), (), (), [0.5])
    assert choice == {"sampler": "autoregressive", "num_steps": 8, "temperature": 0.5}
    assert frontier.drawn(network(kind="autoregressive"), choice, (2, 8), 0)[1]["calls_per_token"] == 1


def test_what_is_tried_is_every_sampler_in_every_number_of_steps_at_every_temperature() -> None:
    tried = list(frontier.choices(network(), (), (), (0.5, 1.0)))
    assert {choice["sampler"] for choice in tried} == set(SAMPLERS)
    assert len(tried) == 2 * (2 * len(SAMPLERS) - 1), "first_hitting has no steps"
    assert [c["num_steps"] for c in frontier.choices(network(), ["margin"], [5, 2, 2], [1.0])] == [2, 5]
    with pytest.raises(UsageError, match="uniform models have no entropy sampler"):
        list(frontier.choices(network(kind="uniform"), ["entropy"], (), [1.0]))


def test_no_point_of_too_little_entropy_is_on_a_front_however_likely(tmp_path: Path) -> None:
    model, reader = network(), network(kind="autoregressive")
    options: Any = {"shape": (6, 8), "cut": list, "batch_size": 8}
    tried = list(frontier.choices(model, ["ancestral", "confidence"], [2], [0.0, 1.0]))
    real = list(np.random.default_rng(0).integers(0, 256, (6, 8), dtype=np.int32))
    found = frontier.frontier([(model, tried)], reader, real, **options) | {"judge": "a reader"}
    assert found["held_out"]["entropy"] == judge.entropy(real)
    assert len(found["points"]) == 4
    for cost in fronts.COSTS:
        front = [point for point in found["points"] if point[f"on_front_of_{cost}"]]
        allowed = [point for point in found["points"] if point["entropy"] >= found["least_entropy"]]
        assert 0 < len(allowed) < 4
        for point in allowed:
            as_cheap = [other for other in front if other[cost] <= point[cost]]
            assert min(other["nats_per_token"] for other in as_cheap) <= point["nats_per_token"]
        assert all(point in allowed for point in front)
        assert len({point["nats_per_token"] for point in front}) == len(front)
    fronts.write(found, tmp_path)
    figure = (tmp_path / "frontier.svg").read_bytes()
    texts = [text for of in ElementTree.fromstring(figure).iter() if (text := (of.text or "").strip())]
    assert {"network calls per token", "seconds per text", "confidence"} <= set(texts)
    fronts.write(found, tmp_path)
    assert (tmp_path / "frontier.svg").read_bytes() == figure


def command(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main([*words])
    said = capsys.readouterr()
    return said.out if ended.value.code == 0 else said.err


def named(artifact: Artifact) -> str:
    return artifact.manifest["config"]["exp"]["run_name"]


@pytest.fixture(scope="module")
def measured(trained: Artifact, models: Store, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store of its own with a trained model, of which frontiers may be measured."""
    store = Store(str(shutil.copytree(models.root, tmp_path_factory.mktemp("frontiers") / "store", symlinks=True)))
    for name in ("evaluate", "sample"):
        run_stage(name, tiny(), store)
    return store


def test_a_report_shows_the_newest_frontier_of_its_model_and_is_made_anew_for_no_other_reason(
    measured: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def report() -> tuple[Artifact, str]:
        made = run_stage("report", tiny(), measured)[0]
        return made, made.file("report.html").read_text()

    without, page = report()
    assert (report()[0].fingerprint, "Quality against cost" in page) == (without.fingerprint, False)
    train = measured.open(f"train/{dict(without.inputs)['train']}")
    words = ["--samplers", "margin", "--steps", "2", "--temperatures", "1", "--num", "2", "--store", measured.uri()]
    said = command(capsys, "bench", "frontier", train.uri, *words)
    first, page = report()
    (kept,) = (artifact for artifact in of_stage("frontier", measured))
    assert f"{kept.name}: the report of the model's next `nanodlm run` shows it" in said
    assert dict(first.inputs)["frontier"] == kept.fingerprint
    assert "Perplexity over network calls per token" in page
    assert re.search(r'<th scope="row">margin</th><td class="n">2</td><td class="n">1.0</td><td class="n">0.0625', page)
    plain = first.file("report.md").read_text()
    assert re.search(r"    margin +2 +1.0 +0.062\d.*\n    autoregressive .*\n    real text ", plain)
    found = json.loads(kept.file("frontier.json").read_text())
    found["points"][0]["num_steps"] = 3
    newer, (second, page) = keep(found, train), report()
    assert dict(second.inputs)["frontier"] == newer.fingerprint == dict(report()[0].inputs)["frontier"]
    assert '<th scope="row">margin</th><td class="n">3</td>' in page
    assert len({without.digest, first.digest, second.digest}) == 3
    assert command(capsys, "ls", "--store", measured.uri()).count("2 points of 2 texts each") == 2
    newer_file = Path(newer.file("frontier.json"))
    whole = newer_file.read_text()
    newer_file.write_text("")
    assert frontier_of(train) == {"frontier": kept}, "a damaged one is passed over"
    newer_file.write_text(whole)
    # Another model's report has none, and one whose parameters were trained anew has lost it.
    assert frontier_of(replace(train, manifest={**train.manifest, "digest": "other"})) == {}
    for where in (first.store, Store(str(tmp_path / "copy"))):
        if where is not first.store:
            command(capsys, "copy", measured.uri(), where.uri())
        assert "every file has its sha256" in command(capsys, "verify", "--deep", "--store", where.uri())


def test_the_command_judges_by_a_twin_beside_it_and_real_text(
    measured: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = next(artifact for artifact in of_stage("train", measured) if not is_twin(named(artifact)))

    def run(*words: str) -> str:
        return command(capsys, "bench", "frontier", trained.uri, "--store", measured.uri(), *words)

    chosen = ["--samplers", "margin", "--steps", "2", "--temperatures", "1", "--num", "3", "--out", str(tmp_path / "f")]
    found = json.loads(run(*chosen, "--json").splitlines()[-1])
    assert [point["sampler"] for point in found["points"]] == ["margin", "autoregressive"]
    assert found["points"][0]["calls_per_token"] == 2 / 32
    assert {"nats_per_token", "nats_per_token_stderr", "perplexity", "entropy"} <= found["held_out"].keys()
    assert json.loads((tmp_path / "f" / "frontier.json").read_text())["held_out"] == found["held_out"]
    assert (tmp_path / "f" / "frontier.svg").exists()
    plain = run(*chosen)
    assert all(str(tmp_path / "f" / name) in plain for name in ("frontier.json", "frontier.svg"))
    assert "3 texts each are few" in plain
    assert "is absorbing, and cannot judge" in run("--judge", trained.uri)
    assert "not by one of the hub" in run("--judge", "hf:gpt2")
    for wrong in (["--num", "1"], ["--temperatures", "nan"], ["--temperatures", "inf"]):
        assert "--num must be 2 or more" in run(*wrong)
    assert "is no folder" in run("--out", f"{tmp_path}/f/frontier.json")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).touch()
    assert "name a run of a store" in command(capsys, "bench", "frontier", str(tmp_path), "--store", measured.uri())


def test_points_are_told_in_columns_and_those_on_a_front_marked() -> None:
    of: dict[str, Any] = {"nats_per_token": 3.0, "nats_per_token_stderr": 0.1, "perplexity": 20.1, "entropy": 3.5}
    of["entropy_stderr"] = 0.02
    point = {**of, "sampler": "ancestral_skip", "num_steps": 8, "temperature": 1.0}
    point |= {"calls_per_token": 0.125, "seconds_per_text": 2.0}
    on = {"on_front_of_calls_per_token": True, "on_front_of_seconds_per_text": False}
    found = {"points": [{**point, **on}], "held_out": of, "least_entropy": 3.325, "num": 16, "judge": "train/9f"}
    head, first, real, said = fronts.described(found)
    assert (head.split()[0], head.split("  ")[-1]) == ("sampler", "entropy")
    assert first.split()[:5] == ["ancestral_skip", "8", "1.0", "0.125*", "2"]
    assert len(head) == len(first) == len(real), "columns end at one place"
    assert real.startswith("real text  ")
    assert said.startswith("* on the front: of all with an entropy of 3.33 nats or more, 95% of real text's")
    assert said.endswith("; 16 texts of each, judged by train/9f")
    found["points"][0] = {**point, **dict.fromkeys(on, False)}
    *_, none, few = fronts.described({**found, "num": 15})
    assert none.startswith("no point is on the front: none has an entropy of 3.33 nats or more, 95% of real text's; ")
    assert few.startswith("15 texts each are few")
