"""Messages of libraries that a user can act on are kept."""

from __future__ import annotations

import logging
import sys

import pytest
from huggingface_hub import constants
from huggingface_hub.utils._http import http_backoff

from peftbench.common.libraries import quiet_libraries


@pytest.mark.parametrize("is_terminal", [True, False])
def test_retries_of_the_hub_are_announced_on_a_terminal(
    is_terminal: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nothing listens on the port: the library asks three times, and one line is printed."""
    logger = logging.getLogger("huggingface_hub.utils._http")
    monkeypatch.setattr(logger, "filters", [])
    monkeypatch.setattr(logger, "level", logging.NOTSET)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    quiet_libraries()
    with pytest.raises(Exception, match="refused"):
        http_backoff("HEAD", "http://127.0.0.1:9/model", max_retries=2, base_wait_time=0.001)
    expected = "note: the Hub did not answer; trying again, up to 2 times\n" if is_terminal else ""
    assert capfd.readouterr().err == expected
