"""What `nanodlm automate` installs on a Prefect server: lost runs end, a webhook is told, GPUs are taken in turn.

nanodlm automate --dry-run
"""

import contextlib
import os
import re
from collections.abc import Iterator
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import httpx
from prefect.blocks.webhook import Webhook
from prefect.client.base import ServerType
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import StateType
from prefect.context import TagsContext
from prefect.events.actions import CallWebhook, ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.settings import get_current_settings

from nanodlm.errors import NanodlmError, UsageError

TAG = "nanodlm"  # of runs that a person or a schedule has started
PART = "nanodlm-part"  # of flow runs inside these
GPU = "gpu"  # the global concurrency limit that a training takes
WEBHOOK = "NANODLM_WEBHOOK_URL"
HEARTBEAT_SECONDS = 30  # the most often that Prefect allows; its default is 180
LOST_SECONDS = 900.0  # longer than a server is away, and than Prefect's default between heartbeats
MOST_SECONDS = 7 * 86400.0
LOST, FAILED, COMPLETED = (f"nanodlm: {name}" for name in ("lost runs", "failed runs", "completed runs"))
LEASES = "prefect.server.concurrency.lease_storage"
OLDEST = (3, 8)


def as_part() -> TagsContext:
    """Tag the flow runs that are started inside this context as parts of a run: lost ones end, but none notifies.

    >>> with as_part():
    ...     sorted(TagsContext.get().current_tags)
    ['nanodlm-part']
    """
    return TagsContext(current_tags={PART})  # instead of `tags`, which would add to those of the whole run


def untagged() -> TagsContext:
    """Leave out tags of the flow run from the tasks that are started inside this context.

    Prefect asks its server, for each tag that a task starts with, whether a concurrency limit has that name, and
    the task waits for the answer.
    """
    return TagsContext(current_tags=set())


def automate(
    *,
    webhook: str = "",
    gpu_limit: int | None = None,
    lost_after: float = LOST_SECONDS,
    dry_run: bool = False,
    remove: bool = False,
) -> list[dict[str, str]]:
    """Bring the server that the settings name to what is wanted; what is so already is left alone.

    Args:
        webhook: Name of the environment variable with the address that notifications are posted to, or `block:NAME`
            for a Webhook block of the server. Empty: `NANODLM_WEBHOOK_URL` if it is set, else as was installed before.
        gpu_limit: How many runs may train at once; None leaves a limit as it is, and makes one of 1.
        lost_after: Seconds without a heartbeat after which a run is taken for lost.
        dry_run: Only say what would change.
        remove: Take away what was installed, instead.

    Returns:
        `kind` (automation, block, limit or server), `name`, `does` and `action` (create, update, keep, remove, absent;
        for the server lack: it keeps leases of places in its memory) of each.

    Raises:
        UsageError: No server is named, or an argument makes no sense.
        NanodlmError: The server does not answer, refuses, or is too old.
    """
    if gpu_limit is not None and gpu_limit < 1:
        raise UsageError(f"--gpu-limit counts trainings at once, from 1, not {gpu_limit}")
    if not HEARTBEAT_SECONDS < lost_after <= MOST_SECONDS:
        raise UsageError(
            f"--lost-after must exceed the {HEARTBEAT_SECONDS} s between heartbeats, and be a week at most: say 15m"
        )
    with answering_server() as client:
        version = client.api_version()
        if tuple(int(number) for number in re.findall(r"\d+", version)[:2]) < OLDEST:
            raise NanodlmError(_too_old(str(get_current_settings().api.url), version))
        if remove:
            return [
                *_remove_automations(client, dry_run),
                _remove_block(client, dry_run),
                _remove_limit(client, dry_run),
            ]
        rows, block = _webhook(client, webhook, dry_run)
        wanted = [lost_runs(lost_after)]
        if block:
            wanted += [
                notification(FAILED, ["FAILED", "CRASHED"], block),
                notification(COMPLETED, ["COMPLETED"], block),
            ]
        installed = [_install(client, item, dry_run) for item in wanted]
        return [*rows, *installed, _limit(client, gpu_limit, dry_run), *_leases(client)]


