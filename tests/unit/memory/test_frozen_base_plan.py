"""The plan of LoRA on a base of eight billion parameters, whose frozen weights are held in 16 bits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from peftbench.memory.devices import UNKNOWN_DEVICE
from peftbench.memory.estimate import estimate
from peftbench.memory.families import get_family
from peftbench.methods.lora import Lora
from tests.helpers.workshop import Workshop

GIB = 2**30


@pytest.fixture
def llama_folder(workshop: Workshop, tmp_path: Path) -> Path:
    """A folder with the config of Llama-3.1-8B and a small tokenizer."""
    family = get_family("llama3")
    (member,) = [member for member in family.members if member.name == "meta-llama/Llama-3.1-8B"]
    folder = tmp_path / "llama"
    AutoTokenizer.from_pretrained(workshop.base_folder("llama_untied")).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(family.config | member.config))
    return folder


@pytest.mark.slow
def test_lora_on_eight_billion_parameters_fits_in_17_gib(
    llama_folder: Path, workshop: Workshop, tmp_path: Path
) -> None:
    """One row of 2,048 tokens with checkpointing; 2,047 labels instead of 64 add at most half a gibibyte."""
    live = {}
    for labels in (64, 2047):
        rows = tmp_path / f"{labels}.jsonl"
        # the end token is a label too
        rows.write_text(json.dumps({"prompt": "a", "completion": " b" * (labels - 1)}) + "\n")
        recipe = workshop.recipe(
            Lora(r=16, target_modules="all-linear"),
            model={"path": str(llama_folder)},
            task={"kind": "completion"} if labels < 2047 else {"kind": "text", "text": "completion"},
            data={"source": {"kind": "files", "train": str(rows), "test": str(rows)}, "max_length": 2048},
            train={
                "precision": "bf16",
                "global_batch_size": 1,
                "micro_batch_size": 1,
                "gradient_checkpointing": True,
            },
            evaluate={"metrics": [], "batch_size": 1},
        )
        plan = estimate(recipe, UNKNOWN_DEVICE, "a GPU")
        assert f"{labels} labeled tokens" in plan.notes[0]
        live[labels] = max(peak.live_bytes for peak in plan.phase_peaks.values())
    assert 15 * GIB < live[64] <= 17.5 * GIB  # the weights alone are 14.96 GiB
    assert abs(live[2047] - live[64]) <= 0.5 * GIB
