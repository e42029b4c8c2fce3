"""Cuts: places in a model where hidden states are stored, so that later epochs compute only what is above.

The whole model is called in either case, inside the engine's wrappers. Gradients are then averaged as usual, and the
model computes its own masks and position embeddings. If states are loaded, the modules below the cut return without
computing; below a :class:`BlockCut`, the embedding lookup still runs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar
from unittest.mock import patch

import torch
from torch import nn

from peftbench.common.text import first_line
from peftbench.errors import UnsupportedModelError
from peftbench.feature_cache.store import STORAGE_DTYPES, PositionKind, StorageDtype
from peftbench.modeling.loss import CausalLMLoss, LabeledLogitsLoss, select_positions
from peftbench.modeling.mask_free import isolated_forward

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from peftbench.data.collate import MicroBatch
    from peftbench.methods.frozen_part import FrozenPart

Save = Callable[[torch.Tensor], None]
"""Function that stores the states of a micro-batch: one row for each stored position of its examples, in order."""
_TEST_SHAPE = (2, 5)
"""Rows and positions of the forward passes that compare computed and loaded states."""


class Cut(ABC):
    """A place in a model at which hidden states are saved and loaded."""

    position_kind: ClassVar[PositionKind]
    """The positions of an example that are stored."""
    hidden_size: int
    """Width of a hidden state."""

    @abstractmethod
    def save(self, batch: MicroBatch, dtype: StorageDtype, save: Save) -> AbstractContextManager[None]:
        """Return the context of a forward pass that computes the states of ``batch`` and passes them to ``save``.

        The pass continues with the states in their stored dtype, so that losses do not depend on whether states were
        computed or loaded.
        """

    @abstractmethod
    def load(self, batch: MicroBatch, states: torch.Tensor) -> AbstractContextManager[None]:
        """Return the context of a forward pass that uses stored ``states`` and skips what is below the cut."""


class HeadCut(Cut):
    """A cut below the output head: its inputs at labeled positions are stored, and the backbone is skipped.

    The backbone then returns a cached one-token output, and the head receives the stored states.
    """

    position_kind = "labeled"

    def __init__(self, loss: LabeledLogitsLoss) -> None:
        self._loss = loss
        self._backbone: nn.Module = loss.base.base_model
        self.hidden_size = loss.head.get_parameter("weight").shape[-1]
        with torch.no_grad():
            token = torch.zeros((1, 1), dtype=torch.long, device=loss.base.device)
            self._single_token_output = self._backbone(input_ids=token, use_cache=False)

    @contextmanager
    def save(self, batch: MicroBatch, dtype: StorageDtype, save: Save) -> Iterator[None]:
        def select_and_save(hidden: torch.Tensor, predictors: torch.Tensor) -> torch.Tensor:
            computed = select_positions(hidden, predictors)
            save(computed)
            return computed.to(STORAGE_DTYPES[dtype]).float()

        with patch.object(self._loss, "select_positions", select_and_save):
            yield

    @contextmanager
    def load(self, batch: MicroBatch, states: torch.Tensor) -> Iterator[None]:
        with (
            _replace_call(self._backbone, lambda *_, **__: self._single_token_output),
            patch.object(self._loss, "select_positions", lambda *_: states.float()),
        ):
            yield


class BlockCut(Cut):
    """A cut above the last frozen block: its outputs at real positions are stored, and the frozen blocks are skipped.

    The blocks above attend to all real positions. Padding is on the right, so no real position attends to it; its
    states are set to zero.
    """

    position_kind = "real"

    def __init__(self, base: PreTrainedModel, blocks: Sequence[nn.Module]) -> None:
        """Record the form of what the frozen ``blocks`` return; call it under the autocast of training.

        Raises:
            UnsupportedModelError: stored states cannot replace the blocks, which pass more than hidden states upwards.
        """
        self._blocks = list(blocks)
        self._templates: list[Any] = []
        """Output of each block, without tensors."""
        try:
            problem = self._try(base)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # model code may fail in any way if blocks are skipped
            problem = f"the model fails without them: {first_line(error, max_length=100)}"
        if problem is not None:
            raise UnsupportedModelError(
                f"stored hidden states cannot replace the lower blocks of {base.config.model_type} ({problem}); set "
                "train.feature_cache=null"
            )

    @torch.no_grad()
    def _try(self, base: PreTrainedModel) -> str | None:
        """Return why stored states cannot replace the blocks; None if the logits are then equal to the last bit."""
        rows, width = _TEST_SHAPE
        ids = (torch.arange(rows * width, device=base.device) * 7 + 3) % int(base.config.vocab_size)
        ids = ids.view(rows, width)
        states: list[torch.Tensor] = []

        def observe(output: Any) -> Any:
            states.append(_get_hidden(output))
            self._templates.append(_remove_tensors(output))
            return output

        with ExitStack() as stack:
            for block in self._blocks:
                stack.enter_context(_transform_output(block, observe))
            computed = base(input_ids=ids, use_cache=False).logits
        if states[-1].shape[:2] != _TEST_SHAPE:
            return "the shape of their outputs does not start with rows and positions"
        self.hidden_size, self._dtype = states[-1].shape[-1], states[-1].dtype
        with self._skip_blocks(states[-1]):
            loaded = base(input_ids=ids, use_cache=False).logits
        return None if torch.equal(computed, loaded) else "the blocks above them read more than their output"

    @contextmanager
    def save(self, batch: MicroBatch, dtype: StorageDtype, save: Save) -> Iterator[None]:
        def save_and_round(output: Any) -> Any:
            hidden = _get_hidden(output).flatten(0, 1)
            states = hidden.index_select(0, _list_real_positions(batch, hidden.device))
            save(states)
            return _replace_hidden(output, self._arrange(batch, states.to(STORAGE_DTYPES[dtype])))

        with _transform_output(self._blocks[-1], save_and_round):
            yield

    @contextmanager
    def load(self, batch: MicroBatch, states: torch.Tensor) -> Iterator[None]:
        with self._skip_blocks(self._arrange(batch, states)):
            yield

    def _arrange(self, batch: MicroBatch, states: torch.Tensor) -> torch.Tensor:
        """Return the states of all positions (rows, width, hidden size) from those of the real positions."""
        hidden = states.to(self._dtype)
        if len(hidden) < batch.input_ids.numel():
            padded = hidden.new_zeros((batch.input_ids.numel(), self.hidden_size))
            hidden = padded.index_copy_(0, _list_real_positions(batch, hidden.device), hidden)
        return hidden.view(*batch.input_ids.shape, self.hidden_size)

    @contextmanager
    def _skip_blocks(self, states: torch.Tensor) -> Iterator[None]:
        """Make the last frozen block return ``states``, and the blocks below it their input."""
        last = len(self._blocks) - 1

        def skip(index: int, *args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            return _replace_hidden(self._templates[index], states if index == last else hidden)

        with ExitStack() as stack:
            for index, block in enumerate(self._blocks):
                stack.enter_context(
                    _replace_call(block, lambda *args, index=index, **kwargs: skip(index, *args, **kwargs))
                )
            yield


def build_cut(
    base: PreTrainedModel,
    part: FrozenPart,
    loss: CausalLMLoss,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Cut:
    """Return the cut of ``base`` above its frozen part; ``autocast`` gives the precision of the training.

    Raises:
        UnsupportedModelError: the model's states cannot be cached.
    """
    if not part.is_backbone:
        with isolated_forward(base), autocast():
            return BlockCut(base, part.list_modules(base))
    if base.base_model is base:
        raise UnsupportedModelError(
            f"{base.config.model_type} has no backbone separate from its head, so its states cannot be cached; set "
            "train.feature_cache=null"
        )
    if not isinstance(loss, LabeledLogitsLoss):
        raise UnsupportedModelError(
            "train.feature_cache stores hidden states of labeled tokens below the head, and train.logits=all computes "
            "all logits; set train.logits=labels_only, or train.feature_cache=null"
        )
    return HeadCut(loss)


def _list_real_positions(batch: MicroBatch, device: torch.device) -> torch.Tensor:
    """Return the indices of the real tokens in the flattened rows of a micro-batch without virtual tokens."""
    width = batch.input_ids.shape[1]
    if batch.packed_sequences is not None:
        indices = torch.arange(sum(batch.lengths))
    else:
        indices = torch.cat([torch.arange(length) + row * width for row, length in enumerate(batch.lengths)])
    return indices.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else indices


def _get_hidden(output: Any) -> torch.Tensor:
    """Return the hidden states in the output of a block: the output itself, or the first item of a sequence."""
    hidden = output[0] if isinstance(output, (tuple, list)) else output
    if not isinstance(hidden, torch.Tensor):
        raise TypeError(f"their outputs are of type {type(hidden).__name__}")
    return hidden


def _replace_hidden(output: Any, hidden: torch.Tensor) -> Any:
    """Return an output of the same form with other hidden states."""
    if isinstance(output, list):
        return [hidden, *output[1:]]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def _remove_tensors(output: Any) -> Any:
    """Return a template of an output, with None in place of each tensor."""
    if not isinstance(output, (tuple, list)):
        return None
    return type(output)(None if isinstance(item, torch.Tensor) else item for item in output)


@contextmanager
def _transform_output(module: nn.Module, transform: Callable[[Any], Any]) -> Iterator[None]:
    """Apply ``transform`` to the outputs of ``module``."""
    call = module._compiled_call_impl or module._call_impl
    with _replace_call(module, lambda *args, **kwargs: transform(call(*args, **kwargs))):
        yield


def _replace_call(module: nn.Module, call: Callable[..., Any]) -> AbstractContextManager[Any]:
    """Replace the call of ``module``, including its hooks and compiled code, in the context.

    torch calls this attribute in place of the module if it is set, as in a compiled module. A forward hook or another
    ``forward`` would become part of the compiled code.
    """
    return patch.object(module, "_compiled_call_impl", call)
