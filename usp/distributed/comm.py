"""Everything that crosses ranks: the only calls of ``torch.distributed``.

An ``Axis`` is one dimension of the mesh seen from one rank. Its verbs post and return a
``wait``; an axis of size 1 sends nothing. Messages are flat: tensors that travel together are one
``Parcel``.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import (
    _disable_current_modes,
    _get_current_dispatch_mode_stack,
)

from usp.distributed.launch import Launch, launched_by

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Wait = Callable[[], Tensor]
Given = ParamSpec("Given")
Found = TypeVar("Found")
# Newer torch has the first name and warns about the second, older torch has just the second.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@contextmanager
def out_of_sight() -> Iterator[None]:
    """Below dispatch modes, which may skip or repeat what they see on this rank alone.

    Modes that say ``only_listens`` hear on, and a graph that is being made is not disturbed.
    """
    modes = _get_current_dispatch_mode_stack() if torch._C._len_torch_dispatch_stack() else []
    if not modes or any(getattr(mode, "_mode_key", None) is not None for mode in modes):
        yield
        return
    with _disable_current_modes(), ExitStack() as listening:
        for mode in modes:
            if getattr(mode, "only_listens", False):
                listening.enter_context(mode)
        yield


def untraced(function: Callable[Given, Found]) -> Callable[Given, Found]:
    """A function that communicates: one graph break where ``torch.compile`` comes upon it, and
    out of sight of dispatch modes."""

    @wraps(function)
    def call(*args: Given.args, **kwargs: Given.kwargs) -> Found:
        # asked at the call: the decorator of torch would import the whole compiler with us
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **kwargs)
        if not torch._C._len_torch_dispatch_stack():
            return function(*args, **kwargs)
        with out_of_sight():
            return function(*args, **kwargs)

    return call


@dataclass(frozen=True)
class Axis:
    """One mesh dimension seen from this rank.

    Attributes:
        size, rank: Ranks along the axis and this rank's place.
        group: Their process group; None where the size is 1.
    """

    size: int
    rank: int
    group: dist.ProcessGroup | None

    @property
    def talks_on_host(self) -> bool:
        """Whether its ranks can exchange tensors of the CPU."""
        return self.group is None or "cpu:" in dist.get_backend_config(self.group)

    @property
    def is_simulated(self) -> bool:
        """Whether its messages go nowhere."""
        return self.group is not None and dist.get_backend(self.group) == "fake"

    def _peer(self, rank: int) -> int:
        assert self.group is not None
        return dist.get_global_rank(self.group, rank % self.size)

    def shift(self, message: Tensor, out: Tensor, by: int = 1) -> Wait:
        """Send ``message`` to the rank ``by`` places on, receive ``out`` from ``by`` places back.

        Both are flat and contiguous and stay untouched until ``wait()`` returns ``out``.
        """
        if by % self.size == 0:
            return lambda: out.copy_(message)
        # Empty messages are skipped on both ends alike: both know the size.
        posted = [
            dist.P2POp(verb, tensor, self._peer(self.rank + step), self.group)
            for verb, tensor, step in ((dist.isend, message, by), (dist.irecv, out, -by))
            if tensor.numel()
        ]
        return _waiter(dist.batch_isend_irecv(posted) if posted else [], out)

    def exchange(
        self, send: Sequence[tuple[int, Tensor]], receive: Sequence[tuple[int, Tensor]]
    ) -> Callable[[], None]:
        """Messages between any ranks of the axis, each with how many places on its peer is.

        All are flat and contiguous and stay untouched until ``wait()``. Both ends of a message
        know its size; empty ones are skipped. Between two ranks they keep their order.
        """
        posted = [
            dist.P2POp(verb, tensor, self._peer(self.rank + step), self.group)
            for verb, messages in ((dist.isend, send), (dist.irecv, receive))
            for step, tensor in messages
            if tensor.numel()
        ]
        works = dist.batch_isend_irecv(posted) if posted else []

        def wait() -> None:
            while works:  # gloo would wait for a second message at a second wait
                works.pop().wait()

        return wait

    def all_gather(self, message: Tensor, whole: Tensor, sizes: Sequence[int]) -> Wait:
        """Everyone's flat message, of ``sizes[rank]`` elements, into ``whole`` in rank order."""
        outs = whole.split(list(sizes))
        if self.size > 1 and len(set(sizes)) == 1:
            work = _all_gather(whole, message, group=self.group, async_op=True)
            return _waiter([work], whole)
        # gloo has no uneven all-gather; point to point moves the same bytes.
        outs[self.rank].copy_(message)
        posted = []
        for step in range(1, self.size):
            to, source = (self.rank + step) % self.size, (self.rank - step) % self.size
            if message.numel():
                posted.append(dist.P2POp(dist.isend, message, self._peer(to), self.group))
            if outs[source].numel():
                posted.append(dist.P2POp(dist.irecv, outs[source], self._peer(source), self.group))
        return _waiter(dist.batch_isend_irecv(posted) if posted else [], whole)

    def all_to_all(self, messages: Tensor, send: Sequence[int], recv: Sequence[int]) -> Tensor:
        """Piece j of ``messages``, cut by ``send``, goes to rank j; what came in, in rank order.

        Args:
            messages: Flat, ``sum(send)`` elements.
            send, recv: Elements for and from each rank; uneven and 0 allowed.
        """
        if self.size == 1:
            return messages
        out = messages.new_empty(sum(recv))
        dist.all_to_all_single(out, messages, list(recv), list(send), group=self.group)
        return out

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over the axis, in place."""
        if self.size > 1:
            parts = torch.view_as_real(tensor) if tensor.is_complex() else tensor
            dist.all_reduce(parts, group=self.group)
        return tensor

    def gather_objects(self, item: Any) -> list[Any]:
        """Everyone's small picklable object, in rank order."""
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item, group=self.group)
        return items


