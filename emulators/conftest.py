"""All of this executes GPU code: `make test` leaves it out, `make test-all` has it."""

from __future__ import annotations

import pytest


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    return True if "not device_code" in config.option.markexpr else None


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker(pytest.mark.device_code)
