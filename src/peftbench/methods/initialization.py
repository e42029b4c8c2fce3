"""Initial values of LoRA that depend on data (EVA, CorDA, LoRA-GA) or on the error of a quantized base (LoftQ).

peft computes the values. This module calls peft's functions in order, prepares their inputs and checks them. Computing
them changes no weight of the model. They are set afterwards, by the same functions in a new run and in a resumed one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from peftbench.common.text import first_line
from peftbench.errors import OutOfRangeError, UnsupportedModelError

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig
    from torch import nn

    from peftbench.data.collate import MicroBatch

ADAPTER = "default"
"""Name of the adapter in peft."""
_MAX_EVA_ROUNDS = 100
"""Passes over the examples after which an error states that EVA's components have not converged."""

InitialValues = dict[str, "torch.Tensor"]
"""Tensors by the names of layers: ``NAME.lora_A`` and ``NAME.lora_B``, for EVA ``NAME.lora_A`` alone."""


class InitializationNeeds(NamedTuple):
    """Data that an initialization reads."""

    examples: int
    """Number of training examples; 0: it reads none."""
    tokens: int = 0
    """Number of tokens that all examples must have together; only tokens that it reads count."""
    weights: bool = False
    """True if it reads the weights before they were quantized."""


@dataclass(frozen=True)
class InitializationPass:
    """A pass over training examples, and the file of the weights before they were quantized."""

    num_examples: int
    collate: Callable[[Sequence[int]], MicroBatch]
    """Collates examples, given by their position in the pass; a single one has no padding."""
    compute_loss: Callable[[MicroBatch], torch.Tensor]
    """Runs the model in the precision of training; returns the loss summed over labeled tokens."""
    weights_file: Path | None = None
    """``model.safetensors`` of the base model, which may be split into several files; None if it is not quantized."""


def list_layers(model: nn.Module, kind: str) -> dict[str, Any]:
    """Return the LoRA layers by name.

    Raises:
        UnsupportedModelError: peft has no such initialization for a layer: it is not linear, or its matrix is shared.
    """
    from peft.tuners.lora import LoraLayer
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    for name, layer in layers.items():
        base = layer.get_base_layer()
        if not isinstance(base, (nn.Linear, Conv1D)) or base.weight is embeddings.weight:
            raise UnsupportedModelError(
                f"init_lora_weights={kind} needs linear layers that share no matrix with the embedding, but "
                f"method.target_modules contains {name.removeprefix('base_model.model.')}; remove it"
            )
    return layers


def compute_eva(model: Any, data: InitializationPass, config: LoraConfig) -> InitialValues:
    """Return the components of each layer's inputs; the tensor of a layer with rank 0 has no rows.

    Raises:
        OutOfRangeError: the examples have fewer tokens than the largest rank that a layer may get.
        UnsupportedModelError: peft cannot compute them.
    """
    from peft.tuners.lora.eva import get_eva_state_dict

    layers, head = list_layers(model, "eva"), model.get_output_embeddings()
    if any(layer is head for layer in layers.values()):
        raise UnsupportedModelError(
            "init_lora_weights=eva reads the inputs of layers at all positions, but the output head, which "
            "method.target_modules contains, is computed only at labeled positions; remove it"
        )
    model.peft_config[ADAPTER].eva_config = config.eva_config
    batches = _join_examples(data, config)
    num_forwards = 0

    def forward(_model: nn.Module, batch: MicroBatch) -> None:
        nonlocal num_forwards
        num_forwards += 1
        if num_forwards > _MAX_EVA_ROUNDS * (len(batches) + 1):
            raise UnsupportedModelError(
                f"the components of init_lora_weights=eva have not converged after {_MAX_EVA_ROUNDS} passes over "
                f"{data.num_examples} examples; raise method.eva_config.init_examples, or lower method.r or "
                "method.eva_config.tau"
            )
        with _hooks_without_autocast(list(layers.values())):
            data.compute_loss(batch)

    with _explain_errors("eva"):
        components = get_eva_state_dict(
            model,
            batches,
            forward_fn=forward,
            prepare_model_inputs_fn=_select_tokens,
            gather_distributed_inputs=False,  # all processes read the same examples
            show_progress_bar=False,
        )
    return {f"{name}.lora_A": tensor.cpu() for name, tensor in components.items()}


def set_eva(model: Any, values: InitialValues, config: LoraConfig) -> None:
    """Give each layer the rank and the values of its components; remove LoRA from layers with rank 0."""
    from peft import initialize_lora_eva_weights

    peft_config = model.peft_config[ADAPTER]
    peft_config.init_lora_weights, peft_config.eva_config = "eva", config.eva_config
    device = next(model.parameters()).device
    components = {name.removesuffix(".lora_A"): tensor.to(device) for name, tensor in values.items()}
    initialize_lora_eva_weights(model, eva_state_dict=components)


