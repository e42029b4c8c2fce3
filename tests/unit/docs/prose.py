"""Find banned words and phrases in the repository's text: `python -m tests.unit.docs.prose [PATH ...]`."""

import subprocess
import sys
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.unit.docs.banned_words import PATTERNS, Pattern

ROOT = Path(__file__).resolve().parents[3]
EXEMPT = {"tests/unit/docs/banned_words.py"}
SCANNED = (
    "src",
    "docs",
    "tests",
    "recipes",
    "launch",
    "benchmarks",
    "accel_configs",
    ".ci",
    ".github",
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "Makefile",
    "pyproject.toml",
    ".pre-commit-config.yaml",
)
SUFFIXES = {".py", ".md", ".yaml", ".yml", ".toml", ".sbatch", ".html", ".j2", ".jinja", ".css", ".js", ".sh", ""}


def find_banned(text: str, patterns: Sequence[Pattern] = PATTERNS) -> Iterator[tuple[int, str, str]]:
    """Yield the line number, the phrase and its plain rewrite for each banned phrase of a text."""
    starts = [0, *(index + 1 for index, character in enumerate(text) if character == "\n")]
    reported: set[tuple[int, int]] = set()
    for pattern in patterns:
        exempt: list[tuple[int, int]] | None = None
        for match in pattern.compile().finditer(text):
            if exempt is None:
                exempt = [found.span() for phrase in pattern.compile_allowed() for found in phrase.finditer(text)]
            if any(start <= match.start() and match.end() <= end for start, end in exempt):
                continue
            if any(start <= match.start() < end for start, end in reported):
                continue
            reported.add(match.span())
            yield bisect_right(starts, match.start()), " ".join(match.group().split()), pattern.rewrite


def list_files() -> list[str]:
    """List the tracked and new text files that are checked, relative to the repository's root."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *SCANNED]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return sorted(
        name for name in set(names) if name not in EXEMPT and Path(name).suffix in SUFFIXES and (ROOT / name).is_file()
    )


def check(names: list[str]) -> list[str]:
    """Return one line for each banned phrase: file:line: phrase -> plain rewrite."""
    lines = []
    for name in names:
        text = (ROOT / name).read_text(encoding="utf-8")
        lines += [f"{name}:{line}: {phrase} -> {rewrite}" for line, phrase, rewrite in sorted(find_banned(text))]
    return lines


if __name__ == "__main__":
    paths = [str(Path(argument).resolve().relative_to(ROOT)) for argument in sys.argv[1:]]
    chosen = [name for name in list_files() if not paths or any(name == p or name.startswith(p + "/") for p in paths)]
    found = check(chosen)
    sys.stdout.writelines(f"{line}\n" for line in found)
    sys.exit(bool(found))
