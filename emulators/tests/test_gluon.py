"""What Gluon kernels are run on: barriers, loads, products, turns; and values with layouts."""

from __future__ import annotations

import pytest
import torch
from gluon.machine import Barrier, Hazard, Load, Machine, Product, Timing, run, running
from torch import Tensor

LATE, EARLY = Timing(False, False), Timing(True, True)
BYTES = 16


def test_a_phase_ends_with_the_last_arrival_and_the_last_byte() -> None:
    barrier = Barrier()
    barrier.init(2)
    assert barrier.passed(1) and not barrier.passed(0)  # as if one had ended before the first
    barrier.expect(BYTES)
    barrier.arrive()
    assert not barrier.passed(0)
    barrier.complete(BYTES)
    assert barrier.passed(0) and not barrier.passed(1)
    barrier.arrive(2)
    assert barrier.passed(1)


def test_more_arrivals_than_are_awaited() -> None:
    barrier = Barrier()
    with pytest.raises(Hazard, match="1 arrive where 0 of 0 are awaited"):
        barrier.arrive()
    barrier.init(1)
    with pytest.raises(Hazard, match="2 arrive where 1 of 1"):
        barrier.arrive(2)


def loading(waits: bool, target: Tensor, seen: list[float]) -> None:
    """Two partitions: one loads, the other uses what it has loaded."""
    barrier = Barrier()
    barrier.init(1)

    def producer() -> None:
        barrier.expect(BYTES)
        running().load(Load(target, torch.ones(4), barrier))

    def consumer() -> None:
        running().wait(lambda: not waits or barrier.passed(0), "the load")
        running().about_to_read(target)
        seen.append(target.sum().item())

    running().specialize([producer, consumer])


@pytest.mark.parametrize("timing", [LATE, EARLY])
@pytest.mark.parametrize("seed", range(4))
def test_who_waits_sees_what_was_loaded(seed: int, timing: Timing) -> None:
    seen: list[float] = []
    machine = Machine(Timing(timing.early_loads, timing.early_products, seed), 0, 1)
    run(machine, lambda: loading(True, torch.zeros(4), seen))
    assert seen == [4.0]


def test_who_does_not_wait_is_caught_in_some_order() -> None:
    caught = 0
    for seed in range(8):
        machine = Machine(Timing(False, False, seed), 0, 1)
        try:
            run(machine, lambda: loading(False, torch.zeros(4), []))
        except Hazard as hazard:
            caught += "has not landed" in str(hazard) or "nobody waited" in str(hazard)
    assert caught == 8


def test_nobody_can_go_on() -> None:
    machine = Machine(LATE, 0, 1)
    with pytest.raises(Hazard, match="nobody can go on: partition 0 waits for what never comes"):
        run(
            machine,
            lambda: running().specialize(
                [lambda: running().wait(lambda: False, "what never comes")]
            ),
        )


def multiplied(seen: list[Tensor], *, overwrites: bool = False, waits: bool = True) -> None:
    operand = torch.full((2, 2), 3.0)

    def partition() -> None:
        machine = running()
        product = machine.multiply(Product(lambda: operand @ operand, [operand], [2, 2], None))
        if overwrites:
            machine.about_to_write(operand)
        if waits:
            machine.wait_for_products(0)
            assert product.result is not None
            seen.append(product.result)
        else:
            seen.append(product.data)

    running().specialize([partition])


@pytest.mark.parametrize("timing", [LATE, EARLY])
def test_a_product_is_there_after_its_wait(timing: Timing) -> None:
    seen: list[Tensor] = []
    run(Machine(timing, 0, 1), lambda: multiplied(seen))
    assert torch.equal(seen[0], torch.full((2, 2), 18.0))
    with pytest.raises(Hazard, match="used before it was waited for"):
        run(Machine(timing, 0, 1), lambda: multiplied(seen, waits=False))
    with pytest.raises(Hazard, match="written while a product of partition 0 reads it"):
        run(Machine(timing, 0, 1), lambda: multiplied(seen, overwrites=True))


def test_products_and_loads_must_be_waited_for() -> None:
    def leaves() -> None:
        x = torch.zeros(2, 2)
        running().multiply(Product(lambda: x, [x], [2, 2], None))

    with pytest.raises(Hazard, match="partition 0 ends with products under way"):
        run(Machine(LATE, 0, 1), lambda: running().specialize([leaves]))
    barrier = Barrier()
    barrier.init(1)
    with pytest.raises(Hazard, match="1 loads that nobody waited for"):
        run(
            Machine(LATE, 0, 1),
            lambda: running().load(Load(torch.zeros(4), torch.ones(4), barrier)),
        )


def test_values_of_two_layouts_do_not_meet() -> None:
    pytest.importorskip("triton.experimental.gluon")
    from gluon.values import Value
    from triton.experimental.gluon import language as gl

    one, other = gl.BlockedLayout([1], [32], [4], [0]), gl.BlockedLayout([2], [32], [4], [0])
    x, y = (Value(torch.arange(4.0), layout) for layout in (one, other))
    assert torch.equal((x + x * 2).data, 3 * torch.arange(4.0))
    with pytest.raises(AssertionError):
        x + y


def test_tma_gives_zeros_outside_of_the_tensor() -> None:
    pytest.importorskip("triton.experimental.gluon.nvidia.hopper")
    from gluon.values import Descriptor
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    whole = torch.arange(1, 33, dtype=torch.float16).view(4, 8)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=32, element_bitwidth=16, rank=2)
    descriptor = Descriptor(TensorDescriptor(whole, [4, 8], [8, 1], [4, 16], layout))
    assert descriptor.block_type.nbytes == 4 * 16 * 2
    tile = descriptor.tile([2, 0])
    assert torch.equal(tile[:2, :8], whole[2:])
    assert not tile[2:].any() and not tile[:, 8:].any()


def test_an_access_outside_of_a_tensor_is_refused() -> None:
    pytest.importorskip("triton.experimental.gluon")
    from gluon.emulator import Language
    from gluon.values import Pointer, Value
    from triton.experimental.gluon import language as gl

    layout = gl.BlockedLayout([1], [32], [4], [0])
    places, memory = Value(torch.arange(4), layout), Pointer.to_tensor(torch.arange(4.0))
    assert torch.equal(Language.load(memory + places).data, torch.arange(4.0))
    with pytest.raises(AssertionError, match="outside of the tensor"):
        Language.load(memory + (places + 1))
    inside = Value(torch.tensor([True, True, True, False]), layout)
    assert torch.equal(Language.load(memory + (places + 1), inside).data[:3], torch.arange(1.0, 4))
