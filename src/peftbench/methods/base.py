"""The base class of methods: which parameters are trained, and everything that other modules need to know about it.

A method is a frozen section of the recipe that can be applied to a base model. Everything specific to one method is in
its class; no code outside this folder tests which method it has.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from peftbench.common.schema import ConfigSection

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from peftbench.methods.frozen_part import FrozenPart
    from peftbench.methods.initialization import InitializationNeeds, InitializationPass, InitialValues


class Target(NamedTuple):
    """Expected or predicted text of an example; for a task with choices also the index of the choice."""

    text: str
    choice: int | None = None


Predictor = Callable[[str, Sequence[str]], Target]
"""Takes a prompt and its choices (none for tasks without choices)."""


class Method(ConfigSection):
    """A method's options. Each subclass gives ``kind`` a literal type, by which a recipe selects it."""

    is_trainable: ClassVar[bool] = True
    """True if it trains anything; False for baselines."""
    needs_model: ClassVar[bool] = True
    """True if it uses the base model; False for baselines that only copy text."""
    predicts_choices: ClassVar[bool] = False
    """True for a baseline without a model that predicts one of an example's choices."""
    reads_training_split: ClassVar[bool] = False
    """True for a baseline that reads the training split though it trains nothing."""
    keeps_base_frozen: ClassVar[bool] = False
    """True if the base model's matrices and embeddings stay as loaded, and what is trained is added to them."""
    freezes_weights: ClassVar[bool] = True
    """True if it keeps weights of the base model frozen, which are then held in ``model.dtype``."""
    supports_quantized_base: ClassVar[bool] = False
    """True if the base model may be quantized (``model.quantization``), which needs ``keeps_base_frozen``."""

    adds_lora: ClassVar[bool] = False
    """True if it adds the matrices A and B of LoRA, which some optimizers step differently."""
    needs_trial: ClassVar[bool] = False
    """True if each run first tries it on a small copy of the architecture (see :mod:`peftbench.training.trial`)."""
    merges_into_base: ClassVar[bool] = False
    """True if the saved adapter can be merged into the base model's weights; False also for a saved whole model."""
    reads_gradients: ClassVar[bool] = False
    """True if :meth:`after_optimizer_step` reads gradients; the engine must then keep them, unsharded."""

    learning_rates: ClassVar[tuple[float, float] | None] = None
    """Lowest and highest learning rate that ``learning_rate_source`` reports; None if unknown."""
    learning_rate_source: ClassVar[str] = ""
    """Paper or benchmark that reports ``learning_rates``."""
    family: ClassVar[str] = ""
    """Family in the compatibility table: by default the kind; a preset has the family of its method."""

    kind: str
    """Kind of method."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Set the family of a subclass, and check its attributes.

        Raises:
            TypeError: it trains the base model and supports a quantized one, whose matrices cannot be trained.
        """
        super().__pydantic_init_subclass__(**kwargs)
        cls.family = cls.family or cls.model_fields["kind"].get_default() or ""
        if cls.supports_quantized_base and not cls.keeps_base_frozen:
            raise TypeError(f"{cls.__name__} supports a quantized base, so it must set keeps_base_frozen = True")

    @property
    def virtual_tokens(self) -> int:
        """Number of positions in front of a sequence's real tokens."""
        return 0

    @property
    def occupied_positions(self) -> int:
        """Number of the model's positions that the method occupies; the others are left for the sequence."""
        return self.virtual_tokens

    @property
    def has_frozen_backbone(self) -> bool:
        """True if everything below the output head is frozen in every model, so that the backward pass ends there.

        :meth:`get_frozen_part` returns what is frozen in one model.
        """
        return False

    @property
    def supports_feature_cache(self) -> bool:
        """True if it leaves a frozen part in some models, whose hidden states ``train.feature_cache`` can store."""
        return False

    @property
    def trains_loaded_weights(self) -> bool:
        """True if it trains weights of the base model, which are then loaded in float32."""
        return not self.keeps_base_frozen

    def trainable_parameters(self, base: PreTrainedModel) -> int:
        """Count the parameters that this method trains on ``base`` (before :meth:`apply`), from the shapes alone.

        ``base`` may be on the meta device.
        """
        raise TypeError(f"{type(self).__name__} trains nothing")

    def apply(self, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
        """Turn ``base`` into the model to train, with ``requires_grad`` on exactly the trained parameters, in float32.

        Raises:
            ModelError: the method does not support this architecture, or its target modules match nothing.
        """
        raise TypeError(f"{type(self).__name__} trains nothing")

    @property
    def initialization(self) -> InitializationNeeds | None:
        """Examples or weights that its initial values are computed from; None if :meth:`apply` sets them."""
        return None

    def compute_initial_values(self, model: nn.Module, data: InitializationPass) -> InitialValues:
        """Return initial values for the applied model, whose outputs still equal those of the base model.

        Raises:
            OutOfRangeError, UnsupportedModelError: they cannot be computed on these examples or this model.
        """
        raise TypeError(f"{type(self).__name__} computes no initial values")

    def set_initial_values(self, model: nn.Module, values: InitialValues) -> None:
        """Set computed values in the applied model. The shapes of its trained parameters may change."""
        raise TypeError(f"{type(self).__name__} computes no initial values")

    def check_quantization(self, quantization: str | None) -> None:
        """Check that it works with this ``model.quantization``.

        Raises:
            OutOfRangeError: it does not.
        """

    def list_notes(self, base: PreTrainedModel) -> list[str]:
        """Return sentences for the record about what :meth:`apply` does to ``base``; call it before that."""
        return []

    def replaces_conv1d(self, config: PreTrainedConfig) -> bool:
        """True if it replaces the Conv1D layers of an architecture, so that its adapter needs Linear layers."""
        return False

    def get_frozen_part(self, model: nn.Module) -> FrozenPart:
        """Return the part of the applied model below everything that is trained.

        It computes the same hidden states for an example in every epoch, so they can be stored.
        """
        from peftbench.methods.frozen_part import FrozenPart

        return FrozenPart(obstacle=f"{self.kind} trains parameters in every block")

    def reduce_for_trial(self) -> Method:
        """Return the method that is tried on a small copy of an architecture."""
        return self

    def set_training(self, model: nn.Module) -> None:
        """Set the applied model to the mode in which it is trained."""
        model.train()

    def why_steps_are_too_few(self, total_steps: int) -> str | None:
        """Return why the method needs more steps than ``total_steps``, None if they suffice."""
        return None

    def start_training(self, model: nn.Module, total_steps: int) -> None:
        """Prepare the applied model for ``total_steps`` optimizer steps."""

    def compute_penalty(self, model: nn.Module) -> torch.Tensor | None:
        """Return a differentiable scalar that is added to the mean loss of each step; None if there is none.

        It is added once per step, for any number of micro-batches and processes. The recorded losses do not contain it.
        """
        return None

    def after_optimizer_step(self, model: nn.Module, step: int, *, was_skipped: bool) -> None:
        """Change the model after ``step`` (counted from 1), while its gradients still exist.

        The gradients are clipped and unscaled. ``was_skipped``: fp16's loss scaler skipped the update, since a
        gradient was not finite.
        """

    def capture_state(self, model: nn.Module) -> dict[str, Any]:
        """Return the state that training changes besides parameters: tensors, numbers and strings in dicts and lists.

        The tensors are not copied.
        """
        return {}

    def load_state(self, model: nn.Module, state: dict[str, Any]) -> None:
        """Restore what :meth:`capture_state` returned."""

    @property
    def simulated_step(self) -> int:
        """Number of the step that a memory plan simulates: one with the most memory, without :meth:`start_training`."""
        return 1

    def list_training_notes(self, model: nn.Module) -> list[str]:
        """Return sentences for the record about what training changed; called after the last step."""
        return []

    def generate(
        self, model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor, **generate_kwargs: Any
    ) -> torch.Tensor:
        """Generate the tokens (rows, at most ``max_new_tokens``) that follow left-padded prompts.

        ``generate_kwargs`` are those of transformers' ``generate``.
        """
        output: torch.Tensor = model.generate(  # type: ignore[operator]
            input_ids=input_ids, attention_mask=attention_mask, **generate_kwargs
        )
        return output[:, input_ids.shape[1] :]

    def check_generation(self, base: PreTrainedModel) -> None:
        """Check that :meth:`generate` works with ``base``; called before training.

        Raises:
            UnsupportedModelError: it does not.
        """

    def save(self, model: nn.Module, save_directory: Path) -> None:
        """Save the trained parameters as safetensors in ``save_directory``, in the format of peft or transformers."""
        with _without_config_warning():
            model.save_pretrained(save_directory, safe_serialization=True)  # type: ignore[operator]
        if not self.keeps_base_frozen:
            _record_widest_dtype(model, save_directory)

    def load(self, model: nn.Module, save_directory: Path) -> None:
        """Load into the applied model what :meth:`save` wrote, if the method keeps the base model frozen.

        Otherwise the saved model is a whole one, to which the method was applied.

        Raises:
            ModelError: the saved weights are not those of this method.
        """
        if not self.keeps_base_frozen:
            return
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        from peftbench.errors import ModelError

        weights = self.restore_structure(model, self.read_weights(save_directory))
        set_peft_model_state_dict(model, weights)
        with _without_config_warning():
            expected = get_peft_model_state_dict(model)
        if difference := sorted(weights.keys() ^ expected.keys()):
            raise ModelError(
                f"{save_directory} and this {self.kind} have different weights: only one of them has {difference[0]}",
                "train again",
            )

    def read_weights(self, save_directory: Path) -> dict[str, torch.Tensor]:
        """Return the saved adapter's weights, in the shapes of the applied model."""
        from peft import load_peft_weights

        weights: dict[str, torch.Tensor] = load_peft_weights(str(save_directory), device="cpu")
        return weights

    def restore_structure(self, model: nn.Module, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Give the applied model the shapes and frozen weights of the saved one; return the trained weights to load."""
        return weights

    def merge(self, model: nn.Module) -> PreTrainedModel:
        """Return the base model with what is trained merged into its weights.

        Raises:
            ValueError, NotImplementedError: a weight is not finite, or peft cannot merge a layer.
        """
        merged: PreTrainedModel = model.merge_and_unload(safe_merge=True)  # type: ignore[operator]
        return merged

    @property
    def num_shots(self) -> int:
        """Number of training examples before each prompt of an evaluation."""
        return 0

    def build_predictor(self, read_training_targets: Callable[[], list[Target]]) -> Predictor:
        """Return the function that predicts an example's target without a model.

        ``read_training_targets`` reads the targets of the training split.
        """
        raise TypeError(f"{type(self).__name__} predicts with a model")


@contextmanager
def _without_config_warning() -> Iterator[None]:
    """Hide peft's warning that the folder of a run, as a base model, has no config.json with the vocabulary's size."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Could not find a config file in")
        yield


def _record_widest_dtype(model: nn.Module, save_directory: Path) -> None:
    """Make a saved model load in the widest type of its weights; transformers loads all of them in the first one's."""
    import torch

    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    file = save_directory / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["dtype"] = str(max(dtypes, key=lambda dtype: torch.finfo(dtype).bits)).removeprefix("torch.")
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def freeze(parameters: Iterable[nn.Parameter]) -> None:
    """Disable gradients of all ``parameters``."""
    for parameter in parameters:
        parameter.requires_grad_(False)
