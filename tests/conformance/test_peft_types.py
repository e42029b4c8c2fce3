"""Every type of peft on five families: the answers of its trial, the memory plan, and the refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
from peft import PeftType
from transformers import PreTrainedTokenizerBase

from peftbench.data.sources import Files
from peftbench.errors import OutOfRangeError, UnsupportedModelError
from peftbench.methods import METHOD_KINDS
from peftbench.methods.peft_kinds import REFUSED_TYPES, TYPES
from peftbench.methods.small_copy import build_small_copy
from peftbench.recipe.loader import parse_recipe
from peftbench.training.trial import try_method
from tests.helpers.architecture_plans import EXACT, UNPLANNED, compare_run_and_plan, write_tiny_config
from tests.helpers.peft_types import ALL_TYPES, FAMILIES, LINEAR_FAMILIES, build_method
from tests.helpers.workshop import Workshop

PROMPTS = {"CARTRIDGE", "P_TUNING", "PREFIX_TUNING", "PROMPT_TUNING"}
PREFIXES = {"CARTRIDGE", "PREFIX_TUNING"}
CHANGES_START = {"C3A", "FOURIERFT", "UNILORA", "VBLORA"} | PROMPTS
"""Types whose initial values change the outputs before the first step."""
DEPENDS_ON_BATCH = {"LILY"}
"""Types whose routers average over all tokens of a batch."""
NOT_MERGED = {"ADAPTION_PROMPT", "BEFT", "LILY"} | PROMPTS
"""Types that cannot be merged into weights; BEFT can be merged only if the base has biases."""
NOT_PLANNED = {"ADAMSS", "BOFT", "FROD", "OSF", "PSOFT", "SHIRA", "TINYLORA", "VBLORA", "WAVEFT"}
"""Types whose shapes depend on values of weights or parameters, or that decompose weights or solve linear systems."""
COUNTED = PREFIXES | {
    "ADAPTION_PROMPT",
    "C3A",
    "GRALORA",
    "HRA",
    "LILY",
    "LOHA",
    "OFT",
    "OSF",
    "PEANUT",
    "P_TUNING",
    "RANDLORA",
    "TINYLORA",
}
"""Types whose FLOPs have no closed form: products that do not scale with positions, or backward passes of their own."""
UNCOUNTED = {"BOFT", "FROD", "PSOFT", "WAVEFT"}
"""Types with products that torch's counter does not count: solvers, sparse products, transposed convolutions."""
REFUSED = {(kind, family) for kind in ("ADAPTION_PROMPT",) for family in ("qwen3", "gemma3", "gpt_neox")}
"""Types and families that peft refuses."""
FAST = {
    ("ADALORA", "gpt2"),
    ("IA3", "llama"),
    ("LILY", "qwen3"),
    ("OSF", "gpt2"),
    ("P_TUNING", "gpt_neox"),
    ("PREFIX_TUNING", "llama"),
    ("VERA", "gemma3"),
    ("ADAPTION_PROMPT", "qwen3"),
}
FAST_INITS = {("eva", "gemma3"), ("corda", "gpt2"), ("lora_ga", "gpt_neox"), ("loftq", "qwen3")}
POINTS = [
    pytest.param(name, family, marks=() if (name, family) in FAST else pytest.mark.slow)
    for name in ALL_TYPES
    for family in FAMILIES
]


RECIPE = {"name": "run", "data": {"source": {"kind": "docstrings"}}, "train": {"steps": 1}}


def test_every_type_of_peft_is_supported_or_refused() -> None:
    """A new type of peft needs a row."""
    assert {kind.value for kind in PeftType} == TYPES | set(REFUSED_TYPES)
    assert not TYPES & set(REFUSED_TYPES)
    assert len(TYPES) == 40
    assert {family for _, family in FAST} == set(FAMILIES)


def test_numbers_of_types_that_pass() -> None:
    """On the families with Linear layers, 39 types pass everything but the plan; 31 plans are exact on Llama."""
    passing = {name for name in ALL_TYPES if not any((name, family) in REFUSED for family in LINEAR_FAMILIES)}
    assert len(passing) == 39
    assert len(set(ALL_TYPES) - NOT_PLANNED) == 31


