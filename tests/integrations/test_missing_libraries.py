"""A door whose library is not there says which command installs it."""

from __future__ import annotations

import importlib
import sys
from unittest import mock

import pytest


@pytest.mark.parametrize("name", ["diffusers", "transformers"])
def test_it_says_what_installs_it(name) -> None:
    door = importlib.import_module(f"usp.integrations.{name}")
    missing = {module: None for module in sys.modules if module.partition(".")[0] == name}
    with (
        mock.patch.dict(sys.modules, {**missing, name: None}),
        pytest.raises(ModuleNotFoundError, match=rf"pip install 'usp\[{name}\]'") as caught,
    ):
        door.register()
    assert caught.value.name == name
