"""The model card of an exported model, made from the run's record."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peftbench.common.units import format_bytes, format_duration
from peftbench.export.privacy import get_last_name, hide_folders_in_text, iter_texts
from peftbench.record import RunRecord, train_peak_bytes
from peftbench.report.reproduce import build_checkout_command, build_launch_commands
from peftbench.report.text.formatting import format_decimal, round_outward

if TYPE_CHECKING:
    from peftbench.export.base_reference import BaseReference
    from peftbench.export.comparison import LogitComparison

CARD_FILE = "README.md"
EXPORTED_RECIPE_FILE = "recipe.yaml"
PLACEHOLDER_PROMPT = "Write your prompt here."
_PROJECT = "peftbench"
_CONV1D_IMPORTS = ["from torch import nn", "from transformers.pytorch_utils import Conv1D"]
_CONV1D_CODE = [
    "for name, layer in list(base.named_modules()):  # the adapter needs Linear layers",
    "    if isinstance(layer, Conv1D):",
    "        linear = nn.Linear(*layer.weight.shape, dtype=layer.weight.dtype)",
    "        linear.weight.data, linear.bias.data = layer.weight.data.T.contiguous(), layer.bias.data",
    "        base.set_submodule(name, linear)",
]
"""Code that replaces the Conv1D layers of ``base`` by Linear layers."""


@dataclass(frozen=True)
class ExportedModel:
    """An exported model, as its card describes it."""

    record: RunRecord
    base: BaseReference
    name: str
    """Name on the Hub, or of the folder."""
    is_adapter: bool
    has_chat_template: bool
    comparison: LogitComparison | None
    """Check of merged weights; None for a copy of the saved model."""


def build_card(exported: ExportedModel) -> str:
    """Return the text of the card, with its metadata as YAML."""
    parts = [
        f"# {exported.name.rpartition('/')[2]}",
        _describe_training(exported),
        "## How to load it\n\n```python\n" + build_loading_code(exported) + "\n```",
        "## Training data\n\n" + _list(_iter_data(exported.record)),
        "## Quality\n\n" + _describe_quality(exported.record),
        "## Memory and time\n\n" + _list(_iter_costs(exported.record)),
        "## Reproduce\n\n" + _describe_reproduction(exported.record),
        "## Limits\n\n" + _list(_iter_limits(exported)),
    ]
    known = [*iter_texts(exported.record.recipe)]
    body = hide_folders_in_text("\n\n".join(parts), known)
    return f"---\n{_build_metadata(exported)}\n---\n{body}\n"


def build_loading_code(exported: ExportedModel) -> str:
    """Return Python code that loads the model and generates text."""
    if not exported.is_adapter:
        prompt = (
            '[{"role": "user", "content": "' + PLACEHOLDER_PROMPT + '"}]'
            if exported.has_chat_template
            else f'"{PLACEHOLDER_PROMPT}"'
        )
        return "\n".join(
            [
                "from transformers import pipeline",
                "",
                f'generate = pipeline("text-generation", model="{exported.name}")',
                f"prompt = {prompt}",
                'print(generate(prompt, max_new_tokens=64)[0]["generated_text"])',
            ]
        )
    lines = ["from peft import PeftModel", *exported.base.imports]
    needs_linear_layers = exported.record.saved_model is not None and exported.record.saved_model.needs_linear_layers
    imports = _CONV1D_IMPORTS if needs_linear_layers else []
    lines += ["from transformers import AutoModelForCausalLM, AutoTokenizer", *imports]
    lines += ["", f"base = {exported.base.load_code}"]
    lines += _CONV1D_CODE if needs_linear_layers else []
    lines += [f'model = PeftModel.from_pretrained(base, "{exported.name}")']
    lines += [f'tokenizer = AutoTokenizer.from_pretrained("{exported.name}")']
    if exported.has_chat_template:
        lines += [
            f'messages = [{{"role": "user", "content": "{PLACEHOLDER_PROMPT}"}}]',
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
            ")",
        ]
    else:
        lines += [f'inputs = tokenizer("{PLACEHOLDER_PROMPT}", return_tensors="pt")']
    return "\n".join([*lines, "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))"])


def _build_metadata(exported: ExportedModel) -> str:
    from huggingface_hub import ModelCardData

    record = exported.record
    source = record.recipe["data"].get("source", {})
    is_hub = source.get("kind") == "hub" and not str(source.get("path", "")).startswith(("/", "~", "."))
    scores = list(record.quality.metrics) if record.quality else []
    data = ModelCardData(
        base_model=exported.base.hub_name,
        library_name="peft" if exported.is_adapter else "transformers",
        pipeline_tag="text-generation",
        license=exported.base.license or "unknown",
        datasets=[str(source["path"])] if is_hub else None,
        metrics=scores or None,
        tags=[_PROJECT, str(record.recipe["method"]["kind"])],
    )
    return str(data.to_yaml())


def _describe_training(exported: ExportedModel) -> str:
    record, base = exported.record, exported.base
    method = record.recipe["method"]
    origin = f"`{base.title}`" + (f" on the Hub ({record.model_fingerprint})" if base.hub_name else "")
    runs = f", after the runs {', '.join(reversed(base.runs))}" if base.runs else ""
    form = "the adapter" if exported.is_adapter else "the whole model"
    sentence = f"{origin}{runs}, trained with the method `{method['kind']}` of {_PROJECT}. This is {form}."
    options = ", ".join(f"{key}={value}" for key, value in method.items() if key != "kind")
    details = [f"options of the method: {options}"] if options else []
    if record.parameters is not None:
        share = record.parameters.trainable / record.parameters.total
        details.append(f"trained parameters: {record.parameters.trainable:,} ({share:.2%} of the model)")
    details.append(f"steps: {record.steps:,}, {record.recipe['train']['global_batch_size']} examples each")
    if exported.comparison is not None:
        details.append(f"check of the written weights: {exported.comparison.describe()}")
    return f"{sentence}\n\n{_list(iter(details))}"


def _iter_data(record: RunRecord) -> Iterator[str]:
    data = record.recipe["data"]
    source = data.get("source", {})
    values = {key: value for key, value in source.items() if key not in {"kind", "id"} and value is not None}
    names = ", ".join(f"{key}={_name_values(value)}" for key, value in values.items())
    yield f"source: {source.get('kind', 'unknown')}" + (f" ({names})" if names else "")
    if (task := record.recipe.get("task")) is not None:
        yield f"task: {task['kind']}"
    yield from (f"{split}: {count:,} examples" for split, count in record.num_examples.items())
    yield f"fingerprint of the data: `{record.data_fingerprint}`"
    if record.split_overlap is not None and record.split_overlap.texts:
        yield f"evaluated examples that are also training examples: {record.split_overlap.texts:,}"


def _name_values(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(_name_values(item) for item in value)
    text = str(value)
    return get_last_name(text) or text


def _describe_quality(record: RunRecord) -> str:
    quality = record.quality
    if quality is None:
        return "The model was not evaluated."
    overlap = record.split_overlap
    is_separate = overlap is not None and not overlap.texts and not overlap.ids
    lines = [
        f"On {quality.num_examples:,} examples of the {quality.split} split"
        + (", none of which the training used" if is_separate else "")
        + ". Intervals are 95 % bootstrap intervals over examples.",
        "",
        "| metric | value | interval |",
        "| --- | --- | --- |",
    ]
    if quality.loss is not None:
        lines.append(f"| held-out loss (nats per token) | {quality.loss:.4f} | |")
    if quality.perplexity is not None:
        lines.append(f"| perplexity | {quality.perplexity:.2f} | |")
    for score in quality.metrics.values():
        interval, definition = score.interval, score.definition
        low, high = round_outward(interval, definition.digits)
        lines.append(
            f"| {definition.axis_title} | {format_decimal(interval.mean, definition.digits)} | {low} to {high} |"
        )
    return "\n".join(lines)


def _iter_costs(record: RunRecord) -> Iterator[str]:
    device = record.device
    yield f"device: {device.name or device.type}, {device.num_processes} process{'es' * (device.num_processes > 1)}"
    yield f"precision: {record.recipe['train']['precision']}"
    if (peak := train_peak_bytes(record)) is not None:
        yield f"peak memory of the training: {format_bytes(peak)}"
    if record.train_seconds is not None:
        duration = format_duration(record.train_seconds)
        omitted = f", without its first {record.untimed_steps} steps" if record.untimed_steps else ""
        yield f"time of the training{omitted}: {duration}"
    if record.throughput is not None:
        yield f"speed: {record.throughput.tokens_per_second.real:,.0f} tokens per second"
    if record.energy_joules is not None:
        yield f"energy: {record.energy_joules:,.0f} J"
    versions = (f"{name} {version}" for name, version in record.library_versions.items())
    yield f"libraries: {', '.join(versions)}"


def _describe_reproduction(record: RunRecord) -> str:
    commands = [] if record.git_commit is None else [build_checkout_command(record.git_commit)]
    commands += ["pip install -c constraints.txt -e .", *build_launch_commands(record, [EXPORTED_RECIPE_FILE])]
    listed = "\n".join(commands)
    return (
        f"`{EXPORTED_RECIPE_FILE}` is the complete recipe. It names local files without their folders. In a checkout "
        f"of {_PROJECT}, with the recipe and those files:\n\n```sh\n{listed}\n```"
    )


def _iter_limits(exported: ExportedModel) -> Iterator[str]:
    record = exported.record
    if exported.base.license is None:
        yield "The license of the base model applies. It was not known when this card was written."
    yield "The quality above holds for this data set only. The model was not tested for safety, bias or other uses."
    yield "The limits of the base model apply."
    if exported.comparison is not None and exported.comparison.warning is not None:
        yield exported.comparison.warning
    yield from record.notes


def _list(lines: Iterator[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
