"""What `nanodlm automate` installs, on a whole Prefect server that asks for authentication: it really happens."""

import http.server
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.concurrency.sync import concurrency
from prefect.events.actions import CallWebhook
from prefect.events.schemas.automations import AutomationCore
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, PREFECT_UI_URL, temporary_settings

import nanodlm
from flows import automations
from nanodlm.errors import NanodlmError, UsageError
from tests.support import servers
from tests.support.commands import environment
from tests.support.commands import nanodlm as command

pytestmark = pytest.mark.slow  # whole servers, with all their services
ROOT = Path(nanodlm.__file__).parents[1]
AUTH = "operator:planted-password-of-the-server"
PATH = "/hooks/planted-secret-of-the-webhook"  # an address that is a secret, as those of chat rooms are
FLOWS = """
import sys, time
from pathlib import Path
from prefect import flow, tags
from flows.automations import TAG, as_part


@flow(name="part")
def part(until=None):
    while until and not Path(until).exists():
        time.sleep(0.1)

@flow(name="whole")
def whole(until=None):
    with as_part():
        part(until)

@flow(name="broken")
def broken():
    raise ValueError("as told")

@flow(name="slow", timeout_seconds=0.5)
def slow():
    while True:
        time.sleep(0.01)

def run(kind, name, tagged=True, **arguments):
    try:
        with tags(*[TAG] * tagged):
            kind.with_options(flow_run_name=name)(**arguments)
    except Exception as error:
        print(type(error).__name__)
"""

CALLS = [
    'run(whole, "nightly \\"1\\"")',  # with a part in it
    'run(broken, "bad-night")',
    'run(slow, "too-slow")',
    'run(broken, "somebody-elses", tagged=False)',
    'run(part, "last")',
]
ENDS = {  # what is to be told of them: at least once, for SQLite makes the server look at an event again
    ("whole", 'nightly "1"', "Completed"),
    ("broken", "bad-night", "Failed"),
    ("slow", "too-slow", "TimedOut"),
    ("part", "last", "Completed"),
}


@dataclass
class Hook:
    """A receiver of notifications, and what it was sent."""

    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)

    def named(self, name: str) -> list[dict[str, Any]]:
        return [body for body in self.bodies if body["run"] == name]


