"""Every attention library that is there, through its adapter: rings against the fp64 oracle.

On a CPU, for a rehearsal, something stands in for each.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from library_cases import Ring, assert_near, of_name, on_cpu

import usp
from usp import kernels
from usp.backends.library import LIBRARIES, LibraryBackend
from usp.backends.library.record import Record
from usp.planning.masks.options import make_mask
from usp.planning.problem import Traits
from usp.planning.samples import masks_of

pytestmark = pytest.mark.gpu
# of fp32: products may be of TF32
TOLERANCE = {torch.float16: 5e-3, torch.bfloat16: 3e-2, torch.float32: 3e-3}
MASKS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window_size": (40, 0)},
    "both sides": {"window_size": (33, 9)},
    "documents": {"causal": True, "cu_seqlens": (0, 37, 38, 200, 263, 301)},
    "documents, window": {
        "causal": True,
        "cu_seqlens": (0, 37, 38, 200, 263, 301),
        "window_size": (20, 0),
    },
}
FEWER = 4  # times, for a rehearsal


def masked(name: str, device: str) -> dict[str, Any]:
    """A mask for as many tokens as a device is given."""
    options = dict(MASKS[name])
    if device == "cpu" and "cu_seqlens" in options:
        options["cu_seqlens"] = tuple(end // FEWER for end in options["cu_seqlens"])
    return options


@pytest.fixture(params=[backend.NAME for backend in LIBRARIES])
def subject(request: pytest.FixtureRequest, device: str) -> LibraryBackend:
    backend = of_name(request.param)
    if device == "cpu":
        return on_cpu(backend.records[0])
    reason = backend.unavailable()
    if reason is not None:
        pytest.skip(f"{backend.NAME}: {reason}")
    return backend


def record_of(subject: LibraryBackend) -> Record:
    found = subject.found()
    assert not isinstance(found, str)
    return found[0]


def skip_if_not_taken(subject: LibraryBackend, device: str, **about: Any) -> None:
    architecture = kernels.architecture(torch.device(device)) if device == "cuda" else ""
    dims = about.pop("dims", (64, 64))
    dtype = about.pop("dtype", torch.bfloat16)
    reasons = subject.reasons_against(
        Traits(device, dtype, *dims, dims[0] ** -0.5, architecture=architecture, **about)
    )
    if reasons:
        pytest.skip(f"{subject.NAME}: {'; '.join(reasons)}")


def ring_of(
    options: dict[str, Any],
    device: str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    dims: tuple[int, int] = (64, 64),
    lengths: tuple[int, int] = (301, 301),
    layout: str = "zigzag",
    ranks: int = 2,
    **more: Any,
) -> tuple[Ring, Ring]:
    """On the device, and on the CPU."""
    random, (d, dv) = torch.Generator().manual_seed(11), dims
    n, m = lengths if device == "cuda" else (max(1, length // FEWER) for length in lengths)
    shapes = (2, n, 6, d), (2, m, 2, d), (2, m, 2, dv), (2, n, 6, dv)
    x = [torch.randn(shape, generator=random).to(dtype) for shape in shapes]
    here = Ring(masks_of(make_mask(**options)), layout, ranks, *x, **more)
    q, k, v, dout = (tensor.to(device) for tensor in x)
    dlse = None if here.dlse is None else here.dlse.to(device)
    return replace(here, q=q, k=k, v=v, dout=dout, dlse=dlse), here


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_rings(mask: str, dtype: torch.dtype, subject: LibraryBackend, device: str) -> None:
    dtype = dtype if device == "cuda" else torch.float16
    skip_if_not_taken(subject, device, dtype=dtype)
    options = masked(mask, device)
    there, here = ring_of(options, device, dtype=dtype)
    assert_near(there.results(subject), here.expected(**options), TOLERANCE[dtype], mask)


@pytest.mark.parametrize("lengths", [(77, 301), (301, 77), (1, 301), (130, 129)], ids=str)
def test_other_numbers_of_keys(
    lengths: tuple[int, int], subject: LibraryBackend, device: str
) -> None:
    there, here = ring_of({"causal": True}, device, lengths=lengths, layout="contiguous", ranks=1)
    assert_near(there.results(subject), here.expected(causal=True), 3e-2, lengths)


@pytest.mark.parametrize("dims", [(32, 32), (128, 128), (256, 256), (128, 64), (192, 128)], ids=str)
def test_head_dims(dims: tuple[int, int], subject: LibraryBackend, device: str) -> None:
    dims = dims if device == "cuda" else (32, 32)
    skip_if_not_taken(subject, device, dims=dims)
    there, here = ring_of({"causal": True}, device, dims=dims)
    assert_near(there.results(subject), here.expected(causal=True), 3e-2, dims)


def test_softcap(subject: LibraryBackend, device: str) -> None:
    if not record_of(subject).softcap:
        pytest.skip(f"{subject.NAME} has no softcap")
    there, here = ring_of({"causal": True}, device, softcap=3.0)
    assert_near(there.results(subject), here.expected(causal=True), 3e-2)


def test_a_returned_lse_is_differentiated(subject: LibraryBackend, device: str) -> None:
    if not record_of(subject).dlse:
        pytest.skip(f"{subject.NAME} takes no gradient of the LSE")
    options = masked("documents", device)
    dlse = torch.randn(2, 6, options["cu_seqlens"][-1], generator=torch.Generator().manual_seed(5))
    there, here = ring_of(options, device, dlse=dlse)
    assert_near(there.results(subject), here.expected(**options), 3e-2)


def test_by_its_name(subject: LibraryBackend, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "cpu":
        backends: Any = importlib.import_module("usp.backends")
        kept = tuple(b for b in backends.TABLE if subject.NAME != b.NAME)
        monkeypatch.setattr(backends, "TABLE", (*kept, subject))
    there, here = ring_of({}, device)
    leaves = [x.requires_grad_() for x in (there.q, there.k, there.v)]
    out = usp.long_context_attention(*leaves, causal=True, backend=subject.NAME)
    grads = torch.autograd.grad(out, leaves, there.dout)
    found = zip(("out", "dq", "dk", "dv"), (out, *grads), strict=True)
    got = {name: x.detach().cpu() for name, x in found}
    want = here.expected(causal=True)
    del want["lse"]
    assert_near(got, want, 3e-2)
