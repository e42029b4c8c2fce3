"""LoRA (Hu et al. 2021, arXiv:2106.09685) through peft: a low-rank update of chosen matrices."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, field_validator

from peftbench.common.text import first_line
from peftbench.errors import TargetModulesError, UnsupportedModelError, did_you_mean
from peftbench.methods.base import Method
from peftbench.methods.peft_method import ALL_LINEAR, keep_initial_values

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Lora(Method):
    """Train a low-rank update of chosen matrices."""

    keeps_base_frozen: ClassVar[bool] = True
    supports_quantized_base: ClassVar[bool] = True
    adds_lora: ClassVar[bool] = True
    merges_into_base: ClassVar[bool] = True

    kind: Literal["lora"] = "lora"
    """Kind of method."""
    r: int = Field(default=16, gt=0)
    """Rank of the update."""
    lora_alpha: float = Field(default=32.0, gt=0)
    """The update is scaled by lora_alpha / r (lora_alpha / sqrt(r) with use_rslora)."""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the update's input."""
    target_modules: tuple[str, ...] | str | None = ALL_LINEAR
    """all-linear (every matrix but the output head), names or their suffixes, a regex; null: peft's for the model."""
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

    @property
    def trains_loaded_weights(self) -> bool:
        return self.bias != "none"

    def trainable_parameters(self, base: PreTrainedModel) -> int:
        """Count r * (in + out) for each adapted matrix, plus its outputs with DoRA, plus the trained biases."""
        count = sum(
            rank * parameter[..., 0, 0].numel() * sum(parameter.shape[-2:])
            for parameter, rank in self._find_adapted_experts(base)
        )
        for _, module in self._find_adapted_modules(base):
            features_in, features_out = _get_in_out_features(module)
            count += self.r * (features_in + features_out) + self.use_dora * features_out
            count += module.bias.numel() if self.bias == "lora_only" and module.bias is not None else 0  # type: ignore
        if self.bias == "all":
            count += sum(p.numel() for name, p in base.named_parameters() if name.endswith("bias"))
        return count

    def apply(self, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
        from peft import get_peft_model

        with keep_initial_values(), warnings.catch_warnings():
            # peft warns of each kind of expert that the architecture lacks.
            warnings.filterwarnings("ignore", message=".*(did not match any|no parameter was matched).*")
            try:
                return get_peft_model(base, self._build_config(base))
            except ValueError as error:
                raise TargetModulesError(
                    f"peft cannot adapt method.target_modules={self.target_modules!r} of {base.config.model_type}: "
                    f"{first_line(error)}"
                ) from error

    def list_notes(self, base: PreTrainedModel) -> list[str]:
        """Return a note that names the matrices below the head that all-linear leaves out."""
        if self.target_modules != ALL_LINEAR:
            return []
        adapted = {name for name, _ in self._find_adapted_modules(base)}
        omitted = [name.rsplit(".", 1)[-1] for name, _ in _list_matrices(base) if name not in adapted]
        adapted_experts = {id(parameter) for parameter, _ in self._find_adapted_experts(base)}
        omitted += [name for name, parameter in _list_stacked_experts(base) if id(parameter) not in adapted_experts]
        names = ", ".join(sorted(set(omitted)))
        return (
            [f"all-linear leaves out {names}, which peft does not adapt in {base.config.model_type}"] if names else []
        )

    def _build_config(self, base: PreTrainedModel) -> LoraConfig:
        from peft import LoraConfig
        from transformers.pytorch_utils import Conv1D

        targets = self._resolve_target_modules(base)
        matrices = _list_matrices(base) if targets == ALL_LINEAR else self._find_adapted_modules(base)
        return LoraConfig(
            task_type="CAUSAL_LM",
            r=self.r,
            lora_alpha=self.lora_alpha,  # type: ignore[arg-type]
            lora_dropout=self.lora_dropout,
            bias=self.bias,
            target_modules=targets if isinstance(targets, str) else list(targets),
            exclude_modules=_list_incompatible_names(base) or None if targets == ALL_LINEAR else None,
            use_dora=self.use_dora,
            use_rslora=self.use_rslora,
            # Conv1D stores its weight as (in, out), the transpose of a Linear's.
            fan_in_fan_out=all(isinstance(module, Conv1D) for _, module in matrices),
        )

    def _find_adapted_experts(self, base: PreTrainedModel) -> list[tuple[nn.Parameter, int]]:
        """Return parameters that hold the matrices of several experts, or a router's, each with its rank.

        peft targets them by name where transformers stacks the experts of a layer in one parameter. A parameter in
        which transformers joined two matrices of an expert has twice the rank.
        """
        config = _convert_config(self._build_config(base), base)
        patterns = {key: int(rank) for key, rank in (config.rank_pattern or {}).items()}
        return [
            (parameter, next((rank for key, rank in patterns.items() if re.fullmatch(key, name)), self.r))
            for name, parameter in base.named_parameters()
            if any(_matches_suffix(target, name) for target in config.target_parameters or ())
        ]

    def _resolve_target_modules(self, base: PreTrainedModel) -> tuple[str, ...] | str:
        from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

        if self.target_modules is not None:
            return self.target_modules
        default = DEFAULTS.get(base.config.model_type)
        if default is None:
            raise UnsupportedModelError(
                f"peft has no default LoRA target modules for {base.config.model_type!r}; set "
                f"method.target_modules={ALL_LINEAR}, or name modules"
            )
        return default if isinstance(default, str) else tuple(default)

    def _find_adapted_modules(self, base: PreTrainedModel) -> list[tuple[str, nn.Module]]:
        """Return the modules that peft adapts: names that the expression matches fully, or that end with a target."""
        targets = self._resolve_target_modules(base)
        if targets == ALL_LINEAR:
            return self._find_all_linear(base)
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
            _check_not_tied(target, matched, base)
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

    def _find_all_linear(self, base: PreTrainedModel) -> list[tuple[str, nn.Module]]:
        """Return the matrices that peft adapts for all-linear: all but the head and those that it cannot adapt."""
        excluded = set(_list_incompatible_names(base))
        converted = _convert_config(self._build_config(base), base).target_modules
        # Where experts are stacked in one parameter, peft replaces all-linear by names of modules.
        names = converted if isinstance(converted, (set, list)) else None
        return [
            (name, module)
            for name, module in _list_matrices(base)
            if name not in excluded and (names is None or any(_matches_suffix(target, name) for target in names))
        ]


def _convert_config(config: LoraConfig, base: PreTrainedModel) -> LoraConfig:
    """Return the config as peft converts it for architectures whose experts transformers stacks."""
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    converted = copy.copy(config)
    convert_peft_config_for_transformers(converted, base, None)  # conversions of weights are not needed
    return converted


def _list_matrices(base: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """Return every module with a matrix that multiplies its input, except the output head."""
    head = base.get_output_embeddings()
    return [(name, module) for name, module in base.named_modules() if _is_linear(module) and module is not head]


def _list_stacked_experts(base: PreTrainedModel) -> list[tuple[str, nn.Parameter]]:
    """Return the parameters that stack the matrices of a layer's experts, named by their module and themselves."""
    from torch.nn.modules.conv import _ConvNd

    return [
        (f"{module_name.rsplit('.', 1)[-1]}.{name}", parameter)
        for module_name, module in base.named_modules()
        if not isinstance(module, _ConvNd)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3
    ]


def _list_incompatible_names(base: PreTrainedModel) -> list[str]:
    """Return the matrices that LoRA cannot adapt.

    These are routers that return more than the product, and the projections that Mamba's kernels multiply themselves.
    """
    from peft import LoraConfig
    from peft.tuners.tuners_utils import _check_lora_target_modules_mamba

    def is_incompatible(name: str, module: nn.Module) -> bool:
        if _returns_tuple(module):
            return True
        try:
            _check_lora_target_modules_mamba(LoraConfig(), base, name.rsplit(".", 1)[-1])
        except ValueError:
            return True
        return False

    return [name for name, module in _list_matrices(base) if is_incompatible(name, module)]


def _returns_tuple(module: nn.Module) -> bool:
    """True for an architecture's own subclass of Linear that returns more than the product, e.g. a router."""
    import torch

    kind = type(module)
    if not kind.__module__.startswith("transformers.models.") or "forward" not in vars(kind):
        return False
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    with torch.no_grad():
        return not isinstance(module(weight.new_zeros(1, weight.shape[-1])), torch.Tensor)


def _check_not_tied(target: str, matched: Mapping[str, nn.Module], base: PreTrainedModel) -> None:
    """Check that no module to adapt shares its matrix with another, which a merged adapter would change too.

    Raises:
        TargetModulesError: one does, e.g. a head that is tied to the embedding.
    """
    owners: dict[int, list[str]] = {}
    for name, module in base.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            owners.setdefault(id(weight), []).append(name)
    for name, module in matched.items():
        others = [owner for owner in owners.get(id(module._parameters.get("weight")), []) if owner != name]
        if others:
            raise TargetModulesError(
                f"method.target_modules {target!r} matches {name}, which shares its matrix with {others[0]}, so that "
                "merging the adapter would change both; leave it out, or use a model that does not tie them"
            )


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
