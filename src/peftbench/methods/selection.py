"""ParameterSelection: the base class of methods that train some of the base model's own parameters.

Nothing is added to the model. As in every model, autograd ends the backward pass at the lowest trained parameter.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, ClassVar

from peftbench.errors import UnsupportedModelError
from peftbench.methods.base import Method, freeze

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from peftbench.methods.frozen_part import FrozenPart

_FROZEN_PART = "frozen_part"
"""Attribute of the applied model that caches its frozen part, since finding it takes a forward pass."""


class ParameterSelection(Method):
    """Train the parameters that :meth:`select_names` returns; everything else is frozen."""

    family: ClassVar[str] = "select"

    @property
    def supports_feature_cache(self) -> bool:
        return True

    @property
    def has_separate_head(self) -> bool:
        """True if the head gets its own copy of a matrix that it shares with the embedding."""
        return False

    @abstractmethod
    def select_names(self, base: PreTrainedModel) -> list[str]:
        """Return the names of the trained parameters, at least one. A tied parameter may have several names.

        Raises:
            ModelError: the model has none of them.
        """

    def trainable_parameters(self, base: PreTrainedModel) -> int:
        """Count the selected parameters; a tied one counts once, or twice if the head gets its own copy."""
        parameters, head_names = dict(list_named_parameters(base)), set(list_head_names(base))
        selected = {
            (id(parameters[name]), self.has_separate_head and name in head_names): parameters[name].numel()
            for name in self.select_names(base)
        }
        return sum(selected.values())

    def apply(self, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        names = self.select_names(base)
        if self.has_separate_head:
            untie_head(base)
        freeze(base.parameters())
        for name in names:
            base.get_parameter(name).requires_grad_(True)
        vars(base).pop(_FROZEN_PART, None)
        return base

    def get_frozen_part(self, model: nn.Module) -> FrozenPart:
        if _FROZEN_PART not in vars(model):
            vars(model)[_FROZEN_PART] = _find_frozen_part(model)  # type: ignore[arg-type]
        part: FrozenPart = vars(model)[_FROZEN_PART]
        return part

    def set_training(self, model: nn.Module) -> None:
        # The frozen part has no dropout, so its states are the same in every epoch and in evaluation.
        self.get_frozen_part(model).set_training(model)

    def list_notes(self, base: PreTrainedModel) -> list[str]:
        """Return a note for each trained parameter that the model uses under several names."""
        if self.has_separate_head:
            return []
        names_by_id: dict[int, list[str]] = {}
        for name, parameter in list_named_parameters(base):
            names_by_id.setdefault(id(parameter), []).append(name)
        selected = {id(base.get_parameter(name)) for name in self.select_names(base)}
        return [
            f"{' and '.join(names)} are one tied parameter, so that training it changes all of them"
            for key, names in names_by_id.items()
            if key in selected and len(names) > 1
        ]


def _find_frozen_part(base: PreTrainedModel) -> FrozenPart:
    """Return the frozen part of a model to which a selection is applied."""
    from peftbench.methods.frozen_part import find_frozen_part

    blocks: list[tuple[str, nn.Module]] | str
    try:
        blocks = find_blocks(base)
    except UnsupportedModelError:
        blocks = f"{base.config.model_type} has several lists of transformer blocks or none"
    return find_frozen_part(base, blocks)


def list_named_parameters(base: PreTrainedModel) -> list[tuple[str, nn.Parameter]]:
    """Return every trainable parameter of ``base`` by name; a tied one has several names.

    Some architectures have parameters that no gradient reaches, e.g. a bias that balances experts. transformers freezes
    them, so call this before a method freezes others.
    """
    return [
        (name, parameter)
        for name, parameter in base.named_parameters(remove_duplicate=False)
        if parameter.requires_grad
    ]


def list_names_in_modules(base: PreTrainedModel, matches: Callable[[nn.Module], bool], *, recurse: bool) -> list[str]:
    """Return the names of the trainable parameters of the modules that match; ``recurse`` includes their submodules."""
    names = [
        name
        for module_name, module in base.named_modules(remove_duplicate=False)
        if matches(module)
        for name, parameter in module.named_parameters(module_name, recurse=recurse, remove_duplicate=False)
        if parameter.requires_grad
    ]
    return list(dict.fromkeys(names))


def list_head_names(base: PreTrainedModel) -> list[str]:
    """Return the names of the output head's parameters; empty without a head."""
    head = base.get_output_embeddings()
    return [] if head is None else list_names_in_modules(base, lambda module: module is head, recurse=True)


def untie_head(base: PreTrainedModel) -> None:
    """Give the head its own copy of its weight, in this model and in its saved config."""
    from torch import nn

    head = get_output_head(base)
    head.weight = nn.Parameter(head.weight.detach().clone())
    base.config.tie_word_embeddings = False
    base.all_tied_weights_keys = {}


def get_output_head(base: PreTrainedModel) -> nn.Linear:
    """Return the module that computes the logits.

    Raises:
        UnsupportedModelError: the model has none.
    """
    head = base.get_output_embeddings()
    if head is None:
        raise UnsupportedModelError(f"{base.config.model_type} has no output head to train; use another method")
    return head  # type: ignore[no-any-return]


def find_blocks(base: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """Return the transformer blocks in their order, with their names.

    These are the members of the one list of layers that transformers can checkpoint, or of the longest list of modules
    if the architecture has no such layers.

    Raises:
        UnsupportedModelError: the model has no list of blocks, or several.
    """
    from torch import nn
    from transformers.modeling_layers import GradientCheckpointingLayer

    def has_blocks(modules: Iterable[nn.Module]) -> bool:
        return any(isinstance(module, GradientCheckpointingLayer) for module in modules)

    lists = [(name, module) for name, module in base.named_modules() if isinstance(module, nn.ModuleList)]
    candidates = [(name, module) for name, module in lists if has_blocks(module)]
    outermost = [
        (name, module)
        for name, module in candidates or sorted(lists, key=lambda item: -len(item[1]))[:1]
        if not any(name.startswith(f"{other}.") for other, _ in candidates)
    ]
    if len(outermost) != 1:
        found = ", ".join(name for name, _ in outermost) or "none"
        raise UnsupportedModelError(
            f"selecting blocks needs a model with one list of transformer blocks, and {base.config.model_type} "
            f"has several or none ({found}); use method.kind=select"
        )
    ((list_name, blocks),) = outermost
    return [(f"{list_name}.{index}", block) for index, block in enumerate(blocks)]
