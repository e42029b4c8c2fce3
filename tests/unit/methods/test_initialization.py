"""Initial values of LoRA from data: those of peft's own functions, equal outputs, saved adapters, and refusals."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora import EvaConfig
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga

from peftbench.data.collate import Collator, MicroBatch
from peftbench.errors import OutOfRangeError, PeftbenchError, UnknownKeyError, UnsupportedModelError
from peftbench.methods import METHOD_KINDS
from peftbench.methods.initialization import InitializationPass
from peftbench.modeling.loss import build_loss
from peftbench.recipe.loader import parse_recipe
from peftbench.training.trial import try_method
from tests.helpers.models import llama_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from peftbench.methods.base import Method

RECIPE: dict[str, Any] = {"name": "run", "data": {"source": {"kind": "docstrings"}}, "train": {"steps": 1}}
KINDS = ("eva", "corda", "lora_ga")
ARCHITECTURES = ("gpt2_tied", "llama_untied")
"""With Conv1D and with Linear layers."""
LENGTHS = (13, 9, 17, 11, 12, 10)
IDS = torch.arange(1, 13)[None]


def build(kind: str, **keys: Any) -> Method:
    """Return a method of rank 4, with the scale 3."""
    return METHOD_KINDS[kind].model_validate({"r": 4, "lora_alpha": 12} | keys)


def list_documents() -> list[list[int]]:
    """Return documents of different lengths."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(4096, (length,), generator=generator).tolist() for length in LENGTHS]


def build_pass(base: PreTrainedModel, model: Any) -> InitializationPass:
    """Return a pass over the documents; all tokens but the first have a label."""
    documents, loss = list_documents(), build_loss(base, labeled_only=False)[0]

    def collate(indices: Sequence[int]) -> MicroBatch:
        rows = [documents[index] for index in indices]
        return Collator(0).collate(rows, [(1, len(row)) for row in rows])

    def compute_loss(batch: MicroBatch) -> torch.Tensor:
        with loss.attention_context():
            return loss(model, batch)

    return InitializationPass(len(documents), collate, compute_loss)


def initialize(method: Method, base: PreTrainedModel, seed: int = 0) -> Any:
    """Return the model with the method's initial values."""
    model = method.apply(base, None)  # type: ignore[arg-type]
    torch.manual_seed(seed)
    method.set_initial_values(model, method.compute_initial_values(model, build_pass(base, model)))
    return model


def logits_of(model: Any) -> torch.Tensor:
    """Return the logits of a few tokens in evaluation mode."""
    model.eval()
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=IDS).logits
    return logits


def move(model: Any) -> None:
    """Change all trained parameters, as a training does."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)


def initialize_with_peft(kind: str, base: PreTrainedModel) -> Any:
    """Return the model that a user of peft builds, as in peft's examples, without peftbench's loss and batches."""
    keys: dict[str, Any] = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    rows = [torch.tensor(document)[None] for document in list_documents()]
    labels = [torch.cat([torch.full((1, 1), -100), row[:, 1:]], dim=1) for row in rows]
    if kind == "eva":
        model = get_peft_model(base, LoraConfig(**keys, init_lora_weights="eva", eva_config=EvaConfig()))
        batches = [
            {"input_ids": row, "labels": label, "attention_mask": torch.ones_like(row)}
            for row, label in zip(rows, labels, strict=True)
        ]
        initialize_lora_eva_weights(model, batches, show_progress_bar=False)
        return model
    names = [name for name, _ in base.named_modules() if name.rsplit(".", 1)[-1] in _list_targets(base)]
    config = LoraConfig(**keys | {"target_modules": names}, init_lora_weights=kind)  # type: ignore[arg-type]
    if kind == "corda":
        config.corda_config = CordaConfig()

        def run_model() -> None:
            for row in rows:
                base(input_ids=row)

        preprocess_corda(base, config, run_model)
    else:
        config.lora_ga_config = LoraGAConfig()

        def run_steps() -> None:
            for row, label in zip(rows, labels, strict=True):
                base(input_ids=row, labels=label).loss.backward()

        preprocess_loraga(base, config, run_steps)
    return get_peft_model(base, config)


def decompose(matrix: torch.Tensor, q: int, niter: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what torch.svd_lowrank approximates."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left[:, :q], values[:q], right[:q].T


def _list_targets(base: PreTrainedModel) -> set[str]:
    from transformers.pytorch_utils import Conv1D

    head = base.get_output_embeddings()
    linear = (torch.nn.Linear, Conv1D)
    return {
        name.rsplit(".", 1)[-1] for name, one in base.named_modules() if isinstance(one, linear) and one is not head
    }


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", KINDS)
def test_values_are_those_of_peft(
    kind: str, architecture: str, fresh_base: Callable[[str], PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks, factors and frozen matrices equal those of a script that uses peft alone."""
    monkeypatch.setattr(torch, "svd_lowrank", decompose)  # the random one gives other signs in each call
    own = initialize(build(kind), fresh_base(architecture))
    expected = initialize_with_peft(kind, fresh_base(architecture))
    weights, others = own.state_dict(), expected.state_dict()
    assert weights.keys() == others.keys()
    assert any(".lora_A." in name for name in weights)
    for name, tensor in weights.items():
        assert tensor.shape == others[name].shape
        assert (tensor - others[name]).norm() <= 2e-3 * others[name].norm(), name
    assert own.peft_config["default"].rank_pattern == expected.peft_config["default"].rank_pattern
    assert own.peft_config["default"].alpha_pattern == expected.peft_config["default"].alpha_pattern


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_before_the_first_step_are_those_of_the_base(
    kind: str, architecture: str, fresh_base: Callable[[str], PreTrainedModel]
) -> None:
    """The product of the initial factors is subtracted from the frozen matrices."""
    expected = logits_of(fresh_base(architecture))
    model = initialize(build(kind), fresh_base(architecture))
    assert (logits_of(model) - expected).norm() < 1e-5 * expected.norm()
    products = [
        layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        for layer in model.modules()
        if hasattr(layer, "lora_A") and "default" in layer.lora_A
    ]
    assert all(bool(product.any()) == (kind != "eva") for product in products)


