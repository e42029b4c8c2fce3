"""Every format with a real 135M instruct model: labels, losses of a plain loop, and prompts of generation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from peftbench.data.encode import iter_spans
from peftbench.data.sources import Files
from peftbench.modeling.loading import load_model
from peftbench.recipe.schema import Data, Evaluate, Model, Profile, Recipe, Schedule, Train
from peftbench.run.runner import Run
from peftbench.tasks import TASKS
from peftbench.training.data import build_encoder, load_split
from tests.helpers.instruct_model import make_instruct_model
from tests.helpers.methods import ONE_OF_EACH
from tests.helpers.training import reset_accelerators

STEPS, LEARNING_RATE = 2, 1e-3
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ROWS: dict[str, list[dict[str, Any]]] = {
    "chat": [
        {
            "messages": [
                {"role": "user", "content": "What is the capital of France?"},
                {"role": "assistant", "content": "Paris."},
                {"role": "user", "content": "And of Italy?"},
                {"role": "assistant", "content": "Rome, on the Tiber."},
            ]
        },
        {"messages": [{"role": "user", "content": "Greet me"}, {"role": "assistant", "content": "Hi!"}]},
    ],
    "completion": [{"prompt": "2 + 2 =", "completion": " 4"}, {"prompt": "The sky is", "completion": " blue today."}],
    "alpaca": [{"instruction": "Name a fruit.", "output": "Apple"}, {"instruction": "Count.", "output": "One two"}],
    "choices": [
        {"prompt": "Water is", "choices": ["wet", "dry"], "answer": 0},
        {"prompt": "Fire is", "choices": ["cold", "hot"], "answer": "B"},
    ],
    "text": [{"text": "A short document."}, {"text": "Another one, which is a little longer than the first."}],
    "summarization": [
        {"article": "A long story.", "summary": "Story"},
        {"article": "News of today", "summary": "News"},
    ],
}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the instruct model."""
    return make_instruct_model(tmp_path_factory.mktemp("instruct"))


def tokenize_plainly(task: str, row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return ids and labels (-100: none) with the tokenizer alone, as one would by hand for this format."""

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    end = [tokenizer.eos_token_id]
    if task == "chat":
        rendered: Any = tokenizer.apply_chat_template(row["messages"], tokenize=True)
        whole: list[int] = list(rendered["input_ids"])
        opening = ids("<|im_start|>assistant\n")
        labels, position = [-100] * len(whole), 0
        while position < len(whole):
            if whole[position : position + len(opening)] == opening:
                start = position + len(opening)
                stop = whole.index(end[0], start) + 1
                labels[start:stop] = whole[start:stop]
                position = stop
            position += 1
        return whole, labels
    if task == "text":
        whole = ids(row["text"]) + end
        return whole, list(whole)
    prompt, target = split_plainly(task, row)
    given = ids(prompt) + (ids("\nTL;DR:") if task == "summarization" else [])
    return given + ids(target) + end, [-100] * len(given) + ids(target) + end


def split_plainly(task: str, row: dict[str, Any]) -> tuple[str, str]:
    """Return prompt and labeled text of a row, without a summary's separator."""
    if task == "alpaca":
        return ALPACA.format(instruction=row["instruction"]), row["output"]
    if task == "choices":
        return row["prompt"], " " + row["choices"][{0: 0, "B": 1}[row["answer"]]]
    if task == "summarization":
        return row["article"], " " + row["summary"]
    return row["prompt"], row["completion"]


def build_recipe(task: str, method: str, model_folder: Path, folder: Path) -> Recipe:
    """Return the recipe of a run in float32 whose one batch has all examples."""
    data = folder / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS[task]), encoding="utf-8")
    return Recipe(
        name="run",
        output_dir=str(folder / "runs"),
        save_model=False,
        model=Model(path=str(model_folder), dropout=0.0),
        method=ONE_OF_EACH[method],
        data=Data(source=Files(train=str(data), test=str(data)), max_length=128),
        schedule=Schedule(kind="constant"),
        train=Train(steps=STEPS, global_batch_size=2, precision="fp32"),
        evaluate=Evaluate(metrics=(), max_new_tokens=8),
        profile=Profile(untimed_steps=0),
    ).model_copy(update={"task": TASKS[task].match(list(ROWS[task][0]))})


def train_plainly(recipe: Recipe, encoded: list[tuple[list[int], list[int]]]) -> list[float]:
    """Return the losses of a loop of torch and transformers: one example at a time, transformers' own forward pass."""
    torch.manual_seed(recipe.train.seed)
    base = load_model(recipe.model)
    if recipe.method.kind == "full":
        base.model.load_state_dict(
            AutoModelForCausalLM.from_pretrained(recipe.model.path, dtype=torch.float32).state_dict()
        )
    torch.manual_seed(recipe.train.seed)
    model = recipe.method.apply(base.model, base.tokenizer)
    recipe.method.set_training(model)
    optimizer = recipe.optimizer.build([one for one in model.parameters() if one.requires_grad])
    losses = []
    for _ in range(STEPS):
        total = sum(sum(label != -100 for label in labels[1:]) for _, labels in encoded)
        step_loss = 0.0
        for ids, labels in encoded:
            logits = model(input_ids=torch.tensor([ids])).logits[0, -len(ids) :]
            loss = functional.cross_entropy(logits[:-1], torch.tensor(labels[1:]), reduction="sum") / total
            loss.backward()
            step_loss += float(loss.detach())
        torch.nn.utils.clip_grad_norm_([one for one in model.parameters() if one.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(step_loss)
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("task", ROWS)
def test_labels_and_prompts_match_the_tokenizer(task: str, model_folder: Path, tmp_path: Path) -> None:
    """Ids, labels and the prompt of a generation are those that the tokenizer alone gives."""
    assert set(ROWS) == set(TASKS)
    recipe = build_recipe(task, "full", model_folder, tmp_path)
    encoder = build_encoder(recipe, load_model(recipe.model))
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    for row, example in zip(ROWS[task], load_split(recipe, "train"), strict=True):
        ids, labels = tokenize_plainly(task, row, tokenizer)
        encoded = encoder.encode_example(example)
        spans = list(iter_spans(encoded["label_spans"]))
        found = [id if any(start <= index < end for start, end in spans) else -100 for index, id in enumerate(ids)]
        assert encoded["input_ids"] == ids
        assert found == labels
        prompt = encoder.encode_prompt(example)
        assert ids[: len(prompt)] == prompt
        assert labels[len(prompt)] != -100


@pytest.mark.slow
@pytest.mark.parametrize("method", ONE_OF_EACH)
@pytest.mark.parametrize("task", ROWS)
def test_losses_match_a_plain_loop(task: str, method: str, model_folder: Path, tmp_path: Path) -> None:
    """The losses of a run in float32 are those of a loop that uses transformers' forward pass and no batches."""
    recipe = build_recipe(task, method, model_folder, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    expected = train_plainly(recipe, [tokenize_plainly(task, row, tokenizer) for row in ROWS[task]])
    reset_accelerators()
    record, _ = Run(recipe).execute()
    assert record.step_losses == pytest.approx(expected, abs=1e-5, rel=1e-5)
    assert record.step_losses[0] != record.step_losses[1]
