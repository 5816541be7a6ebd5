"""Places of a concurrency limit, on a real server that is restarted, with holders that are really killed."""

import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import copy_context
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitUpdate
from prefect.context import SyncClientContext
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from flows import automations, limits, server
from flows.limits import place
from flows.server import heard
from nanodlm.errors import NanodlmError, Stopped
from tests.support import servers
from tests.support.commands import environment

pytestmark = pytest.mark.slow  # a whole server
PROGRAM = """
import sys
from flows import limits
limits.LEASE_SECONDS = 60.0
with limits.place("gpu", lambda kind, text: print(text, flush=True)):
    print("held", flush=True)
    sys.stdin.readline()
"""


@dataclass
class Site:
    """A server that can be taken away by closing `up`, and a client of it."""

    home: Path
    port: int
    up: ExitStack
    client: SyncPrefectClient

    def start(self) -> None:
        self.up.enter_context(servers.prefect(self.home, self.port))

    def taken(self) -> int:
        return self.client.read_global_concurrency_limit_by_name("gpu").active_slots

    def leases(self) -> list[Path]:
        return list((self.home / "server" / "concurrency_leases").glob("*-*.json"))

    @contextmanager
    def holder(self) -> Iterator[subprocess.Popen[str]]:
        """A process that asks for the place, says so, says `held` once it has it, and keeps it for a line of input."""
        env = environment(PREFECT_API_URL=f"http://127.0.0.1:{self.port}/api")
        words = [sys.executable, "-c", PROGRAM]
        with subprocess.Popen(words, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout
                assert process.stdout.readline().startswith("asking for a place")
                yield process
            finally:
                process.kill()


def held(process: subprocess.Popen[str]) -> bool:
    assert process.stdout
    return process.stdout.readline() == "held\n"


@pytest.fixture(scope="module")
def module_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    home, (port,) = tmp_path_factory.mktemp("prefect"), servers.free_ports(1)
    settings = {PREFECT_API_URL: f"http://127.0.0.1:{port}/api"}
    with ExitStack() as up, temporary_settings(settings), get_client(sync_client=True) as client:
        site = Site(home, port, up, client)
        site.start()
        client.upsert_global_concurrency_limit_by_name("gpu", 1)
        yield site


@pytest.fixture
def site(module_site: Site) -> Site:
    assert module_site.taken() == 0
    return module_site


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "RENEW_SECONDS", 0.2)
    monkeypatch.setattr(limits, "ASK_SECONDS", 0.2)


def until(holds: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_the_second_waits_until_the_first_gives_its_place_back(site: Site) -> None:
    with site.holder() as first:
        assert held(first)
        with site.holder() as second:
            time.sleep(5)
            assert site.taken() == 1
            first.communicate("\n", timeout=30)
            assert held(second)
            assert site.taken() == 1
            second.communicate("\n", timeout=30)
    assert site.taken() == 0


def test_one_that_is_ended_while_it_waits_takes_no_place(site: Site) -> None:
    with site.holder() as first:
        assert held(first)
        with site.holder() as second:
            time.sleep(1)
            second.send_signal(2)
            second.wait(30)
        first.communicate("\n", timeout=30)
    assert site.taken() == 0


def test_a_place_is_kept_while_the_server_is_restarted_and_given_back_after(
    site: Site, hurried: None, said: list[str]
) -> None:
    with place("gpu", lambda _, text: said.append(text)):
        site.up.close()
        time.sleep(2)  # renewals fail meanwhile
        site.start()
        time.sleep(2)
        assert site.taken() == 1
    assert site.taken() == 0
    assert len(said) == 1


def test_a_lost_place_is_taken_again(site: Site, hurried: None, said: list[str]) -> None:
    with place("gpu", lambda _, text: said.append(text)):
        (lease,) = site.leases()
        site.client.release_concurrency_slots_with_lease(lease.stem)  # type: ignore[arg-type]
        until(lambda: site.taken() == 1 and site.leases() not in ([], [lease]))
    assert site.taken() == 0
    assert said[1:] == ["the server has forgotten who holds gpu: going on, and asking again"]


def test_a_killed_holders_place_comes_back_when_its_lease_ends(site: Site) -> None:
    with site.holder() as first:
        assert held(first)
        first.kill()
    assert site.taken() == 1
    until(lambda: site.taken() == 0, 120)


def test_a_holder_ends_well_when_the_server_is_away(site: Site, said: list[str]) -> None:
    with place("gpu", lambda _, text: said.append(text)):
        site.up.close()
    assert said[1:] == ["a place of gpu is free when its lease ends: ConnectError"]
    site.start()
    (lease,) = site.leases()
    site.client.release_concurrency_slots_with_lease(lease.stem)  # type: ignore[arg-type]
    assert site.taken() == 0


def test_one_waits_while_the_server_is_away_and_has_the_place_as_soon_as_it_is_back(site: Site, hurried: None) -> None:
    got = threading.Event()

    def wait() -> None:
        with place("gpu", lambda *_, **__: None):
            got.set()

    # As in a flow on a worker: a client that has been connected asks ten times, after ever longer pauses.
    with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 10}), SyncClientContext.get_or_create() as flow:
        flow.client.api_version()
        site.up.close()
        waiting = threading.Thread(target=copy_context().run, args=(wait,))
        waiting.start()
        time.sleep(10)
        assert not got.is_set()
        site.start()
        waiting.join(10)
    assert got.is_set()
    assert site.taken() == 0