def _join_examples(data: InitializationPass, config: LoraConfig) -> list[MicroBatch]:
    """Return batches of consecutive examples; each batch has at least :func:`count_eva_tokens` tokens."""
    needed = count_eva_tokens(config)
    groups: list[list[int]] = [[]]
    counts = [0]
    for index in range(data.num_examples):
        if counts[-1] >= needed:
            groups.append([])
            counts.append(0)
        groups[-1].append(index)
        counts[-1] += len(_select_tokens(data.collate([index]), config))
    if len(groups) > 1 and counts[-1] < needed:
        groups[-2] += groups.pop()
        counts[-2] += counts.pop()
    if counts[-1] < needed:
        raise OutOfRangeError(
            f"init_lora_weights=eva needs {needed} tokens (method.r times method.eva_config.rho), but the "
            f"{data.num_examples} examples have {counts[-1]}; raise method.eva_config.init_examples, or lower method.r"
        )
    return [data.collate(group) for group in groups]


def count_eva_tokens(config: LoraConfig) -> int:
    """Return the number of tokens that a batch needs: the largest rank that a layer may get."""
    assert config.eva_config is not None
    highest: int = max([config.r, *(config.rank_pattern or {}).values()])
    return round(highest * config.eva_config.rho)


def _select_tokens(batch: MicroBatch, config: LoraConfig) -> torch.Tensor:
    """Return the row and column of each token that EVA reads: labeled tokens, or all tokens except padding."""
    import torch

    assert config.eva_config is not None
    width, device = batch.input_ids.shape[1], batch.input_ids.device
    if config.eva_config.use_label_mask:
        places = batch.logit_indices + 1
        return torch.stack((places // width, places % width), dim=1)
    lengths = torch.tensor(batch.lengths, device=device)
    return (torch.arange(width, device=device) < lengths[:, None]).nonzero()


def compute_corda(model: Any, data: InitializationPass, config: LoraConfig) -> InitialValues:
    """Return the factors that CorDA separates from each matrix, by the covariance of the matrix's inputs."""
    from peft.tuners.lora.corda import preprocess_corda

    layers = list_layers(model, "corda")
    _check_ranks(layers, "corda", 1)

    def run_model() -> None:
        with _hooks_without_autocast(list(layers.values())):
            for index in range(data.num_examples):
                data.compute_loss(data.collate([index]))

    with _explain_errors("corda"):
        with model.disable_adapter():
            preprocess_corda(model, _target_base_layers(layers, config), run_model)
        return _compute_factors(layers, lambda layer: layer.corda_init(ADAPTER, "corda"))


def compute_lora_ga(model: Any, data: InitializationPass, config: LoraConfig) -> InitialValues:
    """Return the factors that LoRA-GA takes from the gradient of each matrix, averaged over the examples.

    The loss of an example is the mean over its labeled tokens.
    """
    import torch
    from peft.tuners.lora.loraga import preprocess_loraga

    layers = list_layers(model, "lora_ga")
    _check_ranks(layers, "lora_ga", 2)  # A and B get different directions

    def run_steps() -> None:
        for index in range(data.num_examples):
            batch = data.collate([index])
            (data.compute_loss(batch) / len(batch.targets)).backward()  # type: ignore[no-untyped-call]

    with _explain_errors("lora_ga"):
        with model.disable_adapter():
            preprocess_loraga(model, _target_base_layers(layers, config), run_steps)
        with torch.no_grad():
            return _compute_factors(layers, lambda layer: layer.lora_ga_init(ADAPTER, config.lora_ga_config))


def compute_loftq(model: Any, data: InitializationPass, config: LoraConfig) -> InitialValues:
    """Return the factors that approximate the quantization error of each matrix; none if the base is not quantized.

    peft's ``replace_lora_weights_loftq`` does the same, but on a CUDA device only and without LoRA's scale.

    Raises:
        UnsupportedModelError: a layer is not quantized to 4 bits, or its weights cannot be read.
    """
    if data.weights_file is None:
        return {}
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn.modules import Linear4bit
    from peft.utils.loftq_utils import _low_rank_decomposition, _SafetensorLoader

    values: InitialValues = {}
    with _explain_errors("loftq"), torch.no_grad():
        loader = _SafetensorLoader(model, str(data.weights_file))  # type: ignore[no-untyped-call]
        for name, layer in list_layers(model, "loftq").items():
            base = layer.get_base_layer()
            short = name.removeprefix("base_model.model.")
            if not isinstance(base, Linear4bit):
                raise UnsupportedModelError(
                    f"init_lora_weights=loftq needs layers that are quantized to 4 bits, but {short} is not; remove "
                    "it from method.target_modules"
                )
            quantized = dequantize_4bit(base.weight.data, base.weight.quant_state).float()  # type: ignore[attr-defined]
            original = loader.get_tensor(f"{short}.weight").to(quantized)  # type: ignore[no-untyped-call]
            if original.shape != quantized.shape:
                raise UnsupportedModelError(
                    f"init_lora_weights=loftq cannot read the original weights of {short}, which are stored "
                    "transposed; use init_lora_weights=true"
                )
            factors: Any = _low_rank_decomposition(original - quantized, layer.r[ADAPTER])  # type: ignore[no-untyped-call]
            values[f"{name}.lora_A"] = factors["R"].cpu()
            values[f"{name}.lora_B"] = (factors["L"] / layer.scaling[ADAPTER]).cpu()
    return values


def set_factors(model: nn.Module, values: InitialValues, *, subtract: bool) -> None:
    """Set the factors of each layer; with ``subtract`` also subtract their product from the frozen matrix.

    The outputs then stay those of the base model.
    """
    import torch
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import transpose

    with torch.no_grad():
        for name, layer in model.named_modules():
            if not isinstance(layer, LoraLayer) or f"{name}.lora_A" not in values:
                continue
            factors = []
            for factor, linear in (("lora_A", layer.lora_A[ADAPTER]), ("lora_B", layer.lora_B[ADAPTER])):
                parameter: Any = linear.weight
                parameter.data = values[f"{name}.{factor}"].to(parameter, copy=True)
                factors.append(parameter.data.float())
            if subtract:
                weight: Any = layer.get_base_layer().weight
                delta = layer.scaling[ADAPTER] * (factors[1] @ factors[0])
                change = transpose(delta, layer.fan_in_fan_out)  # type: ignore[attr-defined]
                weight.data = (weight.data.float() - change).to(weight.dtype)


def _compute_factors(layers: dict[str, Any], initialize: Callable[[Any], None]) -> InitialValues:
    """Return the factors that peft sets in each layer; all weights are restored."""
    values: InitialValues = {}
    for name, layer in layers.items():
        weights = [layer.get_base_layer().weight, layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight]
        before = [weight.data for weight in weights]
        initialize(layer)  # it replaces the tensors
        factors = [weight.data for weight in weights[1:]]
        for weight, tensor in zip(weights, before, strict=True):
            weight.data = tensor
        if not all(bool(factor.isfinite().all()) for factor in factors):
            raise ValueError(f"values of {name.removeprefix('base_model.model.')} are not finite")
        values[f"{name}.lora_A"], values[f"{name}.lora_B"] = (factor.clone().cpu() for factor in factors)
    return values


def _check_ranks(layers: dict[str, Any], kind: str, directions: int) -> None:
    """Check that each matrix is large enough for its rank, which needs ``directions`` directions per rank.

    Raises:
        UnsupportedModelError: a matrix is too small.
    """
    for name, layer in layers.items():
        highest = min(layer.in_features, layer.out_features) // directions
        if layer.r[ADAPTER] > highest:
            raise UnsupportedModelError(
                f"init_lora_weights={kind} allows at most rank {highest} for {name.removeprefix('base_model.model.')} "
                f"({layer.in_features} to {layer.out_features}), which has rank {layer.r[ADAPTER]}; lower method.r, or "
                "remove this layer from method.target_modules"
            )


def _target_base_layers(layers: dict[str, Any], config: LoraConfig) -> LoraConfig:
    """Return a copy of the config whose targets are the frozen matrices inside the LoRA layers, with their ranks."""
    targets = copy.copy(config)
    targets.target_modules = [f"{name}.base_layer" for name in layers]
    targets.exclude_modules = targets.layers_to_transform = targets.layers_pattern = None
    targets.rank_pattern = {f"{name}.base_layer": layer.r[ADAPTER] for name, layer in layers.items()}
    return targets


@contextmanager
def _hooks_without_autocast(layers: Sequence[Any]) -> Iterator[None]:
    """Disable autocast in the hooks that peft registered on the layers: it would round statistics to 16 bits."""
    import torch

    device = layers[0].get_base_layer().weight.device.type
    states: list[bool] = []

    def disable(*_: object) -> None:
        states.append(torch.is_autocast_enabled(device))
        torch.set_autocast_enabled(device, False)

    def restore(*_: object) -> None:
        torch.set_autocast_enabled(device, states.pop())

    modules = [module for layer in layers for module in (layer, layer.get_base_layer())]
    handles = [module.register_forward_hook(disable, prepend=True) for module in modules]
    handles += [module.register_forward_hook(restore) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _explain_errors(kind: str) -> Iterator[None]:
    """Convert an error of peft to one that names the initialization.

    Raises:
        UnsupportedModelError: the code in the context failed in a way that depends on the model or on the examples.
    """
    from safetensors import SafetensorError
    from torch.linalg import LinAlgError  # type: ignore[attr-defined]

    try:
        yield
    except (ValueError, LookupError, ArithmeticError, OSError, SafetensorError, LinAlgError) as error:
        raise UnsupportedModelError(
            f"init_lora_weights={kind} cannot be computed: {first_line(error)}; use init_lora_weights=true"
        ) from error