@contextmanager
def receiver() -> Iterator[Hook]:
    """A web server that takes notifications at one secret path."""
    hook = Hook()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if (self.path, self.headers["Content-Type"]) == (PATH, "application/json"):
                hook.bodies.append(json.loads(body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            hook.url = f"http://127.0.0.1:{server.server_port}{PATH}"
            yield hook
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prefect")


@pytest.fixture(scope="module")
def server(home: Path) -> Iterator[dict[str, str]]:
    guarded = {"PREFECT_SERVER_API_AUTH_STRING": AUTH, "PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "true"}
    with servers.prefect(home, **guarded) as client:
        yield {**client, "PREFECT_API_AUTH_STRING": AUTH, "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30"}


@pytest.fixture
def client(server: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[SyncPrefectClient]:
    """A client in this process, of a server on which nothing is installed; nothing is left on it."""
    monkeypatch.delenv(automations.WEBHOOK, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with temporary_settings({PREFECT_API_URL: server["PREFECT_API_URL"], PREFECT_API_AUTH_STRING: AUTH}):
        automations.automate(remove=True)
        with get_client(sync_client=True) as client:
            yield client
        automations.automate(remove=True)


def actions(rows: list[dict[str, str]]) -> dict[str, str]:
    return {row["name"]: row["action"] for row in rows}


def until(condition: Callable[[], Any], patience: float = 60.0) -> Any:
    """The condition's value as soon as it holds."""
    deadline = time.monotonic() + patience
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.2)
    return value


def flows_run(server: dict[str, str], *calls: str) -> subprocess.Popen[str]:
    """A process of its own that runs flows."""
    code = "\n".join([FLOWS, *calls])
    env = environment(**server, PYTHONPATH=str(ROOT), PREFECT_LOGGING_LEVEL="CRITICAL")
    return subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True)


# Installing


def test_what_is_missing_is_created_what_differs_is_updated_and_the_rest_is_kept(
    client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = (automations.LOST, automations.FAILED, automations.COMPLETED)
    monkeypatch.setenv(automations.WEBHOOK, "http://127.0.0.1:9/first")
    everything = {"webhook/nanodlm": "create", **dict.fromkeys(names, "create"), "gpu": "create"}
    assert actions(automations.automate()) == everything
    before = [client.read_automations_by_name(name)[0] for name in names]
    assert actions(automations.automate()) == dict.fromkeys(everything, "keep")
    assert [client.read_automations_by_name(name)[0] for name in names] == before
    monkeypatch.setenv(automations.WEBHOOK, "http://127.0.0.1:9/second")
    changed = automations.automate(gpu_limit=3, lost_after=90)
    assert actions(changed) == everything | {
        "webhook/nanodlm": "update", names[0]: "update", names[1]: "keep", names[2]: "keep", "gpu": "update"
    }  # fmt: skip
    assert client.read_global_concurrency_limit_by_name("gpu").limit == 3
    assert client.read_automations_by_name(names[0])[0].id == before[0].id
    monkeypatch.delenv(automations.WEBHOOK)  # on a machine that does not know the address, what was installed stays
    assert set(actions(automations.automate(lost_after=90)).values()) == {"keep"}
    client.pause_automation(before[0].id)
    client.create_automation(AutomationCore(**before[1].model_dump(exclude={"id"})))
    rows = actions(automations.automate(lost_after=90))
    assert (rows[names[0]], rows[names[1]], rows["gpu"]) == ("update", "update", "keep")
    assert client.read_automations_by_name(names[0])[0].enabled
    assert len(client.read_automations_by_name(names[1])) == 1


def test_a_dry_run_changes_nothing(client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(automations.WEBHOOK, "http://127.0.0.1:9/x")
    assert set(actions(automations.automate(dry_run=True)).values()) == {"create"}
    assert client.read_automations() == []
    automations.automate()
    assert set(actions(automations.automate(remove=True, dry_run=True)).values()) == {"remove"}
    assert set(actions(automations.automate()).values()) == {"keep"}


def test_removing_takes_away_what_was_installed_and_nothing_else(
    client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(automations.WEBHOOK, "http://127.0.0.1:9/x")
    automations.automate()
    theirs = automations.lost_runs(300).model_copy(update={"name": "theirs"})
    identity = client.create_automation(theirs)
    try:
        assert set(actions(automations.automate(remove=True)).values()) == {"remove"}
        assert [automation.name for automation in client.read_automations()] == ["theirs"]
        assert set(actions(automations.automate(remove=True)).values()) == {"absent"}
    finally:
        client.delete_automation(identity)


def test_the_gpu_limit_lets_one_train_and_is_not_removed_meanwhile(client: SyncPrefectClient) -> None:
    automations.automate()
    options = {"strict": True, "raise_on_lease_renewal_failure": False}
    with concurrency("gpu", **options):
        with pytest.raises(TimeoutError), concurrency("gpu", timeout_seconds=1, **options):
            pass
        assert actions(automations.automate(remove=True))["gpu"] == "keep"
    with concurrency("gpu", timeout_seconds=5, **options):
        pass
    assert actions(automations.automate(remove=True))["gpu"] == "remove"


def test_the_address_may_come_from_another_variable_or_a_block_of_the_server(
    client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTHER", "http://127.0.0.1:9/other")
    automations.automate(webhook="OTHER")
    block = client.read_block_document_by_name("nanodlm", "webhook", include_secrets=True)
    assert block.data["url"] == "http://127.0.0.1:9/other"
    assert set(actions(automations.automate(webhook="block:nanodlm")).values()) == {"keep"}


def test_the_command_prints_what_it_does_and_never_the_address(server: dict[str, str], client: Any, home: Path) -> None:
    address = {automations.WEBHOOK: f"http://127.0.0.1:9{PATH}"}
    said = [command("automate", *words, **server, **address) for words in (["--dry-run"], [], ["--json"])]
    said.append(command("automate", "--remove", "--dry-run", **server))
    assert [done.returncode for done in said] == [0] * 4, said
    assert said[0].stdout.startswith("would create block      webhook/nanodlm")
    assert "created      automation nanodlm: lost runs" in said[1].stdout
    assert {row["action"] for row in json.loads(said[2].stdout)["automated"]} == {"keep"}
    assert "would remove limit      gpu" in said[3].stdout
    assert "planted" not in "".join(done.stdout + done.stderr for done in said)


def test_links_lead_where_the_pages_are_reached() -> None:
    with temporary_settings({PREFECT_UI_URL: "https://prefect.example.org"}):
        (action,) = automations.notification("n", ["FAILED"], uuid4()).actions
    assert isinstance(action, CallWebhook)
    assert '"https://prefect.example.org/runs/flow-run/" ~ flow_run.id' in action.payload


# Refusing


@pytest.mark.parametrize(
    ("arguments", "environ", "said"),
    [
        ({"gpu_limit": 0}, {}, "from 1, not 0"),
        ({"lost_after": 30.0}, {}, "must exceed the 30 s between heartbeats"),
        ({"webhook": f"https://example.org{PATH}"}, {}, "not an address, which is a secret"),
        ({"webhook": "NOT_THERE"}, {}, "no variable of that name"),
        ({"webhook": "block:not-there"}, {}, "no Webhook block of that name"),
        ({}, {automations.WEBHOOK: f"ftp://example.org{PATH}"}, "no address that begins with http:// or https://"),
    ],
)
def test_a_bad_argument_is_refused(
    arguments: dict[str, Any], environ: dict[str, str], said: str, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=said) as caught:
        automations.automate(**arguments)
    assert "planted" not in str(caught.value)


@contextmanager
def answering(version: str) -> Iterator[str]:
    """A server that says it is a Prefect of some version."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path.endswith("/admin/version") else 404)
            self.end_headers()
            self.wfile.write(json.dumps(version).encode())

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/api"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("version", ["2.20.9", "3.4.25"])
def test_a_server_that_is_too_old_is_named(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with (
        answering(version) as url,
        temporary_settings({PREFECT_API_URL: url}),
        pytest.raises(NanodlmError, match=rf"is version {version}, which is too old: it must be 3\.8 or newer"),
    ):
        automations.automate()


def test_no_server_a_silent_one_and_one_that_refuses_are_a_line_each(server: dict[str, str], tmp_path: Path) -> None:
    url = server["PREFECT_API_URL"]
    cases = [
        ({"PREFECT_API_URL": ""}, 2, "PREFECT_API_URL names no server"),
        ({"PREFECT_API_URL": "http://127.0.0.1:9/api"}, 1, "no Prefect server answers at http://127.0.0.1:9/api"),
        ({"PREFECT_API_URL": url.removesuffix("/api")}, 1, "PREFECT_API_URL, which ends in /api"),
        ({"PREFECT_API_AUTH_STRING": "operator:wrong-password"}, 1, "refuses access: set PREFECT_API_AUTH_STRING"),
    ]
    for wrong, code, said in cases:
        done = command("automate", **{**server, "PREFECT_HOME": str(tmp_path), **wrong})
        assert (done.returncode, len(done.stderr.strip().splitlines())) == (code, 1), done.stderr
        assert said in done.stderr
        assert "password" not in done.stderr


# Happening


def test_ends_of_this_projects_runs_are_posted_and_nobody_elses(
    server: dict[str, str], client: SyncPrefectClient, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with receiver() as hook:
        monkeypatch.setenv(automations.WEBHOOK, hook.url)
        automations.automate()
        said, _ = flows_run(server, *CALLS).communicate(timeout=120)
        assert said.split() == ["ValueError", "FlowRunTimeoutError", "ValueError"]
        until(lambda: hook.named("last"))
        time.sleep(2)
        monkeypatch.delenv(automations.WEBHOOK)
    assert {(body["flow"], body["run"], body["state"]) for body in hook.bodies} == ENDS
    failed = hook.named("bad-night")[0]
    pages, _, identity = failed["url"].rpartition("/runs/flow-run/")
    assert pages == server["PREFECT_API_URL"].removesuffix("/api")
    assert client.read_flow_run(identity).name == "bad-night"
    assert failed["text"] == f"nanodlm: broken / bad-night is Failed: {failed['url']}"
    for folder in home.rglob("*"):  # the address lies encrypted in the server's database, and in no log
        assert not folder.is_file() or PATH.encode() not in folder.read_bytes(), folder


@pytest.mark.timeout(420)
def test_a_killed_run_is_marked_crashed_and_notified_a_living_one_is_not_and_a_paused_one_can_still_complete(
    server: dict[str, str], client: SyncPrefectClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def states() -> dict[str, tuple[str, str]]:
        return {r.name: (r.state_name or "", r.state.message or "" if r.state else "") for r in client.read_flow_runs()}

    def beating() -> set[str]:
        criteria = {"event": {"name": ["prefect.flow-run.heartbeat"]}, "occurred": {"since": "2000-01-01T00:00:00Z"}}
        answer = client.request("POST", "/events/filter", json={"filter": criteria, "limit": 50})
        return {event["resource"]["prefect.resource.name"] for event in answer.json()["events"]}

    with ExitStack() as stack:
        hook = stack.enter_context(receiver())
        monkeypatch.setenv(automations.WEBHOOK, hook.url)
        automations.automate(lost_after=45)
        processes: dict[str, subprocess.Popen[str]] = {}
        for name in ("killed", "paused", "living"):
            processes[name] = flows_run(server, f'run(whole, "{name}", until="{tmp_path / "end"}")')
            stack.callback(processes[name].communicate)
            stack.callback(processes[name].kill)
        until(lambda: beating() >= set(processes) and sum(s == "Running" for s, _ in states().values()) >= 6)
        parts = {run.name for run in client.read_flow_runs() if run.parent_task_run_id and run.state_name == "Running"}
        until(lambda: beating() >= parts)
        began = time.monotonic()
        processes["killed"].send_signal(signal.SIGKILL)
        processes["paused"].send_signal(signal.SIGSTOP)
        until(lambda: states()["killed"][0] == states()["paused"][0] == "Crashed", patience=120)
        print(f"marked after {time.monotonic() - began:.0f} s")  # `pytest -rA` shows it
        assert states()["killed"][1].startswith("No heartbeat for 45 s")
        until(lambda: sum(states()[part][0] == "Crashed" for part in parts) == 2)
        until(lambda: hook.named("killed") and hook.named("paused"))
        assert states()["living"][0] == "Running"
        assert {body["run"] for body in hook.bodies} == {"killed", "paused"}
        assert hook.named("killed")[0]["state"] == "Crashed"
        processes["paused"].send_signal(signal.SIGCONT)
        (tmp_path / "end").touch()
        until(lambda: states()["paused"][0] == states()["living"][0] == "Completed")
        until(lambda: {body["state"] for body in hook.named("paused")} == {"Crashed", "Completed"})
        monkeypatch.delenv(automations.WEBHOOK)
