"""The automations of deploy/, made as docs/operations.md says, on a whole Prefect server: they really happen."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.operations.conftest import LONG, ROOT, Site, below, wait_until
from tests.support.commands import environment
from tests.support.servers import Quiet, serving

pytestmark = pytest.mark.slow  # a whole server, with all its services
PATH = "/hooks/planted-secret-of-the-webhook"  # an address that is a secret, as those of chat rooms are
LOST_SECONDS = 45  # in place of the file's 15 minutes
FLOWS = """
import time
from pathlib import Path
from prefect import flow, tags
from nanodlm.flows import TAG

@flow(name="waiting")
def waiting(end):
    while not Path(end).exists():
        time.sleep(0.1)

@flow(name="broken")
def broken():
    raise ValueError("as told")

@flow(name="slow", timeout_seconds=0.5)
def slow():
    while True:
        time.sleep(0.01)

@flow(name="good")
def good():
    pass

def run(kind, name, *arguments, tagged=True):
    try:
        with tags(*[TAG] * tagged):
            kind.with_options(flow_run_name=name)(*arguments)
    except Exception as error:
        print(type(error).__name__)
"""
CALLS = [
    'run(good, "good")',
    'run(broken, "somebody-elses", tagged=False)',
    'run(slow, "long")',
    "input()",  # Prefect 3.8.8 may lose one of two posts of the same instant
    """run(broken, 'a "night"')""",
]
ENDS = [("slow", "long", "TimedOut"), ("broken", 'a "night"', "Failed")]  # what is to be told of these


@dataclass
class Hook:
    """A receiver of notifications, and what it was sent."""

    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)

    def ends(self) -> list[tuple[str, str, str]]:
        return [(body["flow"], body["run"], body["state"]) for body in self.bodies]


@contextmanager
def receiver() -> Iterator[Hook]:
    """A web server that takes notifications at one secret path."""
    hook = Hook()

    class Handler(Quiet):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if (self.path, self.headers["Content-Type"]) == (PATH, "application/json"):
                hook.bodies.append(json.loads(body))
            self.send_response(200)
            self.end_headers()

    with serving(Handler) as address:
        hook.url = address + PATH
        yield hook


def flows_run(environ: dict[str, str], *calls: str) -> subprocess.Popen[str]:
    """Start a process of its own that runs flows."""
    more = {"PYTHONPATH": str(ROOT), "PREFECT_LOGGING_LEVEL": "CRITICAL", "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30"}
    code, env = "\n".join([FLOWS, *calls]), environment(**{**environ, **more})
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", code], env=env, text=True, **pipes)


def calls_told(environ: dict[str, str], hook: Hook) -> list[tuple[str, str, str]]:
    """Run the flows of `CALLS`, and return what the receiver was told of them."""
    with flows_run(environ, *CALLS) as process:
        wait_until(lambda: ENDS[0] in hook.ends())
        said, _ = process.communicate("\n", timeout=120)
    assert said.split() == ["ValueError", "FlowRunTimeoutError", "ValueError"]
    wait_until(lambda: ENDS[1] in hook.ends())
    return hook.ends()


def notify(environ: dict[str, str], url: str, folder: Path) -> None:
    """Do what docs/operations.md says about notifications, word for word."""
    section = (ROOT / "docs" / "operations.md").read_text().split("## Notifications")[1]
    commands = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)[0].replace("/tmp/", f"{folder}/")
    env = environment(**environ, NANODLM_WEBHOOK_URL=url)
    done = subprocess.run(["bash", "-ec", commands], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert url not in done.stdout + done.stderr


@pytest.fixture(scope="module")
def hook(whole: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hook]:
    """A receiver that the server notifies, on which the automation of lost runs is as well."""
    folder = tmp_path_factory.mktemp("automations")
    with receiver() as hook:
        notify(whole.environ, hook.url, folder)
        file, given = folder / "automations.yaml", (ROOT / "deploy/automations.yaml").read_text()
        file.write_text(given.replace("within: 900", f"within: {LOST_SECONDS}"))
        whole.succeeds("automation", "create", "--from-file", str(file))
        yield hook


def test_failures_of_this_projects_runs_are_posted_and_nothing_else_is(whole: Site, hook: Hook) -> None:
    told = calls_told(whole.environ, hook)
    assert set(told) == set(ENDS)  # SQLite may make the server look at an event again, and so tell it twice
    body = next(body for body in hook.bodies if body["flow"] == "broken")
    pages, _, identity = body["url"].rpartition("/runs/flow-run/")
    assert pages == whole.environ["PREFECT_API_URL"].removesuffix("/api")
    assert whole.ask(f"/flow_runs/{identity}")["name"] == 'a "night"'
    assert body["text"] == f'nanodlm: broken / a "night" is Failed: {body["url"]}'
    for path in whole.home.rglob("*"):  # the address lies encrypted in the server's database, and in no log
        assert not path.is_file() or PATH.encode() not in path.read_bytes(), path


@pytest.mark.timeout(900)
def test_lost_runs_are_marked_crashed_and_told_a_living_one_is_not_and_a_paused_one_can_still_complete(
    site: Site, hook: Hook, tmp_path: Path
) -> None:
    def states() -> dict[str, str]:
        names = {"flow_runs": {"name": {"any_": list(processes)}}}
        return {run["name"]: run["state_name"] for run in site.ask("/flow_runs/filter", names)}

    def beating() -> set[str]:
        criteria = {"event": {"name": ["prefect.flow-run.heartbeat"]}, "occurred": {"since": "2000-01-01T00:00:00Z"}}
        answer = site.ask("/events/filter", {"filter": criteria, "limit": 50})
        return {event["resource"]["prefect.resource.id"] for event in answer["events"]}

    with ExitStack() as stack:
        processes: dict[str, subprocess.Popen[str]] = {}
        for name in ("killed", "paused", "living"):
            processes[name] = flows_run(site.environ, f'run(waiting, "{name}", "{tmp_path / "end"}")')
            stack.callback(processes[name].communicate)
            stack.callback(processes[name].kill)
        training = site.start("train/gpu", config=LONG)
        trainer, worker = site.trainer(least_step=40), site.work()
        started = below(worker.pid)
        wait_until(lambda: len(states()) == 3 and set(states().values()) == {"Running"})
        ids = {run["name"]: run["id"] for run in site.ask("/flow_runs/filter", {}) if run["name"] in processes}
        wait_until(lambda: beating() >= {f"prefect.flow-run.{run}" for run in (*ids.values(), training)})
        processes["killed"].kill()
        processes["paused"].send_signal(signal.SIGSTOP)
        for process in (psutil.Process(worker.pid), *started):  # as when a machine is lost
            with suppress(psutil.NoSuchProcess):  # it ends with one before it
                process.kill()
        worker.wait(60)
        trainer.wait(60)
        psutil.wait_procs(started, 60)
        assert not [process for process in started if process.is_running()]
        lost = {ids["killed"], ids["paused"], training}
        wait_until(lambda: {site.state(run) for run in lost} == {"Crashed"}, otherwise=lambda: str(states()))
        assert site.state(training, "message").startswith("No heartbeat for 15 minutes")
        assert states()["living"] == "Running"
        told = wait_until(lambda: [body for body in hook.bodies if body["state"] == "Crashed"])
        assert {body["url"][-36:] for body in told} <= lost

        processes["paused"].send_signal(signal.SIGCONT)
        (tmp_path / "end").touch()
        wait_until(lambda: states()["paused"] == states()["living"] == "Completed")
