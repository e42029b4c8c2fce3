"""The loss on a general text before and after a training."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from peftbench.data.text_set import TextSet
from peftbench.errors import DataError, DataNotFoundError
from peftbench.evaluation.general_text import GeneralText, read_general_text
from peftbench.methods.base import Method
from peftbench.methods.baselines import ZeroShot
from peftbench.methods.lora import Lora
from peftbench.methods.prompt_tuning import PromptTuning
from peftbench.optim import SGD, AdamW
from peftbench.record import RunRecord
from peftbench.run.runner import Run
from tests.helpers.methods import one_method_fast
from tests.helpers.short_runs import use_small_matmul
from tests.helpers.training import reset_accelerators
from tests.helpers.workshop import Workshop

SHIPPED = {"general_text": "shipped"}
LARGE_STEPS = AdamW(learning_rate=0.05)


def measure_plainly(folder: Path, max_length: int) -> tuple[float, int]:
    """Return the mean loss and the number of predicted tokens of the shipped text, with transformers alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = tokenizer(read_general_text("shipped").text, add_special_tokens=False)["input_ids"]
    total, count = 0.0, 0
    for window in torch.tensor(ids).split(max_length):
        with torch.no_grad():
            total += float(model(window[None], labels=window[None]).loss) * (len(window) - 1)
        count += len(window) - 1
    return total / count, count


def test_shipped_text_has_several_subjects() -> None:
    """Its length is that of the documentation, and no paragraph occurs twice."""
    text = read_general_text("shipped").text
    paragraphs = text.split("\n\n")
    assert 1800 <= len(text.split()) <= 2400
    assert len(paragraphs) == len(set(paragraphs)) > 30


def test_losses_are_those_of_transformers(workshop: Workshop) -> None:
    """Before the training it is the base model's loss, after it that of the saved model, over all windows."""
    recipe = workshop.recipe(Lora(r=2), evaluate=SHIPPED, optimizer=LARGE_STEPS, save_model=True)
    record = workshop.run(recipe)
    assert record.forgetting is not None
    before, count = measure_plainly(workshop.base_folder("gpt2_tied"), max_length=48)
    after, _ = measure_plainly(workshop.output / "run" / "model", max_length=48)
    assert record.forgetting.num_tokens == count
    assert record.forgetting.window_tokens == 48
    assert record.forgetting.loss_before == pytest.approx(before, rel=1e-5)
    assert record.forgetting.loss_after == pytest.approx(after, rel=1e-5)
    assert record.forgetting.increase == pytest.approx(after - before, rel=1e-3)
    assert abs(after - before) > 1e-3


@one_method_fast("last_layer", "lora")
def test_training_is_not_changed(method: Method, workshop: Workshop) -> None:
    """With dropout, the losses are equal to the last bit; the loss before the training is the same for all methods."""
    plain = workshop.run(workshop.recipe(method, model={"dropout": 0.2}))
    measured = workshop.run(workshop.recipe(method, model={"dropout": 0.2}, evaluate=SHIPPED))
    assert measured.step_losses == plain.step_losses
    assert measured.quality == plain.quality
    assert measured.forgetting is not None
    assert measured.forgetting.loss_before == pytest.approx(measure_plainly(workshop.base_folder("gpt2_tied"), 48)[0])


def test_training_that_changes_nothing_forgets_nothing(workshop: Workshop) -> None:
    """With a learning rate of nearly zero the difference is zero, except for the soft prompt of prompt tuning."""
    still: dict[str, Any] = {"optimizer": SGD(learning_rate=1e-30), "evaluate": SHIPPED}
    lora = workshop.run(workshop.recipe(Lora(r=2), **still)).forgetting
    prompt = workshop.run(workshop.recipe(PromptTuning(num_virtual_tokens=4), **still)).forgetting
    assert lora is not None
    assert prompt is not None
    assert lora.increase == pytest.approx(0.0, abs=1e-6)
    assert prompt.loss_before == lora.loss_before
    assert prompt.increase is not None
    assert abs(prompt.increase) > 1e-4


def test_untrained_model_forgets_nothing(workshop: Workshop) -> None:
    """Zero-shot has the base model's loss, before and after."""
    forgetting = workshop.run(workshop.recipe(ZeroShot(), evaluate=SHIPPED)).forgetting
    assert forgetting is not None
    assert forgetting.increase == 0.0
    assert math.isfinite(forgetting.loss_before or math.inf)


