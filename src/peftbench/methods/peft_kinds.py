"""Kinds of peft's methods: every type that starts from a base model, by its own name and by ``kind: peft``.

A kind is a row of a table here; its section is built when a recipe names it, since importing peft takes seconds.
"""

from __future__ import annotations

import builtins
import functools
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple, Self, cast

from pydantic import BeforeValidator, Field, create_model
from pydantic.fields import FieldInfo

from peftbench.errors import did_you_mean
from peftbench.methods.base import Method

_BOARD = "method_comparison/MetaMathQA of peft, Llama-3.2-3B"


class Preset(NamedTuple):
    """A kind: its type in peft, the learning rates that its source reports, and defaults that differ from peft's."""

    peft_type: str
    learning_rates: tuple[float, float] | None = None
    """Lowest and highest learning rate that the source reports; None without a source."""
    source: str = ""
    defaults: Mapping[str, Any] = {}


def _lora(rates: tuple[float, float], source: str, **defaults: Any) -> Preset:
    """Return a variant of LoRA; rank, scale and targets are those of ``lora``."""
    return Preset("LORA", rates, source, {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"} | defaults)


PRESETS: dict[str, Preset] = {
    "adalora": Preset("ADALORA", (1e-4, 2.2e-3), f"{_BOARD}; Zhang et al. 2023, arXiv:2303.10512"),
    "adamss": Preset("ADAMSS", (1e-4, 1e-4), _BOARD),
    "adaption_prompt": Preset("ADAPTION_PROMPT", (5e-4, 5e-3), _BOARD, {"adapter_len": 10, "adapter_layers": 2}),
    "beft": Preset("BEFT", (1e-4, 1e-4), _BOARD),
    "boft": Preset("BOFT", (1e-4, 1e-4), _BOARD),
    "c3a": Preset("C3A", (0.3, 0.3), _BOARD),
    "cartridge": Preset("CARTRIDGE"),
    "corda": _lora(
        (2e-5, 2e-5), "Yang et al. 2024, arXiv:2406.05223, their example in peft", init_lora_weights="corda"
    ),
    "deft": Preset("DEFT", (1e-4, 1e-4), _BOARD),
    "delora": Preset("DELORA", (1e-3, 1e-3), _BOARD),
    "dora": _lora((1e-4, 2e-4), f"{_BOARD}; Liu et al. 2024, arXiv:2402.09353", use_dora=True),
    "eva": _lora(
        (1e-4, 5e-4),
        f"LoRA in {_BOARD}; the example in peft of Paischer et al. 2024, arXiv:2410.07170, with lora_alpha 1",
        init_lora_weights="eva",
    ),
    "fourierft": Preset("FOURIERFT", (1e-4, 1e-4), f"{_BOARD}, where this method learned nothing"),
    "frod": Preset("FROD", (1e-4, 1e-3), _BOARD),
    "glora": Preset("GLORA", (1e-4, 5e-4), _BOARD),
    "gralora": Preset("GRALORA", (2e-4, 2e-4), _BOARD),
    "hira": Preset("HIRA", (4.5e-3, 4.5e-3), _BOARD),
    "hra": Preset("HRA"),
    "ia3": Preset("IA3", (1e-4, 5e-3), f"{_BOARD}; Liu et al. 2022, arXiv:2205.05638"),
    "lily": Preset("LILY", (1e-4, 1e-4), _BOARD),
    "ln_tuning": Preset("LN_TUNING", (1e-4, 1e-4), f"{_BOARD}, where this method learned nothing"),
    "loha": Preset("LOHA", (1e-4, 1e-4), _BOARD),
    "loftq": _lora((3e-4, 5e-4), "Li et al. 2023, arXiv:2310.08659, their scripts", init_lora_weights="loftq"),
    "lokr": Preset("LOKR", (3e-3, 3e-3), _BOARD),
    "lora_ga": _lora((2e-5, 2e-5), "Wang et al. 2024, arXiv:2407.05000, their script", init_lora_weights="lora_ga"),
    "mica": _lora((1e-4, 1e-4), _BOARD, init_lora_weights="mica"),
    "miss": Preset("MISS", (1e-4, 1e-4), _BOARD),
    "oft": Preset("OFT", (1e-4, 1e-4), _BOARD),
    "olora": _lora((1e-4, 1e-4), f"LoRA in {_BOARD}", init_lora_weights="olora"),
    "orthogonal": _lora((1e-4, 1e-4), f"LoRA in {_BOARD}", init_lora_weights="orthogonal"),
    "osf": Preset("OSF", (5e-5, 5e-5), _BOARD),
    "p_tuning": Preset("P_TUNING", (1e-4, 1e-4), _BOARD),
    "peanut": Preset("PEANUT", (1e-4, 1e-4), _BOARD),
    "pissa": _lora((2e-5, 2e-5), "Meng et al. 2024, arXiv:2404.02948", init_lora_weights="pissa"),
    "prefix_tuning": Preset("PREFIX_TUNING", (1e-3, 5e-3), _BOARD),
    "psoft": Preset("PSOFT", (1e-4, 1e-4), _BOARD),
    "pvera": Preset("PVERA", (3e-3, 3e-3), _BOARD),
    "randlora": Preset("RANDLORA", (1e-4, 1e-4), _BOARD),
    "road": Preset("ROAD", (1e-3, 1e-3), _BOARD),
    "rslora": _lora((1e-4, 1e-4), _BOARD, use_rslora=True),
    "shira": Preset("SHIRA", (3e-4, 3e-4), _BOARD),
    "supertuning": Preset("SUPERTUNING"),
    "tinylora": Preset("TINYLORA", (1e-3, 1e-3), _BOARD),
    "trainable_tokens": Preset("TRAINABLE_TOKENS", (0.2, 0.2), _BOARD),
    "unilora": Preset("UNILORA", (1e-4, 1e-4), f"{_BOARD}, where this method learned nothing"),
    "vblora": Preset("VBLORA", (1e-4, 1e-4), _BOARD),
    "vera": Preset("VERA", (1e-3, 4e-3), f"{_BOARD}; Kopiczko et al. 2023, arXiv:2310.11454"),
    "waveft": Preset("WAVEFT", (1e-4, 1e-4), _BOARD),
}
"""Kinds other than ``lora`` and ``prompt_tuning``, which have classes of their own."""
LORA_KINDS = (
    "lora",
    *(kind for kind, preset in PRESETS.items() if preset.peft_type == "LORA" and kind != "mica"),
)
"""Kinds that train the matrix B of LoRA; MiCA trains A alone."""
TYPES = frozenset(preset.peft_type for preset in PRESETS.values()) | {"LORA", "PROMPT_TUNING"}
"""Types of peft that start from a base model."""
REFUSED_TYPES: Mapping[str, str] = {
    "CPT": "its token ids and masks are tied to one prompt",
    "MULTITASK_PROMPT_TUNING": "it needs the task of each example",
    "POLY": "it needs the task of each example",
    "SHADOW": "it needs a loss of its own for some of its parameters",
    "XLORA": "it mixes adapters that are already trained",
}
"""Types that need more than a base model and examples, and the reason."""


class PeftByType(Method):
    """A method of peft, named by its type; the other keys are those of peft's config class."""

    kind: Literal["peft"] = "peft"
    """Kind of method."""
    type: str
    """Type of peft, e.g. IA3."""

    @classmethod
    def select_section(cls, values: Mapping[str, Any]) -> builtins.type[Self]:
        """Return the section of the type that ``values`` contains.

        Raises:
            ValueError: peft has no such type, or it cannot start from a base model alone.
        """
        name = values.get("type")
        if not isinstance(name, str):
            return cls
        peft_type = name.upper()
        if peft_type in REFUSED_TYPES:
            raise ValueError(f"type={name} is not supported, since {REFUSED_TYPES[peft_type]}")
        if peft_type not in TYPES:
            raise ValueError(f"type={name} is not a type of peft; {did_you_mean(peft_type, sorted(TYPES))}")
        return cast("builtins.type[Self]", _build_section("peft", peft_type))


def build_preset(kind: str) -> type[Method]:
    """Return the section of a kind of ``PRESETS``."""
    return _build_section(kind, PRESETS[kind].peft_type)


@functools.cache
def _build_section(kind: str, peft_type: str) -> type[Method]:
    """Return the section of a type: the fields of its config class are its keys."""
    from peftbench.methods.peft_adalora import PeftAdaLora
    from peftbench.methods.peft_lora import PeftLora
    from peftbench.methods.peft_method import PeftMethod
    from peftbench.methods.peft_prompts import PeftPrefix, PeftSoftTokens
    from peftbench.methods.peft_sections import INIT_CLASSES, build_fields, build_init_section

    preset = PRESETS.get(kind, Preset(peft_type))
    bases: dict[str, type[PeftMethod]] = {
        "ADALORA": PeftAdaLora,
        "LORA": PeftLora,
        "CARTRIDGE": PeftPrefix,
        "P_TUNING": PeftSoftTokens,
        "PREFIX_TUNING": PeftPrefix,
        "PROMPT_TUNING": PeftSoftTokens,
    }
    base: type[PeftMethod] = bases.get(peft_type, PeftMethod)
    fields = {name: field for name, field in build_fields(peft_type).items() if name not in base.hidden_fields}
    keys: dict[str, Any] = {"kind": (Literal[kind], Field(default=kind, description="Kind of method."))}
    if kind == "peft":
        upper = BeforeValidator(lambda value: value.upper() if isinstance(value, str) else value)
        keys["type"] = (
            Annotated[Literal[peft_type], upper],
            Field(default=peft_type, description="Type of peft."),
        )
    init_key = f"{preset.defaults.get('init_lora_weights')}_config"
    for name, (annotation, field) in fields.items():
        changes = dict(base.field_changes.get(name, {}))
        if name in preset.defaults:
            changes["default"] = preset.defaults[name]
        if name == init_key and name in INIT_CLASSES:
            changes["default"] = build_init_section(name)()
        keys[name] = (annotation, FieldInfo.merge_field_infos(field, Field(**changes)) if changes else field)
    section = create_model(f"{peft_type.title().replace('_', '')}Section", __base__=base, __module__=__name__, **keys)
    section.peft_type, section.config_fields = peft_type, tuple(fields)
    section.learning_rates, section.learning_rate_source = preset.learning_rates, preset.source
    return section
