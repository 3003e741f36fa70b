"""Tuning is opt-in: one call times the table's configurations, and the fastest stay in use.

What won is kept in Triton's cache folder, so later processes on the same GPU find it.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from usp import kernels
from usp.kernels import configs, tuned
from usp.kernels.arguments import KernelOptions, KernelSpan
from usp.kernels.configs import AnyConfig
from usp.kernels.tune.trials import MARK, Shape, candidates_that_finish

_TUNED = ("forward", "backward_keys", "backward_queries")


def tune(
    head_dim: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    seq_len: int = 8192,
    num_heads: int = 16,
    num_kv_heads: int | None = None,
) -> dict[str, AnyConfig]:
    """Find the fastest configurations for causal attention on the current GPU and use them.

    They hold for every head dim of the same row of ``configs.TABLE``, in this process and in
    later ones with the same GPU and Triton. Takes some minutes, most of them compiling. On Hopper
    the kernels of ``kernels/hopper`` take part. Each is launched in a process of its own first:
    what hangs or crashes there is left out. What disagrees with the default is not timed.

    Args:
        head_dim: Of q, k and v, up to 256.
        dtype: bf16 or fp16; fp32 has one configuration and needs no tuning.
        seq_len, num_heads, num_kv_heads: Of the problem that is timed, one sequence.

    Returns:
        The winner of each kernel.

    Raises:
        NotImplementedError: there is no GPU, or Triton interprets.
        RuntimeError: no configuration of a kernel runs on this GPU.
    """
    missing = kernels.reason_against("cuda")
    if missing is not None:
        raise NotImplementedError(f"nothing can be tuned: {missing}")
    from triton.testing import do_bench

    device = torch.device("cuda", torch.cuda.current_device())
    shape = (1, seq_len, num_heads, num_kv_heads or num_heads, head_dim)
    found = search(shape, dtype, device, do_bench)
    size, name = configs.bucket(head_dim), configs.device_name(device)
    tuned.remember(name, {(kernel, size): asdict(config) for kernel, config in found.items()})
    configs.forget()
    return found


def search(
    shape: Shape, dtype: torch.dtype, device: torch.device, time_of: Callable[[Trial], float]
) -> dict[str, AnyConfig]:
    """The winner of each kernel, where ``time_of`` says how long a trial takes."""
    forward, backward = problem(shape, dtype, device)
    found: dict[str, AnyConfig] = {}
    for kernel in _TUNED:
        trial = forward if kernel == "forward" else backward
        candidates = configs.candidates(kernel, shape[-1], device)
        fit = candidates_that_finish(kernel, candidates, shape, dtype, device)
        wanted = _first_answer(kernel, trial, fit)
        seconds, is_right = partial(time_of, trial), partial(trial.agrees, wanted)
        found[kernel] = fastest(kernel, fit, seconds, is_right)
    return found


def _first_answer(kernel: str, trial: Trial, candidates: Sequence[AnyConfig]) -> tuple[Tensor, ...]:
    """Of the first that can be launched, the default if it can."""
    reason: Exception | None = None
    for config in candidates:
        try:
            with configs.trying(kernel, config):
                return trial.answer()
        except Exception as error:
            reason = error
    raise RuntimeError(f"no configuration of {kernel} runs here") from reason


def fastest(
    kernel: str,
    candidates: Sequence[AnyConfig],
    seconds: Callable[[], float],
    is_right: Callable[[], bool],
) -> AnyConfig:
    """The candidate under which ``seconds()`` is least.

    One that is not right is not timed; one that cannot be launched is left out.
    """
    times = {}
    reason: Exception | None = None
    for config in candidates:
        with configs.trying(kernel, config):
            try:
                if is_right():
                    times[config] = seconds()
                else:
                    reason = RuntimeError(f"{config} of {kernel} computes something else")
                    warnings.warn(f"not timed: {reason}", stacklevel=3)
            # too much shared memory, say: Triton has many ways to say it
            except Exception as error:
                reason = error
    if not times:
        raise RuntimeError(f"no configuration of {kernel} runs here") from reason
    return min(times, key=lambda config: times[config])


@dataclass(frozen=True)
class Trial:
    """A call, and the tensors that it would update: copies of them, so that answers compare."""

    call: Callable[..., None]
    tensors: tuple[Tensor, ...]

    @cached_property
    def _updated(self) -> tuple[Tensor, ...]:
        return tuple(x.clone() for x in self.tensors)

    def __call__(self) -> None:
        self.call(*self._updated)

    def answer(self) -> tuple[Tensor, ...]:
        """What it makes of the tensors."""
        copies = tuple(x.clone() for x in self.tensors)
        self.call(*copies)
        return copies

    def agrees(self, wanted: tuple[Tensor, ...]) -> bool:
        """Whether the answer is that, up to the rounding of weights to 16 bits."""
        pairs = list(zip(self.answer(), wanted, strict=True))
        return all(bool((x - y).abs().max() <= 0.02 * y.abs().max()) for x, y in pairs)


def problem(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Trial, Trial]:
    """A causal block's forward and backward."""
    from usp.kernels.arguments import BackwardInputs
    from usp.kernels.attention_backward import attention_backward
    from usp.kernels.attention_forward import attention_forward

    batch, length, heads, kv_heads, head_dim = shape
    q, dout = (torch.randn(batch, length, heads, head_dim, device=device) for _ in range(2))
    k, v = (torch.randn(batch, length, kv_heads, head_dim, device=device) for _ in range(2))
    out, dq, dk, dv = (torch.zeros_like(x) for x in (q, q, k, v))
    # weights near 1 / length, as in a pass of its own
    lse = torch.full((batch, heads, length), float(length), device=device).log()
    q, k, v, dout = (x.to(dtype) for x in (q, k, v, dout))
    at = torch.arange(length, dtype=torch.int32, device=device)
    span = KernelSpan(torch.zeros_like(at), at + 1)
    seen_by = KernelSpan(at, torch.full_like(at, length))
    options = KernelOptions(
        *span,
        bias=None,
        alibi_slopes=None,
        q_pos=None,
        k_pos=None,
        head_offset=0,
        num_heads=heads,
        group_size=heads // kv_heads,
        softmax_scale=head_dim**-0.5,
        softcap=0.0,
        dropout_p=0.0,
        dropout_seed=0,
    )
    inputs = BackwardInputs(dout, q, k, v, torch.zeros_like(lse), lse)
    return (
        Trial(partial(attention_forward, q, k, v, options), (out, lse.clone())),
        Trial(partial(attention_backward, inputs, options, seen_by), (dq, dk, dv)),
    )


def try_all(text: str) -> None:
    """In a process of its own: a mark when it has the device, and one after each candidate.

    Args:
        text: What to try, as ``trials.command_for`` puts it.
    """
    task = json.loads(text)
    device = torch.device(task["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    forward, backward = problem(tuple(task["shape"]), getattr(torch, task["dtype"]), device)
    trial = forward if task["kernel"] == "forward" else backward
    _await(device)
    print(MARK, flush=True)
    for found in task["candidates"]:
        try:
            with configs.trying(task["kernel"], configs.config_of(found)):
                trial()
            _await(device)
        except Exception:
            # a device that is lost says so again, and this process ends
            _await(device)
        print(MARK, flush=True)


def _await(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
