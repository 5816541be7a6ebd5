"""Secrets stay in the environment, and what others have put into a store can do no harm."""

import base64
import json
import pickle
import re
import shutil
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import fsspec
import numpy as np
import pytest
from flax import nnx
from obstore import exceptions

import nanodlm
from nanodlm.checkpoints.finding import find_checkpoint
from nanodlm.checkpoints.loading import parameters_sha256
from nanodlm.cli import main
from nanodlm.config import refuse_secrets
from nanodlm.errors import Damaged, NanodlmError, UsageError, redact
from nanodlm.stages import run as stages_run
from nanodlm.stages import table
from nanodlm.store import Artifact, Store, bucket, new_attempt, sealed
from nanodlm.store.disk import describe
from nanodlm.store.manifest import digest_of
from tests.support import commands
from tests.support.helpers import committed, copied, fill
from tests.support.servers import Server
from tests.support.training import tiny

ROOT = Path(nanodlm.__file__).parents[1]
PLANTED = {
    "AWS_ACCESS_KEY_ID": "AKIAPLANTED7KEY0IDXY",
    "AWS_SECRET_ACCESS_KEY": "planted/secret+key/0123456789abcdef01234",
    "AWS_SESSION_TOKEN": "planted-session-token-77f1",
    "HF_TOKEN": "hf_plantedhubtoken4711",
    "WANDB_API_KEY": "4d" * 20,
    "PREFECT_API_AUTH_STRING": "planted-user:planted-prefect-password",
}


def written_forms(secret: str) -> set[bytes]:
    """How a secret may stand in a file."""
    plain = secret.encode()
    return {plain, quote(secret, safe="").encode(), base64.b64encode(plain), json.dumps(secret)[1:-1].encode()}


def leaks(*texts: bytes | str) -> list[str]:
    """Names of the planted secrets that stand in any of these."""
    found = [text.encode() if isinstance(text, str) else text for text in texts]
    return [n for n, secret in PLANTED.items() if any(form in text for form in written_forms(secret) for text in found)]


def below(folder: Path) -> Iterator[bytes]:
    """Names and bytes of all files below a folder."""
    for path in folder.rglob("*"):
        yield str(path).encode()
        if path.is_file():
            yield path.read_bytes()


def in_bucket(url: str) -> Iterator[bytes]:
    """Names and bytes of all files in a bucket."""
    fs, root = fsspec.url_to_fs(url, use_listings_cache=False)
    for path in fs.find(root):
        yield str(path).encode()
        yield fs.cat_file(path)


@pytest.fixture
def planted(moto_server: Server, tmp_path: Path) -> dict[str, str]:
    """An environment with a secret in every place, whose folders are the test's own."""
    home, scratch = tmp_path / "home", tmp_path / "tmp"
    home.mkdir()
    scratch.mkdir()
    own = {
        "HOME": str(home),
        "TMPDIR": str(scratch),
        "NANODLM_CACHE": str(home / "cache"),
        "PREFECT_HOME": str(home / "prefect"),
        "WANDB_MODE": "offline",
        "AWS_ENDPOINT_URL": moto_server.endpoint,
        "AWS_DEFAULT_REGION": "us-east-1",
        "NANODLM_RETRY_SECONDS": "1",
    }
    return {**PLANTED, **own}


