"""Every type of peft with quantized base models, with base models in 16 bits, and in generation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from peftbench.errors import UnsupportedModelError
from peftbench.methods.base import Method
from peftbench.recipe.loader import parse_recipe
from peftbench.training.recipe_trial import check_method
from tests.helpers.peft_types import ALL_TYPES, FAMILIES, build_method

NO_4BIT = {"ADAMSS", "DEFT", "DELORA", "FROD", "GLORA", "HRA", "LOHA", "LOKR", "OSF", "PEANUT", "PSOFT"} | {
    "SUPERTUNING",
    "TINYLORA",
    "UNILORA",
}
"""Types that read the matrix that they adapt; UNILORA ignores a quantized layer without an error."""
NO_8BIT = (NO_4BIT - {"LOHA", "LOKR", "PEANUT"}) | {"SHIRA"}
REFUSED = {"nf4": NO_4BIT, "int8": NO_8BIT, "bf16": set[str](), "fp16": {"DELORA"}}
"""By base model: the types that do not work. DELORA divides by norms, which gives NaN under autocast to fp16."""
RECIPE = {"name": "run", "method": {"kind": "lora"}, "data": {"source": {"kind": "docstrings"}}, "train": {"steps": 9}}
FAST = {("IA3", "nf4"), ("UNILORA", "nf4"), ("SHIRA", "int8"), ("DELORA", "fp16"), ("PREFIX_TUNING", "bf16")}


@pytest.mark.parametrize(
    ("name", "base"),
    [
        pytest.param(name, base, marks=() if (name, base) in FAST else pytest.mark.slow)
        for name in ALL_TYPES
        for base in REFUSED
    ],
)
def test_base_model_of_a_recipe_is_tried(name: str, base: str, tmp_path: Path) -> None:
    """A type that does not work is refused with the setting; all others start from the losses of the base and train.

    The text that follows a prompt is the same next to a longer prompt, for every type.
    """
    is_quantized = base in {"nf4", "int8"}
    FAMILIES["llama"]().save_pretrained(tmp_path)
    model: dict[str, Any] = {"path": str(tmp_path)} | ({"quantization": base, "dtype": "fp32"} if is_quantized else {})
    train = RECIPE["train"] | {"precision": "fp32" if is_quantized else base}  # type: ignore[operator]
    recipe = parse_recipe(RECIPE | {"model": model, "train": train})
    recipe = recipe.model_copy(update={"method": build_method(name)})
    if name not in REFUSED[base]:
        check_method(recipe, torch.device("cpu"), generates_text=True)
        return
    setting, other = ("model.quantization", "null") if is_quantized else ("train.precision", "fp32")
    expected = rf"{setting}={base} does not work with method\.kind=\w+ on llama: .+; set {setting}={other}, or use"
    with pytest.raises(UnsupportedModelError, match=expected):
        check_method(recipe, torch.device("cpu"), generates_text=True)


def test_generation_that_ignores_padding_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text after a prompt then depends on a longer prompt of its batch."""
    generate = Method.generate

    def ignore_mask(method: Method, model: nn.Module, ids: torch.Tensor, mask: torch.Tensor, **options: Any) -> Any:
        return generate(method, model, ids, torch.ones_like(mask), **options)

    monkeypatch.setattr(Method, "generate", ignore_mask)
    monkeypatch.setattr("peftbench.training.recipe_trial._problems", {})
    FAMILIES["llama"]().save_pretrained(tmp_path)
    recipe = parse_recipe(RECIPE | {"model": {"path": str(tmp_path)}, "train": {"steps": 9, "precision": "fp32"}})
    recipe = recipe.model_copy(update={"method": build_method("IA3")})
    check_method(recipe, torch.device("cpu"), generates_text=False)
    with pytest.raises(UnsupportedModelError, match=r"generation .* depends on the other prompts .*metrics=\[\]"):
        check_method(recipe, torch.device("cpu"), generates_text=True)
