"""Structure of the code: modules at the package's top, limits of files and functions, unique names, and imports."""

import ast
from collections import defaultdict
from pathlib import Path

from tests.unit.docs.prose import ROOT

PACKAGE = ROOT / "src" / "peftbench"
CHECKED_FOLDERS = ("src", "tests", "benchmarks", "launch")
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60

# Public names that several modules may define, each with one meaning.
SAME_MEANING = {
    "main": "entry point of a command line",
    "app": "typer application",
    "estimate": "predict the memory of a recipe: the command, and the function it calls",
    "train": "train one model: the command, and the loop that it runs",
}


def _list_sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def _list_checked_files() -> list[Path]:
    return sorted(path for folder in CHECKED_FOLDERS for path in (ROOT / folder).rglob("*.py"))


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
    return {name: modules for name, modules in sorted(modules_by_name.items()) if len(modules) > 1}


def find_long_code(name: str, text: str) -> list[str]:
    """Return the file if it is too long or switches the formatter off, and each function that is too long."""
    too_long = []
    if len(text.splitlines()) > MAX_FILE_LINES:
        too_long.append(name)
    if any("# fmt: " + switch in text for switch in ("skip", "off")):
        too_long.append(f"{name}: formatter switched off")
    too_long += [
        f"{name}:{node.lineno}: {node.name}"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or 0) - node.lineno >= MAX_FUNCTION_LINES
    ]
    return too_long


def find_conftest_imports(name: str, text: str) -> list[str]:
    """Return each import of a conftest module, or of a name from one."""
    imports = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        parent = f"{node.module or ''}." if isinstance(node, ast.ImportFrom) else ""
        modules = [parent + alias.name for alias in node.names]
        imports += [f"{name}:{node.lineno}" for module in modules if "conftest" in module.split(".")]
    return imports


def test_public_names_are_defined_once() -> None:
    """Check that no two modules define the same public name, except the names in ``SAME_MEANING``."""
    duplicates = find_duplicates(
        {str(path.relative_to(PACKAGE)): path.read_text(encoding="utf-8") for path in _list_sources()}
    )
    unexpected = {name: modules for name, modules in duplicates.items() if name not in SAME_MEANING}
    assert not unexpected, "\n".join(f"{name}: {', '.join(modules)}" for name, modules in unexpected.items())
    assert set(SAME_MEANING) <= set(duplicates), "stale entries of SAME_MEANING"


def test_duplicate_name_is_reported() -> None:
    """Check that a public name in two modules is reported; private and imported names are not."""
    sources = {
        "a.py": "FILE = 1\n_x = 2\ndef main(): ...",
        "b.py": "from a import FILE\n_x = 3\ndef main(): ...",
        "c.py": "FILE: int = 2",
    }
    assert find_duplicates(sources) == {"FILE": ["a.py", "c.py"], "main": ["a.py", "b.py"]}


def test_package_top_has_only_entry_points_and_errors() -> None:
    """Check that train.py, errors.py, __init__.py and __main__.py are the only modules at the package's top."""
    modules = {path.name for path in PACKAGE.glob("*.py")}
    assert modules <= {"train.py", "errors.py", "__init__.py", "__main__.py"}


def test_files_and_functions_stay_within_limits() -> None:
    """Check lengths of files (500 lines) and functions (60), and that no line switches the formatter off."""
    too_long = []
    for path in _list_checked_files():
        too_long += find_long_code(str(path.relative_to(ROOT)), path.read_text(encoding="utf-8"))
    assert not too_long


def test_long_file_and_function_are_reported() -> None:
    """Check that 501 lines, a function of 61 lines and a switched-off formatter are reported, 500 and 60 are not."""
    body = "    x = 1\n"
    assert not find_long_code("a.py", "x = 1\n" * MAX_FILE_LINES)
    assert not find_long_code("a.py", "def f():\n" + body * (MAX_FUNCTION_LINES - 1))
    assert find_long_code("a.py", "x = 1\n" * (MAX_FILE_LINES + 1)) == ["a.py"]
    assert find_long_code("a.py", "async def f():\n" + body * MAX_FUNCTION_LINES) == ["a.py:1: f"]
    assert find_long_code("a.py", "x = [1,  2]  # fmt: " + "skip\n") == ["a.py: formatter switched off"]


def test_no_module_imports_from_a_conftest() -> None:
    """Check that shared test code is in tests/helpers; conftest.py has fixtures and hooks only."""
    imports = []
    for path in _list_checked_files():
        imports += find_conftest_imports(str(path.relative_to(ROOT)), path.read_text(encoding="utf-8"))
    assert not imports


def test_import_from_a_conftest_is_reported() -> None:
    """Check that each form of import is reported."""
    for statement in (
        "from a.conftest import X",
        "from a import conftest as b",
        "import conftest",
        "from . import conftest",
    ):
        assert find_conftest_imports("b.py", statement) == ["b.py:1"], statement
    assert not find_conftest_imports("b.py", "from a.helpers import conftests")