# Nothing that is planted comes out


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_commands_and_the_orchestrator_leave_no_secret_anywhere(
    planted: dict[str, str], s3_environment: None
) -> None:
    fsspec.filesystem("s3").mkdir("commands")
    home, store, outputs = Path(planted["HOME"]), "s3://commands/runs", []
    config = tiny(exp={"use_wandb": True, "save_every": 100})
    (home / "config.json").write_text(config.model_dump_json())

    def run(*words: str, code: int = 0) -> None:
        done = commands.nanodlm(*words, cwd=home, PYTHONPATH=str(ROOT), PREFECT_LOGGING_LEVEL="INFO", **planted)
        assert done.returncode == code, done.stderr
        outputs.extend((done.stdout, done.stderr))

    configured = ("config.json", "--store", store)
    run("run", *configured, "--until", "shard")
    for command in ("train", "evaluate", "sample"):
        run(command, *configured, "--events", f"{command}.jsonl")
    run("run", *configured, "--json")
    for command in ("verify", "doctor"):
        run(command, "--store", store)
    run("copy", store, str(home / "copy"))
    run("run", "config.json", "--store", "s3://no-such-bucket/runs", "--until", "split", "--debug", code=1)
    run("run", *configured, "--model.seq_len", "10000000", "--debug", code=1)  # fails in a flow
    assert leaks(*outputs) == []
    kept = list(in_bucket(store))
    assert any(b"report.html" in text for text in kept)
    assert leaks(*kept) == []
    assert list(home.glob("prefect/*.db"))
    assert list(home.rglob("*.wandb"))
    assert leaks(*below(home.parent)) == []


@pytest.fixture
def inside(planted: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The planted environment in this process."""
    for name, value in planted.items():
        monkeypatch.setenv(name, value)
    fsspec.filesystem("s3", skip_instance_cache=True).clear_instance_cache()  # they remember older credentials
    yield
    fsspec.filesystem("s3", skip_instance_cache=True).clear_instance_cache()


def failing(capsys: pytest.CaptureFixture[str], *words: str, code: int = 1) -> str:
    """What a command says that fails, with its traceback."""
    with pytest.raises(SystemExit) as ended:
        main.main([*words, "--debug"])
    out, error = capsys.readouterr()
    assert ended.value.code == code, (out, error)
    assert "Traceback" in error
    return f"{out}\n{error}"


@pytest.mark.usefixtures("inside")
def test_refused_credentials_are_not_repeated(
    seaweedfs_server: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """SeaweedFS checks keys, and does not know these."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", seaweedfs_server.endpoint)
    for words in (["ls", "--store", "s3://refused/x"], ["copy", "s3://refused/x", str(tmp_path / "copy")]):
        text = failing(capsys, *words)
        assert "refuses access" in text
        assert leaks(text) == []
    committed(Store(str(tmp_path / "own")), {"x": b"one"})
    assert leaks(failing(capsys, "copy", str(tmp_path / "own"), "s3://refused/x")) == []


