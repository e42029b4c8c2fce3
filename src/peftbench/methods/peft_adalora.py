"""AdaLoRA: low-rank updates whose ranks are reduced during training (Zhang et al. 2023, arXiv:2303.10512)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import field_validator, model_validator

from peftbench.errors import UnsupportedModelError
from peftbench.methods.base import freeze
from peftbench.methods.peft_method import PeftMethod

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SCORES = ("ipt", "exp_avg_ipt", "exp_avg_unc")
"""Attributes of peft's rank allocator that hold one tensor for each trained parameter."""


class PeftAdaLora(PeftMethod):
    """Base class of AdaLoRA's sections. peft's rank allocator scores and masks the ranks.

    Steps are counted from 1, so that the last step makes the final allocation if ``tfinal`` is 0. peft's example counts
    from 0; that step is then never reached, and the ranks stay above the budget.
    """

    reads_gradients: ClassVar[bool] = True
    hidden_fields: ClassVar[frozenset[str]] = frozenset(
        {
            "alora_invocation_tokens",
            "alpha_pattern",
            "arrow_config",
            "corda_config",
            "eva_config",
            "kasa_config",
            "loftq_config",
            "lora_bias",
            "lora_ga_config",
            "monteclora_config",
            "qalora_group_size",
            "r",
            "rank_pattern",
            "runtime_config",
            "target_parameters",
            "use_bdlora",
            "use_dora",
            "use_qalora",
            "use_rslora",
            "velora_config",
        }
    )
    field_changes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "init_r": {"ge": 1, "description": "Rank of each matrix before the reduction."},
        "target_r": {"ge": 1, "description": "Mean rank of all matrices after the reduction; less than init_r."},
        "tinit": {"ge": 0, "description": "Number of steps at the start without a reduction."},
        "tfinal": {"ge": 0, "description": "Number of steps at the end with the final ranks."},
        "deltaT": {"ge": 1, "description": "Number of steps between two reductions."},
        "beta1": {"gt": 0, "lt": 1, "description": "Decay rate of the average of the importance scores."},
        "beta2": {"gt": 0, "lt": 1, "description": "Decay rate of the average of their uncertainty."},
        "orth_reg_weight": {"ge": 0, "description": "Weight of the penalty on factors that are not orthogonal."},
        "lora_alpha": {"description": "Scale of the update, before it is divided by init_r."},
        "init_lora_weights": {"description": "true: the update is zero at the start; false: it is random."},
    }

    init_r: int
    target_r: int
    tinit: int
    tfinal: int
    deltaT: int  # noqa: N815 — peft's name
    beta1: float
    beta2: float
    orth_reg_weight: float
    init_lora_weights: bool | str

    @field_validator("init_lora_weights")
    @classmethod
    def _check_init(cls, value: bool | str) -> bool | str:
        if isinstance(value, str):
            raise ValueError(f"AdaLoRA ignores the initialization {value}; use true or false")
        return value

    @model_validator(mode="after")
    def _check_ranks(self) -> Self:
        if self.target_r < self.init_r:
            return self
        raise ValueError(
            f"target_r={self.target_r} must be less than init_r={self.init_r}, since the ranks are reduced from init_r "
            "to target_r; lower target_r or raise init_r"
        )

    def why_steps_are_too_few(self, total_steps: int) -> str | None:
        """Require a step of the reduction after ``tinit``, and a step before it that gives the first scores."""
        needed = self.tfinal + max(self.tinit + 1, 2)
        if total_steps >= needed:
            return None
        return (
            f"method.tinit={self.tinit} and method.tfinal={self.tfinal} leave no step to reduce the ranks: they need "
            f"at least {needed} training steps, but the run has {total_steps}; lower them, or train for more steps"
        )

    def apply(self, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> nn.Module:
        model = super().apply(base, tokenizer)
        # The divisors of the scale: peft makes them trainable when it moves them to another device.
        freeze(parameter for name, parameter in model.named_parameters() if ".ranknum." in name)
        return model

    def set_config_values(self, base: PreTrainedModel) -> dict[str, Any]:
        """Return a provisional ``total_step``, with which ``simulated_step`` reduces ranks; training replaces it."""
        return {"total_step": self.simulated_step + self.tfinal + 1}

    @property
    def simulated_step(self) -> int:
        """First step after ``tinit`` that masks ranks."""
        return (self.tinit // self.deltaT + 1) * self.deltaT

    def start_training(self, model: nn.Module, total_steps: int) -> None:
        _get_config(model).total_step = total_steps

    def compute_penalty(self, model: nn.Module) -> torch.Tensor | None:
        """Return the mean distance of the factors' Gram matrices from the identity, times ``orth_reg_weight``.

        peft adds the same penalty if the model itself computes the loss. Its dtype is that of the factors.
        """
        if self.orth_reg_weight == 0:
            return None
        import torch

        distances = []
        for name, factor in _iter_adapter(model):
            if "lora_A" in name or "lora_B" in name:
                gram = factor @ factor.T if "lora_A" in name else factor.T @ factor
                distances.append((gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)).norm())
        return self.orth_reg_weight * sum(distances) / len(distances)  # type: ignore[no-any-return]

    def after_optimizer_step(self, model: nn.Module, step: int, *, was_skipped: bool) -> None:
        """Score the ranks, and mask those that exceed the budget of ``step``.

        A skipped step changes no score. The final allocation and the steps after it read no gradients.
        """
        config, tuner = _get_config(model), _get_tuner(model)
        last_reduction = config.total_step - config.tfinal
        if was_skipped and step < last_reduction:
            return
        if step == last_reduction and not tuner.rankallocator.exp_avg_ipt:
            raise UnsupportedModelError(
                f"fp16's loss scaler skipped all of the first {step} steps, so AdaLoRA has no scores of its ranks; set "
                "train.precision=bf16 or fp32"
            )
        tuner.update_and_allocate(step)

    def capture_state(self, model: nn.Module) -> dict[str, Any]:
        allocator = _get_tuner(model).rankallocator
        scores = {name: dict(getattr(allocator, name)) for name in _SCORES}
        return {"rank_pattern": _get_config(model).rank_pattern, **scores}

    def load_state(self, model: nn.Module, state: dict[str, Any]) -> None:
        tuner = _get_tuner(model)
        _get_config(model).rank_pattern = state["rank_pattern"]
        parameters = dict(tuner.model.named_parameters())
        for score in _SCORES:
            tensors = {name: tensor.to(parameters[name].device) for name, tensor in state[score].items()}
            setattr(tuner.rankallocator, score, tensors)

    def list_notes(self, base: PreTrainedModel) -> list[str]:
        """Return notes on the adapted modules and on the penalty."""
        notes = super().list_notes(base)
        if self.orth_reg_weight:
            notes.append(
                f"each step adds AdaLoRA's penalty (method.orth_reg_weight={self.orth_reg_weight:g}) to the loss; the "
                "recorded losses do not contain it"
            )
        return notes

    def list_training_notes(self, model: nn.Module) -> list[str]:
        """Return a note on the number of ranks that are left."""
        ranks = [values for name, values in _iter_adapter(model) if "lora_E" in name]
        kept = sum(int(values.count_nonzero()) for values in ranks)
        return [
            f"AdaLoRA kept {kept} of {sum(map(len, ranks))} ranks; masked ranks are still computed in training, but "
            "are not saved"
        ]

    def save(self, model: nn.Module, save_directory: Path) -> None:
        """Save the ranks that are not masked; training can continue afterwards, with the same model.

        If the optimizer changed a masked rank after the last reduction, that rank is saved too.
        """
        config = _get_config(model)
        with _keep_pattern(model):
            if config.rank_pattern is not None:
                config.rank_pattern = _add_nonzero_ranks(config.rank_pattern, dict(_iter_adapter(model)))
            super().save(model, save_directory)

    def read_weights(self, save_directory: Path) -> dict[str, torch.Tensor]:
        """Return the saved weights with zeros for masked ranks, so that the outputs are those of the trained model.

        peft reduces the layers instead. The products then have other shapes, and their rounding differs.
        """
        import torch

        weights = super().read_weights(save_directory)
        config = json.loads((save_directory / "adapter_config.json").read_text(encoding="utf-8"))
        for name, ranks in (config["rank_pattern"] or {}).items():
            kept = torch.tensor(ranks).nonzero().flatten()
            for factor, dim in (("lora_E", 0), ("lora_A", 0), ("lora_B", 1)):
                key = f"base_model.model.{name.removesuffix('lora_E')}{factor}"
                shape = list(weights[key].shape)
                shape[dim] = len(ranks)
                weights[key] = weights[key].new_zeros(shape).index_copy(dim, kept, weights[key])
        return weights


def _get_tuner(model: nn.Module) -> Any:
    """Return peft's AdaLoraModel."""
    return model.base_model


def _get_config(model: nn.Module) -> Any:
    """Return peft's AdaLoraConfig, which the rank allocator also reads."""
    return model.active_peft_config


def _iter_adapter(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the adapter's trained parameters by the names that the rank allocator uses."""
    for name, parameter in _get_tuner(model).model.named_parameters():
        if "lora_" in name and parameter.requires_grad:
            yield name, parameter


def _add_nonzero_ranks(pattern: Mapping[str, list[bool]], adapter: Mapping[str, nn.Parameter]) -> dict[str, list[bool]]:
    """Return the pattern, extended by each rank whose singular value is not zero."""
    return {
        name: [kept or value != 0 for kept, value in zip(ranks, adapter[name].flatten().tolist(), strict=True)]
        for name, ranks in pattern.items()
    }


@contextmanager
def _keep_pattern(model: nn.Module) -> Iterator[None]:
    """Restore the rank pattern at exit: peft renames its keys when it saves the adapter."""
    config = _get_config(model)
    pattern = config.rank_pattern
    try:
        yield
    finally:
        config.rank_pattern = pattern
