"""All of this executes GPU code: `make test` and `make test-long` leave it out."""

from __future__ import annotations

import pytest


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    wanted = config.option.markexpr
    return True if "not device_code" in wanted or wanted.startswith("long") else None


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker(pytest.mark.device_code)
