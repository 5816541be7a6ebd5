"""Files as they come: every format, packed and elsewhere, and rows that are no documents."""

import bz2
import gzip
import json
import lzma
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanodlm.data import formats
from nanodlm.data.readers import Bad, check_share, read_documents
from nanodlm.data.sources import identity, source_files
from nanodlm.errors import NanodlmError
from tests.support.helpers import tiny_config
from tests.support.servers import Quiet, Server, serving

ODD = [
    "2024-01-01",
    "12",
    "NA",
    "a\r\nb\u2028c\x0cd\x00e",
    "<|endoftext|>",
    "\ufeffbegins with a mark",
    "x" * 3_000_000,
]
BOM = b"\xef\xbb\xbf"
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".BZ2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.compress(data, "zstd", asbytes=True),
}


def read(source: Path | str, **data: Any) -> tuple[list[Any], Bad]:
    """The documents of a source, and what was left out."""
    config = tiny_config(source, **{"part_mb": 64.0, **data}).data
    arrays = [*read_documents(config, source_files(config), bad := Bad())]
    check_share(config, bad)
    kind = pa.list_(pa.uint16()) if config.pretokenized else pa.large_string()
    assert all(array.type == kind and 0 < len(array) <= 2 * formats.BATCH_ROWS for array in arrays)
    return [document for array in arrays for document in array.to_pylist()], bad


