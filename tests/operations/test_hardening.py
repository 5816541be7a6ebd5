"""A Prefect server that is closed to others: authentication, forged requests, PostgreSQL, old runs."""

import base64
import shutil
import socket
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.operations.conftest import AUTH, SERVER, Site
from tests.operations.test_automations import ENDS, calls_told, notify, receiver
from tests.store.test_secrets import below, written_forms
from tests.support import servers
from tests.support.commands import nanodlm, result_of, speeches, tiny_flags

pytestmark = pytest.mark.slow  # whole servers, with all their services


def answer(url: str, method: str = "GET", auth: str = "", **headers: str) -> int:
    """Return the status of a plain request."""
    if auth:
        headers["Authorization"] = "Basic " + base64.b64encode(auth.encode()).decode()
    body = b"{}" if method == "POST" else None
    request = urllib.request.Request(url, body, {"Content-Type": "application/json", **headers}, method=method)
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as response:
            return response.status
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def test_a_server_with_authentication_answers_nobody_else_at_no_other_address(whole: Site) -> None:
    url = whole.environ["PREFECT_API_URL"]
    assert answer(f"{url}/health") == answer(f"{url}/ready") == 200  # which say nothing but that it is there
    for path in ("/admin/settings", "/admin/version", "/automations/count", "/block_types/slug/webhook"):
        assert answer(url + path) == 401
        assert answer(url + path, auth="operator:wrong") == 401
    assert answer(f"{url}/admin/version", auth=AUTH) == 200
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.2", urlsplit(url).port), timeout=5)


def test_a_run_with_the_password_in_its_environment_works_and_writes_it_nowhere(whole: Site, tmp_path: Path) -> None:
    arguments = ("run", "--store", str(tmp_path / "store"), "--until", "tokenizer", *tiny_flags())
    own = {**whole.environ, "HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    done = nanodlm(*arguments, **own, PREFECT_LOGGING_LEVEL="INFO")
    assert done.returncode == 0, done.stderr
    assert "tokenizer  built" in done.stdout
    own["PREFECT_API_AUTH_STRING"] = "a:bad-one"
    refused = nanodlm(*arguments, "--rebuild", "tokenizer", **own)
    assert (refused.returncode, len(refused.stderr.strip().splitlines())) == (1, 1)
    assert "refuses access: set PREFECT_API_AUTH_STRING" in refused.stderr
    texts = [text.encode() for run in (done, refused) for text in (run.stdout, run.stderr)]
    kept = [*below(whole.home), *below(tmp_path)]
    assert any(b"prefect.db" in text for text in kept)
    for secret in (AUTH, AUTH.partition(":")[2], "a:bad-one"):
        assert not any(form in text for form in written_forms(secret) for text in (*texts, *kept))


def test_a_key_for_one_bucket_is_enough_to_build_and_one_that_only_reads_to_use_what_is_there(
    seaweedfs_server: servers.Server, prefect_server: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seaweedfs_server.enter(monkeypatch)
    store = f"{seaweedfs_server.store}/least-privilege"
    builder, reader = ({"AWS_ACCESS_KEY_ID": f"nanodlm-{name}"} for name in ("builder", "reader"))
    words = ("run", "--until", "download", "--data.source", *speeches(2))
    made = nanodlm(*words, "--store", store, "--json", **builder, **prefect_server)
    assert result_of(made)["stages"][0]["status"] == "built"
    assert nanodlm("gc", "--store", store, "--keep-last", "1", "--grace", "0s", **builder).returncode == 0
    assert nanodlm("verify", "--store", store, "--deep", **reader).stdout.startswith("ok ")
    for more, key in (
        (("--store", store, "--data.part_mb", "3"), reader),
        (("--store", "s3://another-bucket/x"), builder),
    ):
        refused = nanodlm(*words, *more, **key, **prefect_server)
        assert (refused.returncode, "Traceback" in refused.stderr) == (1, False), refused.stderr
        assert "refuses access" in refused.stderr.splitlines()[-1]


@pytest.mark.timeout(420)
def test_flows_run_and_notify_once_on_postgresql_with_authentication(tmp_path: Path) -> None:
    folder = Path(tempfile.mkdtemp(prefix="nanodlm-postgresql-"))
    try:
        with servers.postgresql(folder) as address:
            guarded = {**SERVER, "PREFECT_API_DATABASE_CONNECTION_URL": address}
            with servers.prefect(tmp_path, **guarded) as client, receiver() as hook:
                own = {**client, "PREFECT_API_AUTH_STRING": AUTH}
                notify(own, hook.url, tmp_path)
                assert calls_told(own, hook) == ENDS
                arguments = ("--store", str(tmp_path / "store"), "--until", "tokenizer", "--json", *tiny_flags())
                assert len(result_of(nanodlm("run", *arguments, **own))["stages"]) == 2
                assert hook.ends() == ENDS
            assert not (tmp_path / "server" / "prefect.db").exists()
            password = servers.POSTGRESQL_PASSWORD.encode()
            assert not any(password in text for text in below(tmp_path))
    finally:
        shutil.rmtree(folder)


def test_a_request_that_another_site_could_forge_is_refused(whole: Site) -> None:
    url = f"{whole.environ['PREFECT_API_URL']}/flow_runs/count"
    assert answer(url, "POST") in (401, 403)
    assert answer(url, "POST", auth=AUTH) == 403  # a browser that knows the password would send it along
    assert whole.ask("/flow_runs/count", {}) >= 0
