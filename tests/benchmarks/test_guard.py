"""The guard of speed: what it reads, compares and keeps, with a clock that tells what each call cost."""

from pathlib import Path

import pytest

from benchmarks import guard
from benchmarks.guard import append, compare, fallen, in_turn, pairs, processor, table
from nanodlm.config import PRESETS

PAGE = (
    f"# Speed\n\n{guard.HEAD} update, demo |\n|---|---|---|---|\n| 30609af | 2026-11-23 | avx2, 2 cores | 1.5 ± 0.02 |"
)
NEW = {"commit": "c726362", "date": "2026-11-30", "processor": "amx, 8 cores", "update, demo": "3 ± 0.1"}


@pytest.mark.parametrize("end", ["", "\n", "\n\n## More\n\ntext | and more\n"])
def test_a_row_is_added_below_the_last_one_and_nothing_else_changes(tmp_path: Path, end: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE + end)
    append(NEW, page)
    append(NEW | {"commit": "b2a0d3e"}, page)
    assert [row["commit"] for row in table(page)] == ["30609af", "c726362", "b2a0d3e"]
    assert table(page)[1] == NEW
    assert page.read_text().startswith(f"{PAGE}\n| c726362 | 2026-11-30 | amx, 8 cores | 3 ± 0.1 |\n| b2a0d3e")
    assert page.read_text().endswith(end or "|\n")


def test_a_fall_is_told_by_name_when_it_is_above_a_tenth_and_above_the_noise() -> None:
    before = {
        "commit": "30609af",
        "slower": "1.5 ± 0.02",
        "a little": "1.5 ± 0.02",
        "noisy": "1.5 ± 0.2",
        "gone": "1 ± 0",
    }
    now = {"commit": "c726362", "slower": "1.3 ± 0.02", "a little": "1.4 ± 0.02", "noisy": "1.2 ± 0.02", "new": "1 ± 0"}
    assert fallen(before, now) == ["slower fell from 1.5 ± 0.02 to 1.3 ± 0.02"]
    assert fallen(now, before) == []


def test_a_function_that_becomes_slower_is_caught_however_slow_the_machine_is_meanwhile() -> None:
    spent, number = 0.0, 0

    def costs(seconds: float) -> None:
        nonlocal spent, number
        number += 1
        spent += seconds * (1 + number // 10)  # the machine is slower and slower
        spent += 5 * (number % 13 == 0)  # and sometimes does something else

    def measured(ours: float) -> dict[str, str]:
        return {"update": compare(*in_turn((lambda: costs(ours), lambda: costs(3.0)), 24, clock=lambda: spent))}

    before, slower = measured(2.0), measured(2.5)
    assert before["update"].startswith("1.5 ±")
    assert fallen(before, measured(2.0)) == []
    assert fallen(before, slower) == [f"update fell from {before['update']} to {slower['update']}"]


@pytest.mark.slow
def test_every_pair_runs_and_the_tables_columns_are_the_pairs_of_each_size() -> None:
    small = PRESETS["demo"].replace(
        model={"seq_len": 8, "d_model": 16, "d_ff": 16, "n_layers": 1}, train={"batch_size": 2, "optimizer": "adamw"}
    )
    names = [name for name, *calls in pairs(small) if min(map(sum, in_turn(calls, 1))) > 0]
    columns = [f"{name}, {size}" for size in guard.SIZES for name in names]
    assert [*table()[-1]] == ["commit", "date", "processor", *columns]
    assert processor().endswith(" cores")
