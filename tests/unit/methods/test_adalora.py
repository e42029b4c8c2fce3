"""AdaLoRA: its penalty, the reduction of its ranks, checkpoints, and saved adapters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from peftbench.data.collate import Collator, MicroBatch
from peftbench.errors import OutOfRangeError, PeftbenchError, UnknownKeyError, UnsupportedModelError
from peftbench.evaluation.evaluator import Evaluator, HeldOutLoss
from peftbench.memory.devices import get_device_facts
from peftbench.memory.simulation.step import MemorySimulation
from peftbench.methods import METHOD_KINDS
from peftbench.methods.base import Method
from peftbench.methods.small_copy import build_small_copy
from peftbench.profiler.flops import count_flops
from peftbench.recipe.loader import parse_recipe
from peftbench.recipe.schema import Checkpoint, Profile
from peftbench.run.runner import Run
from peftbench.training.loop import train_step
from peftbench.training.method_hooks import MethodHooks
from tests.helpers.batches import labels_of, mask_of, micro_batch, one_batch, rows
from tests.helpers.models import gpt2_config, llama_config
from tests.helpers.short_runs import use_small_matmul
from tests.helpers.stopped_runs import run_until_first_checkpoint
from tests.helpers.training import assemble_training, reset_accelerators, trainable_parameters
from tests.helpers.workshop import Workshop

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

RECIPE: dict[str, Any] = {"name": "run", "data": {"source": {"kind": "docstrings"}}, "train": {"steps": 8}}
STEPS = 8
LENGTHS = ((9, 6), (14, 5), (20, 19), (26, 12))
SCHEDULES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "phases": {"tinit": 2, "tfinal": 2, "init_r": 6, "target_r": 2},
    "interval": {"tinit": 1, "tfinal": 1, "deltaT": 3},
}


def build_adalora(**keys: Any) -> Method:
    """Return a section of AdaLoRA."""
    return METHOD_KINDS["adalora"].model_validate(keys)


def apply(method: Method, base: PreTrainedModel, steps: int = STEPS) -> Any:
    """Return the model for a training of ``steps`` steps, with initial values that do not depend on the caller."""
    torch.manual_seed(0)
    model = method.apply(base, None)  # type: ignore[arg-type] # types of peft need no tokenizer
    method.start_training(model, steps)
    return model


def apply_peft(keys: dict[str, Any], base: PreTrainedModel, steps: int = STEPS) -> Any:
    """Return the same model, built with peft."""
    torch.manual_seed(0)
    return get_peft_model(base, AdaLoraConfig(task_type="CAUSAL_LM", total_step=steps, **keys))


def assemble(accelerator: Accelerator, method: Method, model: Any) -> Any:
    """Return the components of a training with the method's hooks and AdamW."""
    optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=0.01, weight_decay=0.1)
    training = assemble_training(accelerator, model, optimizer)
    return replace(training, method_hooks=MethodHooks.bind(method, model))


def train_model(accelerator: Accelerator, method: Method, model: Any, steps: int = STEPS) -> list[float]:
    """Train with the project's loop; return the losses."""
    training = assemble(accelerator, method, model)
    return [
        train_step(accelerator, training, one_batch(micro_batch(LENGTHS, seed=step)), 1.0, step=step)
        for step in range(1, steps + 1)
    ]


def logits_of(model: Any) -> torch.Tensor:
    """Return the logits of a few tokens in evaluation mode."""
    model.eval()
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=torch.arange(1, 13)[None]).logits
    return result


@pytest.mark.parametrize("architecture", ["gpt2_tied", "llama_untied"])
def test_penalty_equals_that_of_peft(architecture: str, fresh_base: Callable[[str], PreTrainedModel]) -> None:
    """It equals what peft adds to the loss if the model gets labels."""
    method, batch = build_adalora(), micro_batch(LENGTHS)
    model, reference = apply(method, fresh_base(architecture)), apply_peft({}, fresh_base(architecture))
    penalty = method.compute_penalty(model)
    assert penalty is not None
    inputs = {"input_ids": batch.input_ids, "attention_mask": mask_of(batch), "labels": labels_of(batch)}
    with_penalty, plain = reference(**inputs).loss, reference.base_model.model(**inputs).loss
    assert penalty.item() > 0.3
    assert penalty.item() == pytest.approx((with_penalty - plain).item(), rel=1e-6)
    assert build_adalora(orth_reg_weight=0.0).compute_penalty(model) is None