def test_a_missing_bucket_or_server_is_named_without_secrets(
    inside: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    committed(Store(str(tmp_path / "own")), {"x": b"one"})
    text = failing(capsys, "copy", str(tmp_path / "own"), "s3://missing-bucket/x")
    assert "cannot write to the store s3://missing-bucket/x" in text
    assert leaks(text, failing(capsys, "doctor", "--store", "s3://missing-bucket/x")) == []
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://someone:{PLANTED['HF_TOKEN']}@127.0.0.1:9")
    fsspec.filesystem("s3", skip_instance_cache=True).clear_instance_cache()
    text = failing(capsys, "ls", "--store", "s3://missing-bucket/x")
    assert "does not answer" in text
    assert leaks(text) == []


SECRET = "planted9secret/with+slash"  # what is typed where it does not belong
ADDRESSES = [
    f"s3://AKIAKEY:{SECRET}@bucket/x",
    f"https://me:{SECRET}@example.org/x.txt",
    f"https://example.org/x.txt?token={SECRET}",
    f"https://example.org/x.txt?part=1&X-Amz-Signature={SECRET}",
    f"https://example.org/x.txt?sig={SECRET}",
    f"https://example.org/x.txt?AUTH={SECRET}",
    f"simplecache::https://me:{SECRET}@example.org/x.txt",
    f"zip://*.txt::https://example.org/x.zip?api_key={SECRET}",
    f"https://example.org/x?part=1#access_token={SECRET}",
    f"https://example.org/x;jsessionid={SECRET}",
    f"https://example.org/x?%70wd={SECRET}",
]
SECRET_NAMES = """code jwt pwd hmac pass sas sig bearer session sid otp cookie userPass user_pass passcode passphrase
 key apiKey AWSAccessKeyId X-Amz-Credential authorization oauth sessionId PHPSESSID access_code id_token""".split()
INNOCENT_NAMES = """author authors authority keyword keyboard monkey passage bypass compass encode encoding code_size
 country_code tokenizer design signal session_type sass part""".split()


@pytest.mark.parametrize("name", SECRET_NAMES)
def test_a_secret_is_known_by_many_names_behind_any_mark(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for given in (f"?{name}", f"#{name}", f"?n=1&{name}", f"?n=1#{name}", f";{name}", f"?{name.upper()}"):
        with pytest.raises(UsageError, match="credentials come from the environment only"):
            refuse_secrets(f"https://example.org/x{given}={SECRET}")
        assert redact(f"no {given}={SECRET} there") == f"no {given}=*** there"
    monkeypatch.setenv(name.upper(), "planted-in-a-variable")
    assert str(NanodlmError("told planted-in-a-variable")) == "told ***"


@pytest.mark.parametrize("name", INNOCENT_NAMES)
def test_a_name_that_only_sounds_like_a_secret_is_left_alone(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    address = f"https://example.org/x?n=1&{name}=something#{name}=other"
    assert refuse_secrets(address) == address
    monkeypatch.setenv(name.upper(), "not-so-secret")
    said = f"cannot read {address} not-so-secret with --model.code=12345678"
    assert redact(said) == said


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_with_secrets_is_refused_and_not_repeated(address: str) -> None:
    for read in (nanodlm.load, find_checkpoint, Store, lambda uri: tiny(data={"source": uri}), refuse_secrets):
        with pytest.raises((UsageError, ValueError), match="credentials come from the environment only") as caught:
            read(f"{address}/train/abcdef12")
        assert "planted9secret" not in "".join(traceback.format_exception(caught.value))


def test_every_command_refuses_an_address_with_secrets_and_does_not_repeat_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = ADDRESSES[0]
    for command in (
        ["ls", "--store", address],
        ["plan", "--store", address],
        ["train", "--exp.resume_path", f"{address}/step_1"],
        ["run", "--store", str(tmp_path), "--data.source", address],
        ["show", f"{address}/train/f0"],
        ["verify", f"{address}/train/f0", "--store", str(tmp_path)],
        ["copy", address, str(tmp_path / "copy")],
    ):
        text = failing(capsys, *command, code=2)
        assert "credentials come from the environment only" in text, command
        assert "planted9secret" not in text, command
    monkeypatch.setenv("NANODLM_STORE", address)
    for command in (["ls"], ["train"], ["gc"]):
        assert "planted9secret" not in failing(capsys, *command, code=2)
    with pytest.raises(SystemExit):
        main.main(["ls", "--help"])
    assert "planted9secret" not in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    "address", ["data/store", "s3://bucket/prefix", "http://host:8080/a@b.txt?part=1", "zip://*.txt::s3://b/c.zip"]
)
def test_an_address_without_secrets_is_left_as_it_is(address: str) -> None:
    assert refuse_secrets(address) == address
    assert redact(f"cannot read {address}") == f"cannot read {address}"


@pytest.mark.parametrize("kind", ["AlreadyExistsError", "NotFoundError", "GenericError", "PermissionDeniedError"])
def test_what_a_server_answers_is_quoted_without_the_credentials_of_its_address(kind: str) -> None:
    said = "Error performing PUT http://me:mine@host:1/bucket/x in 3ms - Server returned non-2xx status code: 409"
    with pytest.raises(OSError, match=r"http://\*\*\*@host") as told, bucket._as_of_a_disk():
        raise getattr(exceptions, kind)(said)
    assert "mine" not in str(told.value)


def test_an_error_leaves_out_what_the_environment_keeps_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "a-key-of-some-length")
    monkeypatch.setenv("SOME_KEY_FILE", "/home/me/key.json")
    error = NanodlmError("403 for a-key-of-some-length from /home/me/key.json at http://me:pw@host/?X-Token=abc&n=1")
    assert str(error) == "403 for *** from /home/me/key.json at http://***@host/?X-Token=***&n=1"


# Paths in manifests


def edit(artifact: Artifact, **fields: Any) -> None:
    """Change a manifest as its writer would."""
    manifest = {**artifact.manifest, **fields}
    manifest["digest"] = digest_of(manifest["files"], [])
    Path(artifact.uri, "manifest.json").write_text(json.dumps(sealed(manifest)))


@pytest.mark.parametrize("name", ["..", "../x", "/etc", "a/b", "a\\b", "a\0b", "", "a\n", "."])
def test_an_attempt_an_input_or_its_stage_that_leaves_the_store_is_refused(store: Store, name: str) -> None:
    artifact = committed(store, {"a.bin": b"a"})
    odd_stage = {name: {"fingerprint": "f1", "digest": "0"}}
    odd_fingerprint = {"train": {"fingerprint": name, "digest": "0"}}
    for fields in ({"attempt": name}, {"inputs": odd_stage}, {"inputs": odd_fingerprint}):
        edit(artifact, **fields)
        with pytest.raises(Damaged, match="leaves"):
            store.find("shard", "f0")


MISSHAPEN = [{"files": [{"path": 1}]}, {"files": ["x"]}, {"inputs": {"a": "b"}}, {"attempt": 1}, {"volatile": 1}]


@pytest.mark.parametrize("fields", MISSHAPEN)
def test_a_sealed_manifest_of_the_wrong_shape_is_refused(store: Store, fields: dict[str, Any]) -> None:
    manifest = sealed({**committed(store, {"a.bin": b"a"}).manifest, **fields})
    Path(store.path("shard", "f0", "manifest.json")).write_text(json.dumps(manifest))
    with pytest.raises(Damaged, match=r"shard/f0/manifest\.json"):
        store.find("shard", "f0")


@pytest.mark.parametrize("path", ["../../../../x", "/etc/hostname", "a/../../x", "a\\..\\x", "a\0b", ""])
def test_a_file_that_leaves_its_artifact_is_neither_read_nor_copied(store: Store, tmp_path: Path, path: str) -> None:
    artifact = committed(store, {"a.bin": b"a"})
    edit(artifact, files=[{**artifact.manifest["files"][0], "path": path}])
    target, found = Store(str(tmp_path / "target" / "store")), store.open("shard/f0")
    for use in (lambda: copied(store, target), found.local, lambda: found.problems(deep=True)):
        with pytest.raises(NanodlmError, match="leaves its artifact"):
            use()
    assert [p for p in (tmp_path / "target").rglob("*") if p.is_file()] == []


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_link_out_of_an_artifact_is_refused_even_to_equal_bytes(store: Store, tmp_path: Path, kind: str) -> None:
    artifact = committed(store, {"sub/a.bin": b"private"})
    inside, outside = Path(artifact.remote("sub/a.bin")), tmp_path / "outside"
    outside.mkdir()
    inside.rename(outside / "a.bin")
    if kind == "file":
        inside.symlink_to(outside / "a.bin")
    else:
        inside.parent.rmdir()
        inside.parent.symlink_to(outside)
    for deep in (False, True):
        assert artifact.problems(deep=deep)["sub/a.bin"].startswith("is ")
    with pytest.raises(Damaged, match=r"is a link, which may leave its artifact|is missing"):
        artifact.local()


def test_a_store_or_an_artifact_may_itself_lie_behind_a_link(store: Store, tmp_path: Path) -> None:
    artifact = committed(store, {"a.bin": b"a"})
    Path(artifact.uri).rename(tmp_path / "other-disk")
    Path(artifact.uri).symlink_to(tmp_path / "other-disk")
    Path(tmp_path / "name").symlink_to(store.root)
    assert Store(str(tmp_path / "name")).open("shard/f0").check(deep=True).digest == artifact.digest


def test_a_part_that_is_a_link_out_of_the_store_is_not_adopted(store: Store, tmp_path: Path) -> None:
    with new_attempt(store, "shard", "f0") as attempt:
        fill(attempt, {"a.bin": b"private"})
        attempt.finish("a", ["a.bin"])
    (attempt.path / "a.bin").rename(tmp_path / "a.bin")
    (attempt.path / "a.bin").symlink_to(tmp_path / "a.bin")
    with new_attempt(store, "shard", "f0") as later:
        assert later.adopt("a") is None


# Nothing is unpickled


class Malice:
    """Creates a file when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return nanodlm.train(tiny(), str(tmp_path_factory.mktemp("store")))


def test_a_checkpoint_from_others_is_loaded_without_running_what_it_holds(trained: Artifact, tmp_path: Path) -> None:
    mark, folder = tmp_path / "executed", tmp_path / "theirs"
    malice = pickle.dumps(Malice(mark))
    pickle.loads(malice)
    assert mark.exists(), "it does run when it is unpickled"
    mark.unlink()
    shutil.copytree(trained.local(), folder)
    for place in (folder, folder / "tokenizer", *(p for p in (folder / "checkpoints").rglob("*") if p.is_dir())):
        for name in ("evil.pkl", "pytree.pkl", "model.pickle", "checkpoint.pt", "__init__.py", "descriptor.pbtxt"):
            if not (place / name).exists():
                content = f"open({str(mark)!r}, 'w')".encode() if name.endswith(".py") else malice
                (place / name).write_bytes(content)
    ours, _ = nanodlm.load(trained.uri)
    model, tokenizer = nanodlm.load(f"{folder}/checkpoints/step_{trained.metrics['updates']:06d}")
    assert tokenizer.n_vocab == 257
    assert parameters_sha256(nnx.state(model)) == parameters_sha256(nnx.state(ours))
    assert not mark.exists()


@pytest.mark.parametrize("name", ["model_state", "_METADATA", "tokenizer.json", "ranks.tiktoken", "config.json"])
def test_a_pickle_in_the_place_of_a_checkpoints_file_is_an_error_and_is_not_run(
    trained: Artifact, tmp_path: Path, name: str
) -> None:
    mark, folder = tmp_path / "executed", tmp_path / "theirs"
    shutil.copytree(trained.local(), folder)
    step = folder / "checkpoints" / f"step_{trained.metrics['updates']:06d}"
    for path in [p for p in folder.rglob("*") if p.is_file() and name in p.parts]:
        path.write_bytes(pickle.dumps(Malice(mark)))
    with pytest.raises(Exception):  # noqa: B017  # whatever it is, it is no execution
        nanodlm.load(str(step))
    assert not mark.exists()


def test_arrays_of_objects_are_not_read(store: Store, tmp_path: Path) -> None:
    mark, config = tmp_path / "executed", tiny()
    for name in table.until("split"):
        split, _ = stages_run.run_stage(name, config, store)
    np.save(Path(split.remote("validation.npy")), np.array([Malice(mark)], dtype=object), allow_pickle=True)
    with pytest.raises(Damaged):
        stages_run.run_stage("shard", config, store)
    # Whoever writes the manifest as well is read no further than the header.
    path = Path(split.remote("validation.npy"))
    record = describe(path.parent, path.name)
    edit(split, files=[record, *(f for f in split.manifest["files"] if f["path"] != path.name)])
    with pytest.raises(ValueError, match="allow_pickle=False"):
        stages_run.run_stage("shard", config, store)
    assert not mark.exists()


def test_no_module_can_unpickle() -> None:
    banned = (
        r"\b(c?[Pp]ickle|cloudpickle|dill|joblib|marshal|shelve|torch\.load)\b|allow_pickle\s*=\s*True|\b(eval|exec)\("
    )
    paths = [*(Path(nanodlm.__file__).parent).rglob("*.py"), *Path(nanodlm.__file__).parents[1].glob("flows/*.py")]
    assert len(paths) > 50
    for path in paths:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert not re.search(banned, line), f"{path.name}:{number}: {line}"
            assert "np.load(" not in line or "allow_pickle=False" in line, f"{path.name}:{number}: {line}"
