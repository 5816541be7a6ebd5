"""What is settled before Prefect is imported. Importing this file imports nothing heavy."""

import os

TAG = "nanodlm"  # of every run of this project: what deploy/automations.yaml and deploy/notifications.yaml look for


def quiet_prefect(verbose: bool = False) -> None:
    """Let Prefect report nothing home, start no server by itself, and log no more than is asked for.

    Prefect reads these variables of the environment when it is imported, so this has to be called before. What is set
    already stays.

    Args:
        verbose: Whether Prefect's own log is shown.
    """
    for name in ("PREFECT_SERVER_ANALYTICS_ENABLED", "PREFECT_SERVER_EPHEMERAL_ENABLED"):
        os.environ.setdefault(name, "false")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "INFO" if verbose else "CRITICAL")