@pytest.mark.parametrize("parts", [1, 2])
def test_gradient_equals_that_of_the_loss_of_peft(
    parts: int, fresh_base: Callable[[str], PreTrainedModel], accelerator: Accelerator
) -> None:
    """The penalty counts once in a step, with one micro-batch and with two."""
    method, batch = build_adalora(), micro_batch(LENGTHS)
    model, reference = apply(method, fresh_base("llama_untied")), apply_peft({}, fresh_base("llama_untied"))
    reference(input_ids=batch.input_ids, attention_mask=mask_of(batch), labels=labels_of(batch)).loss.backward()
    gradients: dict[str, torch.Tensor] = {}

    def keep_gradients(_step: int, *, was_skipped: bool) -> None:
        assert not was_skipped
        for name, parameter in trainable_parameters(model).items():
            assert parameter.grad is not None
            gradients[name] = parameter.grad.clone()

    training = assemble(accelerator, method, model)
    training = replace(training, method_hooks=replace(training.method_hooks, after_optimizer_step=keep_gradients))
    accelerator.gradient_accumulation_steps = parts
    micro_batches = [micro_batch(LENGTHS)] if parts == 1 else _split_rows()
    train_step(accelerator, training, one_batch(*micro_batches), None)
    for name, parameter in trainable_parameters(reference).items():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6)
    assert all(gradients[name].abs().max() > 0 for name in gradients)


def _split_rows() -> list[MicroBatch]:
    """Return the rows of ``micro_batch(LENGTHS)`` in two micro-batches."""
    examples = rows(LENGTHS)
    return [
        Collator(0).collate([row["input_ids"] for row in part], [row["label_spans"] for row in part])
        for part in (examples[:1], examples[1:])
    ]


@pytest.mark.parametrize("architecture", ["gpt2_tied", "llama_untied"])
@pytest.mark.parametrize("keys", SCHEDULES.values(), ids=SCHEDULES)
def test_training_equals_a_loop_of_peft(
    keys: dict[str, Any], architecture: str, fresh_base: Callable[[str], PreTrainedModel], accelerator: Accelerator
) -> None:
    """Losses and weights are those of a plain loop over peft's model, through all phases of the reduction."""
    method = build_adalora(**keys)
    model, reference = apply(method, fresh_base(architecture)), apply_peft(keys, fresh_base(architecture))
    losses = train_model(accelerator, method, model)
    optimizer = torch.optim.AdamW(trainable_parameters(reference).values(), lr=0.01, weight_decay=0.1)
    expected = []
    for step in range(1, STEPS + 1):
        batch = micro_batch(LENGTHS, seed=step)
        output = reference(input_ids=batch.input_ids, attention_mask=mask_of(batch), labels=labels_of(batch))
        plain = cross_entropy(output.logits[:, :-1].flatten(0, 1), labels_of(batch)[:, 1:].flatten())
        expected.append(float(plain))
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        optimizer.step()
        reference.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    assert losses == pytest.approx(expected, rel=1e-5)
    for name, parameter in trainable_parameters(reference).items():
        torch.testing.assert_close(trainable_parameters(model)[name], parameter, rtol=1e-3, atol=1e-5)
    assert model.active_peft_config.rank_pattern == reference.active_peft_config.rank_pattern
    assert _count_ranks(model) <= method.target_r * _count_matrices(model)  # type: ignore[attr-defined]


def _list_singular_values(model: Any) -> list[torch.Tensor]:
    return [parameter.detach() for name, parameter in model.named_parameters() if "lora_E" in name]


