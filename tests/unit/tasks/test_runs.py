"""Runs of each task: what is trained, evaluated and counted."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from peftbench.data.encode import Encoder, SequenceLayout
from peftbench.data.sources import Files
from peftbench.errors import OutOfRangeError
from peftbench.evaluation.evaluator import Evaluator
from peftbench.evaluation.outputs import Predictions, build_outputs, read_outputs
from peftbench.methods.base import Method
from peftbench.methods.baselines import Lead, Majority, ZeroShot
from peftbench.methods.lora import Lora
from peftbench.run_dir.layout import RunDir
from peftbench.tasks.base import Task
from peftbench.tasks.chat import Chat
from peftbench.tasks.choices import Choices
from peftbench.tasks.completion import Completion
from peftbench.tasks.text import Text
from peftbench.training.data import check_splits
from peftbench.training.overlap import find_overlap
from tests.helpers.conversations import assistant, user
from tests.helpers.training import single_process_context, wrap_model
from tests.helpers.workshop import Workshop

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tests.helpers.conversations import Message

SYSTEM: Message = {"role": "system", "content": "Be short."}
CONVERSATIONS = [
    [SYSTEM, user(f"Day {day}?"), assistant("A vote."), user("And?"), assistant(f"Bridge {day}.")] for day in range(8)
]
CHAT = Chat(chat_template="plain")


def write_splits(folder: Path, **splits: list[dict[str, Any]]) -> Files:
    """Write a file for each split and return the source."""
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Files(**{split: str(folder / f"{split}.jsonl") for split in splits})  # type: ignore[arg-type]


def as_rows(conversations: list[list[Message]]) -> list[dict[str, Any]]:
    """Return rows with conversations."""
    return [{"messages": one} for one in conversations]


def test_conversations_are_trained_generated_and_compared(workshop: Workshop, tmp_path: Path) -> None:
    """The reference is the last answer. Labels are the answers and their end tokens, of every turn."""
    long = [SYSTEM, *(turn for _ in range(9) for turn in CONVERSATIONS[0][1:])]
    test = [CONVERSATIONS[0], [*CONVERSATIONS[1][:-1], assistant("No.")], [user("New?"), assistant("Yes.")]]
    source = write_splits(tmp_path, train=as_rows([*CONVERSATIONS, long]), test=as_rows(test))
    recipe = workshop.recipe(
        Lora(r=2),
        task=CHAT,
        data={"source": source, "max_length": 60},
        evaluate={"metrics": ("rouge",), "max_new_tokens": 4},
        train={"steps": 1, "global_batch_size": 9},
    )
    record = workshop.run(recipe)
    assert record.outcome.kind == "ok", record.outcome
    assert record.num_examples == {"train": 9, "test": 3}
    assert record.num_cut_examples == {"train": 1, "test": 0}  # the long one loses its first turns
    overlap = record.split_overlap
    assert overlap is not None
    assert overlap.texts == 2
    assert overlap.texts_with_reference == 1
    assert record.quality is not None
    assert set(record.quality.metrics) == {"rouge1", "rouge2", "rougeL", "rougeLsum"}
    outputs = read_outputs(RunDir(workshop.output / "run").path)
    assert [output.reference for output in outputs] == ["Bridge 0.", "No.", "Yes."]
    assert [sample.prompt for sample in record.quality.samples][2] == "user: New?"
    assert record.recipe["task"]["kind"] == "chat"


def test_overlap_of_conversations_ignores_their_last_answer(workshop: Workshop, tmp_path: Path) -> None:
    """A prompt is everything before it, system message included."""
    other_system = [{"role": "system", "content": "Be long."}, *CONVERSATIONS[2][1:]]
    test = [CONVERSATIONS[0], [*CONVERSATIONS[1][:-1], assistant("No.")], other_system, CONVERSATIONS[3][:3]]
    source = write_splits(tmp_path, train=as_rows(CONVERSATIONS), test=as_rows(test))
    columns = CHAT.select_columns(None)
    train, evaluated = source.load("train", columns), source.load("test", columns)
    overlap = find_overlap(train, evaluated, CHAT, has_ids=False, is_same_file=False)
    assert (overlap.texts, overlap.texts_with_reference, overlap.ids) == (2, 1, 0)


def test_overlap_of_documents_is_that_of_whole_texts(tmp_path: Path) -> None:
    """They have no prompt, so equal empty prompts do not count."""
    source = write_splits(tmp_path, train=[{"text": "a"}, {"text": "b"}], test=[{"text": "b"}, {"text": "c"}])
    columns = Text().select_columns(None)
    train, evaluated = source.load("train", columns), source.load("test", columns)
    overlap = find_overlap(train, evaluated, Text(), has_ids=False, is_same_file=False)
    assert (overlap.texts, overlap.texts_with_reference) == (0, 1)


def test_documents_are_trained_on_all_their_tokens(
    workshop: Workshop, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Nothing is generated, so no room is kept for new tokens."""
    texts = [f"The council met on day {day}. It voted on the bridge." for day in range(4)]
    source = write_splits(tmp_path, train=[{"text": text} for text in texts], test=[{"text": texts[0]}])
    keys: dict[str, Any] = {"train": {"steps": 1, "global_batch_size": 4}, "data": {"source": source}}
    record = workshop.run(
        workshop.recipe(Lora(r=2), task=Text(), evaluate={"metrics": None, "max_new_tokens": 40}, **keys)
    )
    assert record.outcome.kind == "ok", record.outcome
    lengths = [len(ids) for ids in tokenizer(texts)["input_ids"]]
    assert record.tokens is not None
    assert record.tokens.labeled == sum(lengths)  # the end token is labeled, the first token is not
    assert record.quality is not None
    assert record.quality.loss is not None
    assert (record.quality.metrics, record.quality.samples) == ({}, ())