@pytest.mark.parametrize("keys", [{}, {"use_rslora": True, "rank_pattern": {"down_proj": 3}}, {"use_dora": True}])
@pytest.mark.parametrize("kind", KINDS)
def test_saved_adapter_fits_the_original_base(
    kind: str, keys: dict[str, Any], fresh_base: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    """Peft alone, peftbench and a merged model give the logits of the trained model."""
    keys = keys | ({"eva_config": {"tau": 0.5}} if kind == "eva" else {})  # it converges early
    method, architecture = build(kind, **keys), "llama_untied"
    model = initialize(method, fresh_base(architecture))
    move(model)
    expected = logits_of(model)
    method.save(model, tmp_path)
    with_peft = logits_of(PeftModel.from_pretrained(fresh_base(architecture), tmp_path))
    assert (with_peft - expected).norm() < 1e-5 * expected.norm()
    loaded = method.apply(fresh_base(architecture), None)  # type: ignore[arg-type]
    method.load(loaded, tmp_path)
    assert torch.equal(logits_of(loaded), expected)
    merged = logits_of(method.merge(loaded))
    assert (merged - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loaded_adapter_has_the_frozen_weights_of_the_training(
    dtype: torch.dtype, fresh_base: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    """Frozen matrices in 16 bits are rounded after the subtraction, and equally when the adapter is loaded."""
    method, bases = build("corda"), [fresh_base("llama_untied") for _ in range(2)]
    for base in bases:
        for layer in base.model.layers:
            layer.to(dtype)
    values = method.compute_initial_values(
        model := method.apply(fresh_base("llama_untied"), None),  # type: ignore[arg-type]
        build_pass(model.get_base_model(), model),  # type: ignore[operator]
    )
    trained, loaded = (method.apply(base, None) for base in bases)  # type: ignore[arg-type]
    method.set_initial_values(trained, values)
    move(trained)
    method.save(trained, tmp_path)
    method.load(loaded, tmp_path)
    others = dict(loaded.named_parameters())
    assert all(torch.equal(tensor, others[name]) for name, tensor in trained.named_parameters())


def test_training_does_not_change_the_stored_values(fresh_base: Callable[[str], PreTrainedModel]) -> None:
    """The saved adapter subtracts them, and a resumed process sets them."""
    model = initialize(build("corda"), fresh_base("gpt2_tied"))
    before = copy.deepcopy(model.initial_values)
    move(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.initial_values.items())


def test_ranks_of_eva_are_distributed_by_rho(fresh_base: Callable[[str], PreTrainedModel]) -> None:
    """With rho=1 every layer has the rank r; with rho=2 ranks differ and keep their sum."""
    ranks = {}
    for rho in (1.0, 2.0):
        model = initialize(build("eva", eva_config={"rho": rho}), fresh_base("gpt2_tied"))
        ranks[rho] = [layer.r["default"] for layer in model.modules() if hasattr(layer, "lora_A")]
    assert set(ranks[1.0]) == {4}
    assert len(set(ranks[2.0])) > 1
    assert sum(ranks[2.0]) == sum(ranks[1.0])


@pytest.mark.parametrize(
    ("method", "error", "message"),
    [
        (
            {"kind": "eva", "eva_config": {"roh": 1.0}},
            UnknownKeyError,
            "did you mean 'method.eva_config.rho'?",
        ),
        ({"kind": "eva", "eva_config": {"rho": 0.5}}, OutOfRangeError, "must be >= 1.0"),
        ({"kind": "corda", "corda_config": {"cache_file": "x"}}, UnknownKeyError, "cache_file"),
        ({"kind": "corda", "corda_config": {"corda_method": "ipn"}}, OutOfRangeError, "ipm"),
        ({"kind": "pissa", "eva_config": {}}, OutOfRangeError, "eva_config has no effect with init_lora_weights=pissa"),
        ({"kind": "loftq", "loftq_config": {"loftq_bits": 4}}, OutOfRangeError, "set model.quantization=nf4"),
        ({"kind": "dora", "init_lora_weights": "lora-ga"}, OutOfRangeError, "did you mean 'lora_ga'?"),
        ({"kind": "dora", "init_lora_weights": "corda2"}, OutOfRangeError, "did you mean 'corda'?"),
    ],
)
def test_mistake_in_a_key_is_one_sentence(method: dict[str, Any], error: type[PeftbenchError], message: str) -> None:
    """The message has what was given, and what is allowed."""
    with pytest.raises(error) as raised:
        parse_recipe(RECIPE | {"method": method})
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("kind", "quantization", "message"),
    [
        ("loftq", None, "model.quantization=null; set it to nf4 or nf4_double"),
        ("loftq", "int8", "model.quantization=int8; set it to nf4 or nf4_double"),
        ("corda", "nf4", "decomposes the matrices of the base model"),
        ("lora_ga", "int8", "decomposes the matrices of the base model"),
        ("pissa", "nf4", "decomposes the matrices of the base model"),
        ("mica", "nf4", "decomposes the matrices of the base model"),
        ("loftq", "nf4", None),
        ("eva", "nf4", None),
    ],
)
def test_quantization_that_does_not_fit_is_refused(kind: str, quantization: str | None, message: str | None) -> None:
    """The error is raised before any weight is loaded."""
    model = {"path": "x", "quantization": quantization}
    recipe = parse_recipe(RECIPE | {"method": {"kind": kind}, "model": model, "train": {"steps": 1}})
    trial = try_method(recipe.method, llama_config())
    if message is None:
        trial.check(recipe)
    else:
        with pytest.raises(OutOfRangeError, match=message):
            trial.check(recipe)


def test_too_few_tokens_are_refused(fresh_base: Callable[[str], PreTrainedModel]) -> None:
    """Without this check, peft would repeat the passes over the examples forever."""
    method = METHOD_KINDS["eva"].model_validate({"r": 40})
    with pytest.raises(OutOfRangeError, match=r"eva needs 80 tokens .* the 6 examples have 66; raise"):
        initialize(method, fresh_base("gpt2_tied"))


def test_components_that_do_not_converge_are_refused(
    fresh_base: Callable[[str], PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Peft itself has no limit on the number of passes."""
    monkeypatch.setattr("peftbench.methods.initialization._MAX_EVA_ROUNDS", 2)
    method = build("eva", eva_config={"tau": 1.0})
    with pytest.raises(UnsupportedModelError, match=r"have not converged after 2 passes over 6 examples"):
        initialize(method, fresh_base("gpt2_tied"))


@pytest.mark.parametrize(
    ("kind", "keys", "message"),
    [
        (
            "lora_ga",
            {"r": 40},
            r"at most rank 32 for transformer.h.0.attn.c_attn \(64 to 192\), which has rank 40",
        ),
        ("corda", {"r": 70}, "allows at most rank 64 for transformer.h.0.attn.c_attn"),
        ("corda", {"target_modules": ("wte",)}, "needs linear layers that share no matrix with the embedding, but"),
        ("eva", {"target_modules": ("c_attn", "wte")}, "needs linear layers that share no matrix with the embedding"),
    ],
)
def test_layers_that_do_not_fit_are_refused(
    kind: str, keys: dict[str, Any], message: str, fresh_base: Callable[[str], PreTrainedModel]
) -> None:
    """The error is one sentence with the reason."""
    with pytest.raises(UnsupportedModelError, match=message):
        initialize(METHOD_KINDS[kind].model_validate(keys), fresh_base("gpt2_tied"))


def test_statistics_are_not_rounded_by_autocast(fresh_base: Callable[[str], PreTrainedModel]) -> None:
    """The hooks of peft run in float32, though the forward pass runs in bf16."""
    method, base = build("corda"), fresh_base("llama_untied")
    model = method.apply(base, None)  # type: ignore[arg-type]
    data, dtypes = build_pass(base, model), []

    def compute_loss(batch: MicroBatch) -> torch.Tensor:
        def record(*_: object) -> None:
            dtypes.append((torch.ones(2, 2) @ torch.ones(2, 2)).dtype)

        layer: Any = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj.base_layer")
        first = next(iter(layer._forward_hooks))
        handle = layer.register_forward_hook(record)
        layer._forward_hooks.move_to_end(handle.id, last=False)
        layer._forward_hooks.move_to_end(first, last=False)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = data.compute_loss(batch)
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
        handle.remove()
        return value

    values = method.compute_initial_values(model, InitializationPass(data.num_examples, data.collate, compute_loss))
    assert dtypes == [torch.float32] * len(LENGTHS)
    assert all(tensor.dtype == torch.float32 for tensor in values.values())
