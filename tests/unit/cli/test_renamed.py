"""Commands and options that were renamed are refused with the new spelling."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from peftbench import train
from peftbench.cli.app import app
from peftbench.common.usage_errors import USAGE_EXIT_CODE


@pytest.mark.parametrize(
    ("command_line", "message"),
    [
        ("compare suite.yaml train.steps=2 --seeds 2", "peftbench compare suite.yaml is now peftbench run suite.yaml"),
        ("report --compare a b", "--compare is now the command peftbench compare A B"),
        ("report a --threshold 5%", "--threshold is now an option of peftbench compare A B"),
        ("report a --json", "--json is now an option of peftbench compare A B"),
        ("report a --into README.md", "--into is now --update-file"),
        ("report a --into=README.md", "--into is now --update-file"),
        ("report a --block demo", "--block is now --marker"),
        ("report a --by train.seed", "--by is now --group-by"),
        ("estimate --into README.md", "--into is now --update-file"),
        ("estimate --block plan", "--block is now --marker"),
        ("fit --allow all", "--allow is now --techniques"),
        ("submit suite.yaml --engine zero2", "--engine is now --accelerate"),
        ("submit suite.yaml --at-once 2", "--at-once is now --max-parallel"),
        ("submit suite.yaml --restarts 2", "--restarts is now --max-requeues"),
    ],
)
def test_old_spelling_is_refused_with_the_new_one(command_line: str, message: str) -> None:
    """Check that the error is one sentence with the new spelling and the exit code is that of a usage error."""
    result = CliRunner().invoke(app, command_line.split())
    assert result.exit_code == USAGE_EXIT_CODE == CliRunner().invoke(app, ["report", "--no-such-option"]).exit_code
    assert result.stderr == f"error: {message}\n"
    assert result.stdout == ""


def test_train_script_refuses_the_old_option(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Check that launch/train.py refuses --unless-finished."""
    monkeypatch.setattr("sys.argv", ["train.py", "--unless-finished", "--config", "recipe.yaml"])
    with pytest.raises(SystemExit) as excinfo:
        train.main()
    assert excinfo.value.code == USAGE_EXIT_CODE
    assert capsys.readouterr().err == "error: --unless-finished is now --skip-finished\n"
