"""LoRA over a 4-bit base model (QLoRA) in two processes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.helpers.paths import REPOSITORY
from tests.launch.test_run_suite import record_of, run

ENGINES = {
    "ddp": ["--config_file", str(REPOSITORY / "accel_configs" / "cpu2.yaml")],
    "zero2": [
        "--config_file",
        str(REPOSITORY / "accel_configs" / "zero2.yaml"),
        "--deepspeed_config_file",
        str(REPOSITORY / "ds_configs" / "zero2.json"),
    ],
    "zero3": [
        "--config_file",
        str(REPOSITORY / "accel_configs" / "zero3.yaml"),
        "--deepspeed_config_file",
        str(REPOSITORY / "ds_configs" / "zero3.json"),
    ],
}
ARGUMENTS = [
    "--config",
    "recipe.yaml",
    "train.steps=6",
    "train.precision=fp32",
    "profile.untimed_steps=2",
    "model.dropout=0.0",
    "model.quantization=nf4",
    "optimizer.learning_rate=3e-3",
]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_qlora_two_processes_match_one(project: Path, caches: dict[str, str]) -> None:
    """DDP and ZeRO-2 give the same losses; ZeRO-3 would shard packed weights, so it is refused and saves no model."""
    single_process = run([sys.executable, "-m", "peftbench.train", *ARGUMENTS, "name=single"], project, caches)
    assert single_process.returncode == 0, single_process.stderr
    single = record_of(project, "single")
    assert single["step_losses"][-1] < single["step_losses"][0]
    for name, config in ENGINES.items():
        launch = [sys.executable, "-m", "accelerate.commands.launch", *config, "-m", "peftbench.train"]
        result = run([*launch, *ARGUMENTS, f"name={name}"], project, caches | {"DS_ACCELERATOR": "cpu"})
        if name == "zero3":
            assert "packed weights of a quantized base model" in result.stdout + result.stderr
            assert not list((project / "out").glob("zero3/model*"))
            continue
        assert result.returncode == 0, result.stderr
        record = record_of(project, name)
        assert (record["engine"]["name"], record["device"]["num_processes"]) == (name, 2)
        assert record["step_losses"] == pytest.approx(single["step_losses"], rel=2e-5)
        assert record["state_bytes"]["weights"] == single["state_bytes"]["weights"]
        assert record["parameters"] == single["parameters"]
