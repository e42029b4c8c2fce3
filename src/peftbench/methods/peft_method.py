"""Any method of peft that starts from a base model: its recipe keys are the fields of peft's config class."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self
from unittest.mock import patch

from pydantic import field_validator, model_validator

from peftbench.common.schema import ConfigSection
from peftbench.common.text import first_line
from peftbench.errors import UnsupportedModelError
from peftbench.methods.base import Method
from peftbench.methods.linear_layers import has_conv1d, replace_conv1d, restore_conv1d
from peftbench.methods.small_copy import CopySize, build_small_copy, identify

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

ALL_LINEAR = "all-linear"
"""peft's name for every linear layer except the output head."""
_OTHER_TARGETS = frozenset({"ADAPTION_PROMPT", "LN_TUNING", "TRAINABLE_TOKENS"})
"""Types that adapt modules other than linear layers."""


class Targets(NamedTuple):
    """Modules that a method adapts in an architecture."""

    modules: str | tuple[str, ...] | None
    """Value of peft's ``target_modules``; None: peft's for the family, or a type without this key."""
    needs_linear: bool
    """True if Conv1D layers must be replaced by Linear layers first."""
    copy_size: CopySize
    """Size of the copy on which the method could be applied."""
    used: str | tuple[str, ...] | None
    """Names or expression that peft uses."""


_targets: dict[tuple[str, str], Targets] = {}


