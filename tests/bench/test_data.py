"""What preparing data costs, measured on a small corpus."""

import pytest

from nanodlm.bench import data as bench_data
from nanodlm.errors import UsageError
from tests.support.commands import TINY, nanodlm, result_of
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
