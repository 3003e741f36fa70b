"""What the ranks tell each other before ``MultiheadAttention``, as an op of a graph.

What is to be compared is known while the graph is made, but for sizes that are symbols there; what
a rank holds, the seed that it drew and its tokens are known when the graph runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from usp.distributed.agreement import Facts, When, check_on_all_ranks, meets
from usp.distributed.graph import has_effect, saved_in_graph
from usp.distributed.mesh import SequenceMesh, mesh_of
from usp.nn.multihead.uncut import content, refuse_equal

PLACE = "MultiheadAttention"
_LIBRARY = torch.library.Library("usp", "FRAGMENT")


def meet_in_graph(
    mesh: SequenceMesh,
    facts: Facts,
    tokens: tuple[int, int],
    seed: Tensor | None,
    keys: tuple[Tensor, int, bool],
    validate: When,
) -> Tensor | None:
    """The seed of the first rank where this one drew one.

    Args:
        facts: What all ranks must agree on, by name.
        tokens: Local queries and keys.
        seed: () int64 on the CPU, or None.
        keys: As given, their dim of tokens, and whether they must differ between ranks.
        validate: As in ``agreement.meets``, or "first".
    """
    # a size stands where its text would: it may be a symbol
    sizes = {name: fact for name, fact in facts.items() if isinstance(fact, int | torch.SymInt)}
    sizes = {name: size for name, size in sizes.items() if not isinstance(size, bool)}
    texts = ["" if name in sizes else str(fact) for name, fact in facts.items()]
    found = torch.ops.usp.meet_multihead(
        keys[0].detach(),
        *keys[1:],
        seed,
        mesh.name,
        list(facts),
        texts,
        list(sizes),
        list(sizes.values()),
        tokens,
        validate if isinstance(validate, bool) else None,
        validate == "first",
    )
    return None if seed is None else cast(Tensor, found)


def _meet(
    key: Tensor,
    token_dim: int,
    differ: bool,
    seed: Tensor | None,
    mesh: str,
    names: Sequence[str],
    texts: Sequence[str],
    sized: Sequence[str],
    sizes: Sequence[int],
    tokens: Sequence[int],
    validate: bool | None,
    is_first: bool,
) -> Tensor:
    on = mesh_of(mesh)
    if is_first:
        kind = repr((PLACE, names, texts, differ))
        validate = None if kind in on.compared else True
        on.compared.add(kind)
    drawn = torch.zeros((), dtype=torch.int64, device="cpu") if seed is None else seed.clone()
    if not meets(on, validate, seed is not None):
        return drawn
    facts: Facts = dict(zip(names, texts, strict=True)) | dict(zip(sized, sizes, strict=True))
    _, told = check_on_all_ranks(
        on,
        PLACE,
        lambda: None,
        lambda _: facts,
        lambda: (
            *tokens,
            int(drawn),
            content(key, token_dim) if differ and validate else 0,
        ),
    )
    refuse_equal([numbers[3] for numbers in told], tokens[1])
    return torch.tensor(told[0][2], device="cpu")


def _below_autograd(*args: Any) -> Tensor:
    with saved_in_graph(), torch._C._AutoDispatchBelowAutograd():
        return cast(Tensor, torch.ops.usp.meet_multihead(*args))


_LIBRARY.define(
    "meet_multihead(Tensor key, int token_dim, bool differ, Tensor? seed, str mesh, str[] names, "
    "str[] texts, str[] sized, SymInt[] sizes, SymInt[] tokens, bool? validate, bool is_first) "
    "-> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.impl("meet_multihead", _meet, "CompositeExplicitAutograd")
torch.library.register_fake(
    "usp::meet_multihead",
    lambda *_: torch.empty((), dtype=torch.int64, device="cpu"),
    lib=_LIBRARY,
)
_LIBRARY.impl("meet_multihead", _below_autograd, "Autograd")
has_effect(torch.ops.usp.meet_multihead.default)
