"""How costs grow, in small: that the sweeps measure what they say, and that the figure has them."""

from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks.growth import BASE, CHANGES, SIZES, Sweep, draw, look_ups, memory, updates


def test_one_size_is_doubled_and_the_sweeps_have_one_point_in_common() -> None:
    for of, sizes in SIZES.items():
        assert {larger / smaller for smaller, larger in pairwise(sizes)} == {2}
        assert BASE in [BASE.replace(**CHANGES[of](size)) for size in sizes]


def test_the_figure_names_every_sweep_and_its_exponents(tmp_path: Path) -> None:
    sweep = Sweep("s", [1, 2, 4], {"ours": [1, 4, 16]}, {"ours": [1, 2, 4]})
    draw({"update over d": sweep, "look-ups": sweep}, tmp_path / "growth.svg")
    assert (tmp_path / "growth.svg").read_text().count("ours: 2.00 (1.00)") == 2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_series_of_the_sweeps_is_measured_beside_its_promise(tmp_path: Path) -> None:
    small = BASE.replace(model={"seq_len": 8, "n_layers": 1}, train={"batch_size": 2})
    sweeps = updates("d", (8, 16), repeats=1, base=small), look_ups(str(tmp_path), (6, 9), repeats=1), memory((8, 16))
    assert [*sweeps[0].y] == ["adamw", "muon"]
    assert all(min(spent) > 0 for sweep in sweeps for spent in sweep.y.values())
    assert sweeps[1].exponents()["a run"][2] == 0
    assert sweeps[2].exponents()["parameters"] == pytest.approx([1, 1, 1])
