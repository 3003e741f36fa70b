"""What kernels must pass on a GPU, as functions of a subject; a CPU can be one for a rehearsal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from kernel_call import Call, Inputs, assert_right, computed, expected, largest, make_inputs
from torch import Tensor
from triton_interpreter import Kernels

import usp
from usp.backends import native, triton
from usp.kernels import configs
from usp.planning.problem import Traits

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}
DTYPES = tuple(TOLERANCE)
# hopper: the Triton backend with its kernels for Hopper wherever they take a problem
NAMES = ("triton", "native", "hopper")


@dataclass(frozen=True)
class Subject:
    """Kernels on a device.

    Attributes:
        name: One of NAMES.
        device: "cuda", or "cpu" for a rehearsal.
    """

    name: str
    device: str

    @property
    def ops(self) -> Any:
        """The contract's two functions."""
        return torch.ops.usp if self.name == "native" else Kernels

    @property
    def backend(self) -> str:
        """As users name it."""
        return "native" if self.name == "native" else "triton"

    def setting(self) -> AbstractContextManager[object]:
        return configs.pipelined() if self.name == "hopper" else nullcontext()

    def reason_against(self, dtype: torch.dtype = torch.bfloat16, head_dim: int = 64) -> str | None:
        """Why it cannot be asked, or None."""
        module = native if self.name == "native" else triton
        traits = Traits(self.device, dtype, head_dim, head_dim, head_dim**-0.5)
        reasons = list(module.reasons_against(traits))
        if self.name == "hopper" and not reasons:
            if not hasattr(configs, "pipelined"):
                return "there are no kernels for Hopper alone"
            if self.device == "cpu" or configs.family(torch.device("cuda")) != "sm_90":
                return "this is no Hopper GPU"
        return "; ".join(reasons) or None


@pytest.fixture(params=NAMES)
def subject(request: pytest.FixtureRequest, device: str) -> Subject:
    found = Subject(request.param, device)
    reason = found.reason_against()
    if reason is not None:
        pytest.skip(f"{found.name}: {reason}")
    return found


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory holds NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    # the tests' own sums may be of any order
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def assert_right_twice(subject: Subject, case: Call) -> None:
    """Every result against dense attention in fp64, and the same bits twice."""
    x = make_inputs(case)
    there = on_device(x, subject.device)
    with poisoned(), subject.setting(), torch.device(subject.device):
        got, again = (computed(case, there, subject.ops) for _ in range(2))
    for name, result in got.items():
        assert torch.equal(result, again[name]), f"{name} differs from run to run"
    assert_right(case, x, got, TOLERANCE[case.dtype])


def on_device(x: Inputs, device: str) -> Inputs:
    moved = {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in vars(x).items()
    }
    return Inputs(**moved)


def assert_right_far_apart(subject: Subject, gap: int) -> None:
    """Rows that lie ``gap`` elements apart; of what lies between, pages come into being at most."""
    rows, width = 3, 16
    case = Call(batch=1, lq=rows, lk=rows, heads=(1, 0, 1), head_dim=width, value_head_dim=width)
    case = replace(case, dtype=torch.bfloat16, span="causal")
    x = make_inputs(case)
    far = torch.empty(rows * gap, dtype=case.dtype, device=subject.device)
    far = far.as_strided(x.k.shape, (1, gap, 1, 1)).copy_(x.k)
    want = expected(case, with_all(x, x.k))
    there = with_all(on_device(x, subject.device), far)
    with subject.setting(), torch.device(subject.device):
        got = computed(case, there, subject.ops)
    for name, reference in want.items():
        assert largest(got[name].cpu().double() - reference) <= 1e-2, name


def with_all(x: Inputs, same: Tensor) -> Inputs:
    return Inputs(**{**vars(x), "q": same, "k": same, "v": same, "dout": same})


@dataclass(frozen=True)
class Long:
    """Causal self-attention over many tokens in bf16."""

    length: int
    heads: int
    head_dim: int
    window: int | None = None