def refusal(source: Path | str, **data: Any) -> str:
    with pytest.raises(NanodlmError) as caught:
        read(source, **data)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def table_bytes(kind: str, table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    if kind == "parquet":
        pq.write_table(table, sink)
    else:
        with (pa.ipc.new_file if kind == "file" else pa.ipc.new_stream)(sink, table.schema) as writer:
            writer.write_table(table)
    return sink.getvalue().to_pybytes()


def contents(texts: list[str]) -> dict[str, bytes]:
    """The same texts in a file of each format, beside a field that holds values of all kinds where that can be."""
    others: list[Any] = [None, {"a": 1}, 7, "seven", [float("nan")], "\ud800", 10**30]
    objects = [{"text": text, "other": others[i % 7]} for i, text in enumerate(texts)]
    rows = [json.dumps(row, ensure_ascii=row["other"] == "\ud800").encode() for row in objects]
    quoted = "".join(f'"{text.replace(chr(34), chr(34) * 2)}",{i}\r\n' for i, text in enumerate(texts))
    table = pa.table({"other": pa.nulls(len(texts)), "text": texts})
    return {
        "a.jsonl": b"\n".join(rows),
        "a.NDJSON": b"\r\n\r\n".join(rows) + b"\n",
        "lines.json": BOM + b"\n".join(rows),
        "array.json": BOM + b" [" + b" ,\n".join(rows) + b"]\n",
        "a.csv": BOM + b"text,other\r\n" + quoted.encode(),
        "a.parquet": table_bytes("parquet", table),
        "stream.arrow": table_bytes("stream", table),
        "file.Arrow": table_bytes("file", table),
    }


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("name", contents([]))
def test_texts_are_what_they_were_in_every_format_whatever_other_fields_hold(
    tmp_path: Path, name: str, packing: str
) -> None:
    path = tmp_path / (name + packing)
    path.write_bytes(PACKERS[packing](contents(ODD)[name]))
    texts, bad = read(path)
    assert texts == ODD
    assert (bad.rows, bad.counts) == (len(ODD), {})


@pytest.mark.parametrize("packing", PACKERS)
def test_a_text_file_is_kept_byte_for_byte_but_for_a_mark_at_its_beginning(tmp_path: Path, packing: str) -> None:
    text = "one\r\n\u2028two\x0c\x00\r\n\r\n\n\ufeffthree"
    path = tmp_path / f"a.TXT{packing}"
    path.write_bytes(PACKERS[packing](BOM + text.encode()))
    assert read(path)[0] == [text]
    lines, bad = read(path, sample_by="line")
    assert lines == ["one\r", "\u2028two\x0c\x00\r", "\ufeffthree"]
    assert bad.counts == {"empty": 2}
    assert read(path, sample_by="paragraph")[0] == ["one\r\n\u2028two\x0c\x00\r", "\ufeffthree"]


LISTS = [pa.list_, pa.large_list, lambda kind: pa.list_(kind, 3)]


@pytest.mark.parametrize("kind", [pa.int8(), pa.uint16(), pa.int64(), pa.uint64()], ids=str)
def test_token_ids_in_lists_of_any_kind_are_the_same(tmp_path: Path, kind: pa.DataType) -> None:
    for i, make in enumerate(LISTS):
        tokens = pa.array([[1, 2, 3], [0, 127, 5]], make(kind))
        (tmp_path / f"{i}.arrow").write_bytes(table_bytes("stream", pa.table({"tokens": tokens})))
        assert read(tmp_path / f"{i}.arrow", column="tokens", pretokenized=True)[0] == [[1, 2, 3], [0, 127, 5]]


@pytest.mark.parametrize("size", [7, 8, 9, 64])
def test_an_array_is_the_same_wherever_its_pieces_end(
    tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "CHUNK", size)
    texts = ["é\u2028 ,]", "", '"\\', "three"]
    (tmp_path / "a.json").write_text(f"\n [{{}},{json.dumps([{'text': t} for t in texts], ensure_ascii=False)[1:]}\n ")
    found, bad = read(tmp_path / "a.json", max_bad=0.3)
    assert (found, bad.counts) == ([t for t in texts if t], {"without 'text'": 1, "empty": 1})


def test_a_field_of_a_field_is_named_with_a_dot(tmp_path: Path) -> None:
    rows: list[Any] = [{"meta": {"text": "one", "id": 1}}, {"meta": {"text": "two", "id": None}}]
    for name, content in {
        "a.jsonl": "\n".join(map(json.dumps, rows)).encode(),
        "a.parquet": table_bytes("parquet", pa.Table.from_pylist(rows)),
        "a.arrow": table_bytes("stream", pa.Table.from_pylist(rows)),
        "b.parquet": table_bytes("parquet", pa.table({"meta.text": ["one", "two"]})),
        "b.csv": b"meta.text\none\ntwo",
    }.items():
        (tmp_path / name).write_bytes(content)
        assert read(tmp_path / name, column="meta.text")[0] == ["one", "two"], name
        says = "has no column 'meta.title' but ["
        assert says in refusal(tmp_path / name, column="meta.title"), name


def test_rows_that_are_no_documents_are_counted_by_reason_and_named_by_file_and_line(tmp_path: Path) -> None:
    lines = [b'{"text": "one"}', b'{"text": null}', b"", b'{"other": 1}', b'{"text": "tw', b'{"text": ""}', b"[1]"]
    lines += [b'{"text": ["a"]}', b'{"text": 12}', b'{"text": "\\ud800"}', b'{"text": "caf\xe9"}', b'{"text": "two"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    texts, bad = read(tmp_path / "a.jsonl", max_bad=0.9)
    assert texts == ["one", "two"]
    what = {"null": 1, "without 'text'": 1, "not JSON": 1, "empty": 1, "not a JSON object": 1}
    assert bad.counts == {**what, "list instead of a text": 1, "int instead of a text": 1, "not UTF-8": 2}
    assert (bad.rows, bad.total) == (11, 8)
    url = f"file://{tmp_path}/a.jsonl"
    reasons = {2: "null", 4: "without 'text'", 5: "not JSON", 7: "not a JSON object"}
    assert bad.first[:4] == [f"{url}:{line}: {why}" for line, why in reasons.items()]
    (tmp_path / "a.csv").write_bytes(b'id,text\n1,"one\n"\n2\n3,caf\xe9\n4,"a"b\n5,two\n6,"never closed\n7,three')
    texts, bad = read(tmp_path / "a.csv", max_bad=0.9)
    assert texts == ["one\n", "two"]
    assert [line.rpartition(":")[0].rpartition(":")[2] for line in bad.first] == ["4", "5", "6", "8"]
    assert bad.first[0].endswith(":4: without 'text'") and bad.first[1].endswith(":5: not UTF-8")


def test_columns_say_which_of_their_rows_are_no_documents(tmp_path: Path) -> None:
    valid, offsets, data = pa.array([b"one", b"caf\xe9", b"", None, b"two"], pa.binary()).buffers()
    texts = pa.StringArray.from_buffers(5, offsets, data, valid)
    lists = pa.array([[1, 2], [3, None], [], None, [4]], pa.list_(pa.int32()))
    pairs = pa.array([[1, 2], None, [3, None], [4, 5], [6, 7]], pa.list_(pa.int32(), 2))
    for kind in ("parquet", "stream"):
        path = tmp_path / f"a.{kind.replace('stream', 'arrow')}"
        path.write_bytes(table_bytes(kind, pa.table({"text": texts, "lists": lists, "pairs": pairs})))
        found, bad = read(path, max_bad=0.5)
        assert (found, bad.counts["empty"]) == (["one", "two"], 1)
        assert bad.first == [f"file://{path}:2: not UTF-8", f"file://{path}:4: null"]
        found, bad = read(path, max_bad=0.5, column="lists", pretokenized=True)
        assert found == [[1, 2], [4]]
        assert bad.counts == {"a gap (null) between ids": 1, "empty": 1, "null": 1}
        found, bad = read(path, max_bad=0.5, column="pairs", pretokenized=True)
        assert found == [[1, 2], [4, 5], [6, 7]]
        assert bad.first == [f"file://{path}:2: null", f"file://{path}:3: a gap (null) between ids"]


def test_a_share_of_bad_rows_stops_the_run_only_above_max_bad_and_empty_ones_never_do(tmp_path: Path) -> None:
    good, path = '{"text": "good"}\n', tmp_path / "a.jsonl"
    path.write_text(good * 98 + '{"text": ""}\n' * 100 + "bad\n" * 2)
    assert len(read(path)[0]) == 98
    path.write_text(good * 97 + '{"text": ""}\n' * 100 + "bad\n" * 3)
    message = refusal(path)
    assert "too many rows are no documents: 100 empty, 3 not JSON of 200 rows (file://" in message
    assert "a.jsonl:198: not JSON; " in message
    assert message.endswith("mend or leave out those, or raise --data.max_bad (0.01)")
    path.write_text(good + "bad\n" * 100_000)  # of which most is not read
    assert int(refusal(path).split(": ")[1].split()[0].replace(",", "")) < 50_000
    (tmp_path / "b.txt").write_bytes("café au lait".encode("latin-1"))
    message = refusal(tmp_path / "b.txt")
    assert f"1 not UTF-8 of 1 rows (file://{tmp_path}/b.txt:1: not UTF-8); check --data.column, and that" in message


@pytest.mark.parametrize(
    ("value", "pretokenized", "says"),
    [
        (["a", "b"], False, "holds list<item: string>, not texts; set --data.column"),
        ([1, 2], False, "holds list<item: int64>, not texts; set --data.column, or --data.pretokenized True"),
        ({"n": 1}, False, "holds struct<n: int64>, not texts; set --data.column to a field of it, such as text.n"),
        (12, False, "holds int64, not texts; set --data.column"),
        (["a", "b"], True, "holds list<item: string>, not lists of token ids; set --data.column"),
        ([1.5], True, "holds list<item: double>, not lists of token ids; set --data.column"),
        ("text", True, "holds string, not lists of token ids; set --data.column, or leave out --data.pretokenized"),
        (12, True, "holds int64, not lists of token ids; set --data.column"),
        (
            [1, 70_000],
            True,
            ":1 holds token id 70000, but bytes has ids 0 to 256: check --data.tokenizer and --data.column",
        ),
        ([1, -1], True, ":1 holds token id -1, but bytes"),
        ([None, 257], True, ":1 holds token id 257, but bytes"),
    ],
)
def test_a_column_of_another_kind_is_refused_in_a_line(
    tmp_path: Path, value: Any, pretokenized: bool, says: str
) -> None:
    for kind in ("parquet", "arrow"):
        path = tmp_path / f"a.{kind}"
        path.write_bytes(table_bytes(kind, pa.table({"text": [value]})).replace(b"list<element", b"list<item"))
        message = refusal(path, pretokenized=pretokenized).replace("element:", "item:")
        assert message.endswith(says) if says.startswith("holds") else says in message
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": None}) + "\n" + json.dumps({"text": value}) + "\n")
    message = refusal(tmp_path / "a.jsonl", pretokenized=pretokenized)
    assert message.endswith(says) if says.startswith("holds") else says.replace(":1 ", ":2 ") in message


def test_numbers_with_fractions_are_no_token_ids(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": [1.5]}\n{"text": [1.0]}\n{"text": [true]}\n{"text": [1]}\n{"text": 3}')
    rows, bad = read(tmp_path / "a.jsonl", pretokenized=True, max_bad=1)
    assert (rows, bad.counts) == ([[1]], {"no list of token ids": 4})


def test_an_empty_table_among_others_holds_no_rows(tmp_path: Path) -> None:
    for i, texts in enumerate([["one"], [], ["two"]]):
        table = pa.table({"text": pa.array(texts, pa.string())})
        for kind in ("parquet", "arrow"):
            (tmp_path / f"{i}.{kind}").write_bytes(table_bytes(kind, table))
    assert read(tmp_path / "*.parquet")[0] == read(tmp_path / "*.arrow")[0] == ["one", "two"]


def test_a_folder_that_datasets_saved_is_read_without_its_caches(tmp_path: Path) -> None:
    for i, text in enumerate(["one", "two"]):
        (tmp_path / f"data-{i:05d}-of-00002.arrow").write_bytes(table_bytes("stream", pa.table({"text": [text]})))
    (tmp_path / "cache-0123456789abcdef.arrow").write_bytes(table_bytes("stream", pa.table({"text": ["mapped"]})))
    (tmp_path / "state.json").write_text('{"_data_files": [{"filename": "data-00000-of-00002.arrow"}]}')
    (tmp_path / "dataset_info.json").write_text("{}")
    assert read(tmp_path)[0] == ["one", "two"]


def test_a_link_and_its_target_are_read_once(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("b")
    for name in ("a.txt", "c.txt"):
        (tmp_path / name).symlink_to(tmp_path / "b.txt")
    assert read(tmp_path)[0] == ["b"]
    assert identity(tiny_config(tmp_path).data) == identity(tiny_config(tmp_path / "b.txt").data)


def test_files_inside_an_archive_are_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "all.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.txt", "a")
        archive.writestr("sub/b [1].md", "b")
        archive.writestr("c.parquet", table_bytes("parquet", pa.table({"text": ["c"]})))
        archive.writestr("picture.png", "no text")
    inside = f"{tmp_path}/all.zip"
    assert read(f"zip://*.txt::{inside}")[0] == ["a"]
    assert read(f"zip://::{inside}")[0] == ["a", "c", "b"]
    assert read(f"zip://sub/b [1].md::{inside}")[0] == ["b"]
    with_hash = identity(tiny_config(f"zip://a.txt::{inside}").data)
    (tmp_path / "a.txt").write_text("a")
    assert with_hash == identity(tiny_config(tmp_path / "a.txt").data)
    assert refusal(f"zip://{inside}").endswith("say which files of which archive: zip://*.txt::texts.zip")
    assert "no file matches" in refusal(f"zip://*.csv::{inside}")


class Files(Quiet):
    """A server of a few files, without ranges, as the simplest ones are."""

    bodies: ClassVar = {
        "/a.txt": "é\r\n".encode() * 4_000_000,
        "/b.JSONL.gz": gzip.compress(b'{"text": "packed"}\n'),
        "/c.parquet": table_bytes("parquet", pa.table({"text": ["columns"]})),
    }

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if path not in self.bodies:
            self.send_error(int(path[1:4]))
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.bodies[path])))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(self.bodies[path])

    do_HEAD = do_GET


