"""A real Slurm of two virtual nodes on loopback, for tests: munged, slurmctld and two slurmd, up in seconds.

Everything lives in one directory and one process namespace, so nothing is left when the namespace ends. Needs root, for
the namespace, and Debian's slurm-wlm and munge, which are installed if they are missing.
"""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import alone_in_the_world

NODES = ("127.0.1.1", "127.0.1.2")

CONF = """\
ClusterName=mini
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/s,cred_expire=5
CredType=cred/munge
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0,batch_sched_delay=0
SlurmdParameters=config_overrides
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=10
KillWait=20
InactiveLimit=0
MinJobAge=3600
FirstJobId={job}
JobRequeue=1
MailProg=/bin/true
{nodes}
PartitionName=main Nodes={names} Default=YES MaxTime=INFINITE State=UP OverTimeLimit=0
"""

START = """\
set -eu
cd {folder}
m=munge
munged --force -F --key-file=$m/key --socket=$m/s --pid-file=$m/pid --log-file=$m/log --seed-file=$m/seed &
while [ ! -S munge/s ]; do sleep 0.05; done
slurmctld -D -c &
for node in {nodes}; do slurmd -D -N $node & done
wait
"""


def install() -> None:
    """Skips the test where Slurm is missing and cannot be installed."""
    if shutil.which("slurmctld") and shutil.which("munged"):
        return
    if os.geteuid() or not shutil.which("apt-get"):
        pytest.skip("no Slurm here, and only root on Debian can install it: apt-get install slurm-wlm munge")
    words = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "slurm-wlm", "munge"]
    for command in (["apt-get", "update", "-qq"], words):
        quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        done = subprocess.run(command, capture_output=True, text=True, env=quiet)
        if done.returncode:
            pytest.skip(f"slurm-wlm and munge cannot be installed: {done.stderr.strip()[-200:]}")


@contextmanager
def slurm(folder: Path) -> Iterator[dict[str, str]]:
    """The environment in which sbatch and its kin speak to the cluster, while it is up."""
    install()
    if os.geteuid():
        pytest.skip("a Slurm in a process namespace of its own needs root")
    for name in ("munge", "state", "spool", "run", "log", "etc"):
        (folder / name).mkdir(parents=True)
    port = _free_ports(1 + len(NODES))
    lines = [
        f"NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port + 1 + number} CPUs=4 RealMemory=8000"
        for number, name in enumerate(NODES)
    ]
    conf = folder / "etc" / "slurm.conf"
    conf.write_text(
        CONF.format(folder=folder, port=port, job=port + 500, nodes="\n".join(lines), names=",".join(NODES))
    )
    (folder / "munge" / "key").write_bytes(os.urandom(128))
    (folder / "munge" / "key").chmod(0o400)
    environment = alone_in_the_world() | {"SLURM_CONF": str(conf)}
    path = f"{environment['PATH']}:/usr/sbin:/sbin"
    script = START.format(folder=folder, nodes=" ".join(NODES))
    daemons = subprocess.Popen(
        ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", "bash", "-c", script],
        env=environment | {"PATH": path},
        stdout=(folder / "log" / "daemons").open("w"),
        stderr=subprocess.STDOUT,
    )
    try:
        _wait_until_idle(environment, folder)
        yield environment
    finally:
        subprocess.run(["scancel", "--user=root"], env=environment, capture_output=True)
        daemons.kill()  # and with it all of its namespace
        daemons.wait()


def _free_ports(count: int) -> int:
    """The first of so many ports in a row that nobody listens on."""
    for first in range(21000 + os.getpid() % 1000 * 10, 60000, count):
        with socket.socket() as probe:
            if all(probe.connect_ex(("127.0.0.1", first + number)) for number in range(count)):
                return first
    raise AssertionError("no free ports")


def _wait_until_idle(environment: dict[str, str], folder: Path) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        done = subprocess.run(["sinfo", "-hN", "-o", "%T"], env=environment, capture_output=True, text=True)
        if done.stdout.split() == ["idle"] * len(NODES):
            return
        time.sleep(0.2)
    logs = "\n".join(path.read_text()[-2000:] for path in sorted((folder / "log").iterdir()))
    raise AssertionError(f"the nodes did not come up:\n{done.stdout}{done.stderr}\n{logs}")
