"""What Gluon kernels run on in the tests: shared memory, barriers, loads and products on their own.

The partitions of a program take turns at every wait, in an order that a seed decides. A load lands
as soon as it is issued or only when nobody can go on, a product is taken when it is issued or only
when it is waited for: what a kernel does not wait for shows in one of these. Where nobody can go on
and nothing is under way, barriers are wrong, and the program ends with what each one waits for.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


class Hazard(AssertionError):
    """Two that do not wait for each other use the same memory, or nobody can go on."""


@dataclass(frozen=True)
class Timing:
    """When what runs by itself is done."""

    early_loads: bool
    early_products: bool
    seed: int = 0


@dataclass(eq=False)
class Barrier:
    """An mbarrier: a phase ends with its last arrival and the last of the bytes it expects."""

    count: int = 0
    pending: int = 0
    expected: int = 0
    phases: int = 0

    def init(self, count: int) -> None:
        self.count = self.pending = count

    def arrive(self, count: int = 1) -> None:
        if not self.count or count > self.pending:
            raise Hazard(f"{count} arrive where {self.pending} of {self.count} are awaited")
        self.pending -= count
        self._end_phase()

    def expect(self, size: int) -> None:
        self.expected += size
        self.arrive()

    def complete(self, size: int) -> None:
        self.expected -= size
        self._end_phase()

    def passed(self, parity: int) -> bool:
        """Whether the phase of that parity is over; before the first one, that of parity 1 is."""
        assert self.count and parity in (0, 1)
        return self.phases % 2 != parity

    def _end_phase(self) -> None:
        if not self.pending and not self.expected:
            self.phases += 1
            self.pending = self.count


@dataclass(eq=False)
class Load:
    """A TMA load under way."""

    target: Tensor
    source: Tensor
    barrier: Barrier

    def land(self) -> None:
        self.target.copy_(self.source)
        self.barrier.complete(self.target.numel() * self.target.element_size())


@dataclass(eq=False)
class Product:
    """A wgmma, whose result may be used once it has been waited for."""

    take: Callable[[], Tensor]
    operands: list[Tensor]
    shape: list[int]
    layout: Any
    result: Tensor | None = None

    @property
    def data(self) -> Tensor:
        raise Hazard("a product is used before it was waited for")


@dataclass(eq=False)
class Partition:
    """Warps that run one function; ``products`` are those not waited for yet."""

    name: str
    run: Callable[[], Any]
    products: list[Product] = field(default_factory=list)
    ready: Callable[[], bool] = lambda: True
    waits_for: str = "its start"
    done: bool = False
    error: BaseException | None = None
    turn: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))


class _Abandoned(BaseException):
    pass


class Machine:
    """One program of a kernel."""

    def __init__(self, timing: Timing, program_id: int, num_programs: int) -> None:
        self.timing = timing
        self.program_id, self.num_programs = program_id, num_programs
        self.loads: list[Load] = []
        self.partitions: list[Partition] = []
        self.current = Partition("program", lambda: None)
        self._random = random.Random(timing.seed * 7919 + program_id)
        self._back = threading.Semaphore(0)
        self._abandoned = False

    def wait(self, ready: Callable[[], bool], why: str) -> None:
        """Let others run until it is so."""
        me = self.current
        me.ready, me.waits_for = ready, why
        self._back.release()
        me.turn.acquire()
        if self._abandoned:
            raise _Abandoned

    def specialize(self, functions: list[Callable[[], Any]]) -> None:
        """Run partitions, in turns, to their end."""
        self.partitions = [Partition(f"partition {i}", run) for i, run in enumerate(functions)]
        before = self.current
        threads = [threading.Thread(target=self._live, args=[p]) for p in self.partitions]
        for thread in threads:
            thread.start()
        try:
            while not all(p.done for p in self.partitions):
                self._step()
        finally:
            self._abandoned = True
            for partition in self.partitions:
                partition.turn.release()
            for thread in threads:
                thread.join()
            self.current = before

    def _live(self, me: Partition) -> None:
        me.turn.acquire()
        try:
            if not self._abandoned:
                me.run()
                if me.products:
                    raise Hazard(f"{me.name} ends with products under way")
        except _Abandoned:
            pass
        except BaseException as error:
            me.error = error
        me.done = True
        self._back.release()

    def _step(self) -> None:
        able = [p for p in self.partitions if not p.done and p.ready()]
        if able:
            self.current = self._random.choice(able)
            self.current.turn.release()
            self._back.acquire()
            if self.current.error is not None:
                raise self.current.error
        elif self.loads:
            self.loads.pop(self._random.randrange(len(self.loads))).land()
        else:
            stuck = [f"{p.name} waits for {p.waits_for}" for p in self.partitions if not p.done]
            raise Hazard("nobody can go on: " + ", ".join(stuck))

    def load(self, load: Load) -> None:
        self.about_to_write(load.target)
        if self.timing.early_loads:
            load.land()
        else:
            # undefined until it lands
            load.target.fill_(torch.nan)
            self.loads.append(load)

    def about_to_write(self, target: Tensor) -> None:
        for partition in self.partitions:
            for product in partition.products:
                if any(_overlap(target, operand) for operand in product.operands):
                    raise Hazard(f"written while a product of {partition.name} reads it")
        self.about_to_read(target)

    def about_to_read(self, source: Tensor) -> None:
        if any(_overlap(source, load.target) for load in self.loads):
            raise Hazard(f"{self.current.name} uses what has not landed")

    def multiply(self, product: Product) -> Product:
        for operand in product.operands:
            self.about_to_read(operand)
        if self.timing.early_products:
            product.result = product.take()
        self.current.products.append(product)
        return product

    def wait_for_products(self, left: int) -> None:
        """Products end in order: all but so many are done."""
        queue = self.current.products
        while len(queue) > left:
            if queue[0].result is None:
                queue[0].result = queue[0].take()
            queue.pop(0)

    def end(self) -> None:
        if self.loads:
            raise Hazard(f"{len(self.loads)} loads that nobody waited for")


class _Running:
    machine: Machine


def running() -> Machine:
    """The program that runs now."""
    return _Running.machine


def run(machine: Machine, program: Callable[[], Any]) -> None:
    """Run a program to its end."""
    _Running.machine = machine
    program()
    machine.end()


def _overlap(a: Tensor, b: Tensor) -> bool:
    if a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
        return False
    first, last = ((x.data_ptr(), x.data_ptr() + x.numel() * x.element_size()) for x in (a, b))
    return first[0] < last[1] and last[0] < first[1]
