"""A Slurm cluster of the tests' own: two nodes on loopback, whose processes end with the tests, however these end."""

import getpass
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.servers import free_ports, running

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "scontrol", "unshare")
SYSTEM = f"{os.environ['PATH']}{os.pathsep}/usr/sbin"

# Nodes are named by addresses, for the first task's is where the others look for it.
CONF = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
KillWait=60
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,batch_sched_delay=1
NodeName=127.0.0.2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=4000
NodeName=127.0.0.3 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=4000
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
START = """
munged --foreground --key-file=munge.key --socket=$PWD/munge.sock --log-file=$PWD/munged.log \
    --pid-file=$PWD/munged.pid --seed-file=$PWD/munge.seed &
while [ ! -S munge.sock ]; do sleep 0.1; done
slurmctld -D -f $PWD/slurm.conf > slurmctld.log 2>&1 &
for node in 127.0.0.2 127.0.0.3; do slurmd -D -N $node -f $PWD/slurm.conf > slurmd-$node.log 2>&1 & done
wait
"""


@contextmanager
def slurm() -> Iterator[dict[str, str]]:
    """A cluster of two nodes: what its programs need in their environment.

    It is a process namespace of its own, so that killing its first process ends the jobs as well.
    """
    missing = [name for name in PROGRAMS if not shutil.which(name, path=SYSTEM)]
    assert not missing, f"{', '.join(missing)} not found: apt-get install slurm-wlm munge"
    with tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        folder.chmod(0o755)  # as munged wants it
        (folder / "state").mkdir()
        (folder / "munge.key").write_bytes(secrets.token_bytes(1024))
        (folder / "munge.key").chmod(0o400)
        user, host = getpass.getuser(), socket.gethostname().partition(".")[0]
        conf = CONF.format(folder=folder, host=host, user=user, ports=free_ports(3))
        (folder / "slurm.conf").write_text(conf)
        environ = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": SYSTEM}
        alone = [] if os.geteuid() == 0 else ["--user", "--map-current-user"]
        unshare = [str(shutil.which("unshare")), *alone, "--pid", "--fork", "--kill-child", "--mount-proc"]
        start = ["bash", "-c", f"cd {folder}{START}"]
        with running([*unshare, *start], **environ) as server:
            deadline = time.monotonic() + 60
            while "idle idle" not in _said("sinfo", "--noheader", "--Node", "--format=%t", **environ):
                logs = [path.read_text()[-400:] for path in folder.glob("*.log")]
                assert server.poll() is None, logs
                assert time.monotonic() < deadline, logs
                time.sleep(0.2)
            yield environ


def _said(*command: str, **environ: str) -> str:
    done = subprocess.run(command, env={**os.environ, **environ}, capture_output=True, text=True, timeout=60)
    return " ".join(done.stdout.split())
