"""LoRA's variants in peft, including the initializations that are computed before the first step.

CorDA and LoRA-GA subtract the product of the initial factors from the frozen matrices. Their saved adapter has both the
trained and the initial factors, as plain LoRA of twice the rank, so that it fits the original base model.
"""

from __future__ import annotations

import math
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import field_validator, model_validator

from peftbench.errors import OutOfRangeError, did_you_mean
from peftbench.methods import initialization
from peftbench.methods.initialization import ADAPTER, InitializationNeeds, InitializationPass, InitialValues
from peftbench.methods.peft_method import PeftMethod, keep_initial_values

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftConfig
    from torch import nn
    from transformers import PreTrainedModel

    from peftbench.methods.base import Method
    from peftbench.methods.small_copy import CopySize

_INIT_CONFIGS = {"eva": "eva_config", "corda": "corda_config", "lora_ga": "lora_ga_config"}
"""Initializations that pass over examples, with the key of their options."""
_SUBTRACTED = ("corda", "lora_ga")
"""Initializations that change the frozen matrices."""
_COMPUTED = (*_INIT_CONFIGS, "loftq")
_INITS = ("gaussian", "pissa", "olora", "orthogonal", "mica", *_COMPUTED)
_TRIAL_RANK, _TRIAL_WIDTH = 4, 256
"""Rank and width in trials of computed initializations, which decompose matrices."""
_FACTOR = re.compile(r"(.*)\.(lora_[AB])\.weight")


class PeftLora(PeftMethod):
    """Base class of the sections of LoRA's variants."""

    adds_lora: ClassVar[bool] = True
    init_lora_weights: bool | str
    r: int

    @field_validator("init_lora_weights")
    @classmethod
    def _check_init(cls, value: bool | str) -> bool | str:
        if isinstance(value, bool) or value in _INITS or re.fullmatch(r"pissa_niter_\d+", value):
            return value
        raise ValueError(
            f"{value} is not an initialization; {did_you_mean(value, [*_INITS, 'true', 'false', 'pissa_niter_N'])}"
        )

    @model_validator(mode="after")
    def _check_init_configs(self) -> Self:
        for init, key in _INIT_CONFIGS.items():
            if getattr(self, key, None) is not None and self.init_lora_weights != init:
                raise ValueError(f"{key} has no effect with init_lora_weights={self.init_lora_weights}; remove it")
        if self.init_lora_weights == "loftq" and getattr(self, "loftq_config", None):
            raise ValueError(
                "loftq_config describes a quantization by peft; remove it, and set model.quantization=nf4, which "
                "quantizes the base model"
            )
        return self

    @property
    def initialization(self) -> InitializationNeeds | None:
        init = self.init_lora_weights
        if init not in _COMPUTED:
            return None
        if init == "loftq":
            return InitializationNeeds(0, weights=True)
        section = self._get_init_section()
        if init != "eva":
            return InitializationNeeds(section.init_examples)
        return InitializationNeeds(section.init_examples, initialization.count_eva_tokens(self._build_init_config()))

    def reduce_for_trial(self) -> Method:
        """Return a method of a low rank if the initial values are computed: a copy's matrices may be too small."""
        if self.initialization is None:
            return self
        return self.model_copy(update={"r": min(self.r, _TRIAL_RANK), "rank_pattern": {}})

    def _list_copy_sizes(self) -> list[CopySize]:
        sizes = super()._list_copy_sizes()
        if self.initialization is None:
            return sizes
        return [size if size.max_width is None else size._replace(max_width=_TRIAL_WIDTH) for size in sizes]

    def check_quantization(self, quantization: str | None) -> None:
        init = self.init_lora_weights
        if init == "loftq" and quantization not in {"nf4", "nf4_double"}:
            raise OutOfRangeError(
                f"init_lora_weights=loftq corrects the quantization error of a 4-bit base model, but "
                f"model.quantization={quantization or 'null'}; set it to nf4 or nf4_double, or use another "
                "initialization"
            )
        if quantization is not None and (init in _SUBTRACTED or str(init).startswith(("mica", "pissa", "olora"))):
            raise OutOfRangeError(
                f"init_lora_weights={init} decomposes the matrices of the base model, which model.quantization="
                f"{quantization} packs; set model.quantization=null, or use another initialization"
            )

    def list_notes(self, base: PreTrainedModel) -> list[str]:
        notes = super().list_notes(base)
        if self.init_lora_weights == "loftq":
            notes.append(
                "init_lora_weights=loftq changes the outputs of the quantized base model before the first step, "
                "toward those of the unquantized one"
            )
        return notes

    def build_config(self, base: PreTrainedModel, modules: Any) -> PeftConfig:
        """Return peft's config; a computed initialization is set later, in a model with plain initial values."""
        if self.init_lora_weights not in _COMPUTED:
            return super().build_config(base, modules)
        changes = {"init_lora_weights": True} | dict.fromkeys(_INIT_CONFIGS.values())
        plain = self.model_copy(update={key: value for key, value in changes.items() if key in self.config_fields})
        return super(PeftLora, plain).build_config(base, modules)

    def compute_initial_values(self, model: nn.Module, data: InitializationPass) -> InitialValues:
        compute = {
            "eva": initialization.compute_eva,
            "corda": initialization.compute_corda,
            "lora_ga": initialization.compute_lora_ga,
            "loftq": initialization.compute_loftq,
        }[str(self.init_lora_weights)]
        kept = _list_kept(model)
        with warnings.catch_warnings():  # about defaults, and hooks on layers whose inputs need no gradient
            warnings.simplefilter("ignore")
            values = compute(model, data, self._build_init_config())
        _restore_kept(model, kept)  # peft's disable_adapter enables the gradients of all factors at its end
        return values

    def set_initial_values(self, model: nn.Module, values: InitialValues) -> None:
        kept = _list_kept(model)
        if self.init_lora_weights == "eva":
            with keep_initial_values():
                initialization.set_eva(model, values, self._build_init_config())
        else:
            initialization.set_factors(model, values, subtract=self.init_lora_weights in _SUBTRACTED)
        _restore_kept(model, kept)
        model.initial_values = values  # type: ignore[assignment]

    def save(self, model: nn.Module, save_directory: Path) -> None:
        """Save the adapter in peft's format: as plain LoRA for the original base model, if that was changed."""
        super().save(model, save_directory)
        if self.init_lora_weights in _SUBTRACTED:
            _append_initial_factors(save_directory, model.initial_values)  # type: ignore[arg-type]

    def restore_structure(self, model: nn.Module, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if self.init_lora_weights == "eva":
            layers = initialization.list_layers(model, "eva")
            values = {
                f"{name}.lora_A": weights.get(
                    f"{name}.lora_A.weight", layer.lora_A[ADAPTER].weight.new_zeros(0, layer.in_features)
                )
                for name, layer in layers.items()
            }
        elif self.init_lora_weights in _SUBTRACTED:
            weights, values = _split_factors(weights)
        else:
            return weights
        self.set_initial_values(model, values)
        return weights

    def _get_init_section(self) -> Any:
        """Return the recipe's options of the initialization, or the defaults."""
        from peftbench.methods.peft_sections import build_init_section

        key = _INIT_CONFIGS[str(self.init_lora_weights)]
        section = getattr(self, key)
        return build_init_section(key)() if section is None else section

    def _build_init_config(self) -> LoraConfig:
        """Return peft's config with the values that the functions of an initialization read."""
        from peft import LoraConfig

        init = str(self.init_lora_weights)
        keys = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
        values: dict[str, Any] = {key: getattr(self, key) for key in keys}
        if init == "loftq":
            return LoraConfig(**values)
        options = self._get_init_section().model_dump(exclude={"init_examples"})
        with warnings.catch_warnings():  # about a conversion by peft, which is not used
            warnings.simplefilter("ignore")
            return LoraConfig(init_lora_weights=init, **values, **{_INIT_CONFIGS[init]: options})  # type: ignore[arg-type]


def _list_kept(model: nn.Module) -> dict[str, tuple[torch.dtype, bool]]:
    """Return the type of each parameter by name, and whether it is trained."""
    return {name: (parameter.dtype, parameter.requires_grad) for name, parameter in model.named_parameters()}


def _restore_kept(model: nn.Module, kept: dict[str, tuple[torch.dtype, bool]]) -> None:
    """Restore the types of the parameters, and which of them are trained; layers may have been replaced."""
    for name, parameter in model.named_parameters():
        if name not in kept:
            continue  # a frozen matrix whose adapter EVA removed
        dtype, is_trained = kept[name]
        if parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)
        parameter.requires_grad_(is_trained)


