"""Structure of the package: modules at its top, limits of files and functions, and unique public names."""

import ast
from collections import defaultdict
from pathlib import Path

from tests.unit.docs.prose import ROOT

PACKAGE = ROOT / "src" / "peftbench"
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60

# Public names that several modules may define, each with one meaning.
SAME_MEANING = {
    "main": "entry point of a command line",
    "app": "typer application",
    "estimate": "the command, and the function it calls",
    "report": "the command, and its typer group",
    "Array": "type alias of a NumPy array of floats",
    "T": "type variable",
    "train": "the command of one run, and the training loop",
}


def _list_sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def _find_public_names(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return {name for name in names if not name.startswith("_")}


def find_duplicates(sources: dict[str, str]) -> dict[str, list[str]]:
    """Return each public name that more than one module defines, with the modules."""
    modules_by_name: dict[str, list[str]] = defaultdict(list)
    for module, text in sources.items():
        for name in _find_public_names(ast.parse(text)):
            modules_by_name[name].append(module)
    return {
        name: modules
        for name, modules in sorted(modules_by_name.items())
        if len(modules) > 1 and name not in SAME_MEANING
    }


def test_public_names_are_defined_once() -> None:
    """Check that no two modules define the same public name, except the names in ``SAME_MEANING``."""
    duplicates = find_duplicates(
        {str(path.relative_to(PACKAGE)): path.read_text(encoding="utf-8") for path in _list_sources()}
    )
    assert not duplicates, "\n".join(f"{name}: {', '.join(modules)}" for name, modules in duplicates.items())


def test_duplicate_name_is_reported() -> None:
    """Check that a public name in two modules is reported; private and imported names are not."""
    sources = {
        "a.py": "FILE = 1\n_x = 2\ndef main(): ...",
        "b.py": "from a import FILE\n_x = 3\ndef main(): ...",
        "c.py": "FILE: int = 2",
    }
    assert find_duplicates(sources) == {"FILE": ["a.py", "c.py"]}


def test_package_top_has_only_entry_points_and_errors() -> None:
    """Check that train.py, errors.py, __init__.py and __main__.py are the only modules at the package's top."""
    modules = {path.name for path in PACKAGE.glob("*.py")}
    assert modules <= {"train.py", "errors.py", "__init__.py", "__main__.py"}


def test_files_and_functions_stay_within_limits() -> None:
    """Check lengths of files (500 lines) and functions (60), and that no line switches the formatter off."""
    too_long = []
    for path in _list_sources():
        text = path.read_text(encoding="utf-8")
        name = str(path.relative_to(ROOT))
        if len(text.splitlines()) > MAX_FILE_LINES:
            too_long.append(name)
        if "# fmt: " + "skip" in text:
            too_long.append(f"{name}: formatter switched off")
        too_long += [
            f"{name}:{node.lineno}: {node.name}"
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= MAX_FUNCTION_LINES
        ]
    assert not too_long
