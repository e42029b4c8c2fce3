"""A saved and exported chat model answers through transformers' pipeline, with its chat template."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from peftbench.export.folder import ExportRequest, export_model
from peftbench.modeling.saved_tokenizer import save_tokenizer
from tests.helpers.finished_runs import build_recipe, train_run, write_rows
from tests.unit.export.test_folder import extract_code, run_code

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from peftbench.recipe.schema import Precision

TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
QUESTION = [{"role": "user", "content": "What is seven plus five?"}]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"What is {number} plus {number}?"},
            {"role": "assistant", "content": f"{number} plus {number} is {2 * number}."},
        ]
    }
    for number in range(12)
]


def ask(folder: Path) -> list[dict[str, str]]:
    """Ask the question through transformers' pipeline and return the conversation."""
    generate = pipeline("text-generation", model=str(folder))
    conversation: Any = generate(QUESTION, max_new_tokens=4, do_sample=False)
    return conversation[0]["generated_text"]  # type: ignore[no-any-return]


def test_template_is_saved_and_the_tokenizer_unchanged(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """A template that is given replaces the tokenizer's own in the saved folder only; without one, its own is saved."""
    own = copy.deepcopy(tokenizer)
    own.chat_template = "own"
    save_tokenizer(own, TEMPLATE, tmp_path / "named")
    save_tokenizer(own, None, tmp_path / "own")
    save_tokenizer(tokenizer, None, tmp_path / "none")
    assert own.chat_template == "own"
    loaded = [AutoTokenizer.from_pretrained(tmp_path / name).chat_template for name in ("named", "own", "none")]
    assert loaded == [TEMPLATE, "own", None]


@pytest.mark.parametrize("method", [{"kind": "full"}, {"kind": "lora", "r": 4}], ids=lambda method: method["kind"])
def test_saved_and_exported_model_answers_with_the_template_of_the_recipe(
    method: dict[str, Any], base_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """The tokenizer of the base has no template; the pipeline uses the one that the recipe names."""
    rows = write_rows(tmp_path, CHATS)
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE, encoding="utf-8")
    task = {"kind": "chat", "chat_template": str(template)}
    values = {"task": task, "data": {"max_length": 56}, "name": "chat"}
    recipe = build_recipe(base_folder("llama_tied"), rows, tmp_path, method, **values)
    assert train_run(recipe).outcome.kind == "ok"
    saved = tmp_path / "chat" / "model"
    folders = [saved] if method["kind"] == "full" else []
    folders.append(export_model(ExportRequest(tmp_path / "chat", tmp_path / "exported", merge=True)).folder)
    for folder in folders:
        assert AutoTokenizer.from_pretrained(folder).chat_template == TEMPLATE
        conversation = ask(folder)
        assert conversation[:-1] == QUESTION
        assert conversation[-1]["role"] == "assistant"
    code = extract_code(tmp_path / "exported")
    assert '[{"role": "user", "content": "Write your prompt here."}]' in code
    assert "'role': 'assistant'" in run_code(code, tmp_path)


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """Return the folder of SmolLM2-135M-Instruct, which is too large to commit."""
    folder = Path(os.environ.get("SMOLLM2_FOLDER", Path(tempfile.gettempdir()) / "smollm2"))
    if not (folder / "config.json").exists():
        pytest.skip(f"{folder} does not exist; set SMOLLM2_FOLDER to a copy of SmolLM2-135M-Instruct")
    return folder


@pytest.mark.slow
def test_real_chat_model_is_trained_merged_and_asked(smollm2: Path, tmp_path: Path) -> None:
    """An instruct model keeps its template, is merged within the tolerances, and answers the question."""
    rows = write_rows(tmp_path, CHATS)
    sections = {
        "task": {"kind": "chat"},
        "data": {"max_length": 96},
        "train": {"steps": 4, "global_batch_size": 4},
        "optimizer": {"kind": "adamw", "learning_rate": 3e-4},
    }
    method = {"kind": "lora", "r": 8}
    recipe = build_recipe(smollm2, rows, tmp_path, method, **sections)
    assert train_run(recipe).outcome.kind == "ok"
    requested: tuple[Precision | None, ...] = (None, "fp16", "fp32")
    for dtype in requested:
        exported = export_model(ExportRequest(tmp_path / "lora", tmp_path / str(dtype), merge=True, dtype=dtype))
        assert exported.comparison is not None
        assert exported.comparison.dtype == (dtype or "bf16"), "the base model's files are in bf16"
        assert exported.comparison.error < exported.comparison.tolerance / 2
    tokenizer: Any = AutoTokenizer.from_pretrained(exported.folder)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(smollm2).chat_template
    generate = pipeline("text-generation", model=str(exported.folder), dtype=torch.float32)
    answer: Any = generate(QUESTION, max_new_tokens=16, do_sample=False)
    base = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    adapted: Any = PeftModel.from_pretrained(base, str(tmp_path / "lora" / "model"))
    inputs = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    new = adapted.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    text = answer[0]["generated_text"][-1]["content"]
    assert text == tokenizer.decode(new, skip_special_tokens=True)
    assert "seven" in text.lower()