def _count_ranks(model: Any) -> int:
    return sum(int(values.count_nonzero()) for values in _list_singular_values(model))


def _count_matrices(model: Any) -> int:
    return len(_list_singular_values(model))


@pytest.mark.parametrize("architecture", ["gpt2_tied", "llama_untied"])
def test_saved_ranks_are_loaded_merged_and_trained_further(
    architecture: str, fresh_base: Callable[[str], PreTrainedModel], accelerator: Accelerator, tmp_path: Path
) -> None:
    """Each way to load gives the trained model's logits, and saving changes nothing in the training."""
    method = build_adalora(tfinal=2)
    model, other = (apply(method, fresh_base(architecture)) for _ in range(2))
    training = assemble(accelerator, method, model)
    losses = []
    for step in range(1, STEPS + 1):
        losses.append(train_step(accelerator, training, one_batch(micro_batch(LENGTHS, seed=step)), 1.0, step=step))
        method.save(model, tmp_path / f"step{step}")
    assert losses == train_model(accelerator, method, other)
    for step in (1, STEPS):
        loaded = apply(method, fresh_base(architecture))
        method.load(loaded, tmp_path / f"step{step}")
        assert all(p.dtype == torch.float32 for p in trainable_parameters(loaded).values())
        assert not any("ranknum" in name for name in trainable_parameters(loaded))
    expected = logits_of(model)
    assert torch.equal(logits_of(loaded), expected)
    elsewhere = PeftModel.from_pretrained(fresh_base(architecture), str(tmp_path / f"step{STEPS}"))
    for same in (elsewhere, method.merge(loaded)):
        torch.testing.assert_close(logits_of(same), expected, rtol=1e-4, atol=1e-5)
    saved = load_file(tmp_path / f"step{STEPS}" / "adapter_model.safetensors")
    ranks = [len(values) for name, values in saved.items() if "lora_E" in name]
    assert sum(ranks) == _count_ranks(model) < method.init_r * len(ranks)  # type: ignore[attr-defined]
    assert f"kept {sum(ranks)} of {method.init_r * len(ranks)} ranks" in method.list_training_notes(model)[0]  # type: ignore[attr-defined]


def test_rank_that_grew_after_its_mask_is_saved(
    fresh_base: Callable[[str], PreTrainedModel], accelerator: Accelerator, tmp_path: Path
) -> None:
    """Between two reductions, the optimizer changes masked ranks again; the saved adapter contains them."""
    method = build_adalora(deltaT=3)
    model = apply(method, fresh_base("llama_untied"))
    train_model(accelerator, method, model, steps=5)
    pattern = model.active_peft_config.rank_pattern
    assert sum(map(sum, pattern.values())) < _count_ranks(model)
    method.save(model, tmp_path)
    loaded = apply(method, fresh_base("llama_untied"))
    method.load(loaded, tmp_path)
    assert torch.equal(logits_of(loaded), logits_of(model))


def test_skipped_step_reads_no_gradient(fresh_base: Callable[[str], PreTrainedModel]) -> None:
    """A gradient that is not finite changes no score, and the final allocation is made in a skipped step too."""
    method = build_adalora()
    model = apply(method, fresh_base("llama_untied"), steps=3)

    def set_gradients(value: float) -> None:
        for parameter in trainable_parameters(model).values():
            parameter.grad = torch.full_like(parameter, value)

    set_gradients(1.0)
    with torch.no_grad():
        for values in trainable_parameters(model).values():
            values.add_(torch.randn(values.shape))
    method.after_optimizer_step(model, 1, was_skipped=False)
    before = {name: score.clone() for name, score in method.capture_state(model)["exp_avg_ipt"].items()}
    set_gradients(float("nan"))
    method.after_optimizer_step(model, 2, was_skipped=True)
    after = method.capture_state(model)["exp_avg_ipt"]
    assert all(torch.equal(after[name], score) for name, score in before.items())
    method.after_optimizer_step(model, 3, was_skipped=True)
    assert _count_ranks(model) <= 8 * _count_matrices(model)


