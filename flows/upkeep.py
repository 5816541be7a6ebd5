"""The upkeep of a store as a flow: what `nanodlm gc` does, on a schedule, with a line on each thing that went."""

from typing import Annotated, Any

from prefect import State, flow
from prefect.logging import get_run_logger
from pydantic import Field

from nanodlm.config import StoreUrl
from nanodlm.errors import NanodlmError
from nanodlm.flows.own_run import fail
from nanodlm.stages.run import default_store, enter_folder
from nanodlm.store import Store
from nanodlm.upkeep.ages import AGE, seconds, size
from nanodlm.upkeep.collect import collect


@flow(name="gc", persist_result=False)
def gc(
    store: StoreUrl | None = None,
    dry_run: bool = False,
    keep_last: Annotated[int | None, Field(ge=0)] = None,
    older_than: Annotated[str | None, Field(pattern=AGE)] = None,
    grace: Annotated[str, Field(pattern=AGE)] = "1h",
) -> list[dict[str, Any]] | State[Any]:
    """Remove what nobody needs: abandoned attempts and uploads, and old results when asked to.

    Args:
        store: Where artifacts lie: a folder or an address without credentials. Without it that of the worker's
            NANODLM_STORE, else data/store.
        dry_run: Only say what would be removed.
        keep_last: Results to keep, the newest, with all they were made from; all when empty.
        older_than: Give up results older than this, a number with s, m, h or d, such as 30d; none when empty.
        grace: Leave alone what changed this lately, such as 1h.
    """
    log, removed = get_run_logger(), []
    older = None if older_than is None else seconds(older_than)
    done = "would remove" if dry_run else "removed"
    try:
        enter_folder()
        opened = Store(store or default_store())
        for row in collect(opened, keep_last=keep_last, older_than=older, grace=seconds(grace), dry_run=dry_run):
            removed.append(row)
            log.info("%s %s %s, %s", done, row["kind"], row["uri"], size(row["bytes"]))
    except NanodlmError as error:
        return fail(error)
    log.info("%s %d of %s, %s", done, len(removed), opened.uri(), size(sum(row["bytes"] for row in removed)))
    return removed
