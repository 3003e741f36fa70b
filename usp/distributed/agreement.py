"""Ranks compare what they were asked for, so that a difference is an error and not a hang.

They meet: a message of 48 bytes along each axis of the mesh says where in the program a rank is,
what it was asked for (a digest) and three numbers that the ranks need from each other. As every
meeting has the same size, ranks that are at different places of the program understand each
other, and each of them raises.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from usp.distributed.comm import untraced
from usp.distributed.mesh import SequenceMesh
from usp.planning.kinds import flag

Found = TypeVar("Found")
VALIDATE = ("first", "always", "never")
LENGTH_ADVICE = "pass the same seq_len= on all ranks, or on none"
PLACES = (
    "long_context_attention",
    "the backward of long_context_attention",
    "MultiheadAttention",
    "unshard_sequence",
    "all_reduce_gradients",
    "usp.rng.replicated",
    "usp.take",
    "usp.roll",
    "usp.mean",
    "usp.var",
    "usp.var_mean",
    "usp.held",
    "usp.cross_entropy",
    "usp.tiled_cross_entropy",
    "usp.dsp.switch",
    "usp.dsp.DynamicShard.of",
    "ShardedCache.extend",
    "linear_attention",
    "usp.causal_conv1d",
    "usp.schedule_documents",
    "something with meta or fake tensors, which have no values",
)
_NUMBERS = 4
_REFUSALS = {
    kind.__name__: kind
    for kind in (ValueError, TypeError, IndexError, NotImplementedError, RuntimeError)
}


@dataclass(frozen=True)
class Advised:
    """A fact, and what to do where ranks disagree on it."""

    value: object
    advice: str

    def __str__(self) -> str:
        return str(self.value)


# Always, never, where it must be, or at the "first" call of a graph; see ``meets``.
When = bool | str | None
# By name; ranks compare them as text.
Facts = dict[str, object]
Numbers = tuple[int, ...]


def check_validate(validate: str) -> None:
    """Refuse an unknown word for when ranks compare.

    Raises:
        ValueError: names it and those there are.
    """
    if not isinstance(validate, str) or validate not in VALIDATE:
        raise ValueError(f"validate must be one of {', '.join(VALIDATE)}, got {validate!r}")


def check_when(validate: object) -> None:
    """Refuse what ``meets`` does not know.

    Raises:
        TypeError: it is neither True, False nor None.
    """
    if validate is not None:
        flag("validate", validate)


def compares_now(validate: str, compared: bool) -> When:
    """Whether ranks compare at this call of a module: the ``validate`` of ``meets``, or "first"
    where a graph is made, which holds many calls.

    Args:
        validate: Of VALIDATE.
        compared: Whether they did before.
    """
    if validate == "never":
        return False
    if validate == "first" and torch.compiler.is_compiling():
        return validate
    return True if validate == "always" or not compared else None


def meets(mesh: SequenceMesh | None, validate: When, asks: bool) -> bool:
    """Whether the ranks of the mesh meet at this call; the same on all of them.

    Args:
        mesh: Its ranks; None is one device.
        validate: True or False: always, never. Else: at every call of a mesh of CPUs, and where
            there is something to ask; elsewhere a device would be waited for.
        asks: Whether a rank needs to know something of the others.
    """
    if mesh is None or mesh.size == 1:
        return False
    if isinstance(validate, bool):
        return validate
    return asks or mesh.device_type == "cpu"


@contextmanager
def _in_the_open() -> Iterator[None]:
    """In a transform of torch.func nothing can be sent, and a mode of fake tensors would answer for
    the other ranks."""
    with ExitStack() as stack:
        if torch._C._are_functorch_transforms_active():
            from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

            stack.enter_context(temporarily_clear_interpreter_stack())
        if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
            stack.enter_context(_disable_current_modes())
        yield


def check_on_all_ranks(
    mesh: SequenceMesh,
    place: str,
    check: Callable[[], Found],
    facts: Callable[[Found], Facts],
    numbers: Callable[[], Numbers] = tuple,
) -> tuple[Found, list[Numbers]]:
    """What ``check`` finds or raises, together with all ranks of the mesh.

    Args:
        mesh: All its ranks call this.
        place: Of PLACES: where in the program that is.
        check: Looks at what this rank was given.
        facts: What of its findings all ranks must agree on, by name.
        numbers: Up to four of 64 bits that the others are told.

    Returns:
        What was found, and the numbers of every rank.

    Raises:
        ValueError, TypeError, IndexError, NotImplementedError, RuntimeError: what ``check``
            raises here or on another rank, or a difference, with both values.
    """
    found, told, error = None, {}, None
    mine: Numbers = ()
    try:
        found = check()
        told, mine = facts(found), numbers()
    except Exception as refusal:  # whatever it is, the others must not wait for this rank
        error = refusal
    return cast(Found, found), _compare(mesh, place, told, error, mine)


def refuse_together(
    mesh: SequenceMesh | None, place: str, validate: When, refusal: Exception
) -> None:
    """Raise on all ranks what one refuses in a call before they meet in it.

    Args:
        mesh, validate: Of the call; see ``meets``. Where the ranks do not meet nothing happens,
            nor where a graph is made.
        place: Of PLACES: where the others are.
        refusal: To be raised by the caller behind this.
    """
    if torch.compiler.is_compiling() or not isinstance(mesh, SequenceMesh):
        return
    if meets(mesh, validate, False):
        _compare(mesh, place, {}, refusal, ())


def meet_without_values(mesh: SequenceMesh | None, validate: When) -> None:
    """Meet where tensors have no values, and nothing is computed or sent: all ranks do so, or all
    of them raise.

    Args:
        mesh, validate: Of the call; see ``meets``.
    """
    if mesh is not None and meets(mesh, validate, False) and not mesh.is_simulated:
        _compare(mesh, PLACES[-1], {}, None, ())


def meet_in_place_of(
    mesh: SequenceMesh | None, other: SequenceMesh | None, place: str, validate: When
) -> None:
    """Meet on a mesh before one of other degrees takes its place, so that a rank that does so alone
    is heard. One of fewer ranks is taken without: they may be alone in what they do.

    Args:
        mesh, place, validate: Of the call.
        other: The mesh in its place.
    """
    if mesh is None or other is None or other is mesh or torch.compiler.is_compiling():
        return
    if mesh.size == other.size and repr(mesh) != repr(other) and meets(mesh, validate, False):
        _compare(mesh, place, {"mesh": other}, None, ())


@untraced
@_in_the_open()
def _compare(
    mesh: SequenceMesh, place: str, facts: Facts, error: Exception | None, numbers: Numbers
) -> list[Numbers]:
    """Collective: a digest of what each rank was told; only where these differ what it was."""
    said = {name: str(fact) for name, fact in ({"mesh": mesh} | facts).items()}
    told = (said, type(error).__name__ if error else None, str(error))
    padded = (*numbers, *(0,) * (_NUMBERS - len(numbers)))
    everyone = mesh.gather_numbers(PLACES.index(place), digest(repr(told)), *padded)
    places = [PLACES[number] for number, *_ in everyone]
    if len(set(places)) > 1:
        other = next(rank for rank, there in enumerate(places) if there != places[0])
        raise ValueError(
            f"the ranks of the mesh are at different places of the program: rank 0 calls "
            f"{places[0]}, rank {other} calls {places[other]}; all must make the same calls in "
            "the same order, and run backward through the same outputs"
        ) from error
    if error is not None or len({said for _, said, *_ in everyone}) > 1:
        _refuse_differences(mesh.gather_objects(told), facts, error)
    return [tuple(rest) for _, _, *rest in everyone]


def digest(text: str) -> int:
    """64 bits that stand for a text."""
    found = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(found, "little", signed=True)


def _refuse_differences(
    everyone: list[tuple[dict[str, str], str | None, str]], facts: Facts, error: Exception | None
) -> None:
    """Raise what a rank refused, or what two of them were told differently."""
    if error is not None:
        raise error
    for rank, (_, kind, message) in enumerate(everyone):
        if kind is not None:
            raise _REFUSALS.get(kind, ValueError)(f"rank {rank} of the mesh refused: {message}")
    names = {name: None for said, _, _ in everyone for name in said}
    for name in names:
        # A rank that cannot tell leaves the fact out.
        values = [(rank, said[name]) for rank, (said, _, _) in enumerate(everyone) if name in said]
        for rank, value in values[1:]:
            if value != values[0][1]:
                raise ValueError(
                    f"ranks of the mesh disagree on {name}: rank {values[0][0]} has "
                    f"{values[0][1]}, rank {rank} has {value}{_advice(facts.get(name))}"
                )


def _advice(fact: object) -> str:
    return f"; {fact.advice}" if isinstance(fact, Advised) else ""


def new_name() -> int:
    """A number that no other call has; a call goes by that of the mesh's first rank."""
    return secrets.randbits(62)


def meet_in_backward(output: Tensor, mesh: SequenceMesh, name: int) -> None:
    """Have the ranks meet before the backward of the call that ``output`` came from.

    Args:
        output: Of an autograd node of its own.
        mesh, name: See ``meet_before_backward``.
    """
    if output.grad_fn is not None:
        output.grad_fn.register_prehook(lambda _: meet_before_backward(mesh, name))


def meet_before_backward(mesh: SequenceMesh, name: int) -> None:
    """Compare whose backward this is.

    Collectives of a backward find each other by order alone: ranks whose losses depend on
    different outputs would exchange gradients of different calls.

    Args:
        mesh: All its ranks were told ``name``.
        name: Of the call.
    """
    told: Facts = {
        "the call whose backward this is": Advised(
            f"call {name:x}",
            "every rank's loss must depend on the same outputs: add `0 * output.sum()` of "
            "those that it does not use",
        )
    }
    _compare(mesh, PLACES[1], told, None, ())
