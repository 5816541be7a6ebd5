"""Which process made something, and whether it has ended, as far as that can be told from here."""

import contextlib
import os
import re
import socket
from pathlib import Path


def this_process() -> str:
    """Return a name that no other process has, of whatever machine, boot or container."""
    return f"{_namespace()}.{os.getpid()}.{_started(os.getpid())}"


def has_ended(name: str) -> bool:
    """Say if the process of a name has ended for certain; of other machines, boots and containers nothing is known."""
    namespace, _, rest = name.partition(".")
    pid, _, started = rest.partition(".")
    if namespace != _namespace() or not pid.isdecimal():
        return False
    if now := _started(int(pid)):
        return now != started
    try:
        os.kill(int(pid), 0)
    except OSError as error:  # a machine may hide more than that of other users' processes
        return not isinstance(error, PermissionError)
    return False


def _namespace() -> str:
    """Return what tells the numbers of the processes seen here from those of others; host names are not enough."""
    seen = socket.gethostname()
    with contextlib.suppress(OSError):  # of Linux alone
        seen = f"{Path('/proc/sys/kernel/random/boot_id').read_text()}-{os.readlink('/proc/self/ns/pid')}"
    return re.sub(r"\W+", "-", seen).strip("-")


def _started(pid: int) -> str:
    """Return when a process was started, for its number may be given again; empty where that is not known."""
    with contextlib.suppress(OSError):  # on Linux since the boot, so that a clock that is set changes nothing
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return ""
