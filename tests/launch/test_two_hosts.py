"""Two hosts: network namespaces that only a virtual link connects, like the nodes of a cluster."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml

from tests.helpers.paths import REPOSITORY
from tests.helpers.project import LAUNCH, RECIPE
from tests.launch.test_run_suite import record_of

pytestmark = [pytest.mark.xdist_group("hosts"), pytest.mark.slow, pytest.mark.multiprocess, pytest.mark.timeout(900)]
ADDRESSES = ("10.219.0.1", "10.219.0.2")
NAMES = Path("/etc/netns")
"""Folder of each namespace's own files of /etc, see ip-netns(8)."""
STEPS = 12
SECONDS = 120
"""Time within which a run must end after it has lost a host."""


@dataclass(frozen=True)
class Hosts:
    """Two connected network namespaces."""

    names: tuple[str, str]
    link: str

    def command(self, host: int, arguments: list[str]) -> list[str]:
        """Return a command that runs in one namespace, with the namespace's name as host name."""
        name = self.names[host]
        set_hostname = ["unshare", "--uts", "sh", "-c", f'hostname {name}; exec "$@"', "sh"]
        return ["ip", "netns", "exec", name, *set_hostname, *arguments]


def ip(*arguments: str) -> None:
    """Run an ip command of iproute2."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    """Create two hosts with a link between them; skip if this machine cannot."""
    if shutil.which("ip") is None:
        pytest.skip("the ip command was not found; apt-get install iproute2")
    if os.geteuid() != 0:
        pytest.skip("only root can create network namespaces")
    prefix = f"pb{os.getpid() % 100000}"
    names, link = (f"{prefix}a", f"{prefix}b"), prefix[:12]
    try:
        try:
            for name in names:
                ip("netns", "add", name)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"cannot create a network namespace: {error.stderr.strip()}")
        ip("link", "add", link, "netns", names[0], "type", "veth", "peer", "name", link, "netns", names[1])
        host_entries = "".join(f"{address} {name}\n" for name, address in zip(names, ADDRESSES, strict=True))
        for name, address in zip(names, ADDRESSES, strict=True):
            (NAMES / name).mkdir(parents=True)
            (NAMES / name / "hosts").write_text(f"127.0.0.1 localhost\n{host_entries}", encoding="utf-8")
            ip("-n", name, "addr", "add", f"{address}/24", "dev", link)
            ip("-n", name, "link", "set", link, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield Hosts(names, link)
    finally:
        for name in names:
            shutil.rmtree(NAMES / name, ignore_errors=True)
            with suppress(subprocess.CalledProcessError):
                ip("netns", "del", name)
        with suppress(OSError):
            NAMES.rmdir()


@dataclass(frozen=True)
class TwoHostRun:
    """A run with one process on each host."""

    processes: tuple[subprocess.Popen[str], subprocess.Popen[str]]

    def wait(self, seconds: float) -> list[str]:
        """Wait until both processes have ended, kill them after a timeout, and return the output of each."""
        deadline = time.monotonic() + seconds
        outputs = []
        try:
            for process in self.processes:
                out, errors = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
                outputs.append(out + errors)
        finally:
            for process in self.processes:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        return outputs


def start_run(hosts: Hosts, project: Path, caches: dict[str, str], port: int, *overrides: str) -> TwoHostRun:
    """Start a ZeRO-2 run with one process on each host; the first host runs the c10d rendezvous."""
    environment = caches | {"PYTHONUNBUFFERED": "1"}
    processes = []
    for host in range(2):
        arguments = [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--quiet",
            "--config_file",
            str(project / "accelerate.yaml"),
            "--num_machines",
            "2",
            "--num_processes",
            "2",
            "--machine_rank",
            str(host),
            "--main_process_ip",
            ADDRESSES[0],
            "--main_process_port",
            str(port),
            "--rdzv_backend",
            "c10d",
            "--rdzv_conf",
            f"is_host={int(host == 0)}",
            "--deepspeed_multinode_launcher",
            "standard",
            str(LAUNCH),
            "--config",
            "recipe.yaml",
            *overrides,
        ]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command = hosts.command(host, arguments)
        processes.append(subprocess.Popen(command, cwd=project, env=environment, start_new_session=True, **streams))  # type: ignore[call-overload]
    return TwoHostRun((processes[0], processes[1]))


@pytest.fixture
def project(project: Path) -> Path:
    """Return a project with a short ZeRO-2 training on CPU."""
    engine = yaml.safe_load((REPOSITORY / "accel_configs" / "zero2.yaml").read_text(encoding="utf-8"))
    engine["use_cpu"] = True
    engine["deepspeed_config"]["deepspeed_config_file"] = str(REPOSITORY / "ds_configs" / "zero2.json")
    (project / "accelerate.yaml").write_text(yaml.safe_dump(engine), encoding="utf-8")
    recipe = RECIPE | {"train": {"steps": STEPS, "global_batch_size": 4}, "checkpoint": {"interval": 2}}
    (project / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return project


def run_on_one_host(project: Path, caches: dict[str, str]) -> None:
    """Run the same two processes on one host."""
    arguments = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--quiet",
        "--config_file",
        str(project / "accelerate.yaml"),
        "--main_process_port",
        "0",
        str(LAUNCH),
        "--config",
        "recipe.yaml",
        "name=one",
    ]
    done = subprocess.run(arguments, cwd=project, env=caches, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr


def test_two_hosts_match_one(hosts: Hosts, project: Path, caches: dict[str, str]) -> None:
    """The losses are equal; after the loss of a host the run ends in time with an error, and it resumes."""
    run_on_one_host(project, caches)
    one_host = record_of(project, "one")
    outputs = start_run(hosts, project, caches, 29511, "name=two").wait(150)
    assert record_of(project, "two")["outcome"]["kind"] == "ok", outputs
    assert record_of(project, "two")["step_losses"] == one_host["step_losses"]

    lost_run = start_run(hosts, project, caches, 29512, "train.steps=12", "name=lost")
    status = project / "out" / "lost" / "status.json"
    checkpoints = project / "out" / "lost" / "checkpoints"
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and not list(checkpoints.rglob("step-*[0-9]/checkpoint.json")):
        assert lost_run.processes[0].poll() is None, lost_run.wait(1)
        time.sleep(0.05)
    # Cut the link before the kill, so that the other host sees no closed connection.
    ip("-n", hosts.names[1], "link", "set", hosts.link, "down")
    lost_host = psutil.Process(lost_run.processes[1].pid)
    for process in (*lost_host.children(recursive=True), lost_host):
        process.kill()
    start = time.monotonic()
    outputs = lost_run.wait(SECONDS)
    assert time.monotonic() - start < SECONDS
    assert json.loads(status.read_text(encoding="utf-8"))["phase"] in {"warmup", "train"}
    assert "no heartbeat for" in outputs[0], outputs[0]

    ip("-n", hosts.names[1], "link", "set", hosts.link, "up")
    outputs = start_run(hosts, project, caches, 29513, "name=lost").wait(150)
    record = record_of(project, "lost")
    assert record["outcome"]["kind"] == "ok", outputs
    assert record["resumed_after"]
    assert record["step_losses"] == one_host["step_losses"]