def _waiter(works: Sequence[Any], out: Tensor) -> Wait:
    def wait() -> Tensor:
        for work in works:
            work.wait()
        return out

    return wait


def ensure_initialised() -> Launch | None:
    """Start the default process group from the launcher's environment if nobody has.

    Returns:
        What the launcher said; None where there was a process group.

    Raises:
        ValueError: there is neither a process group nor a launcher's environment, or it
            contradicts itself.
    """
    if dist.is_available() and dist.is_initialized():
        return None
    launch = launched_by() if dist.is_available() else None
    if launch is None:
        raise ValueError(
            "torch.distributed has no process group: run under torchrun or srun, or call "
            "torch.distributed.init_process_group first; one device needs no mesh (mesh=None)"
        )
    if launch.init_method is None:
        dist.init_process_group()
    else:
        dist.init_process_group(
            init_method=launch.init_method, rank=launch.rank, world_size=launch.world_size
        )
    return launch


def join_locally(
    store: str, rank: int, size: int, seconds: float, backend: str | None = "gloo"
) -> None:
    """Start the default process group, among processes of this machine.

    Args:
        store: A path by which they find each other.
        seconds: How long a rank waits for another.
        backend: Of torch's; None is what torch takes for the devices that are there.
    """
    loopback = {"Linux": "lo", "Darwin": "lo0"}.get(platform.system())
    if loopback:  # gloo would look up this machine's name to find an address
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
    dist.init_process_group(
        backend,
        store=dist.FileStore(store, size),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=seconds),
    )


def has_begun() -> bool:
    """Whether this process has a process group."""
    return dist.is_available() and dist.is_initialized()


def post(key: str, text: str) -> None:
    """Leave a word that other ranks find by ``posted``, without a collective."""
    _words().set(key, text)


def posted(keys: Sequence[str], seconds: float) -> list[str | None]:
    """Words that other ranks have left, each waited for until so many seconds are over."""
    store, end = _words(), time.monotonic() + seconds
    found: list[str | None] = []
    for key in keys:
        while not store.check([key]) and time.monotonic() < end:
            time.sleep(0.02)
        found.append(store.get(key).decode() if store.check([key]) else None)
    return found


def _words() -> Any:
    """A connection of our own: a thread that hangs may hold that of the process group."""
    store: Any = dist.distributed_c10d._get_default_store()
    return store.clone()


def axis_ranks(device_mesh: DeviceMesh, name: str) -> list[int] | None:
    """Global ranks along an axis of that name, also one that was flattened; None without one."""
    try:
        return group_ranks(device_mesh.get_group(name))
    except (KeyError, RuntimeError):
        return None


def group_ranks(group: dist.ProcessGroup | None) -> list[int]:
    """Global ranks of ``group``, of the whole world for None."""
    return dist.get_process_group_ranks(group if group is not None else dist.group.WORLD)


def global_rank() -> int:
    """This process's rank in the world."""
    return dist.get_rank()


