"""The kernels that are held to the contract: where each family runs, and what it cannot take."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import pytest
import torch
from contract_cases import RESULTS, Changes
from gpu_builds import BUILD_TIMEOUT_S
from hypothesis.strategies import SearchStrategy
from kernel_call import Call, assert_right, problem
from torch import Tensor

Result = TypeVar("Result")
SIZES = ("batch", "lq", "lk", "heads", "head_dim", "value_head_dim", "prior_keys")


@dataclass(frozen=True)
class Subject:
    """Kernels of one family.

    Attributes:
        name: The family's, then which of it: "native-avx2".
    """

    name: str

    # What a row of the table changes; small where every instruction is interpreted.
    base: ClassVar[Call] = Call()
    # Session fixtures that it runs on.
    fixtures: ClassVar[tuple[str, ...]] = ()
    # Whether its kernels take several bands in one call.
    bands_at_once: ClassVar[bool] = False
    # Whether lse is read where there is no state before.
    lse_is_read: ClassVar[bool] = False
    # One that fills no tile; a multiple of 8 where no other is taken.
    odd_head_dim: ClassVar[int] = 37
    # Calls of its own, where interpreting is too slow for a call a row.
    mixtures: ClassVar[Mapping[str, Changes]] = {}
    # Spans with which results of their own are looked at, and calls that write gradients over.
    result_spans: ClassVar[Sequence[str]] = tuple(RESULTS)[:-3]
    overwritten: ClassVar[Mapping[str, Changes]] = {}

    @property
    def family(self) -> str:
        return self.name.split("-")[0]

    @property
    def all_dtypes(self) -> Sequence[torch.dtype]:
        return tuple(self.tolerance)

    @property
    def tolerance(self) -> Mapping[torch.dtype, float]:
        """Of each dtype that it takes: the largest error, in units of ``error_scale``."""
        raise NotImplementedError

    def sizes(self, row: str, changes: Changes) -> Changes:
        """Other sizes than the row's."""
        return {}

    def run(
        self, request: pytest.FixtureRequest, promise: Callable[..., Result], *args: Any
    ) -> Result:
        """``promise(ops, *args)``, here or in a worker."""
        raise NotImplementedError

    def reason_against(self, row: str, case: Call) -> str | None:
        """Why it is not held to a row of the table, or None."""
        return None

    def why_not(self, row: str, case: Call) -> str | None:
        """The same, where the reason is one of all families."""
        if case.bands_at_once and not self.bands_at_once:
            return "its kernels take one band in a call"
        return self.reason_against(row, case)

    def dtypes(self, row: str) -> tuple[torch.dtype, ...]:
        """Those in which it is held to a row."""
        return (self.base.dtype,)

    def in_turn(self, number: int) -> Subject:
        """The same in one of its orders of doing things: another one from row to row."""
        return self

    def orders(self) -> Sequence[Subject]:
        """All of them."""
        return (self,)

    def kept(self, case: Call) -> list[tuple[torch.dtype, torch.dtype]]:
        """Of gradients that are written over: dtypes of dq, and of dk and dv."""
        return [(dtype, dtype) for dtype in {case.dtype, case.acc}]

    def lse_tolerance(self, dtype: torch.dtype) -> float | None:
        """Where lse is more exact than other results."""
        return None

    def drawn(self) -> SearchStrategy[tuple[Subject, Call]]:
        """Any mix of all it takes, in any of its orders."""
        raise NotImplementedError

    def case(self, row: str, changes: Changes, dtype: torch.dtype | None = None) -> Call:
        """The row's call at this subject's sizes."""
        case = replace(self.base, **{**changes, **self.sizes(row, changes)})
        return case if dtype is None else replace(case, dtype=dtype)

    def assert_right(self, case: Call, got: dict[str, Tensor], slack: float = 1.0) -> None:
        """Every result is near dense attention in fp64."""
        x, want = problem(case)
        tolerance = self.tolerance[case.dtype] * slack
        assert_right(case, x, got, tolerance, self.lse_tolerance(case.dtype), want)

    def param(self, *values: Any, name: str) -> Any:
        marks = [] if self.family == "native" else [pytest.mark.device_code]
        if self.fixtures:  # the first one waits for them
            marks.append(pytest.mark.timeout(BUILD_TIMEOUT_S + 300))
        return pytest.param(self, *values, id=f"{self.name}-{name}", marks=marks)


def held_to(table: Mapping[str, Changes], subjects: Sequence[Subject]) -> list[Any]:
    """(subject, call) for each row that a subject takes; those of a row stand together."""
    found = []
    for number, (row, changes) in enumerate(table.items()):
        for subject in subjects:
            if subject.why_not(row, subject.case(row, changes)) is None:
                for dtype in subject.dtypes(row):
                    case = subject.case(row, changes, dtype)
                    name = f"{row}-{str(dtype).removeprefix('torch.')}"
                    found.append(subject.in_turn(number).param(case, name=name))
    return found


def mixtures_of(subjects: Sequence[Subject]) -> list[Any]:
    """(subject, call) for the calls of subjects that mix several rows in one."""
    return [
        subject.in_turn(number).param(subject.case(name, changes), name=name)
        for subject in subjects
        for number, (name, changes) in enumerate(subject.mixtures.items())
    ]


def mixture_with(subject: Subject, row: Changes) -> str | None:
    """A call of its own in which all is that a row promises, or None.

    Of lengths only those of 0 and 1 are part of it, and of a carried state that there is one.
    """

    def promised(changes: Changes) -> set[tuple[str, Any]]:
        lengths = {name for name in ("lq", "lk") if changes.get(name, 2) > 1}
        kept = {name: x for name, x in changes.items() if name not in lengths}
        return set((kept | {"prior_keys": bool(kept.get("prior_keys"))}).items())

    wanted = promised(row) - {("prior_keys", False)}
    return next((name for name, x in subject.mixtures.items() if wanted <= promised(x)), None)