def lost_runs(after: float) -> AutomationCore:
    """The automation that ends runs whose process is gone, its computer too.

    Args:
        after: Seconds without a heartbeat.
    """
    ends = {f"prefect.flow-run.{name}" for name in ("Completed", "Failed", "TimedOut", "Cancelled", "Crashed")}
    return AutomationCore(
        name=LOST,
        enabled=True,  # said, for only what is said is sent
        description=f"A run whose heartbeats have stopped for {after:g} s is marked Crashed: its process is gone.",
        trigger=EventTrigger(
            after={"prefect.flow-run.heartbeat"},
            expect={"prefect.flow-run.heartbeat", "prefect.flow-run.Suspended", *ends},
            match=ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"}),
            match_related=_tagged(TAG, PART),
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=after),
        ),
        actions=[
            ChangeFlowRunState(
                name="Crashed",
                state=StateType.CRASHED,
                force=False,  # the server refuses it for a run that has ended
                message=f"No heartbeat for {after:g} s: its process is gone. Run it again to continue.",
            )
        ],
    )


def notification(name: str, states: list[str], block: UUID) -> AutomationCore:
    """The automation that posts flow, run, state and link to a webhook when a run enters a state.

    Args:
        name: The automation's.
        states: Types of states, such as FAILED, which is also what a run that took too long has.
        block: Id of the Webhook block that has the address.
    """
    link = f'"{get_current_settings().ui_url}/runs/flow-run/" ~ flow_run.id'
    text = f'"nanodlm: " ~ flow.name ~ " / " ~ flow_run.name ~ " is " ~ flow_run.state.name ~ ": " ~ {link}'
    fields = {"text": text, "flow": "flow.name", "run": "flow_run.name", "state": "flow_run.state.name", "url": link}
    payload = ", ".join(f'"{key}": {{{{ ({value}) | tojson }}}}' for key, value in fields.items())
    return AutomationCore(
        name=name,
        enabled=True,
        description=f"Posts to a webhook when a run that is tagged {TAG} is {' or '.join(states).lower()}.",
        trigger=EventTrigger(
            expect={"prefect.flow-run.*"},
            match=ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*", "prefect.state-type": states}),
            match_related=_tagged(TAG),
            for_each={"prefect.resource.id"},
            posture=Posture.Reactive,
            threshold=1,
            within=timedelta(0),
        ),
        actions=[CallWebhook(block_document_id=block, payload=f"{{{payload}}}")],
    )


def _tagged(*tags: str) -> ResourceSpecification:
    return ResourceSpecification(
        {"prefect.resource.id": [f"prefect.tag.{tag}" for tag in tags], "prefect.resource.role": "tag"}
    )


# Talking to the server


@contextlib.contextmanager
def answering_server() -> Iterator[SyncPrefectClient]:
    """A client of the server that the settings name, whose every failure is one line.

    Raises:
        UsageError: No server is named.
        NanodlmError: It does not answer, or refuses.
    """
    url = get_current_settings().api.url
    if not url:
        raise UsageError(
            "PREFECT_API_URL names no server: start one with `prefect server start --host 127.0.0.1`, "
            "and set it to http://127.0.0.1:4200/api"
        )
    with contextlib.ExitStack() as stack:
        try:
            client = stack.enter_context(get_client(sync_client=True))
            if client.server_type is not ServerType.CLOUD:  # which tells no version
                client.api_version()
        except (httpx.RequestError, RuntimeError, ValueError) as error:
            if "ncompatible" in str(error):  # another major version, says the client as it connects
                raise NanodlmError(_too_old(url, re.sub(".*server: ", "", str(error)).split()[0])) from error
            raise _silent(url) from error
        except PrefectHTTPStatusError as error:
            raise _silent(url) if error.response.status_code == 404 else _refused(url, error) from error
        try:
            yield client
        except PrefectHTTPStatusError as error:
            raise _refused(url, error) from error
        except httpx.RequestError as error:
            raise _silent(url) from error


def _silent(url: str) -> NanodlmError:
    return NanodlmError(
        f"no Prefect server answers at {url}: start it (`prefect server start --host 127.0.0.1`), or correct "
        "PREFECT_API_URL, which ends in /api"
    )


def _refused(url: str, error: PrefectHTTPStatusError) -> NanodlmError:
    status = error.response.status_code
    if status == 401:
        advice = "set PREFECT_API_AUTH_STRING to the PREFECT_SERVER_API_AUTH_STRING that it was started with"
        return NanodlmError(f"the Prefect server at {url} refuses access: {advice}")
    return NanodlmError(f"the Prefect server at {url} answered {status}: {' '.join(error.response.text.split())[:200]}")


def _too_old(url: str, version: str) -> str:
    needed = ".".join(str(number) for number in OLDEST)
    return f"the Prefect server at {url} is version {version}, which is too old: it must be {needed} or newer"


def _row(kind: str, name: str, does: str, action: str) -> dict[str, str]:
    return {"kind": kind, "name": name, "does": does, "action": action}


