"""What preparing data costs, measured on a small corpus."""

import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanodlm.bench import data as bench_data
from nanodlm.cli.main import main
from nanodlm.errors import UsageError
from nanodlm.store import Artifact, Store
from tests.support.commands import TINY, nanodlm, result_of
from tests.support.helpers import tiny_config
from tests.support.training import tiny


@pytest.mark.parametrize("apart", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_each_stage_is_measured_beside_libraries_alone(apart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    size = bench_data.ROWS * bench_data.ROW + 1
    if apart:
        found = result_of(nanodlm("bench", "data", *TINY, "--tokens", str(size), "--json"))
    else:
        monkeypatch.setenv("NANODLM_CACHE", "")  # restored after the stages have set it
        monkeypatch.setattr(bench_data, "_alone", lambda function, *arguments: function(*arguments))
        found = bench_data.data(tiny(), tokens=size)
    assert {*found} == {"ids", "text"}
    for kind, references in bench_data.REFERENCES.items():
        measured = found[kind]
        speeds = {name: m["tokens_per_second_per_core"] for name, m in measured.items()}
        assert {*bench_data.STAGES, "end to end", *references.values()} <= {*speeds}
        seconds = sum(1 / speeds[stage] for stage in bench_data.WHOLE)
        assert speeds["end to end"] == pytest.approx(1 / seconds), "the times of the stages add up"
        for name, reference in references.items():
            assert measured[name]["reference"] == reference
            assert measured[name]["of_reference"] == pytest.approx(speeds[name] / speeds[reference])
        for stage in bench_data.STAGES:
            assert measured[stage]["seconds"] > 0
            assert measured[stage]["peak_bytes"] > 3e7, "that of its process"


def test_a_corpus_too_small_to_measure_is_refused() -> None:
    with pytest.raises(UsageError, match="raise --tokens to a million"):
        bench_data.data(tiny(), tokens=1000)


@pytest.mark.parametrize(
    ("names", "data", "size"),
    [
        (["a.txt", "b.jsonl"], {}, 600),
        (["a.txt"], {"limit_tokens": 20}, 80),
        (["a.parquet"], {"column": "ids", "pretokenized": True}, 2 * 3000),
        (["a.parquet", "a.txt"], {}, 90_000 + 4 * 1000 + 300),  # parquet counts four bytes more a text, and some
        (["a.txt.gz"], {}, None),
        (["a.jsonl"], {"pretokenized": True}, None),
    ],
)
def test_files_tell_how_much_text_or_how_many_ids_they_hold(
    tmp_path: Path, names: list[str], data: dict[str, Any], size: int | None
) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"a" * 300)
    columns = {"text": [f"{i:090}" for i in range(1000)], "ids": [[1, i % 99, 3] for i in range(1000)]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet", use_dictionary=False)
    found = bench_data.size_of(tiny_config([str(tmp_path / name) for name in names], **data).data)
    assert found == size or (size and found and size < found < 1.01 * size)


def test_plan_says_how_long_a_large_source_will_take(tmp_path: Path) -> None:
    with (tmp_path / "large.txt").open("wb") as file:
        file.truncate(2 * 10**8)
    words = ("--data.source", str(tmp_path / "large.txt"), "--until", "shard", "--store", str(tmp_path / "store"))
    said = nanodlm("plan", *words).stdout.splitlines()[-1]
    assert re.match(
        r"about 0\.2 GB of text: download \d.*, split \d.*, shard \d.* on \d+ cores, as .* just now; ", said
    )
    assert said.endswith("; much shorter documents than 5 kB take longer")
    assert result_of(nanodlm("plan", *words, "--data.limit_tokens", "1000", "--json"))["expected"] == []
    (said,) = result_of(nanodlm("plan", "owt", *words[2:], "--json"))["expected"]
    assert said.startswith("each billion tokens of a source that does not tell its size: download ")
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("changed", [{}, {"d_ff": 96}])
def test_plan_says_how_long_a_training_takes_when_an_equal_network_was_trained(
    trained: Artifact, models: Store, capsys: pytest.CaptureFixture[str], changed: dict[str, int]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["plan", tiny(train={"lr": 0.5}, model=changed).model_dump_json(), "--store", models.root])
    says = "sample" if changed else r"training on 1,536 tokens: \d.* at the .* tokens/s of train/[0-9a-f]{12} on 1 cpu"
    assert re.match(says, capsys.readouterr().out.splitlines()[-1])