@pytest.mark.parametrize("labels", ["completion", "all"])
def test_generation_starts_from_the_prompt_whatever_is_labeled(
    labels: str, workshop: Workshop, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Labels of the prompt change what is trained, not what the model is given."""
    rows = [{"prompt": f"The council met on day {day}.", "completion": " It voted."} for day in range(3)]
    source = write_splits(tmp_path, train=rows, test=rows)
    task = Completion(labels=labels)  # type: ignore[arg-type]
    evaluate = {"metrics": ("rouge",), "max_new_tokens": 6}
    recipe = workshop.recipe(ZeroShot(), task=task, data={"source": source}, evaluate=evaluate)
    record = workshop.run(recipe)
    assert record.quality is not None
    generated = [output.generated for output in read_outputs(RunDir(workshop.output / "run").path)]
    other = workshop.recipe(ZeroShot(), task=Completion(), data={"source": source}, evaluate=evaluate, name="other")
    workshop.run(other)
    assert generated == [output.generated for output in read_outputs(RunDir(workshop.output / "other").path)]
    assert len(set(generated)) > 1  # the texts depend on their prompts


def test_baseline_without_a_model_reads_conversations(workshop: Workshop, tmp_path: Path) -> None:
    """It copies from the prompt, and no template is needed."""
    source = write_splits(tmp_path, train=as_rows(CONVERSATIONS), test=as_rows([[user("It rained."), assistant("A")]]))
    recipe = workshop.recipe(
        Lead(sentences=1), task=Chat(), data={"source": source}, evaluate={"metrics": ("rouge",), "max_new_tokens": 4}
    )
    record = workshop.run(recipe)
    assert record.outcome.kind == "ok", record.outcome
    (output,) = read_outputs(RunDir(workshop.output / "run").path)
    assert (output.generated, output.reference) == ("user: It rained.", "A")


# --- choices ---------------------------------------------------------------------------------------------------------

QUESTIONS: list[dict[str, Any]] = [
    {"prompt": "The council voted on the", "choices": ["bridge", "road to the harbour", "car"], "answer": 0},
    {"prompt": "A day has", "choices": ["24 hours", "60"], "answer": "B"},
    {"prompt": "Longer than the others, this prompt has", "choices": ["more", "fewer", "no"], "answer": "no"},
]


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_choices_have_the_log_likelihood_of_their_tokens(
    batch_size: int,
    *,
    fresh_base: Callable[[str], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    accelerator: Accelerator,
    workshop: Workshop,
    tmp_path: Path,
) -> None:
    """It is the sum over the choice's tokens after the prompt, in nats, whatever the batch."""
    task = Choices()
    source = write_splits(tmp_path, train=QUESTIONS, test=QUESTIONS)
    encoder = Encoder(tokenizer, SequenceLayout(48, 0), task)
    columns = task.select_columns(None)
    encoded, _ = encoder.encode_split(source.load("test", columns), "test", "refuse", is_evaluated=True)
    model = fresh_base("gpt2_tied").eval()
    recipe = workshop.recipe(ZeroShot(), task=task, evaluate={"batch_size": batch_size})
    evaluator = Evaluator(single_process_context(accelerator), wrap_model(model), encoder, encoded, recipe)
    scores = evaluator.score_choices()
    for question, choices in zip(QUESTIONS, scores, strict=True):
        assert [choice.text for choice in choices] == question["choices"]
        prompt = tokenizer(str(question["prompt"]))["input_ids"]
        for choice in choices:
            tokens = tokenizer(" " + choice.text)["input_ids"]
            with torch.no_grad():
                log_probs = model(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0].double().log_softmax(-1)
            expected = [log_probs[len(prompt) + index - 1, token].item() for index, token in enumerate(tokens)]
            assert choice.log_likelihood == pytest.approx(math.fsum(expected), rel=1e-5)
            assert (choice.num_tokens, choice.num_bytes) == (len(tokens), len(choice.text))
    outputs = build_outputs(encoded, task, Predictions(choices=scores))
    assert [output.answer for output in outputs] == [0, 1, 2]
    assert [output.reference for output in outputs] == ["bridge", "60", "no"]
    best = [max(choices, key=lambda choice: choice.log_likelihood).text for choices in scores]
    assert [output.prediction for output in outputs] == best


@pytest.mark.parametrize(
    ("method", "task"), [(Lead(), Choices()), (Lead(), Text()), (Majority(), Text())], ids=["lead", "text", "majority"]
)
def test_baseline_without_anything_to_predict_is_refused(method: Method, task: Task, workshop: Workshop) -> None:
    """Its score would mean nothing."""
    with pytest.raises(OutOfRangeError, match=f"method.kind={method.kind} does not support task.kind={task.kind}"):
        check_splits(workshop.recipe(method, task=task))