@pytest.mark.parametrize("was_skipped", [False, True])
def test_loop_passes_the_step_and_whether_it_was_skipped(
    was_skipped: bool,
    fresh_base: Callable[[str], PreTrainedModel],
    accelerator: Accelerator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The hook runs after the update, and before the gradients are deleted."""
    method = build_adalora()
    model = apply(method, fresh_base("llama_untied"))
    training = assemble(accelerator, method, model)
    before = {name: parameter.detach().clone() for name, parameter in trainable_parameters(model).items()}
    calls: list[tuple[int, bool]] = []

    def check_state(step: int, *, was_skipped: bool) -> None:
        calls.append((step, was_skipped))
        for name, parameter in trainable_parameters(model).items():
            assert parameter.grad is not None
            assert not torch.equal(parameter, before[name])

    monkeypatch.setattr(type(accelerator), "optimizer_step_was_skipped", property(lambda _: was_skipped))
    training = replace(training, method_hooks=replace(training.method_hooks, after_optimizer_step=check_state))
    train_step(accelerator, training, one_batch(micro_batch(LENGTHS)), None, step=3)
    assert calls == [(3, was_skipped)]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_training_without_a_finite_gradient_is_an_error(fresh_base: Callable[[str], PreTrainedModel]) -> None:
    """The final allocation needs scores."""
    method = build_adalora()
    model = apply(method, fresh_base("llama_untied"), steps=2)
    method.after_optimizer_step(model, 1, was_skipped=True)
    with pytest.raises(UnsupportedModelError, match="skipped all of the first 2 steps"):
        method.after_optimizer_step(model, 2, was_skipped=True)


@pytest.mark.parametrize("interval", [1, 3, 5])
def test_resumed_training_repeats_the_uninterrupted_one(interval: int, workshop: Workshop) -> None:
    """Checkpoints before, during and after the reduction restore the scores and the masked ranks to the last bit."""
    method, train = build_adalora(tinit=1, tfinal=2, deltaT=2), {"steps": 6}
    plain = workshop.run(workshop.recipe(method, train=train))
    recipe = workshop.recipe(method, train=train, checkpoint=Checkpoint(interval=interval))
    run_until_first_checkpoint(workshop, recipe)
    resumed = workshop.run(recipe)
    assert resumed.resumed_after == (interval,)
    assert resumed.step_losses == plain.step_losses
    assert resumed.quality == plain.quality
    assert [note for note in resumed.notes if "kept" in note] == [note for note in plain.notes if "kept" in note]


def test_best_weights_before_the_reduction_are_saved(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """The saved adapter is that of the best step, although later steps masked some of its ranks."""
    curve = iter([3.0, 1.0, 2.0, 2.0, 2.0])
    compute = Evaluator.compute_held_out_loss

    def next_loss(self: Evaluator) -> HeldOutLoss:
        loss = next(curve, None)
        return compute(self) if loss is None else HeldOutLoss((loss,), (1,))

    method = build_adalora(tinit=2)
    settings: dict[str, Any] = {"train": {"steps": 5}, "schedule": {"kind": "constant"}}
    plain = workshop.run(workshop.recipe(method, **settings))
    monkeypatch.setattr(Evaluator, "compute_held_out_loss", next_loss)
    recipe = workshop.recipe(
        method, **settings, evaluate={"interval": 1}, checkpoint=Checkpoint(keep_best=True), save_model=True
    )
    record = workshop.run(recipe)
    assert record.step_losses == plain.step_losses
    assert record.held_out_curve is not None
    assert record.held_out_curve.kept_step == 2
    saved = load_file(workshop.output / "run" / "model" / "adapter_model.safetensors")
    assert all(len(values) == 12 for name, values in saved.items() if "lora_E" in name)
    reset_accelerators()
    with use_small_matmul():
        evaluated, _ = Run(recipe, evaluate_only=True).execute()
    assert evaluated.quality == record.quality


def test_memory_of_the_scores_is_optimizer_state(workshop: Workshop) -> None:
    """For each trained value, AdamW keeps two values and the scores are three, also in the plan of a GPU."""
    recipe = workshop.recipe(
        build_adalora(init_r=32), train={"steps": 5}, profile=Profile(untimed_steps=3, memory_breakdown=True)
    )
    record = workshop.run(recipe)
    assert record.memory_breakdown is not None
    assert record.parameters is not None
    with MemorySimulation(recipe, get_device_facts("t4").capability, 1) as plan:
        plan.simulate_training(6, 48, 8)
    expected = 5 * 4 * record.parameters.trainable
    for categories in (
        record.memory_breakdown.bytes_by_category,
        plan.memory_tracker.find_peak().bytes_by_category,
    ):
        assert categories["optimizer_state"] == pytest.approx(expected, abs=200)  # also step counters


def test_flops_contain_the_penalty() -> None:
    """A pass computes a Gram matrix of each factor, and two products in its backward pass."""
    costs = []
    for weight in (0.5, 0.0):
        method, base = build_adalora(orth_reg_weight=weight), build_small_copy(llama_config())
        model = apply(method, base)
        costs.append(
            count_flops(
                model,
                base,
                virtual_tokens=0,
                gradient_checkpointing=False,
                computes_all_logits=True,
                compute_penalty=lambda method=method, model=model: method.compute_penalty(model),  # type: ignore[misc]
            )
        )
    factors = [p for name, p in trainable_parameters(model).items() if "lora_A" in name or "lora_B" in name]
    extra = [matmul for matmul in costs[0].matmuls if matmul not in costs[1].matmuls]
    assert {matmul.unit for matmul in extra} == {"pass"}
    assert sum(m.forward_flops + m.backward_flops for m in extra) == sum(6 * 12 * factor.numel() for factor in factors)


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        ({"target_r": 12}, OutOfRangeError, "target_r=12 must be less than init_r=12"),
        ({"deltaT": 0}, OutOfRangeError, "method.deltaT=0 must be at least 1"),
        ({"beta1": 1.0}, OutOfRangeError, "method.beta1=1.0 must be less than 1"),
        ({"init_lora_weights": "gaussian"}, OutOfRangeError, "AdaLoRA ignores the initialization gaussian"),
        ({"r": 4}, UnknownKeyError, "there is no key 'method.r'"),
        ({"use_dora": True}, UnknownKeyError, "there is no key 'method.use_dora'"),
        ({"total_step": 8}, UnknownKeyError, "there is no key 'method.total_step'"),
        (
            {"tinit": 5, "tfinal": 3},
            OutOfRangeError,
            "method.tinit=5 and method.tfinal=3 leave no step to reduce the ranks: they need at least 9 training "
            "steps, but the run has 8; lower them, or train for more steps",
        ),
    ],
)
def test_mistake_in_a_key_is_one_sentence(keys: dict[str, Any], error: type[PeftbenchError], message: str) -> None:
    """The message has the key, what is allowed, and what to do."""
    with pytest.raises(error) as raised:
        parse_recipe(RECIPE | {"method": {"kind": "adalora"} | keys})
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("steps", "is_enough"), [(1, False), (2, True)])
def test_fewest_steps(steps: int, is_enough: bool) -> None:
    """A score exists from the first step on, and the last one reduces the ranks."""
    assert (build_adalora().why_steps_are_too_few(steps) is None) == is_enough


def test_too_few_steps_of_epochs_are_refused(workshop: Workshop) -> None:
    """The number of steps is known once the examples are encoded."""
    recipe = workshop.recipe(build_adalora(tinit=10), train={"epochs": 1, "steps": None})
    with pytest.raises(OutOfRangeError, match=r"method\.tinit=10 and method\.tfinal=0 leave no step .* 11 training"):
        workshop.run(recipe)


def test_record_tells_that_losses_lack_the_penalty() -> None:
    """A note has the weight of the penalty."""
    notes = build_adalora().list_notes(build_small_copy(gpt2_config()))
    assert any("method.orth_reg_weight=0.5" in note and "losses do not contain it" in note for note in notes)
