"""Try a method with the settings of a recipe: a quantized base model or one in 16 bits, and generation."""

from __future__ import annotations

import tempfile
import warnings
from typing import TYPE_CHECKING

import torch

from peftbench.common.dtypes import TORCH_DTYPES, get_autocast_dtype
from peftbench.errors import UnsupportedModelError
from peftbench.methods.small_copy import identify
from peftbench.modeling.frozen_weights import convert_frozen_weights
from peftbench.modeling.loading import load_base_weights, load_config
from peftbench.training.trial import Trial, try_method
from peftbench.training.trial_model import (
    TOLERANCE,
    SmallCopy,
    TrialModel,
    add_noise,
    apply_to_copy,
    build_trial_batch,
    compute_gradients,
    compute_losses,
    differ,
    find_problem,
    initialize_copy,
    use_one_thread,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedConfig, PreTrainedModel

    from peftbench.methods.base import Method
    from peftbench.recipe.schema import Recipe

_PROMPT_LENGTHS, _NEW_TOKENS = (6, 3), 3
_problems: dict[tuple[str, ...], str | None] = {}


def check_method(recipe: Recipe, device: torch.device, *, generates_text: bool) -> None:
    """Try the recipe's method on its architecture and ``device``, and check the recipe's settings, before loading.

    Raises:
        UnsupportedModelError: the method does not work there, or not with these settings.
        ModelError, HubUnreachableError: the model's config cannot be read.
    """
    config = load_config(recipe.model)
    trial = try_recipe(recipe, config)
    if generates_text and recipe.method.needs_trial:
        problem = _find_once(recipe, config, ("generation",), lambda: _check_generation(recipe, config, trial))
        _raise_if_refused(recipe, config, "generation (evaluate.metrics)", "evaluate.metrics=[]", problem)
    precision = recipe.train.resolved_precision
    if recipe.method.needs_trial and precision != "fp32":
        key = (precision, recipe.frozen_dtype, str(recipe.model.quantization), device.type)
        problem = _find_once(recipe, config, key, lambda: _check_precision(recipe, config, device))
        _raise_if_refused(recipe, config, f"train.precision={precision}", "train.precision=fp32", problem)


def try_recipe(recipe: Recipe, config: PreTrainedConfig) -> Trial:
    """Return the answers for the recipe's method and an architecture; check the settings that no device changes.

    Raises:
        UnsupportedModelError: the method does not work on this architecture, or not with these settings.
    """
    method, trial = recipe.method, try_method(recipe.method, config)
    trial.check(recipe)
    if not method.needs_trial:
        return trial
    if (quantization := recipe.model.quantization) is not None:
        problem = _find_once(recipe, config, (quantization,), lambda: _check_quantized(recipe, config, trial))
        setting = f"model.quantization={quantization}"
        _raise_if_refused(recipe, config, setting, "model.quantization=null", problem)
    return trial


def _raise_if_refused(recipe: Recipe, config: PreTrainedConfig, setting: str, other: str, problem: str | None) -> None:
    if problem is not None:
        raise UnsupportedModelError(
            f"{setting} does not work with method.kind={recipe.method.kind} on {config.model_type}: {problem}; set "
            f"{other}, or use method.kind=lora"
        )


def _find_once(
    recipe: Recipe, config: PreTrainedConfig, key: tuple[str, ...], check: Callable[[], str | None]
) -> str | None:
    """Return the reason that a check gives; it is made once in a process for a method, an architecture and a key."""
    full_key = (*key, recipe.method.model_dump_json(), identify(config))
    if full_key not in _problems:
        with torch.random.fork_rng(), warnings.catch_warnings(), use_one_thread():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            _problems[full_key] = find_problem(check)
    return _problems[full_key]


def _check_precision(recipe: Recipe, config: PreTrainedConfig, device: torch.device) -> str | None:
    """Compute gradients on a copy of the base model as the recipe holds it, in the recipe's precision."""
    method, dtype = recipe.method.reduce_for_trial(), get_autocast_dtype(recipe.train.resolved_precision)
    base = _build_base(recipe, method, config, dtype or torch.float32)
    subject = apply_to_copy(base, method)
    convert_frozen_weights(base, TORCH_DTYPES[recipe.frozen_dtype])
    subject.model.to(device)
    gradients = compute_gradients(subject, build_trial_batch(base, method).to(device), dtype)
    return None if all(bool(one.isfinite().all()) for one in gradients) else "gradients are not finite"


def _check_quantized(recipe: Recipe, config: PreTrainedConfig, trial: Trial) -> str | None:
    """Check that an adapted quantized copy starts from the copy's own losses, and that training changes them."""
    method = recipe.method.reduce_for_trial()
    base = _build_base(recipe, method, config, torch.float32)
    before = compute_losses(TrialModel(base, base, method), build_trial_batch(base, method, virtual=False))
    subject = apply_to_copy(base, method)
    reads_weights = method.initialization is not None and method.initialization.weights
    if not reads_weights:  # of the model's files, which a copy does not have
        initialize_copy(subject)
    batch = build_trial_batch(base, method)
    start = compute_losses(subject, batch)
    if not trial.changes_start and differ(before, start):
        return "the losses before the first step are not those of the base model"
    trained = {name: parameter for name, parameter in subject.model.named_parameters() if parameter.requires_grad}
    if len(compute_gradients(subject, batch)) < len(trained):
        return "the loss does not depend on every trained parameter"
    add_noise(trained)
    effect = float((compute_losses(subject, batch) - start).norm())
    return None if effect > TOLERANCE * float(start.norm()) else "new values of its parameters give the same losses"


def _check_generation(recipe: Recipe, config: PreTrainedConfig, trial: Trial) -> str | None:
    """Compare the tokens that follow two left-padded prompts with those that follow each prompt alone."""
    method = recipe.method.reduce_for_trial()
    subject = apply_to_copy(SmallCopy(config, method.resolve_targets(config).copy_size).build(), method)  # type: ignore[attr-defined]
    add_noise({name: one for name, one in subject.model.named_parameters() if one.requires_grad})
    subject.model.eval()
    longest = max(_PROMPT_LENGTHS)
    ids = (
        torch.arange(longest * len(_PROMPT_LENGTHS)).view(len(_PROMPT_LENGTHS), longest)
        * 7
        % int(subject.base.config.vocab_size)
    )
    mask = torch.stack([(torch.arange(longest) >= longest - length).long() for length in _PROMPT_LENGTHS])
    together = _generate(subject, ids, mask)
    alone = [
        _generate(subject, ids[row : row + 1, longest - length :], mask[row : row + 1, longest - length :])
        for row, length in enumerate(_PROMPT_LENGTHS)
    ]
    if trial.batching_problem is None and not torch.equal(together, torch.cat(alone)):
        return "the text that follows a prompt depends on the other prompts of its batch"
    return None


def _generate(subject: TrialModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the next tokens of left-padded prompts (rows, tokens)."""
    with torch.no_grad():
        return subject.method.generate(
            subject.model,
            ids,
            mask,
            max_new_tokens=_NEW_TOKENS,
            min_new_tokens=_NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )


def _build_base(
    recipe: Recipe, method: Method, config: PreTrainedConfig, compute_dtype: torch.dtype
) -> PreTrainedModel:
    """Return a small copy of the base model, quantized as the recipe requests, by the code that loads a real one."""
    copy = SmallCopy(config, method.resolve_targets(config).copy_size).build()  # type: ignore[attr-defined]
    if recipe.model.quantization is None:
        return copy
    attention = copy.config._attn_implementation
    with tempfile.TemporaryDirectory() as folder:
        copy.save_pretrained(folder)
        values = {"path": folder, "tokenizer": None, "revision": None, "init": "pretrained", "attention": attention}
        model_config = recipe.model.model_copy(update=values)
        return load_base_weights(model_config, load_config(model_config), compute_dtype, torch.float32)
