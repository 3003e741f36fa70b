"""usp as contestants: its own kernels and its adapters to libraries, whichever take a problem.

Triton's come both ways.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from usp import kernels
from usp.backends import in_order
from usp.backends.library import LIBRARIES
from usp.kernels import configs
from usp.planning.problem import Traits


@dataclass(frozen=True)
class Own:
    """A backend, and what must be set while it runs."""

    backend: Any
    setting: Callable[[], AbstractContextManager[object]] = nullcontext

    def __call__(self, run: Callable[..., Any], *args: Any) -> Any:
        """Run it so."""
        with self.setting():
            return run(*args)


def own(dtype: torch.dtype, head_dim: int, device: str) -> dict[str, Own]:
    """Every one that takes such a problem there, by name; "auto" would take the first."""
    architecture = kernels.architecture(torch.device(device))
    dims = head_dim, head_dim
    traits = Traits(device, dtype, *dims, head_dim**-0.5, architecture=architecture)
    found = {
        f"usp {backend.NAME}": Own(backend)
        for backend in in_order(architecture)
        if (backend.CARRIES_STATE or backend in LIBRARIES) and not backend.reasons_against(traits)
    }
    if "usp triton" in found and has_pipelines(head_dim, device):
        found["usp hopper"] = Own(found["usp triton"].backend, configs.pipelined)
    return found


def has_pipelines(head_dim: int, device: str) -> bool:
    """Whether the Triton backend has kernels for Hopper alone beside the portable ones."""
    if device != "cuda" or head_dim > 128 or not hasattr(configs, "pipelined"):
        return False
    return configs.family(torch.device(device)) == "sm_90" and kernels.has_gluon()
