"""Imported by the template process of the pool where tests of doors were collected.

Each worker would import the libraries itself, which takes longer than most of these tests.
"""

from __future__ import annotations

import importlib
from contextlib import suppress

import libraries

libraries.import_torchvision()
for name in ("transformers.modeling_utils", "diffusers.models.transformers.transformer_flux"):
    with suppress(ImportError):
        importlib.import_module(name)
