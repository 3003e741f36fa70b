"""First launches in a process of their own: what hangs or crashes there leaves this one alone."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict

import torch

from usp.kernels.configs import AnyConfig, Config
from usp.machine.apart import command_of, watch

Shape = tuple[int, int, int, int, int]
MARK = "usp: one more has ended"


def candidates_that_finish(
    kernel: str,
    candidates: Sequence[AnyConfig],
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    patience: float = 120.0,
) -> list[AnyConfig]:
    """The candidates under which a kernel's first launch ends, be it with an exception.

    Where no second process can use the device, those whose code waits for nothing.

    Args:
        kernel: As in ``configs.TABLE``.
        shape, dtype, device: As in ``tune.problem``.
        patience: Seconds for each, to compile and to run.
    """
    left = list(candidates)
    fit: list[AnyConfig] = []
    while left:
        command = command_for(kernel, left, shape, dtype, device)
        marks, reason = count_marks(command, patience)
        if not marks:
            warnings.warn(f"no second process can try {kernel}: {reason}", stacklevel=3)
            return fit + [config for config in left if isinstance(config, Config)]
        ended = marks - 1
        fit += left[:ended]
        if ended < len(left):
            warnings.warn(f"left out: {left[ended]} of {kernel}: {reason}", stacklevel=3)
        left = left[ended + 1 :]
    return fit


def command_for(
    kernel: str,
    candidates: Sequence[AnyConfig],
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
) -> list[str]:
    """A process that tries them one by one (``tune.try_all``)."""
    task = {
        "kernel": kernel,
        "candidates": [asdict(config) for config in candidates],
        "shape": shape,
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(device),
    }
    return command_of("from usp.kernels import tune; tune.try_all(sys.argv[1])", json.dumps(task))


def count_marks(command: Sequence[str], patience: float) -> tuple[int, str]:
    """How many marks a process makes, and why there are no more."""
    said, reason = watch(command, MARK, patience)
    return said.count(MARK), reason