def _append_initial_factors(folder: Path, initial: InitialValues) -> None:
    """Turn the saved adapter, which fits the changed base model, into one of twice the rank for the original base.

    With W the original and W - s B0 A0 the changed matrix, W - s B0 A0 + s B A = W + s [B, -B0] [A; A0].
    """
    import torch
    from peft import LoraConfig
    from safetensors.torch import load_file, save_file

    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    for name, tensor in weights.items():
        if (match := _FACTOR.fullmatch(name)) is not None:
            first = initial[f"{match[1]}.{match[2]}"].to(tensor.dtype)
            is_a = match[2] == "lora_A"
            weights[name] = torch.cat([tensor, first if is_a else -first], dim=0 if is_a else 1).contiguous()
    save_file(weights, file, metadata={"format": "pt"})
    config = LoraConfig.from_pretrained(str(folder))
    factor = math.sqrt(2) if config.use_rslora else 2  # so that the scale stays the same
    config.r, config.lora_alpha = 2 * config.r, factor * config.lora_alpha  # type: ignore[assignment]
    config.rank_pattern = {key: 2 * rank for key, rank in (config.rank_pattern or {}).items()}
    config.alpha_pattern = {key: factor * alpha for key, alpha in (config.alpha_pattern or {}).items()}  # type: ignore[misc]
    config.save_pretrained(str(folder))


def _split_factors(weights: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], InitialValues]:
    """Return the trained and the initial factors of an adapter that has both."""
    trained, initial = dict(weights), {}
    for name, tensor in weights.items():
        if (match := _FACTOR.fullmatch(name)) is not None:
            is_a = match[2] == "lora_A"
            first, second = tensor.chunk(2, dim=0 if is_a else 1)
            trained[name] = first.contiguous()
            initial[f"{match[1]}.{match[2]}"] = (second if is_a else -second).contiguous()
    return trained, initial
