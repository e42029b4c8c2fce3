"""A private SLURM cluster: munged, slurmctld and slurmd from Debian's packages, with their files in one folder."""

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
GPUS, GPU_TYPE = 4, "a100"
"""GPUs that each node declares, and their type. They are empty files, not devices."""
_SECONDS = 60
_SEARCH_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def find_missing_requirement() -> str | None:
    """Return why SLURM cannot run on this machine, None if it can."""
    missing = [name for name in NEEDED if shutil.which(name, path=_SEARCH_PATH) is None]
    if missing:
        return f"{', '.join(missing)} not found; {PACKAGES}"
    return None if os.geteuid() == 0 else "slurmd must start as root"


@dataclass(frozen=True)
class Cluster:
    """A running SLURM cluster."""

    folder: Path
    environment: dict[str, str]

    def run(self, *command: str, check: bool = True) -> str:
        """Run a SLURM command and return its output."""
        result = self._run_command(command)
        if check and result.returncode:
            raise AssertionError(f"{' '.join(command)}: {result.stderr}{result.stdout}")
        return result.stdout

    def send(self, *command: str) -> None:
        """Run a SLURM command for at most 5 seconds. If its job has ended, scancel retries for minutes."""
        with suppress(subprocess.TimeoutExpired):
            self._run_command(command, 5)

    def _run_command(self, command: Sequence[str], seconds: float = _SECONDS) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            list(command), env=self.environment, capture_output=True, text=True, timeout=seconds, check=False
        )

    def queue(self) -> dict[str, str]:
        """Return the state of each pending or running job, by job id."""
        rows = self.run("squeue", "--noheader", "--array", "--format=%i %T").splitlines()
        return {row.split()[0]: row.split()[1] for row in rows}

    def await_empty(self, seconds: float) -> None:
        """Wait until no job is pending or running."""
        wait_until(lambda: not self.queue(), seconds, lambda: f"still in the queue: {self.queue()}\n{self.logs()}")

    def logs(self) -> str:
        """Return the end of each daemon's log."""
        return "\n".join(
            f"{path.name}: {path.read_text(encoding='utf-8', errors='replace')[-1500:]}"
            for path in sorted(self.folder.glob("*.log"))
        )


def wait_until(
    condition: Callable[[], object],
    seconds: float,
    get_message: Callable[[], str] = lambda: "the condition did not become true",
) -> None:
    """Poll until a condition is true.

    Raises:
        AssertionError: the condition is still false after the timeout.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(get_message())
        time.sleep(0.3)


@contextmanager
def cluster() -> Iterator[Cluster]:
    """Start a cluster of two nodes on this machine. Each has two CPUs and four fake GPUs; all ports are free ones."""
    folder = Path(tempfile.mkdtemp(prefix="peftbench-slurm-", dir="/tmp"))
    folder.chmod(0o755)
    with ExitStack() as daemons:
        daemons.callback(shutil.rmtree, folder, ignore_errors=True)
        sock = _munge(folder, daemons)
        configuration = folder / "slurm.conf"
        configuration.write_text(_configuration(folder, sock), encoding="utf-8")
        # The GPUs are empty files. Jobs can request them, and CUDA finds none, as on a machine without a driver.
        for number in range(GPUS):
            (folder / f"gpu{number}").touch()
        (folder / "gres.conf").write_text(
            f"Name=gpu Type={GPU_TYPE} File={folder}/gpu[0-{GPUS - 1}]\n", encoding="utf-8"
        )
        environment = os.environ | {"SLURM_CONF": str(configuration), "PATH": _SEARCH_PATH}
        for name in list(environment):
            if name.startswith("SLURM_") and name != "SLURM_CONF":
                del environment[name]
        running_cluster = Cluster(folder, environment)
        for name, *more in (["slurmctld"], *(["slurmd", "-N", node] for node in nodes())):
            command = [str(shutil.which(name, path=_SEARCH_PATH)), "-D", "-f", str(configuration), *more]
            _start(command, folder / f"{'-'.join([name, *more[1:]])}.out.log", daemons, environment)
        wait_until(
            lambda: (
                running_cluster.run("sinfo", "--noheader", "--Node", "--format=%T", check=False).split() == ["idle"] * 2
            ),
            _SECONDS,
            lambda: f"the nodes did not become idle\n{running_cluster.logs()}",
        )
        daemons.callback(_cancel, running_cluster)
        yield running_cluster


def _cancel(running_cluster: Cluster) -> None:
    running_cluster.run("scancel", "--user=root", "--full", "--signal=KILL", check=False)
    running_cluster.run("scancel", "--user=root", check=False)
    with suppress(AssertionError):
        wait_until(lambda: not running_cluster.queue(), 20)


def _munge(folder: Path, daemons: ExitStack) -> Path:
    munge_dir = folder / "munge"
    munge_dir.mkdir(mode=0o755)
    key = munge_dir / "key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    for path in (munge_dir, key):
        shutil.chown(path, "munge", "munge")
    sock = munge_dir / "socket"
    command = [
        str(shutil.which("munged", path=_SEARCH_PATH)),
        "--foreground",
        "--force",
        f"--socket={sock}",
        f"--key-file={key}",
        f"--pid-file={munge_dir / 'pid'}",
        f"--seed-file={munge_dir / 'seed'}",
        f"--log-file={munge_dir / 'munged.log'}",
    ]
    _start(command, folder / "munged.log", daemons, dict(os.environ), user="munge")
    wait_until(sock.exists, _SECONDS)
    return sock


def _start(
    command: list[str], log: Path, daemons: ExitStack, environment: dict[str, str], user: str | None = None
) -> None:
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, user=user)
    daemons.callback(_stop, process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])


def nodes() -> tuple[str, str]:
    """Return the names of the nodes. Both resolve to this machine, so that the processes of a run can connect."""
    return socket.gethostname().split(".")[0], "localhost"


def _configuration(folder: Path, sock: Path) -> str:
    host = nodes()[0]
    directories = {name: folder / name for name in ("state", "spool")}
    for directory in directories.values():
        directory.mkdir()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
    return "\n".join(
        [
            "ClusterName=peftbench",
            f"SlurmctldHost={host}(127.0.0.1)",
            "SlurmUser=root",
            "SlurmdUser=root",
            f"SlurmctldPort={_free_port()}",
            "GresTypes=gpu",
            # A requeued job waits until its previous credential has expired, so let it expire early.
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
            f"StateSaveLocation={directories['state']}",
            f"SlurmdSpoolDir={directories['spool']}/%n",
            f"SlurmctldPidFile={folder / 'slurmctld.pid'}",
            f"SlurmdPidFile={folder}/slurmd-%n.pid",
            f"SlurmctldLogFile={folder / 'slurmctld.log'}",
            f"SlurmdLogFile={folder}/slurmd-%n.log",
            *(
                f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={_free_port()} CPUs=2 "
                f"RealMemory={memory // 3} Gres=gpu:{GPU_TYPE}:{GPUS} State=UNKNOWN"
                for name in nodes()
            ),
            "PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP",
            "",
        ]
    )