def test_one_that_is_ended_just_as_it_gets_the_place_gives_it_back(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(limits, "_renewed", interrupted)
    with pytest.raises(KeyboardInterrupt), place("gpu", lambda *_, **__: None):
        pass
    assert site.taken() == 0


def test_a_place_that_is_taken_again_as_its_holder_leaves_is_given_back(
    site: Site, hurried: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    taking, left, take = threading.Event(), threading.Event(), limits._take

    def slowly(*arguments: Any) -> Any:
        lease = take(*arguments)
        taking.set()
        left.wait(60)
        return lease

    with place("gpu", lambda *_, **__: None):
        monkeypatch.setattr(limits, "_take", slowly)
        monkeypatch.setattr(limits, "JOIN_SECONDS", 0.1)
        (lease,) = site.leases()
        site.client.release_concurrency_slots_with_lease(lease.stem)  # type: ignore[arg-type]
        assert taking.wait(60)
    assert site.taken() == 1
    left.set()
    until(lambda: site.taken() == 0, 30)  # before the lease ends by itself


@pytest.mark.parametrize(("status", "waits"), [(503, True), (429, True), (500, True), (403, False)])
def test_only_a_refusal_that_will_stay_one_ends_the_wait(
    status: int, waits: bool, site: Site, hurried: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, take = [status], limits._take

    def refused(client: SyncPrefectClient, limit: str) -> Any:
        if not answers:
            return take(client, limit)
        request = httpx.Request("POST", "http://127.0.0.1/api")
        answer = httpx.Response(answers.pop(), request=request, text="<html>\n<p>no</p>")
        raise httpx.HTTPStatusError("refused", request=request, response=answer)

    monkeypatch.setattr(limits, "_take", refused)
    expected = nullcontext() if waits else pytest.raises(NanodlmError, match=r"no place of gpu: <html> <p>no</p>$")
    with expected, place("gpu", lambda *_, **__: None):
        assert site.taken() == 1
    assert site.taken() == 0


@pytest.mark.parametrize("name", ["tpu", "gpu/", "gpu?", "gpu#1", "./gpu", "gpu\n"])
def test_a_limit_that_does_not_exist_is_one_line(site: Site, name: str) -> None:
    """Whatever it would mean in an address."""
    with pytest.raises(NanodlmError) as error, place(name, lambda *_, **__: None):
        pass
    said = f"the Prefect server has no concurrency limit {name!r}: run `prefect gcl create {shlex.quote(name)} --limit"
    assert str(error.value).startswith(said)


def test_a_limit_that_is_switched_off_says_that_it_guards_nothing(site: Site, said: list[str]) -> None:
    site.client.update_global_concurrency_limit("gpu", GlobalConcurrencyLimitUpdate(active=False))
    with place("gpu", lambda _, text: said.append(text)):
        assert said[1:] == ["the concurrency limit gpu is switched off, and guards nothing"]
    site.client.update_global_concurrency_limit("gpu", GlobalConcurrencyLimitUpdate(active=True))


def test_the_place_of_a_stage_that_ended_while_the_server_was_away_is_given_back_when_it_is_there(
    site: Site, said: list[str]
) -> None:
    has, ends = threading.Event(), threading.Event()

    def emit(_: str, text: str) -> None:
        said.append(text)

    def stage() -> None:
        with place("gpu", emit), heard(emit):
            has.set()
            ends.wait(60)

    holder = threading.Thread(target=copy_context().run, args=(stage,))
    holder.start()
    assert has.wait(60)
    site.up.close()
    ends.set()
    time.sleep(25)  # a place that cannot be given back is given up after 20 s
    site.start()
    holder.join(60)
    assert said[1:] == ["the Prefect server is away: waiting to tell it how the stage ended"]
    assert site.taken() == 0


@pytest.mark.parametrize("after", [0.3, 0.8, 1.3, 1.8, 2.3, 2.8])
def test_whoever_waits_for_a_server_is_stopped_by_a_signal_at_any_moment(
    after: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise Stopped("stopped by a signal")

    monkeypatch.setattr(server, "AWAY_SECONDS", 20.0)
    (port,) = servers.free_ports(1)
    before = signal.signal(signal.SIGALRM, stop)
    try:
        with (
            temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{port}/api"}),
            pytest.raises(Stopped),
            heard(lambda *_, **__: None),
        ):
            signal.setitimer(signal.ITIMER_REAL, after)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_nobody_waits_for_a_server_of_their_own_that_has_ended() -> None:
    began = time.monotonic()
    with (
        pytest.raises(NanodlmError, match="the local Prefect server has ended; what is finished is kept: run again"),
        server.ephemeral_server() as url,
        temporary_settings({PREFECT_API_URL: url}),
        heard(lambda *_, **__: None),
    ):
        child = server.OWN.get()
        assert child is not None
        child.kill()
        child.wait()
        raise OSError("the request that this would have made fails")
    assert time.monotonic() - began < server.AWAY_SECONDS / 2


def test_a_server_that_would_forget_its_holders_is_told_of(tmp_path: Path, site: Site) -> None:
    assert "server" not in {row["kind"] for row in automations.automate(dry_run=True)}
    memory = "prefect.server.concurrency.lease_storage.memory"  # which is Prefect's default
    with (
        servers.prefect(tmp_path, PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE=memory) as environ,
        temporary_settings({PREFECT_API_URL: environ["PREFECT_API_URL"]}),
    ):
        (row,) = [row for row in automations.automate(dry_run=True) if row["kind"] == "server"]
    assert row["does"].endswith("PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE=" + memory.replace("memory", "filesystem"))