def _install(client: SyncPrefectClient, wanted: AutomationCore, dry_run: bool) -> dict[str, str]:
    found = client.read_automations_by_name(wanted.name)
    there = AutomationCore(**found[0].model_dump(exclude={"id"})) if found else None
    action = "create" if there is None else "keep" if there == wanted and len(found) == 1 else "update"
    if not dry_run:
        if action == "create":
            client.create_automation(wanted)
        elif action == "update":
            client.update_automation(found[0].id, wanted)
            for copy in found[1:]:
                client.delete_automation(copy.id)
    return _row("automation", wanted.name, wanted.description, action)


def _remove_automations(client: SyncPrefectClient, dry_run: bool) -> Iterator[dict[str, str]]:
    for name in (LOST, FAILED, COMPLETED):
        found = client.read_automations_by_name(name)
        for automation in () if dry_run else found:
            client.delete_automation(automation.id)
        yield _row("automation", name, "", "remove" if found else "absent")


def _block(client: SyncPrefectClient, name: str) -> Any:
    """A Webhook block's document with its secrets, or None."""
    with contextlib.suppress(ObjectNotFound):
        return client.read_block_document_by_name(name, "webhook", include_secrets=True)
    return None


def _webhook(client: SyncPrefectClient, webhook: str, dry_run: bool) -> tuple[list[dict[str, str]], UUID | None]:
    """What becomes of the block with the webhook's address, and its id; none when nothing is to be notified."""
    if "://" in webhook:
        raise UsageError("--webhook takes the name of an environment variable, not an address, which is a secret")
    if webhook.startswith("block:"):
        document = _block(client, webhook.removeprefix("block:"))
        if document is None:
            raise UsageError(f"--webhook {webhook}: the server has no Webhook block of that name")
        return [], document.id
    url = os.environ.get(webhook or WEBHOOK, "")
    if not url and webhook:
        raise UsageError(f"--webhook {webhook}: the environment has no variable of that name, or it is empty")
    if not url:
        notifying = [a.actions[0] for name in (FAILED, COMPLETED) for a in client.read_automations_by_name(name)]
        return [], next((a.block_document_id for a in notifying if isinstance(a, CallWebhook)), None)
    if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
        raise UsageError(f"{webhook or WEBHOOK} holds no address that begins with http:// or https://")
    data = {"url": url, "method": "POST", "headers": {"Content-Type": "application/json"}}
    document = _block(client, TAG)
    there = document is not None and {name: document.data.get(name) for name in data} == data
    action = "keep" if there else "update" if document else "create"
    if not dry_run and not there:
        Webhook.model_validate(data).save(TAG, overwrite=True)
        document = _block(client, TAG)
    row = _row("block", f"webhook/{TAG}", f"Holds the address in {webhook or WEBHOOK}.", action)
    return [row], document.id if document else UUID(int=0)


def _remove_block(client: SyncPrefectClient, dry_run: bool) -> dict[str, str]:
    document = _block(client, TAG)
    if document and not dry_run:
        client.delete_block_document(document.id)
    return _row("block", f"webhook/{TAG}", "", "remove" if document else "absent")


def _limit(client: SyncPrefectClient, limit: int | None, dry_run: bool) -> dict[str, str]:
    there = None
    with contextlib.suppress(ObjectNotFound):
        there = client.read_global_concurrency_limit_by_name(GPU)
    wanted = limit or (there.limit if there else 1)
    action = "create" if there is None else "keep" if there.limit == wanted else "update"
    if not dry_run and action != "keep":
        client.upsert_global_concurrency_limit_by_name(GPU, wanted)
    return _row("limit", GPU, f"Trainings at once: {wanted}.", action)


def _leases(client: SyncPrefectClient) -> Iterator[dict[str, str]]:
    """Nothing, unless the server forgets who holds a place when it is restarted, and then never gives it to another."""
    settings = client.request("GET", "/admin/settings").json()
    if settings["server"]["concurrency"]["lease_storage"] == f"{LEASES}.memory":
        does = (
            f"A restart leaves places taken: start it with PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE={LEASES}.filesystem"
        )
        yield _row("server", "leases", does, "lack")


def _remove_limit(client: SyncPrefectClient, dry_run: bool) -> dict[str, str]:
    try:
        there = client.read_global_concurrency_limit_by_name(GPU)
    except ObjectNotFound:
        return _row("limit", GPU, "", "absent")
    if there.active_slots:
        return _row("limit", GPU, "A training holds it: remove it when that has ended.", "keep")
    if not dry_run:
        client.delete_global_concurrency_limit_by_name(GPU)
    return _row("limit", GPU, "", "remove")