class Sampled:
    """Its results, judged at some rows and keys in fp64."""

    def __init__(self, subject: Subject, size: Long) -> None:
        torch.manual_seed(0)
        shape = (1, size.length, size.heads, size.head_dim)
        self.window, left = size.window, None if size.window is None else size.window - 1
        self.q, self.k, self.v, self.dout = (
            torch.randn(shape, device=subject.device, dtype=torch.bfloat16) for _ in range(4)
        )
        leaves = [x.requires_grad_() for x in (self.q, self.k, self.v)]
        with subject.setting():
            out, lse = usp.long_context_attention(
                *leaves,
                causal=True,
                window_size=(left, 0),
                return_lse=True,
                backend=subject.backend,
            )
            self.grads = torch.autograd.grad(out, leaves, self.dout)
        self.out, self.lse = out.detach(), lse.detach()

    def check(self, head: int, places: list[int]) -> None:
        for place in places:
            self._check_row(head, place)
            self._check_key(head, place)

    def _of_head(self, head: int) -> list[Tensor]:
        tensors = (self.q, self.k, self.v, self.out, self.dout, *self.grads)
        return [x.detach()[0, :, head] for x in tensors]

    def _check_row(self, head: int, place: int) -> None:
        q, k, v, out, dout, dq, _, _ = self._of_head(head)
        scale = q.shape[1] ** -0.5
        low = 0 if self.window is None else max(0, place + 1 - self.window)
        keys = slice(low, place + 1)
        scores = k[keys].double() @ q[place].double() * scale
        p = scores.softmax(0)
        wanted = p @ v[keys].double()
        assert_close("out", out[place], wanted)
        assert_close("lse", self.lse[0, head, place], scores.logsumexp(0))
        ds = p * (v[keys].double() @ dout[place].double() - dout[place].double() @ wanted)
        cancelling = (dout[place] * wanted).norm().item() * largest(k[keys]) * scale
        assert_close("dq", dq[place], ds @ k[keys].double() * scale, cancelling)

    def _check_key(self, head: int, place: int) -> None:
        """Its column needs the lse of every row that sees it: those judged by sample."""
        q, k, v, out, dout, _, dk, dv = self._of_head(head)
        scale = q.shape[1] ** -0.5
        high = len(q) if self.window is None else min(len(q), place + self.window)
        rows = slice(place, high)
        scores = q[rows].double() @ k[place].double() * scale
        p = (scores - self.lse[0, head, rows].double()).exp()
        assert_close("dv", dv[place], p @ dout[rows].double())
        delta = (dout[rows].double() * out[rows].double()).sum(1)
        ds = p * (dout[rows].double() @ v[place].double() - delta)
        rounding = (dout[rows] * out[rows]).double().norm(dim=1)
        cancelling = largest(p * rounding) * largest(q[rows]) * scale
        assert_close("dk", dk[place], ds @ q[rows].double() * scale, cancelling)


def assert_close(name: str, ours: Tensor, wanted: Tensor, cancelling: float = 0.0) -> None:
    """Within rounding of the largest number, or of ``out`` where that cancels in a gradient."""
    error, scale = largest(ours.double() - wanted), max(largest(wanted), cancelling, 1e-2)
    assert error <= 1e-2 * scale, f"{name} is off by {error:.2e} of {scale:.2e}"


def assert_merged(subject: Subject, merge: Callable[..., None], dtype: torch.dtype) -> None:
    """A partial result into some rows of a longer state; the others stay."""
    from usp.ops import merge as formula

    generator = torch.Generator().manual_seed(3)
    shape, inside = (2, 131, 3, 40), slice(5, -2)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    out, lse = randn(2, 138, 3, 40), 8 * randn(2, 3, 138)
    # heads before tokens, as libraries give it
    more, more_lse = randn(2, 3, 131, 40).to(dtype).transpose(1, 2), 8 * randn(2, 3, 131)
    for part in (lse, more_lse):
        part.masked_fill_(torch.rand(part.shape, generator=generator) < 0.2, -torch.inf)
    out.masked_fill_((lse == -torch.inf).transpose(1, 2)[..., None], 0)
    more = more.masked_fill((more_lse == -torch.inf).transpose(1, 2)[..., None], 0)
    assert more.shape == shape
    want, want_lse = out.double(), lse.double()
    held = want[:, inside], want_lse[:, :, inside]
    want[:, inside], want_lse[:, :, inside] = formula.merge(*held, more.double(), more_lse.double())
    got, got_lse, more, more_lse = (x.to(subject.device) for x in (out, lse, more, more_lse))
    merge(got[:, inside], got_lse[:, :, inside], more, more_lse)
    torch.testing.assert_close(got.cpu().double(), want, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(got_lse.cpu().double(), want_lse, rtol=2e-6, atol=2e-6)


def assert_packed(
    subject: Subject, pack: Callable[[list[Tensor], Tensor], None], dtype: torch.dtype
) -> None:
    """Runs of heads of a strided tensor, one behind the other in one poisoned message."""
    source = torch.arange(2 * 7 * 31 * 5).view(2, 7, 31, 5).to(dtype).to(subject.device)
    source = source.transpose(1, 2)
    pieces = [source[:, :, a:b] for a, b in ((0, 3), (3, 4), (4, 4), (2, 7))]
    with poisoned():
        message = torch.empty(sum(p.numel() for p in pieces), dtype=dtype, device=subject.device)
    pack(pieces, message.view(torch.uint8))
    assert torch.equal(message, torch.cat([p.flatten() for p in pieces]))
