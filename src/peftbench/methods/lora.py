"""LoRA (Hu et al. 2021, arXiv:2106.09685) through peft: a low-rank update of chosen matrices."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, field_validator

from peftbench.errors import TargetModulesError, UnsupportedModelError, did_you_mean
from peftbench.methods.base import Method

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


ALL_LINEAR = "all-linear"
"""peft's name for every matrix except the output head."""


class Lora(Method):
    """Train a low-rank update of chosen matrices."""

    keeps_base_frozen: ClassVar[bool] = True
    supports_quantized_base: ClassVar[bool] = True

    kind: Literal["lora"] = "lora"
    """Kind of method."""
    r: int = Field(default=16, gt=0)
    """Rank of the update."""
    lora_alpha: float = Field(default=32.0, gt=0)
    """The update is scaled by lora_alpha / r (lora_alpha / sqrt(r) with use_rslora)."""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the update's input."""
    target_modules: tuple[str, ...] | str | None = None
    """Module names or their suffixes, one regular expression, or all-linear; null: peft's default for the model."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Biases of the base model to train as well."""
    use_dora: bool = False
    """Train magnitude and direction of each output separately (DoRA, Liu et al. 2024)."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r), which is stable at high ranks (rsLoRA, Kalajdzievski 2023)."""

    @field_validator("target_modules")
    @classmethod
    def _check_target_modules(cls, value: tuple[str, ...] | str | None) -> tuple[str, ...] | str | None:
        if value in ((), ""):
            raise ValueError("must name at least one module, or be null")
        if isinstance(value, str):
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(
                    f"invalid regular expression ({error}); for a suffix of names write [{value}]"
                ) from error
        return value

    def trainable_parameters(self, base: PreTrainedModel) -> int:
        """Count r * (in + out) for each adapted matrix, plus its outputs with DoRA, plus the trained biases."""
        count = 0
        adapted = self._find_adapted_modules(base)
        for _, module in adapted:
            features_in, features_out = _get_in_out_features(module)
            count += self.r * (features_in + features_out) + self.use_dora * features_out
            count += module.bias.numel() if self.bias == "lora_only" and module.bias is not None else 0  # type: ignore
        if self.bias == "all":
            count += sum(p.numel() for name, p in base.named_parameters() if name.endswith("bias"))
        return count

    def apply(self, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
        from peft import LoraConfig, get_peft_model
        from transformers.pytorch_utils import Conv1D

        adapted = self._find_adapted_modules(base)
        targets = self._resolve_target_modules(base)
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=self.r,
            lora_alpha=self.lora_alpha,  # type: ignore[arg-type]
            lora_dropout=self.lora_dropout,
            bias=self.bias,
            target_modules=targets if isinstance(targets, str) else list(targets),
            use_dora=self.use_dora,
            use_rslora=self.use_rslora,
            # Conv1D stores its weight as (in, out), the transpose of a Linear's.
            fan_in_fan_out=all(isinstance(module, Conv1D) for _, module in adapted),
        )
        return get_peft_model(base, config)

    def _resolve_target_modules(self, base: PreTrainedModel) -> tuple[str, ...] | str:
        from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

        if self.target_modules is not None:
            return self.target_modules
        default = DEFAULTS.get(base.config.model_type)
        if default is None:
            raise UnsupportedModelError(
                f"peft has no default LoRA target modules for {base.config.model_type!r}; set method.target_modules"
            )
        return default if isinstance(default, str) else tuple(default)

    def _find_adapted_modules(self, base: PreTrainedModel) -> list[tuple[str, nn.Module]]:
        """Return the modules that peft adapts: names that the expression matches fully, or that end with a target."""
        targets = self._resolve_target_modules(base)
        if targets == ALL_LINEAR:
            head = base.get_output_embeddings()
            return [(name, m) for name, m in base.named_modules() if _is_linear(m) and m is not head]
        modules = [(name, module) for name, module in base.named_modules() if name]
        adapted: dict[str, nn.Module] = {}
        for target in [targets] if isinstance(targets, str) else targets:
            matches = _matches_pattern if isinstance(targets, str) else _matches_suffix
            matched = {name: module for name, module in modules if matches(target, name)}
            if unsupported := [name for name, module in matched.items() if not _is_adaptable(module)]:
                raise TargetModulesError(
                    f"method.target_modules {target!r} matches {unsupported[0]}, which has no matrix to adapt; "
                    f"modules with a matrix: {', '.join(_list_linear_names(base))}"
                )
            if not matched and self.target_modules is not None:
                is_suffix = isinstance(targets, str) and any(_matches_suffix(target, name) for name, _ in modules)
                hint = (
                    f"write [{target}] for a suffix of names"
                    if is_suffix
                    else did_you_mean(target, _list_linear_names(base))
                )
                raise TargetModulesError(
                    f"method.target_modules {target!r} matches no module of the model (architecture "
                    f"{base.config.model_type}); {hint}"
                )
            adapted |= matched
        if not adapted:
            raise UnsupportedModelError(
                f"peft's default LoRA targets {targets!r} match nothing in this {base.config.model_type}; "
                "set method.target_modules"
            )
        return list(adapted.items())


def _matches_pattern(pattern: str, name: str) -> bool:
    return re.fullmatch(pattern, name) is not None


def _matches_suffix(suffix: str, name: str) -> bool:
    return name == suffix or name.endswith(f".{suffix}")


def _list_linear_names(base: PreTrainedModel) -> list[str]:
    return sorted({name.rsplit(".", 1)[-1] for name, module in base.named_modules() if _is_linear(module)})


def _is_adaptable(module: nn.Module) -> bool:
    from torch import nn

    return _is_linear(module) or isinstance(module, nn.Embedding)


def _is_linear(module: nn.Module) -> bool:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (nn.Linear, Conv1D))


def _get_in_out_features(module: nn.Module) -> tuple[int, int]:
    """Return (in, out) of a Linear, Conv1D or Embedding."""
    from torch import nn

    if isinstance(module, nn.Linear):  # its quantized weight may be packed
        return module.in_features, module.out_features
    rows, columns = module.weight.shape  # type: ignore[union-attr,misc]
    return rows, columns  # type: ignore[return-value]
