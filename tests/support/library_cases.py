"""Rows of the table of libraries over stand-ins on the CPU, and rings in one process."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from typing import Any

import stand_in_ops
import stand_ins
import torch
from cases import Case
from torch import Tensor

from usp.attention import block
from usp.backends.library import LIBRARIES, aten, flash2, flash3, flash4
from usp.backends.library import aiter as of_aiter
from usp.backends.library.backend import LibraryBackend
from usp.backends.library.call import Kernel
from usp.backends.library.record import Record
from usp.backends.library.table import ROWS
from usp.planning.heads import Heads
from usp.planning.plan import make_plan
from usp.planning.problem import Block, Gradients, Scoring, State
from usp.planning.samples import Masks


def _flash3() -> Kernel:
    stand_in_ops.define_flash3()
    return flash3.Flash3(torch.ops.flash_attn_3.fwd, torch.ops.flash_attn_3.bwd)


def _of_torch(kernel: Any) -> Any:
    def load() -> Kernel:
        stand_in_ops.define_aten()
        found: Kernel = kernel()
        return found

    return load


LOADERS = {
    "flash-attn 2": lambda: flash2.Flash2(stand_ins.flash2_functions()),
    "flash-attn 2 (composable kernels)": lambda: flash2.Flash2(stand_ins.flash2_functions()),
    "flash-attn 2 (Triton)": lambda: flash2.Flash2(stand_ins.flash2_functions(lse_lies="nh")),
    "flash-attn 2 (by aiter)": lambda: flash2.Flash2(stand_ins.flash2_functions()),
    "flash-attn 3": _flash3,
    "flash-attn 4": lambda: flash4.Flash4(stand_ins.Flash4),
    "aiter (Triton)": lambda: of_aiter.Aiter(stand_ins.Aiter),
    "torch's flash attention": _of_torch(aten.Flash),
    "torch's flash attention (AOTriton)": _of_torch(aten.Flash),
    "torch's cuDNN attention": _of_torch(aten.Cudnn),
    "torch's memory-efficient attention": _of_torch(aten.Efficient),
}


def label(record: Record) -> str:
    kind = record.title.partition("(")[2].rstrip(")").replace(" ", "-")
    return "-".join(filter(None, (record.name, record.built_for, kind)))


def here() -> None:
    """Nothing is missing."""


def on_cpu(record: Record, **changes: Any) -> LibraryBackend:
    """A row of the table as if it were for the CPU, over what stands in for its kernels."""
    changes = {"load": LOADERS[record.title], "missing": here, **changes}
    return LibraryBackend((replace(record, device_type="cpu", built_for=None, **changes),))


def of_name(name: str) -> LibraryBackend:
    """The library of that name in the table."""
    (backend,) = (backend for backend in LIBRARIES if name == backend.NAME)
    return backend


def put_in_table(*backends: LibraryBackend) -> None:
    """In this process: in the place of those of these names."""
    module: Any = importlib.import_module("usp.backends")
    names = {backend.NAME for backend in backends}
    kept = tuple(backend for backend in module.TABLE if backend.NAME not in names)
    module.TABLE = (*kept, *backends)


def run_over_stand_in(title: str, case: Case) -> dict[str, Tensor]:
    """On a worker: this rank's results through the row of that title."""
    from judge import run

    (record,) = (record for record in ROWS if record.title == title)
    module: Any = importlib.import_module("usp.backends")
    before = module.TABLE
    put_in_table(on_cpu(record))
    try:
        return run(case)
    finally:  # others use this worker, too
        module.TABLE = before


@dataclass
class Ring:
    """A ring whose ranks take turns in one process.

    Attributes:
        q, k, v, dout: The whole tensors.
        softcap: As the user gives it; 0 is off.
    """

    masks: Masks
    layout: str
    ranks: int
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    dlse: Tensor | None = None
    softcap: float = 0.0

    def blocks(self, rank: int) -> Any:
        lengths = self.q.shape[1], self.k.shape[1]
        plan = make_plan(self.masks, self.layout, lengths, self.ranks, rank)
        heads = Heads(0, self.q.shape[2], self.q.shape[2], self.q.shape[2] // self.k.shape[2])
        rows = plan.queries.tensor
        scoring = Scoring(self.q.shape[-1] ** -0.5, self.softcap)
        for step in plan.steps:
            (load,) = step.loads
            keys = plan.keys[step.owner].tensor[load.rows.index]
            for visit in load.visits:
                k, v = self.k[:, keys], self.v[:, keys]
                yield rows, keys, Block(self.q[:, rows], k, v, visit, heads, scoring)

    def results(self, backend: Any) -> dict[str, Tensor]:
        """out, lse and the gradients by a backend, of the whole sequences, on the CPU."""
        state = block.new_state(self.q, self.v.shape[-1])
        assert state.out is not None
        for rank in range(self.ranks):
            for rows, _, piece in self.blocks(rank):
                part = State(state.out[:, rows].contiguous(), state.lse[:, :, rows].contiguous())
                block.attention_forward(piece, part, backend)
                state.out[:, rows], state.lse[:, :, rows] = part.out, part.lse
        out = state.out.to(self.q.dtype)
        sums = [torch.zeros_like(x, dtype=torch.float32) for x in (self.q, self.k, self.v)]
        for rank in range(self.ranks):
            for rows, keys, piece in self.blocks(rank):
                dlse = None if self.dlse is None else self.dlse[:, :, rows]
                given = self.dout[:, rows], dlse, out[:, rows], state.lse[:, :, rows].contiguous()
                saved = block.saved_for_backward(*given, backend)
                parts = [
                    torch.zeros_like(x, dtype=torch.float32) for x in (piece.q, piece.k, piece.v)
                ]
                block.attention_backward(piece, saved, Gradients(*parts), backend)
                for total, part, where in zip(sums, parts, (rows, keys, keys), strict=True):
                    total[:, where] += part
        found = {"out": out, "lse": state.lse}
        found |= dict(zip(("dq", "dk", "dv"), sums, strict=True))
        return {name: x.cpu() for name, x in found.items()}

    def expected(self, **options: Any) -> dict[str, Tensor]:
        """The same by the fp64 oracle."""
        from usp.testing import dense_attention

        leaves = [x.double().requires_grad_() for x in (self.q, self.k, self.v)]
        cap = self.softcap or None
        out, lse = dense_attention(*leaves, softcap=cap, **options)
        cotangents = [self.dout.double(), torch.zeros_like(lse)]
        if self.dlse is not None:
            cotangents[1] = self.dlse.double()
        grads = torch.autograd.grad([out, lse], leaves, cotangents, allow_unused=True)
        grads = [
            torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)
        ]
        found = {"out": out.detach(), "lse": lse.detach()}
        return found | dict(zip(("dq", "dk", "dv"), grads, strict=True))


def assert_near(
    got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float, about: object = ""
) -> None:
    """Within a share of the largest value, or of 1 if that is less."""
    assert got.keys() == want.keys()
    for name, reference in want.items():
        result = got[name].double()
        if name == "lse":
            assert torch.equal(result == -torch.inf, reference == -torch.inf), f"empty rows {about}"
            result, reference = (x.nan_to_num(neginf=0.0) for x in (result, reference))
        if reference.numel():
            error = (result - reference).abs().max().item()
            scale = max(1.0, reference.abs().max().item())
            assert error <= tolerance * scale, f"{name}: {error:.2e} of {scale:.2g} {about}"
