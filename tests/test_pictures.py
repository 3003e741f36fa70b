"""The pictures of the documentation are what their scripts draw."""

from __future__ import annotations

import importlib

import pytest
import svg


@pytest.mark.parametrize("script", ["layouts", "bands", "ring", "exchange"])
def test_a_picture_is_what_its_script_draws(script: str) -> None:
    module = importlib.import_module(f"draw_{script}")
    assert (svg.PICTURES / module.NAME).read_text() == module.draw()
