"""The pipeline as Prefect flows: order, retries and reporting; all logic is in `nanodlm`. Nothing heavy is imported."""

import os

TAG = "nanodlm"  # of every run of this project: what deploy/automations.yaml and deploy/notifications.yaml look for


def quiet_prefect() -> None:
    """Let Prefect, before it is imported, report nothing home, start no server and keep its own log to itself."""
    for name in ("PREFECT_SERVER_ANALYTICS_ENABLED", "PREFECT_SERVER_EPHEMERAL_ENABLED"):
        os.environ.setdefault(name, "false")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")
