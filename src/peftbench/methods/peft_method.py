"""Any method of peft that starts from a base model: its recipe keys are the fields of peft's config class."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple
from unittest.mock import patch

from pydantic import field_validator

from peftbench.common.text import first_line
from peftbench.errors import UnsupportedModelError
from peftbench.methods.base import Method
from peftbench.methods.linear_layers import has_conv1d, replace_conv1d
from peftbench.methods.small_copy import build_small_copy, identify

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ALL_LINEAR = "all-linear"
"""peft's name for every linear layer except the output head."""
_OTHER_TARGETS = frozenset({"ADAPTION_PROMPT", "LN_TUNING", "TRAINABLE_TOKENS"})
"""Types whose targets are other modules than linear layers."""


class Targets(NamedTuple):
    """Modules that a method adapts in an architecture."""

    modules: str | list[str] | None
    """Names, suffixes or an expression, as peft takes them; None for a type without such a key."""
    needs_linear: bool
    """True if Conv1D layers must be replaced by Linear layers first."""


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
    config_fields: ClassVar[tuple[str, ...]]
    """Names of the keys that are fields of peft's config class."""

    def trainable_parameters(self, base: PreTrainedModel) -> int:
        """Count what is trained on a copy of ``base``, to which the method is applied."""
        model = self.apply(copy.deepcopy(base), None)
        return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)

    def apply(self, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> nn.Module:
        """Add the method's parameters to ``base``; replace Conv1D layers first where the type needs Linear."""
        targets = self.resolve_targets(base)
        if targets.needs_linear:
            replace_conv1d(base)
        model = self._add_adapter(base, targets.modules)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise self._trains_nothing(base)
        return model

    def list_notes(self, base: PreTrainedModel) -> list[str]:
        """Return notes on the modules that are adapted and on layers that are replaced."""
        targets = self.resolve_targets(base)
        notes = []
        if targets.needs_linear:
            notes.append(
                "Conv1D layers are replaced by Linear layers with the same values, since peft's "
                f"{self.peft_type} adapts only these; the saved adapter loads into a model with Linear layers"
            )
        if targets.modules is not None and getattr(self, "target_modules", None) is None:
            names = targets.modules if isinstance(targets.modules, str) else ", ".join(sorted(targets.modules))
            notes.append(f"method.target_modules is {names}")
        return notes

    def resolve_targets(self, base: PreTrainedModel) -> Targets:
        """Return the modules to adapt, and whether they must be Linear; found on a small copy of ``base``.

        The modules are the recipe's, else peft's for this family, else all that the type can adapt.

        Raises:
            UnsupportedModelError: the method cannot be applied.
        """
        key = (self.model_dump_json(), identify(base.config))
        if key not in _targets:
            _targets[key] = self._find_targets(base)
        return _targets[key]

    def _find_targets(self, base: PreTrainedModel) -> Targets:
        import torch

        with torch.random.fork_rng(devices=[]):  # the method's own initial values must not depend on this search
            return self._search_targets(base)

    def _search_targets(self, base: PreTrainedModel) -> Targets:
        given = getattr(self, "target_modules", None)
        choices = [given]
        if given is None and "target_modules" in self.config_fields and self.peft_type not in _OTHER_TARGETS:
            choices.append(ALL_LINEAR)
        elif given is None and self.peft_type == "LN_TUNING":
            choices.append(tuple(_list_norm_names(base)))
        error: UnsupportedModelError | None = None
        for needs_linear in (False, True) if has_conv1d(base) else (False,):
            for modules in choices:
                small = build_small_copy(base.config)
                if needs_linear:
                    replace_conv1d(small)
                try:
                    model: Any = self._add_adapter(small, modules)
                except UnsupportedModelError as refusal:
                    error = refusal
                    continue
                if any(parameter.requires_grad for parameter in model.parameters()):
                    used = getattr(model.active_peft_config, "target_modules", None)
                    return Targets(sorted(used) if isinstance(used, set) else used, needs_linear)
        raise error or self._trains_nothing(base)

    def _trains_nothing(self, base: PreTrainedModel) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"method.kind={self.kind} trains nothing in {base.config.model_type}; set method.target_modules, or use "
            "another method"
        )

    def set_config_values(self, base: PreTrainedModel) -> dict[str, Any]:
        """Return fields of peft's config that follow from ``base`` and that peft does not find itself."""
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
            except _PEFT_ERRORS as error:
                raise UnsupportedModelError(
                    f"method.kind={self.kind} cannot be applied to {base.config.model_type}: {first_line(error)}"
                ) from error


class PeftLora(PeftMethod):
    """Base class of the sections of LoRA's variants."""

    init_lora_weights: bool | str

    @field_validator("init_lora_weights")
    @classmethod
    def _check_init(cls, value: bool | str) -> bool | str:
        if value in _DATA_INITS:
            raise ValueError(
                f"{value} needs a pass over the data before the training, which is not supported; use true, gaussian, "
                "pissa, olora, orthogonal or mica"
            )
        return value


_DATA_INITS = ("corda", "eva", "loftq", "lora_ga")
"""Initial values of LoRA that are computed from data, or with a quantized base; without that they are the default."""
_PEFT_ERRORS = (ValueError, TypeError, NotImplementedError, AttributeError, RuntimeError, ImportError, LookupError)
"""Errors of peft for a config or a layer that a type does not support."""


def _list_norm_names(base: PreTrainedModel) -> list[str]:
    """Return the suffixes of the names of normalization layers."""
    names = [name for name, module in base.named_modules() if "norm" in type(module).__name__.lower()]
    return sorted({name.rsplit(".", 1)[-1] for name in names})


def _to_python(value: object) -> object:
    """Return a value of a recipe as peft's configs hold it: lists for tuples."""
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