@pytest.fixture(scope="module")
def web() -> Iterator[str]:
    with serving(Files) as address:
        yield address


def test_files_on_a_web_server_are_read_and_its_refusals_are_told(web: str) -> None:
    assert read(f"{web}/a.txt")[0] == [Files.bodies["/a.txt"].decode()]
    assert read(f"{web}/b.JSONL.gz?download=1")[0] == ["packed"]
    assert read(f"{web}/c.parquet?download=1")[0] == ["columns"]
    assert "no file matches" in refusal(f"{web}/404.txt")
    for status, says in {403: "HTTP 403 Forbidden", 500: "HTTP 500 Internal Server Error", 503: "HTTP 503"}.items():
        assert f"cannot list {web}/{status}.txt: {says}" in refusal(f"{web}/{status}.txt")
    assert "Connect call failed" in refusal("http://127.0.0.1:1/a.txt")


def test_files_in_a_bucket_are_read_and_one_that_is_missing_is_told(
    moto_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    moto_server.enter(monkeypatch)
    fs = fsspec.filesystem("s3", skip_instance_cache=True)
    folder = f"{moto_server.store}/texts"
    fs.pipe_file(f"{folder}/a.txt", "é\r\n".encode())
    fs.pipe_file(f"{folder}/b.parquet", table_bytes("parquet", pa.table({"text": ["columns"]})))
    assert read(f"{folder}/*.txt")[0] == ["é\r\n"]
    assert read(folder)[0] == ["é\r\n", "columns"]
    for name in ("a.txt", "*.txt"):
        assert "The specified bucket does not exist" in refusal(f"s3://no-such-bucket/{name}")
    assert "no file matches" in refusal(f"{folder}/absent.txt")


MEASURE = """
import sys
from nanodlm.bench.memory import peak_memory
from nanodlm.data.readers import Bad, read_documents
from tests.support.helpers import tiny_config
data = tiny_config(sys.argv[1], column="tokens", pretokenized=True, tokenizer="gpt2").data
before = peak_memory()
rows = sum(len(array) for array in read_documents(data, ["file://" + sys.argv[1]], Bad()))
print(rows, (peak_memory() - before) // 1_000_000)
"""


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_memory_does_not_grow_with_a_row_group(tmp_path: Path, kind: str) -> None:
    rows, path = 100_000, tmp_path / f"a.{kind}"
    ids = pa.array(range(512), pa.uint16())
    flat = pa.concat_arrays([ids] * rows)
    tokens = pa.ListArray.from_arrays(pa.array(range(0, 512 * rows + 1, 512), pa.int32()), flat)
    batch = pa.record_batch({"tokens": tokens})
    if kind == "parquet":
        options = {"row_group_size": rows, "use_dictionary": False, "compression": "none"}
        pq.write_table(pa.Table.from_batches([batch]), path, **options)
    else:
        with pa.ipc.new_stream(str(path), batch.schema) as writer:
            writer.write_batch(batch)
    assert path.stat().st_size > 100e6
    run = subprocess.run([sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True)
    read_rows, megabytes = map(int, run.stdout.split())
    assert read_rows == rows
    assert megabytes < 80
