"""A SLURM of its own, real daemons in a folder: munged, slurmctld and slurmd, as Debian's packages bring them."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue")
PACKAGES = "apt-get install --no-install-recommends -y slurm-wlm munge"
GPUS = 4
"""Of each node, by name alone."""
_SECONDS = 60
_PLACES = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def why_not() -> str | None:
    """Why there can be none here."""
    missing = [name for name in NEEDED if shutil.which(name, path=_PLACES) is None]
    if missing:
        return f"there is no {', '.join(missing)} here; {PACKAGES}"
    return None if os.geteuid() == 0 else "slurmd starts as root alone"


@dataclass(frozen=True)
class Cluster:
    """One that runs."""

    folder: Path
    environment: dict[str, str]

    def run(self, *command: str, check: bool = True) -> str:
        """What one of SLURM's commands says."""
        done = self._done(command)
        if check and done.returncode:
            raise AssertionError(f"{' '.join(command)}: {done.stderr}{done.stdout}")
        return done.stdout

    def send(self, *command: str) -> None:
        """One of SLURM's commands, of which the effect matters: scancel tries for minutes where a job has ended."""
        with suppress(subprocess.TimeoutExpired):
            self._done(command, 5)

    def _done(self, command: Sequence[str], seconds: float = _SECONDS) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            list(command), env=self.environment, capture_output=True, text=True, timeout=seconds, check=False
        )

    def queue(self) -> dict[str, str]:
        """State of each job that is not over, by name."""
        rows = self.run("squeue", "--noheader", "--array", "--format=%i %T").splitlines()
        return {row.split()[0]: row.split()[1] for row in rows}

    def await_empty(self, seconds: float) -> None:
        """Until nothing waits and nothing runs."""
        wait_until(lambda: not self.queue(), seconds, lambda: f"still in the queue: {self.queue()}\n{self.logs()}")

    def logs(self) -> str:
        """What the daemons said last."""
        return "\n".join(
            f"{path.name}: {path.read_text(encoding='utf-8', errors='replace')[-1500:]}"
            for path in sorted(self.folder.glob("*.log"))
        )


def wait_until(true: Callable[[], object], seconds: float, why: Callable[[], str] = lambda: "it did not come") -> None:
    """Look again and again.

    Raises:
        AssertionError: it did not come to be true.
    """
    until = time.monotonic() + seconds
    while not true():
        if time.monotonic() > until:
            raise AssertionError(why())
        time.sleep(0.3)


@contextmanager
def cluster() -> Iterator[Cluster]:
    """Two nodes on this machine, each with two CPUs and what it takes for four GPUs; ports of its own."""
    folder = Path(tempfile.mkdtemp(prefix="peftbench-slurm-", dir="/tmp"))
    folder.chmod(0o755)
    with ExitStack() as daemons:
        daemons.callback(shutil.rmtree, folder, ignore_errors=True)
        sock = _munge(folder, daemons)
        configuration = folder / "slurm.conf"
        configuration.write_text(_configuration(folder, sock), encoding="utf-8")
        # What stands for them is no device: jobs can ask for GPUs, and find none, as on a machine without a driver.
        for number in range(GPUS):
            (folder / f"gpu{number}").touch()
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-{GPUS - 1}]\n", encoding="utf-8")
        environment = os.environ | {"SLURM_CONF": str(configuration), "PATH": _PLACES}
        for name in list(environment):
            if name.startswith("SLURM_") and name != "SLURM_CONF":
                del environment[name]
        found = Cluster(folder, environment)
        for name, *more in (["slurmctld"], *(["slurmd", "-N", node] for node in nodes())):
            command = [str(shutil.which(name, path=_PLACES)), "-D", "-f", str(configuration), *more]
            _start(command, folder / f"{'-'.join([name, *more[1:]])}.out.log", daemons, environment)
        wait_until(
            lambda: found.run("sinfo", "--noheader", "--Node", "--format=%T", check=False).split() == ["idle"] * 2,
            _SECONDS,
            lambda: f"the nodes did not come up\n{found.logs()}",
        )
        daemons.callback(_cancel, found)
        yield found


def _cancel(found: Cluster) -> None:
    found.run("scancel", "--user=root", "--full", "--signal=KILL", check=False)
    found.run("scancel", "--user=root", check=False)
    with suppress(AssertionError):
        wait_until(lambda: not found.queue(), 20)


def _munge(folder: Path, daemons: ExitStack) -> Path:
    place = folder / "munge"
    place.mkdir(mode=0o755)
    key = place / "key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    for path in (place, key):
        shutil.chown(path, "munge", "munge")
    sock = place / "socket"
    command = [
        str(shutil.which("munged", path=_PLACES)),
        "--foreground",
        "--force",
        f"--socket={sock}",
        f"--key-file={key}",
        f"--pid-file={place / 'pid'}",
        f"--seed-file={place / 'seed'}",
        f"--log-file={place / 'munged.log'}",
    ]
    _start(command, folder / "munged.log", daemons, dict(os.environ), user="munge")
    wait_until(sock.exists, _SECONDS)
    return sock


def _start(
    command: list[str], log: Path, daemons: ExitStack, environment: dict[str, str], user: str | None = None
) -> None:
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, user=user)
    daemons.callback(_end, process)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("", 0))
        return int(found.getsockname()[1])


def nodes() -> tuple[str, str]:
    """Their names, which are this machine's, for processes of one run find each other by them."""
    return socket.gethostname().split(".")[0], "localhost"


def _configuration(folder: Path, sock: Path) -> str:
    host = nodes()[0]
    places = {name: folder / name for name in ("state", "spool")}
    for place in places.values():
        place.mkdir()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
    return "\n".join(
        [
            "ClusterName=peftbench",
            f"SlurmctldHost={host}(127.0.0.1)",
            "SlurmUser=root",
            "SlurmdUser=root",
            f"SlurmctldPort={_free_port()}",
            "GresTypes=gpu",
            # A job that begins anew waits until what it was let in with before is out of date.
            "AuthType=auth/munge",
            f"AuthInfo=socket={sock},cred_expire=5",
            "CredType=cred/munge",
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            "MpiDefault=none",
            "SwitchType=switch/none",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_CPU",
            "SchedulerType=sched/backfill",
            "JobAcctGatherType=jobacct_gather/none",
            "AccountingStorageType=accounting_storage/none",
            "ReturnToService=2",
            "JobRequeue=1",
            "KillWait=30",
            "InactiveLimit=0",
            "MinJobAge=300",
            f"StateSaveLocation={places['state']}",
            f"SlurmdSpoolDir={places['spool']}/%n",
            f"SlurmctldPidFile={folder / 'slurmctld.pid'}",
            f"SlurmdPidFile={folder}/slurmd-%n.pid",
            f"SlurmctldLogFile={folder / 'slurmctld.log'}",
            f"SlurmdLogFile={folder}/slurmd-%n.log",
            *(
                f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={_free_port()} CPUs=2 "
                f"RealMemory={memory // 3} Gres=gpu:{GPUS} State=UNKNOWN"
                for name in nodes()
            ),
            "PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP",
            "",
        ]
    )
