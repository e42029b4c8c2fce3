"""Requests for GPUs: which option has them, how many each node gets, and the line of the script."""

from __future__ import annotations

from pathlib import Path

import pytest

from peftbench.errors import SlurmError
from peftbench.slurm.batch_script import Job, render_script
from peftbench.slurm.gpus import find_gpu_options, take_gpu_request
from peftbench.slurm.options import parse_sbatch_options

REQUESTS: list[tuple[str, str, int]] = [
    ("gres", "gpu:a100:1", 1),
    ("gres", "gpu:2", 2),
    ("gres", "gpu", 1),
    ("gres", "gpu:a100", 1),
    ("gres", "gpu:1g.10gb:3", 3),
    ("gres", "gpu:a100:1,gpu:v100:2", 3),
    ("gres", "tmp:100G,gpu:a100_80gb:4", 4),
    ("gres", "shard:2", 1),
    ("gres", "mps:50", 1),
    ("gpus", "2", 2),
    ("gpus", "a100:2", 2),
    ("gpus", "a100", 1),
    ("gpus-per-node", "a100:1", 1),
    ("gpus-per-node", "8", 8),
    ("gpus-per-node", "a100:2,h100:1", 3),
    ("gpus-per-task", "h100:4", 4),
    ("tres-per-task", "cpu:2,gres/gpu:a100:2", 2),
    ("tres-per-task", "gres/gpu=3", 3),
]


@pytest.mark.parametrize(("name", "value", "count"), REQUESTS)
def test_request_is_one_line_of_its_kind(name: str, value: str, count: int) -> None:
    """The script has the user's value, no other request, and the number of GPUs is that of each node."""
    options, gpu_option, per_node = take_gpu_request(parse_sbatch_options({name: value, "time": "1:00:00"}), 1, 7)
    assert per_node == count
    job = Job(name="x", run_dirs=(Path("/runs/x"),), log_dir=Path("/runs"), options=options, gpus_per_node=gpu_option)
    lines = render_script(job).splitlines()
    assert lines.count(f"#SBATCH --{name}={value}") == 1
    assert len([line for line in lines if line.startswith("#SBATCH") and ("gpu" in line or "gres" in line)]) == 1
    assert "#SBATCH --time=1:00:00" in lines


@pytest.mark.parametrize(("default", "line"), [(1, "1"), (4, "4"), (0, "")])
@pytest.mark.parametrize("others", [{}, {"gres": "tmp:100G"}, {"gpu-bind": "closest"}, {"cpus-per-gpu": "8"}])
def test_default_is_used_without_a_request(others: dict[str, str], default: int, line: str) -> None:
    """Other resources, and options that only describe GPUs, do not replace it."""
    options = parse_sbatch_options(others)
    assert take_gpu_request(options, 1, default) == (options, line, default)


@pytest.mark.parametrize(("name", "value"), [("gres", "gpu:0"), ("gpus", "0"), ("gpus-per-node", "0")])
def test_request_for_no_gpu_writes_no_line(name: str, value: str) -> None:
    """A cluster without GPUs would refuse the line."""
    assert take_gpu_request({name: value, "time": "1"}, 1, 4) == ({"time": "1"}, "", 0)


def test_gpus_per_socket_need_the_sockets() -> None:
    """The number per node is the product; without the sockets it is unknown."""
    options = {"gpus-per-socket": "a100:2", "sockets-per-node": "2"}
    assert take_gpu_request(options, 1, 1) == (options, "", 4)
    with pytest.raises(SlurmError, match=r"gpus-per-socket=a100:2 needs slurm\.sockets-per-node; give it, or --gpus"):
        take_gpu_request({"gpus-per-socket": "a100:2"}, 1, 1)


@pytest.mark.parametrize(
    ("options", "nodes", "message"),
    [
        ({"gpus": "two gpus"}, 1, "slurm.gpus=two gpus is not a number of GPUs; write [TYPE:]NUMBER, e.g. slurm.gpus="),
        ({"gpus": "-1"}, 1, "slurm.gpus=-1 is not a number of GPUs"),
        ({"gpus": "a100:x"}, 1, "is not a number of GPUs"),
        ({"gpus": "a100:1:2"}, 1, "is not a number of GPUs"),
        ({"gpus-per-node": ""}, 1, "is not a number of GPUs"),
        ({"gpus-per-node": "1,"}, 1, "is not a number of GPUs"),
        ({"gpus-per-node": "\uff11"}, 1, "is not a number of GPUs"),
        (
            {"gres": "gpu:a100:many"},
            1,
            "slurm.gres=gpu:a100:many is not a number of GPUs; write [TYPE:]NUMBER, e.g. slurm",
        ),
        ({"gpus": "4"}, 2, "slurm.gpus=4 may be divided unevenly over 2 nodes; give --gpus-per-node instead"),
        ({"gres": "gpu:1", "gpus": "1"}, 1, "slurm.gres=gpu:1 and slurm.gpus=1 both request GPUs; give one of them"),
    ],
)
def test_invalid_request_is_refused(options: dict[str, str | None], nodes: int, message: str) -> None:
    """The error quotes the option and has an example."""
    with pytest.raises(SlurmError) as raised:
        take_gpu_request(options, nodes, 1)
    assert message in str(raised.value)


def test_resources_whose_names_contain_gpu_are_not_gpus() -> None:
    """Only the exact names of SLURM's generic resources count."""
    assert find_gpu_options({"gres": "gpumem:80,mygpu:1"}) == []
