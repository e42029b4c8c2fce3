"""Scalars of YAML as they were written, for keys whose value is text.

YAML reads ``off`` as false, ``010`` as 8 and ``1:30`` as 90. If the key holds text, it gets the characters as written.
If the key holds a number, a number that YAML reads differently than a person is an error.
"""

from __future__ import annotations

import re
import types
from collections.abc import Mapping
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo

from peftbench.common.schema import ConfigSection, find_section_class
from peftbench.errors import WrongTypeError

_AMBIGUOUS_NUMBER = re.compile(r"[-+]?0[0-9_]+|[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9]*)?")
"""Octal and sexagesimal numbers of YAML 1.1."""


class _TextLoader(yaml.SafeLoader):
    """Constructs every scalar as text; merge keys (``<<``) are merged."""


def _construct_text(loader: _TextLoader, node: yaml.ScalarNode) -> object:
    return loader.construct_scalar(node)


for _tag in ("bool", "int", "float", "null", "timestamp", "str"):
    _TextLoader.add_constructor(f"tag:yaml.org,2002:{_tag}", _construct_text)


def load_as_text(text: str) -> Any:  # noqa: ANN401 — any YAML value
    """Return a YAML document with every scalar as the text that was written."""
    return yaml.load(text, Loader=_TextLoader)  # noqa: S506 — a subclass of SafeLoader


def restore_text(
    values: dict[str, Any],
    written: Mapping[str, Any],
    section: type[ConfigSection],
    kinds: Mapping[str, Mapping[str, type[ConfigSection]]],
    prefix: str = "",
) -> None:
    """Replace values of text keys by the text as written, in place.

    ``written`` has the structure of ``values``. ``kinds`` maps the key of a group to its classes by ``kind``.

    Raises:
        WrongTypeError: a number is ambiguous.
    """
    for key, field in section.model_fields.items():
        if key not in values or key not in written:
            continue
        value, text, path = values[key], written[key], f"{prefix}{key}"
        group = _find_group(key, field, value, kinds)
        if group is not None and isinstance(value, dict) and isinstance(text, Mapping):
            restore_text(value, text, group, kinds, f"{path}.")
        else:
            values[key] = _restore(value, text, field.annotation, path)


def find_section(
    kinds: Mapping[str, type[ConfigSection]], group: Mapping[Any, Any], field: FieldInfo | None = None
) -> type[ConfigSection] | None:
    """Return the class that validates a group of keys, None if its kind is unknown.

    A group without a kind has the kind of the default value of ``field``.
    """
    section = kinds.get(str(group.get("kind", getattr(field and field.default, "kind", None))))
    if section is None:
        return None
    try:
        return section.select_section(group)
    except ValueError:  # the key that selects the section, e.g. type, has an invalid value
        return section


def _find_group(
    key: str, field: FieldInfo, value: object, kinds: Mapping[str, Mapping[str, type[ConfigSection]]]
) -> type[ConfigSection] | None:
    """Return the class of a group of keys, None if the key holds a value."""
    if key in kinds and isinstance(value, dict):
        return find_section(kinds[key], value, field)
    return find_section_class(field.annotation)


def _restore(value: object, text: object, annotation: object, path: str) -> object:
    allowed = _list_types(annotation)
    if isinstance(value, list) and isinstance(text, list) and len(value) == len(text):
        items = [argument for kind in allowed if get_origin(kind) is tuple for argument in get_args(kind)]
        return (
            [_restore(*pair, Union[tuple(items)], path) for pair in zip(value, text, strict=True)] if items else value
        )
    if value is None or isinstance(value, (str, list, dict)) or not isinstance(text, str):
        return value
    if str in allowed and not allowed & {int, float, bool}:
        return text
    if allowed & {int, float} and _AMBIGUOUS_NUMBER.fullmatch(text):
        plain = ("-" if text.startswith("-") else "") + (text.lstrip("-+0_") or "0")
        hint = f"write {value}" if ":" in text else f"write {plain} or {value}"
        raise WrongTypeError(f"Invalid recipe: {path}={text} is ambiguous, since YAML reads it as {value}", hint)
    return value


def _list_types(annotation: object) -> set[Any]:
    """Return the types that an annotation allows, without None."""
    if get_origin(annotation) is Annotated:
        return _list_types(get_args(annotation)[0])
    if get_origin(annotation) in {Union, types.UnionType}:
        return {kind for argument in get_args(annotation) for kind in _list_types(argument)} - {type(None)}
    return {annotation}
