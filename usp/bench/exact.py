"""Attention of a few heads in fp64 by the formula, a chunk of rows at a time: what is right."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

ROWS_AT_ONCE = 1024
NAMES = ("out", "dq", "dk", "dv")
EXACT_ZERO = 1e-12  # what fp64 leaves of dq and dk where each query sees one key


class WrongResult(ValueError):
    """What would have been timed is further from the exact result than it may be."""


def exact_heads(
    tensors: Iterable[Tensor], interval: tuple[Tensor, Tensor] | None, softmax_scale: float
) -> dict[str, Tensor]:
    """out, dq, dk, dv of query heads that share one key head.

    Args:
        tensors: q (L, H, D), k (L, D), v (L, D), dout (L, H, D), any dtype.
        interval: First key and one past the last of each row, (L,), or None for all.
        softmax_scale: Factor of the scores.

    Returns:
        (L, H, D), (L, H, D), (L, D), (L, D) in fp64.
    """
    q, k, v, dout = (x.detach().double() for x in tensors)
    length = len(q)
    out, dq, dk, dv = (torch.zeros_like(x) for x in (q, q, k, v))
    for start in range(0, length, ROWS_AT_ONCE):
        rows = slice(start, min(start + ROWS_AT_ONCE, length))
        keys, hidden = slice(0, len(k)), None
        if interval is not None:
            first, stop = (end[rows] for end in interval)
            keys = slice(int(first.min()), int(stop.max()))
            j = torch.arange(keys.start, keys.stop, device=k.device)
            hidden = (j < first[:, None]) | (j >= stop[:, None])
        for h in range(q.shape[1]):
            scores = q[rows, h] @ k[keys].T * softmax_scale
            if hidden is not None:
                scores.masked_fill_(hidden, -torch.inf)
            p = scores.softmax(1)
            out[rows, h] = p @ v[keys]
            dv[keys] += p.T @ dout[rows, h]
            delta = (dout[rows, h] * out[rows, h]).sum(1, keepdim=True)
            ds = p * (dout[rows, h] @ v[keys].T - delta) * softmax_scale
            dq[rows, h] = ds @ k[keys]
            dk[keys] += ds.T @ q[rows, h]
    return dict(zip(NAMES, (out, dq, dk, dv), strict=True))


def relative_error(x: Tensor, exact: Tensor) -> float:
    """Root mean square of the error over that of the exact values; of the error if they are 0."""
    error, scale = (y.square().mean().sqrt().item() for y in (x.double() - exact, exact))
    return error / scale if scale > EXACT_ZERO else error


def wrong(
    errors: Mapping[str, Mapping[str, float]], dtype: torch.dtype, which: str = "both"
) -> dict[str, str]:
    """Who is off by more than three times the best, or by more than rounding explains, and how far.

    Args:
        errors: Of each candidate, of each tensor.
        dtype: Of the inputs. In fp32 sums of thousands of terms are rounded in it, too.
        which: "forward" judges out alone.
    """
    rounding = torch.finfo(dtype).eps
    most = (16 if dtype == torch.float32 else 4) * rounding
    found: dict[str, str] = {}
    for name in NAMES[:1] if which == "forward" else NAMES:
        known = {who: e[name] for who, e in errors.items() if name in e}
        best = min((e for e in known.values() if e == e), default=0.0)
        allowed = min(max(3 * best, rounding / 2), most)
        for who, error in known.items():
            if not error <= allowed:  # a NaN is no success
                found.setdefault(who, f"{name} is off by {error:.2e}, the best by {best:.2e}")
    return found


def judged_by(errors: Mapping[str, float], which: str) -> dict[str, float]:
    """Those that count for a pass: of a forward that of out alone."""
    return {name: error for name, error in errors.items() if which != "forward" or name == "out"}


def refuse_inexact(case: object, errors: Mapping[str, Mapping[str, float]], allowed: float) -> None:
    """End where a scheme's result is further from the exact one than it may be, or is NaN.

    Args:
        errors: Of each scheme, of each of its results.

    Raises:
        WrongResult: names the first.
    """
    for scheme, found in errors.items():
        for tensor, error in found.items():
            if not error <= allowed:
                raise WrongResult(
                    f"{case}: {tensor} of {scheme} is off by {error:.2e}, more than "
                    f"{allowed:.0e}: not timed"
                )