def evaluate_saved(workshop: Workshop, method: Method) -> RunRecord:
    """Train without the text, then evaluate the saved model with it; return that record."""
    recipe = workshop.recipe(method, optimizer=LARGE_STEPS, save_model=True)
    workshop.run(recipe)
    recipe = copy.copy(recipe).model_copy(update={"evaluate": recipe.evaluate.model_copy(update=SHIPPED)})
    reset_accelerators()
    with use_small_matmul():
        return Run(recipe, evaluate_only=True).execute()[0]


def test_saved_model_is_measured_later(workshop: Workshop) -> None:
    """An adapter's base model is at hand, so that both losses are those of a run that measures them at once."""
    later = evaluate_saved(workshop, Lora(r=2)).forgetting
    recipe = workshop.recipe(Lora(r=2), optimizer=LARGE_STEPS, evaluate=SHIPPED, name="at_once")
    at_once = workshop.run(recipe).forgetting
    assert later is not None
    assert at_once is not None
    assert later.loss_before == pytest.approx(at_once.loss_before)
    assert later.loss_after == pytest.approx(at_once.loss_after)


def test_unknown_loss_before_is_noted(workshop: Workshop) -> None:
    """The base model of full fine-tuning is no longer loaded."""
    from peftbench.methods.full import Full

    record = evaluate_saved(workshop, Full())
    assert record.forgetting is not None
    assert record.forgetting.loss_before is record.forgetting.increase is None
    assert record.forgetting.loss_after is not None
    assert any("before the training is unknown" in note for note in record.notes)


def test_own_text(workshop: Workshop, tmp_path: Path) -> None:
    """A file of one's own is read, and its content identifies it."""
    file = tmp_path / "own.txt"
    file.write_text("The harbour council voted. " * 20, encoding="utf-8")
    forgetting = workshop.run(workshop.recipe(Lora(r=2), evaluate={"general_text": str(file)})).forgetting
    assert forgetting is not None
    assert forgetting.text == str(file)
    assert forgetting.text_fingerprint == read_general_text(str(file)).fingerprint


def test_text_of_a_data_set(workshop: Workshop, tmp_path: Path) -> None:
    """The first rows of a column, empty ones included, are one text; the record names the split."""
    folder = write_data_set(tmp_path, ["The harbour council voted.\n", "", "It was late. " * 20, "not read"])
    source = {"path": str(folder), "column": "body", "rows": 3}
    recipe = workshop.recipe(Lora(r=2), evaluate={"general_text": source})
    assert recipe.evaluate.general_text == TextSet(**source)
    forgetting = workshop.run(recipe).forgetting
    assert forgetting is not None
    assert forgetting.text == f"{folder} (validation)"
    text = "The harbour council voted.\n\n" + "It was late. " * 20
    assert forgetting.text_fingerprint == GeneralText("", text).fingerprint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"column": "text"}, "evaluate.general_text cannot be read: .*text"),
        ({"split": "dev"}, "evaluate.general_text cannot be read: .*dev.* does not exist"),
        ({"path": "no folder"}, "evaluate.general_text cannot be read: could not load no folder"),
    ],
    ids=["column", "split", "path"],
)
def test_unusable_data_set_is_refused_before_the_run(
    change: dict[str, str], message: str, workshop: Workshop, tmp_path: Path
) -> None:
    """The error has the key, and nothing was written."""
    source = {"path": str(write_data_set(tmp_path, ["a b c"])), "column": "body"} | change
    with pytest.raises(DataError, match=message):
        Run(workshop.recipe(Lora(r=2), evaluate={"general_text": source}))
    assert not (workshop.output / "run").exists()


def write_data_set(folder: Path, texts: list[str]) -> Path:
    """Write a data set with a validation split whose column is ``body``."""
    data = folder / "data_set"
    data.mkdir()
    rows = "".join(json.dumps({"body": text}) + "\n" for text in texts)
    (data / "validation.jsonl").write_text(rows, encoding="utf-8")
    return data


@pytest.mark.parametrize(
    ("content", "message", "kind"),
    [
        (None, "does not exist", DataNotFoundError),
        (b"\xff\xfe\x00", "is not UTF-8 text: byte 0", DataError),
        (b" \n", "is too short to measure a loss", DataError),
    ],
    ids=["missing", "binary", "empty"],
)
def test_unusable_text_is_refused_before_the_run(
    content: bytes | None, message: str, kind: type[DataError], workshop: Workshop, tmp_path: Path
) -> None:
    """The error names the key and the file, and nothing was written."""
    file = tmp_path / "bad.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(kind, match=message) as raised:
        Run(workshop.recipe(Lora(r=2), evaluate={"general_text": str(file)}))
    assert f"evaluate.general_text={str(file)!r}" in str(raised.value)
    assert not (workshop.output / "run").exists()
