"""Two hosts: network namespaces connected only by a virtual link, like the nodes of a cluster."""

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
from tests.launch.conftest import LAUNCH, RECIPE
from tests.launch.test_run_suite import record_of

pytestmark = [pytest.mark.xdist_group("hosts"), pytest.mark.slow, pytest.mark.multiprocess, pytest.mark.timeout(900)]
ADDRESSES = ("10.219.0.1", "10.219.0.2")
NAMES = Path("/etc/netns")
"""Where ip-netns(8) finds what is in /etc of a namespace alone."""
STEPS = 12
SECONDS = 120
"""Within which a run whose other host is gone must have ended."""


@dataclass(frozen=True)
class Hosts:
    """Two of them, by the names of their namespaces."""

    names: tuple[str, str]
    link: str

    def command(self, host: int, words: list[str]) -> list[str]:
        """A command that runs on one of them, which has its own name."""
        name = self.names[host]
        named = ["unshare", "--uts", "sh", "-c", f'hostname {name}; exec "$@"', "sh"]
        return ["ip", "netns", "exec", name, *named, *words]


def ip(*words: str) -> None:
    """One command of iproute2."""
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    """Two hosts with a link between them, or the reason why there are none."""
    if shutil.which("ip") is None:
        pytest.skip("there is no ip command; apt-get install iproute2")
    if os.geteuid() != 0:
        pytest.skip("network namespaces are made by root alone")
    mark = f"pb{os.getpid() % 100000}"
    names, link = (f"{mark}a", f"{mark}b"), mark[:12]
    try:
        try:
            for name in names:
                ip("netns", "add", name)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespace can be made here: {error.stderr.strip()}")
        ip("link", "add", link, "netns", names[0], "type", "veth", "peer", "name", link, "netns", names[1])
        known = "".join(f"{address} {name}\n" for name, address in zip(names, ADDRESSES, strict=True))
        for name, address in zip(names, ADDRESSES, strict=True):
            (NAMES / name).mkdir(parents=True)
            (NAMES / name / "hosts").write_text(f"127.0.0.1 localhost\n{known}", encoding="utf-8")
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
class Two:
    """One run on both hosts."""

    processes: tuple[subprocess.Popen[str], subprocess.Popen[str]]

    def end(self, seconds: float) -> list[str]:
        """What each said, after both have ended."""
        until = time.monotonic() + seconds
        said = []
        try:
            for process in self.processes:
                out, errors = process.communicate(timeout=max(1.0, until - time.monotonic()))
                said.append(out + errors)
        finally:
            for process in self.processes:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        return said


def begin(hosts: Hosts, project: Path, caches: dict[str, str], port: int, *more: str) -> Two:
    """A run of one process on each host, with ZeRO-2, that meet at the first (c10d)."""
    environment = caches | {"PYTHONUNBUFFERED": "1"}
    made = []
    for host in range(2):
        words = [
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
            *more,
        ]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command = hosts.command(host, words)
        made.append(subprocess.Popen(command, cwd=project, env=environment, start_new_session=True, **streams))  # type: ignore[call-overload]
    return Two((made[0], made[1]))


@pytest.fixture
def project(project: Path) -> Path:
    """A training of a few steps with ZeRO-2 on CPUs."""
    engine = yaml.safe_load((REPOSITORY / "accel_configs" / "zero2.yaml").read_text(encoding="utf-8"))
    engine["use_cpu"] = True
    engine["deepspeed_config"]["deepspeed_config_file"] = str(REPOSITORY / "ds_configs" / "zero2.json")
    (project / "accelerate.yaml").write_text(yaml.safe_dump(engine), encoding="utf-8")
    recipe = RECIPE | {"train": {"steps": STEPS, "global_batch_size": 4}, "checkpoint": {"interval": 2}}
    (project / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return project


def on_one_host(project: Path, caches: dict[str, str]) -> None:
    """The same two processes on one host."""
    words = [
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
    done = subprocess.run(words, cwd=project, env=caches, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr


def test_two_hosts_match_one(hosts: Hosts, project: Path, caches: dict[str, str]) -> None:
    """The losses are the same; a lost host ends the run in time with an error, and the run resumes."""
    on_one_host(project, caches)
    one = record_of(project, "one")
    whole = begin(hosts, project, caches, 29511, "name=two").end(150)
    assert record_of(project, "two")["outcome"]["kind"] == "ok", whole
    assert record_of(project, "two")["step_losses"] == one["step_losses"]

    two = begin(hosts, project, caches, 29512, "train.steps=12", "name=lost")
    status = project / "out" / "lost" / "status.json"
    kept = project / "out" / "lost" / "checkpoints"
    until = time.monotonic() + 200
    while time.monotonic() < until and not list(kept.rglob("step-*[0-9]/checkpoint.json")):
        assert two.processes[0].poll() is None, two.end(1)
        time.sleep(0.05)
    # It vanishes: nothing of it answers any more, and nothing says that it is gone.
    ip("-n", hosts.names[1], "link", "set", hosts.link, "down")
    vanished = psutil.Process(two.processes[1].pid)
    for process in (*vanished.children(recursive=True), vanished):
        process.kill()
    start = time.monotonic()
    said = two.end(SECONDS)
    assert time.monotonic() - start < SECONDS
    assert json.loads(status.read_text(encoding="utf-8"))["phase"] in {"warmup", "train"}
    assert "is gone: nothing was heard of its host" in said[0], said[0]

    ip("-n", hosts.names[1], "link", "set", hosts.link, "up")
    ended = begin(hosts, project, caches, 29513, "name=lost").end(150)
    record = record_of(project, "lost")
    assert record["outcome"]["kind"] == "ok", ended
    assert record["resumed_after"]
    assert record["step_losses"] == one["step_losses"]
