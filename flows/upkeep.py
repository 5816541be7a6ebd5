"""The upkeep of a store as a flow: what `nanodlm gc` does, on a schedule, with a record of what went.

python -m flows.upkeep                   # on the server that PREFECT_API_URL names
"""

from typing import Annotated, Any

from prefect import flow, tags
from prefect.artifacts import create_markdown_artifact
from prefect.logging import get_run_logger
from pydantic import Field

from flows.environment import TAG
from nanodlm.config import StoreUrl
from nanodlm.stages.run import default_store
from nanodlm.store import Store
from nanodlm.upkeep.ages import AGE, seconds, size
from nanodlm.upkeep.collect import collect

SHOWN = 500  # rows of the artifact; the log has all


def _run_name() -> str:
    from prefect.runtime import flow_run

    return "gc-dry-run" if flow_run.parameters["dry_run"] else "gc"


@flow(name="gc", flow_run_name=_run_name, persist_result=False)
def gc(
    store: StoreUrl | None = None,
    dry_run: bool = False,
    keep_last: Annotated[int | None, Field(ge=0)] = None,
    older_than: Annotated[str | None, Field(pattern=AGE)] = None,
    grace: Annotated[str, Field(pattern=AGE)] = "1h",
) -> list[dict[str, Any]]:
    """Remove what nobody needs: abandoned attempts and uploads, and old results when asked to.

    The artifact `gc` lists what was removed, also after an error.

    Args:
        store: Where artifacts lie: a folder or an fsspec URL, without credentials; by default that of the worker's
            NANODLM_STORE, else data/store.
        dry_run: Only say what would be removed.
        keep_last: Results to keep, the newest, with all they were made from; all when empty.
        older_than: Give up results older than this, a number with s, m, h or d, such as 30d; none when empty.
        grace: Leave alone what changed this lately, such as 1h.

    Returns:
        `kind`, `uri` and `bytes` of each thing removed.
    """
    log, removed = get_run_logger(), []
    older = None if older_than is None else seconds(older_than)
    done = "would remove" if dry_run else "removed"
    opened = Store(store or default_store())
    try:
        for row in collect(opened, keep_last=keep_last, older_than=older, grace=seconds(grace), dry_run=dry_run):
            removed.append(row)
            log.info("%s %s %s, %s", done, row["kind"], row["uri"], size(row["bytes"]))
    finally:
        total = f"{done} {len(removed):,} of {opened.uri()}, {size(sum(row['bytes'] for row in removed))}"
        log.info(total)
        lines = [f"| {row['kind']} | {row['bytes']:,} | {row['uri']} |" for row in removed]
        shown = ["| kind | bytes | address |", "|---|---:|---|", *lines[:SHOWN]] if lines else []
        more = [f"and {len(lines) - SHOWN:,} more, which the log names"] if len(lines) > SHOWN else []
        create_markdown_artifact("\n".join([total, "", *shown, *more]), key="gc", description=total)
    return removed


if __name__ == "__main__":
    with tags(TAG):
        gc()
