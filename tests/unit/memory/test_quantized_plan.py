"""Plans of QLoRA by architecture: matrices that transformers does not quantize, and the type of hidden states."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from peftbench.memory.devices import UNKNOWN_DEVICE
from peftbench.memory.estimate import estimate
from peftbench.memory.plan import Plan
from peftbench.methods.lora import Lora
from tests.helpers.models import llama_config
from tests.helpers.workshop import Workshop

NUM_LAYERS, HIDDEN, ROWS = 2, 64, 8


def _plan(folder: Path, workshop: Workshop, quantization: str | None) -> Plan:
    model = {"path": str(folder), "quantization": quantization}
    train = {"precision": "bf16", "gradient_checkpointing": True, "global_batch_size": ROWS, "micro_batch_size": ROWS}
    return estimate(workshop.recipe(Lora(r=4), model=model, train=train), UNKNOWN_DEVICE, "a GPU")


def test_falcon_is_not_quantized_by_a_run_and_the_plan_notes_it(workshop: Workshop, tmp_path: Path) -> None:
    """Its layers are of a subclass of Linear, which transformers' quantization skips."""
    sizes = {"hidden_size": HIDDEN, "num_hidden_layers": NUM_LAYERS, "num_attention_heads": 4, "vocab_size": 256}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("falcon", **sizes)).save_pretrained(tmp_path)
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=options)
    assert not any(type(module).__name__ == "Linear4bit" for module in loaded.modules())
    notes = _plan(tmp_path, workshop, "nf4").notes
    assert any("nf4 does not quantize transformer.h.*.self_attention.query_key_value" in note for note in notes)


@pytest.mark.parametrize(("family", "ratio"), [("gpt2", 2), ("llama", 1)])
def test_hidden_states_between_quantized_layers(family: str, ratio: int, workshop: Workshop, tmp_path: Path) -> None:
    """QLoRA stores hidden states of GPT-2 in twice the bytes of LoRA's.

    A 4-bit layer returns the type of its input: under autocast, float32 after LayerNorm, and bf16 after RMSNorm.
    """
    gpt2 = AutoConfig.for_model("gpt2", n_embd=HIDDEN, n_layer=6, n_head=4, vocab_size=256, n_positions=512)
    config = gpt2 if family == "gpt2" else llama_config(max_position_embeddings=512, num_hidden_layers=6)
    config.save_pretrained(tmp_path)
    stored = [
        _plan(tmp_path, workshop, kind).phase_peaks["forward"].live_bytes_by_category["activations"]
        for kind in (None, "nf4")
    ]
    assert stored[1] / stored[0] == pytest.approx(ratio, rel=0.3)