def axis_groups(
    axes: Sequence[Sequence[Sequence[int]]], group: dist.ProcessGroup | None
) -> list[dist.ProcessGroup]:
    """This rank's process group along each axis of a mesh.

    Args:
        axes: Of each, the lines of global ranks along it; a rank is in one of them.
        group: Who calls this: the whole world (None), or just the ranks of the mesh.
    """
    mine = []
    for lines in axes:
        for line in lines:
            # All the world makes every group in the same order; a smaller group only its own.
            if group is None or global_rank() in line:
                made = dist.new_group(list(line), use_local_synchronization=group is not None)
                if global_rank() in line:
                    mine.append(made)
    return mine


def group_among(
    ranks: Sequence[int], gather: Callable[[Any], list[Any]]
) -> tuple[dist.ProcessGroup, list[int]]:
    """A process group of just these global ranks, made by all of them together at the first call.

    Args:
        ranks: This one among them; the same on all.
        gather: Everyone's small object.

    Returns:
        The group, which is that of the world where these are all ranks, and its ranks in the
        order of the group.

    Raises:
        ValueError: the ranks cannot agree on its name (``_agree_on_names``).
    """
    world = dist.group.WORLD
    assert world is not None
    if len(ranks) == dist.get_world_size():
        return world, group_ranks(world)
    wanted = frozenset(ranks)
    of_world, found = _AMONG.get(wanted, (None, None))
    if found is None or of_world is not world:
        counted = dist.distributed_c10d._world
        groups = gather((len(counted.pg_names), getattr(counted, "group_count", 0)))
        _agree_on_names(groups, among_some=True)
        found = dist.new_group(sorted(ranks), use_local_synchronization=True)
        _AMONG[wanted] = world, found
    return found, group_ranks(found)


# Groups that were made for a few ranks, each with the world that it belongs to.
_AMONG: dict[frozenset[int], tuple[Any, Any]] = {}


def compare_before_groups(
    group: dist.ProcessGroup | None, told: str, own: str | None, error: Exception | None
) -> None:
    """Collective over ``group``: raise on every rank where one refuses, or where they differ.

    Args:
        group: The ranks that are about to make process groups; None is the world.
        told: What this rank was asked for.
        own: What no other rank may have, if anything.
        error: This rank's own refusal.

    Raises:
        ValueError: another rank refused, was asked for something else or has the same ``own``;
            or the ranks cannot agree on names of groups (``_agree_on_names``). And ``error``
            itself.
    """
    everyone: list[Any] = [None] * dist.get_world_size(group)
    refusal = None if error is None else str(error)
    world = dist.distributed_c10d._world
    groups = len(world.pg_names), getattr(world, "group_count", 0)
    dist.all_gather_object(everyone, (told, own, refusal, groups), group=group)
    if error is not None:
        raise error
    owners: dict[str, int] = {}
    for rank, (other, claimed, message, _) in enumerate(everyone):
        if message is not None:
            raise ValueError(f"rank {rank} of the group refused: {message}")
        if other != told:
            raise ValueError(f"ranks of the group disagree: rank {rank} has {other}, this {told}")
        if claimed is not None and owners.setdefault(claimed, rank) != rank:
            raise ValueError(
                f"ranks {owners[claimed]} and {rank} would share one device ({claimed}): start as "
                'many processes as there are devices, or choose the device type "cpu"'
            )
    _agree_on_names([groups for *_, groups in everyone], among_some=group is not None)


def _agree_on_names(groups: list[tuple[int, int]], among_some: bool) -> None:
    """Let torch give the groups that ranks are about to make the same names on all of them.

    It names a group by how many groups its rank has counted, and waits forever where ranks found
    different names. Up to 2.13 groups that some ranks make among themselves do not count, but are
    named by how many groups the rank is in; with 2.15 they count, so a rank that made more of them
    than others is ahead. Numbers may be left out, and all go on from the highest.

    Args:
        groups: Of each rank, how many it is in, and how many it has counted.
        among_some: Whether the groups are made by some ranks only.

    Raises:
        ValueError: torch names such groups by how many a rank is in, and these numbers differ.
    """
    torch_groups = dist.distributed_c10d
    if hasattr(torch_groups._world, "group_count"):  # torch's own, and no promise
        torch_groups._world.group_count = max(counted for _, counted in groups)
    if not among_some or "group_count" in torch_groups._hash_ranks_to_str.__code__.co_names:
        return
    held = [held for held, _ in groups]
    if len(set(held)) > 1:
        raise ValueError(
            f"the ranks of the group have made {held} process groups so far, and torch can only "
            "make groups among some ranks where these numbers are equal: make the same groups on "
            "all of them, or build one DeviceMesh and use SequenceMesh.from_device_mesh"
        )