class PeftMethod(Method):
    """Base class of the sections that :mod:`peftbench.methods.peft_kinds` builds, one for each type of peft."""

    keeps_base_frozen: ClassVar[bool] = True
    supports_quantized_base: ClassVar[bool] = True
    merges_into_base: ClassVar[bool] = True
    needs_trial: ClassVar[bool] = True
    family: ClassVar[str] = "lora"  # it adds trained parameters to a frozen model, as LoRA does
    peft_type: ClassVar[str]
    """Name of the type in peft's ``PeftType``."""
    hidden_fields: ClassVar[frozenset[str]] = frozenset()
    """Fields of peft's config class that are not keys: the type ignores or refuses them, or the run sets them."""
    field_changes: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Arguments of pydantic's ``Field`` by key, e.g. limits, that replace those of peft's field."""
    config_fields: ClassVar[tuple[str, ...]]
    """Names of the keys that are fields of peft's config class."""

    @property
    def trains_loaded_weights(self) -> bool:
        return getattr(self, "bias", "none") != "none" or bool(getattr(self, "modules_to_save", None))

    @field_validator("target_modules", "exclude_modules", check_fields=False)
    @classmethod
    def _check_expression(cls, value: Any) -> Any:
        if isinstance(value, str):
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"invalid regular expression ({error}); write [{value}] for a suffix") from error
        return value

    @model_validator(mode="after")
    def _check_layers(self) -> Self:
        if getattr(self, "layers_to_transform", None) is None or getattr(self, "target_modules", None) != ALL_LINEAR:
            return self
        raise ValueError(
            "peft ignores layers_to_transform with target_modules=all-linear; name the modules, e.g. [q_proj, v_proj]"
        )

    def trainable_parameters(self, base: PreTrainedModel) -> int:
        """Apply the method to a copy of ``base`` and count the trained parameters."""
        model = self.apply(copy.deepcopy(base), None)
        return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)

    def apply(self, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> nn.Module:
        """Add the method's parameters to ``base``; replace Conv1D layers first where the type needs Linear."""
        targets = self.resolve_targets(base.config)
        replaced = replace_conv1d(base) if targets.needs_linear else []
        model: Any = self._add_adapter(base, targets.modules)
        model.conv1d_names = replaced
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not trained:
            raise self._trains_nothing(base.config)
        for parameter in trained:
            parameter.data = parameter.data.float()
        return model  # type: ignore[no-any-return]

    def merge(self, model: nn.Module) -> PreTrainedModel:
        merged = super().merge(model)
        restore_conv1d(merged, model.conv1d_names)  # type: ignore[arg-type]
        return merged

    def list_notes(self, base: PreTrainedModel) -> list[str]:
        """Return notes on the modules that are adapted and on layers that are replaced."""
        targets = self.resolve_targets(base.config)
        notes = []
        if targets.needs_linear:
            notes.append(
                "Conv1D layers are replaced by Linear layers with the same values, since peft's "
                f"{self.peft_type} does not adapt Conv1D; the saved adapter needs a model with these "
                "Linear layers (the model card of an export has the code)"
            )
        if targets.used and getattr(self, "target_modules", None) is None:
            names = targets.used if isinstance(targets.used, str) else ", ".join(targets.used)
            notes.append(f"method.target_modules is {names}")
        return notes

    def replaces_conv1d(self, config: PreTrainedConfig) -> bool:
        return self.resolve_targets(config).needs_linear

    def resolve_targets(self, config: PreTrainedConfig) -> Targets:
        """Return the modules to adapt in an architecture, and whether they must be Linear; found on a copy of it.

        The modules are those of the recipe, else peft's choice for this family, else all that the type can adapt.

        Raises:
            UnsupportedModelError: the method cannot be applied.
        """
        import torch

        key = (self.model_dump_json(), identify(config))
        if key not in _targets:
            with torch.random.fork_rng():  # the method's own initial values must not depend on this search
                _targets[key] = self._find_targets(config)
        return _targets[key]

    def _list_copy_sizes(self) -> list[CopySize]:
        """Return sizes of copies to try: the smallest on which the recipe's keys have a meaning, then a wider one."""
        names_layers = getattr(self, "layers_to_transform", None) is not None or getattr(self, "adapter_layers", 0) > 2
        patterns = (getattr(self, name, None) for name in ("target_modules", "exclude_modules"))
        names_layers |= any(isinstance(one, str) and one != ALL_LINEAR for one in patterns)
        vocabulary = max((512, *(index + 1 for index in self.tried_tokens)))
        if names_layers:
            return [CopySize(None, 256, vocabulary), CopySize(None, None, vocabulary)]
        return [CopySize(vocabulary=vocabulary), CopySize(max_width=None, vocabulary=vocabulary)]

    @property
    def tried_tokens(self) -> tuple[int, ...]:
        """Tokens that a trial must contain: those that the recipe names."""
        indices = getattr(self, "token_indices", ())
        return tuple(indices) if isinstance(indices, (list, tuple)) else ()

    def _find_targets(self, config: PreTrainedConfig) -> Targets:
        error: UnsupportedModelError | None = None
        for size in self._list_copy_sizes():
            small = build_small_copy(config, size)
            given = getattr(self, "target_modules", None)
            choices: list[Any] = [given]
            if given is None and "target_modules" in self.config_fields and self.peft_type not in _OTHER_TARGETS:
                choices.append(ALL_LINEAR)
            elif given is None and self.peft_type == "LN_TUNING":
                choices.append(tuple(_list_norm_names(small)))
            for needs_linear in (False, True) if has_conv1d(small) else (False,):
                for choice in choices:
                    base = build_small_copy(config, size)
                    if needs_linear:
                        replace_conv1d(base)
                    try:
                        model: Any = self._add_adapter(base, choice)
                        self._check_forward(model, config)
                    except UnsupportedModelError as refusal:
                        error = error or refusal
                        continue
                    if any(parameter.requires_grad for parameter in model.parameters()):
                        used = choice or getattr(model.active_peft_config, "target_modules", None)
                        return Targets(choice, needs_linear, size, used if isinstance(used, str) else _sort(used))
        raise error or self._trains_nothing(config)

    def _check_forward(self, model: nn.Module, config: PreTrainedConfig) -> None:
        """Run a forward pass: some types accept a layer whose shape they then take for the transposed one."""
        import torch

        try:
            with torch.no_grad():
                model(input_ids=torch.zeros((1, 3), dtype=torch.long))
        except Exception as error:
            raise UnsupportedModelError(
                f"method.kind={self.kind} fails in {config.model_type}: {first_line(error)}; use another method"
            ) from error

    def _trains_nothing(self, config: PreTrainedConfig) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"method.kind={self.kind} trains nothing in {config.model_type}; set method.target_modules, or use "
            "another method"
        )

    def set_config_values(self, base: PreTrainedModel) -> dict[str, Any]:
        """Return fields of peft's config that depend on ``base`` and that peft does not set correctly itself."""
        return {}

    def build_config(self, base: PreTrainedModel, modules: Any) -> PeftConfig:
        """Return peft's config of this method for ``base``, with these target modules."""
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

        values: dict[str, Any] = {name: _to_python(getattr(self, name)) for name in self.config_fields}
        if "target_modules" in values:
            values["target_modules"] = _to_python(modules)
        config_class = PEFT_TYPE_TO_CONFIG_MAPPING[self.peft_type]  # type: ignore[index]
        if "progressbar" in config_class.__dataclass_fields__:
            values["progressbar"] = False
        return config_class(task_type="CAUSAL_LM", **values, **self.set_config_values(base))

    def _add_adapter(self, base: PreTrainedModel, modules: Any) -> nn.Module:
        from peft import get_peft_model

        with keep_initial_values(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return get_peft_model(base, self.build_config(base, modules))
            except Exception as error:
                raise UnsupportedModelError(
                    f"method.kind={self.kind} cannot be applied to {base.config.model_type}: {first_line(error)}"
                ) from error


def _sort(names: Iterable[str] | None) -> tuple[str, ...] | None:
    return None if names is None else tuple(sorted(names))


def _list_norm_names(base: PreTrainedModel) -> list[str]:
    """Return the suffixes of the names of normalization layers."""
    names = [name for name, module in base.named_modules() if "norm" in type(module).__name__.lower()]
    return sorted({name.rsplit(".", 1)[-1] for name in names})


def _to_python(value: object) -> object:
    """Return a value of a recipe as peft's configs hold it: lists for tuples, dicts for sections."""
    if isinstance(value, ConfigSection):
        return value.model_dump()
    return [_to_python(item) for item in value] if isinstance(value, tuple) else copy.deepcopy(value)


@contextmanager
def keep_initial_values() -> Iterator[None]:
    """Keep new weights in float32; peft rounds them to the type of the matrix that they adapt, and converts them back.

    The initial values are then the same for a base model in any type.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    find = BaseTunerLayer._get_base_layer_device_and_dtype

    def find_device(layer: BaseTunerLayer, base_layer: nn.Module) -> tuple[torch.device | None, None]:
        return find(layer, base_layer)[0], None  # type: ignore[no-untyped-call]

    with patch.object(BaseTunerLayer, "_get_base_layer_device_and_dtype", find_device):
        yield
