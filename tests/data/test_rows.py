from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from nanodlm.data import rows as data_rows
from nanodlm.errors import Damaged


def rows_of(count: int, length: int, dtype: str, seed: int = 0) -> np.ndarray:
    top = int(np.iinfo(dtype).max) if dtype == "<u2" else 2**31 - 1
    return np.random.default_rng(seed).integers(0, top, (count, length), endpoint=True).astype(dtype)


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_rows_are_read_back_in_order_as_int32(tmp_path: Path, dtype: str) -> None:
    rows = rows_of(300, 7, dtype)
    data_rows.write(tmp_path / "x.arrayrecord", rows)
    read = data_rows.read(tmp_path / "x.arrayrecord", dtype)
    assert {row.dtype for row in read} == {np.dtype(np.int32)}
    np.testing.assert_array_equal(np.stack(read), rows)


@pytest.mark.parametrize("length", [64, 1024])
def test_rows_are_stored_as_they_are_in_groups_of_about_two_kilobytes(tmp_path: Path, length: int) -> None:
    rows = rows_of(2**20 // length, length, "<u2")
    data_rows.write(tmp_path / "whole", rows)
    data_rows.write(tmp_path / "blocks", iter([rows[:100], rows[100:100], *rows[100:103], rows[103:]]))
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "blocks").read_bytes()
    assert 1 < (tmp_path / "whole").stat().st_size / rows.nbytes < 1.15  # 1.4 with a row of 64 by itself
    with closing(ArrayRecordReader(str(tmp_path / "whole"))) as reader:
        assert f"group_size:{1024 // length}," in reader.writer_options_string()


def test_files_of_an_earlier_version_are_read(tmp_path: Path) -> None:
    rows = rows_of(50, 64, "<u2")
    with closing(ArrayRecordWriter(str(tmp_path / "x"), "group_size:1,zstd:3")) as writer:
        for row in rows:
            writer.write(row.tobytes())
    np.testing.assert_array_equal(data_rows.read(tmp_path / "x", "<u2"), rows)


@pytest.mark.parametrize("lengths", [(), (5, 5, 1)])
def test_rows_may_differ_in_length_and_there_may_be_none(tmp_path: Path, lengths: tuple[int, ...]) -> None:
    data_rows.write(tmp_path / "x.arrayrecord", [np.arange(n, dtype="<u2") for n in lengths])
    assert [row.tolist() for row in data_rows.read(tmp_path / "x.arrayrecord", "<u2")] == [[*range(n)] for n in lengths]


def test_equal_rows_give_equal_bytes_and_other_rows_others(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        data_rows.write(tmp_path / name, rows_of(100, 16, "<u2", seed))
    one, same, other = ((tmp_path / name).read_bytes() for name in "abc")
    assert one == same != other


@pytest.mark.parametrize("keep", [0, 1, 1000, -1])
def test_a_truncated_file_is_refused_rather_than_read_as_empty(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "x.arrayrecord"
    data_rows.write(path, rows_of(2000, 64, "<u2"))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(Damaged, match=r"x\.arrayrecord is not a whole ArrayRecord file: .*--rebuild shard"):
        data_rows.read(path, "<u2")


def test_a_file_that_is_missing_or_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.arrayrecord").write_bytes(b"text" * 50_000)
    for name in ("text.arrayrecord", "absent.arrayrecord"):
        with pytest.raises(Damaged, match=rf"{name} is not a whole ArrayRecord file"):
            data_rows.read(tmp_path / name, "<u2")


def test_the_types_change_where_sixteen_bits_are_full() -> None:
    assert [data_rows.dtype_for(n) for n in (1, 2**16, 2**16 + 1, 2**31)] == ["<u2", "<u2", "<u4", "<u4"]