@pytest.mark.parametrize(("name", "family"), POINTS)
def test_trial_finds_what_a_type_does(name: str, family: str) -> None:
    """Every type trains parameters and is saved exactly; the tables above list all exceptions."""
    method, config = build_method(name), FAMILIES[family]()
    if (name, family) in REFUSED:
        with pytest.raises(UnsupportedModelError, match=rf"method.kind=\w+ cannot be applied to {config.model_type}"):
            try_method(method, config)
        return
    trial = try_method(method, config)
    assert trial.trainable_parameters > 0
    assert trial.added_parameters >= 0
    assert trial.saving_problem is None
    assert bool(trial.batching_problem) == (name in DEPENDS_ON_BATCH), trial.batching_problem
    assert bool(trial.packing_problem) == (name in PREFIXES and family != "gemma3")
    assert bool(trial.checkpointing_problem) == (name in PREFIXES), trial.checkpointing_problem
    has_biases = family in {"gpt2", "gpt_neox"}
    assert bool(trial.merging_problem) == (name in NOT_MERGED and not (name == "BEFT" and has_biases))
    assert trial.changes_start <= (name in CHANGES_START)
    is_counted = name in COUNTED | UNCOUNTED or (name == "GLORA" and has_biases)
    assert bool(trial.flops_problem) == is_counted, trial.flops_problem
    assert trial.flops_are_counted == (name not in UNCOUNTED)
    assert bool(trial.meta_problem) <= (name in NOT_PLANNED), trial.meta_problem


@pytest.mark.parametrize(
    ("kind", "family"),
    [
        pytest.param(kind, family, marks=() if (kind, family) in FAST_INITS else pytest.mark.slow)
        for kind in ("eva", "corda", "lora_ga", "loftq")
        for family in FAMILIES
    ],
)
def test_trial_of_a_computed_initialization(kind: str, family: str) -> None:
    """The initial outputs equal those of the base model, every check passes, and only the plan is refused."""
    trial = try_method(METHOD_KINDS[kind].model_validate({}), FAMILIES[family]())
    problems = (trial.batching_problem, trial.packing_problem, trial.checkpointing_problem, trial.flops_problem)
    assert problems == (None,) * 4
    assert (trial.merging_problem, trial.saving_problem) == (None, None)
    assert not trial.changes_start
    assert trial.meta_problem is not None


@pytest.mark.parametrize(
    "name",
    [name if name in {"ADALORA", "IA3", "SHIRA"} else pytest.param(name, marks=pytest.mark.slow) for name in ALL_TYPES],
)
def test_plan_equals_the_run_or_is_refused(
    name: str, workshop: Workshop, sources: dict[str, Files], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """The live bytes of a step are equal, or the estimate is refused with the reason."""
    folder = write_tiny_config("llama", tmp_path / "base", tokenizer)
    outcome, reason = compare_run_and_plan(workshop, sources["max_length"], folder, build_method(name))
    assert outcome == (UNPLANNED if name in NOT_PLANNED else EXACT), reason
    if outcome == UNPLANNED:
        assert "without" in reason


def test_method_that_trains_nothing_is_refused() -> None:
    """Target modules that match nothing are an error."""
    with pytest.raises(UnsupportedModelError, match=r"method\.kind=ia3 cannot be applied to llama"):
        try_method(build_method("IA3", target_modules=("nothing",), feedforward_modules=()), FAMILIES["llama"]())


def test_osf_trains_conv1d_layers_as_linear_layers() -> None:
    """OSF of peft accepts Conv1D layers but trains nothing in them; here they are replaced first."""
    method, base = build_method("OSF"), build_small_copy(FAMILIES["gpt2"]())
    assert method.resolve_targets(base.config).needs_linear  # type: ignore[attr-defined]
    assert try_method(method, base.config).trainable_parameters > 10_000


@pytest.mark.parametrize("name", sorted(REFUSED_TYPES))
def test_type_that_cannot_start_is_refused(name: str) -> None:
    """The message contains the reason."""
    with pytest.raises(OutOfRangeError, match=f"type={name} is not supported, since "):
        parse_recipe(RECIPE | {"method": {"kind": "peft", "type": name}})
