"""A model that exists, its tokens spread over ranks: whole in, whole out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

from torch import nn

from usp.attention.chunk_options import in_chunks, refuse_chunks
from usp.attention.given import Options
from usp.distributed.mesh import SequenceMesh, check_mesh
from usp.integrations._boundary import Boundary
from usp.integrations._choice import Only, any_means, choices, means, outermost, shortened
from usp.integrations._cut import Cut, CutTrunk
from usp.integrations._families import family
from usp.integrations._led import lead_through
from usp.integrations._parts import Across, Alone, Local, Multihead, Reader, Samples, States
from usp.integrations._sites import Block, Inside, Whole
from usp.integrations._tiles import of_trunk, tiled_sites
from usp.integrations._trunk import Trunk
from usp.nn.across import drops_samples, reason
from usp.nn.multihead.module import check_class
from usp.nn.site import Site
from usp.nn.tiled.module import Tiled
from usp.planning.layout import Layout, check_layout

Model = TypeVar("Model", bound=nn.Module)


def parallelize(
    model: Model,
    mesh: SequenceMesh | None,
    trunk: str | Boundary | Sequence[str | Boundary] | None = None,
    *,
    layout: Layout = "contiguous",
    outputs: str = "joined",
    validate: bool | None = None,
    tiles: int | None = None,
    chunks: int = 1,
    head_chunks: int = 1,
    offload: str | None = None,
) -> Model:
    """Spread the tokens of a model over the ranks of a mesh, in place.

    Its forward takes and returns what it did, the same on every rank; in its trunk, modules that
    follow each other, each rank has its own tokens, and attention is that of the whole sequence:
    ``nn.MultiheadAttention``, and whatever calls ``F.scaled_dot_product_attention`` or
    ``flex_attention``. The loss stays as it was; the sum over the ranks of a parameter's gradients
    is that of one device: ``usp.all_reduce_gradients(model, mesh)`` after ``backward``, or DDP or
    FSDP with ``loss * mesh.size``.

    Parameters, their names and hooks stay. The model copies and pickles, its modules may be
    checkpointed or compiled; called by themselves, outside of a forward, they are as they were.

    Args:
        model: What ends in the outputs that make the loss.
        mesh: The ranks that share the sequence, seeded alike; None is one device.
        trunk: Where tokens are spread: a name as in ``named_modules``, or a ``usp.Boundary``, or
            several of these; None for models that are known.
        layout: Which token goes where; a rule, for each forward has its own length.
        outputs: "joined": whole in and whole out. "local", for language models: the model is given
            this rank's tokens and their ``spread`` (``usp.cut_batch`` makes both) and returns what
            is theirs, so that no rank ever holds all logits. The gradient rule is the same; the
            loss is this rank's part of the mean over all valid tokens (``usp.cross_entropy``).
        validate: See ``long_context_attention``.
        tiles: In how many tiles of this rank's tokens the MLPs of the trunk compute; None: in one,
            which is kept (``usp.tiled_mlp``).
        chunks, head_chunks, offload: How attention in the trunk is worked off: see
            ``long_context_attention``. With one of them it is usp's on one device, too.

    Returns:
        ``model``.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: the trunk is not known or not there, or the model is parallelized already.
        NotImplementedError: a module in the trunk looks at several tokens and is no attention that
            could be answered; names it. Nothing has been changed. In a forward: a module that must
            hold attention called none; what is left undone is named.
    """
    check_mesh(mesh)
    if not isinstance(check_layout(layout), str):
        raise ValueError(
            f"layout {layout!r} is made for one length: parallelize takes a rule, as forwards have "
            "a length each"
        )
    if any(_site(m) and not isinstance(_site(m), Tiled) for m in model.modules()):
        raise ValueError(
            f"{type(model).__qualname__} is parallelized, or a part of it is: usp.restore(model) "
            "first"
        )
    lead_through()
    names = dict(model.named_modules(remove_duplicate=False))
    boundaries = trunks_of(model, trunk)
    if outputs not in ("joined", "local"):
        raise ValueError(f'outputs must be "joined" or "local", got {outputs!r}')
    is_local = outputs == "local"
    if is_local:
        _check_local(boundaries, names, layout, mesh)
    in_pieces = Options(chunks=chunks, head_chunks=head_chunks, offload=offload)
    refuse_chunks(in_pieces)
    pieces = {"chunks": chunks, "head_chunks": head_chunks, "offload": offload}
    pieces = pieces if in_chunks(in_pieces) else {}
    sites: list[Site] = []
    trunks: list[Trunk] = []
    for boundary in boundaries:
        blocks = boundary.blocks(model)
        dims = {boundary.token_dim(block) for block in blocks.values()}
        if len(dims) > 1:
            raise ValueError(f"modules of {boundary.trunk} have tokens along dims {sorted(dims)}")
        kind = CutTrunk if is_local else Trunk
        trunks.append(kind(mesh, layout, validate, boundary, dims.pop(), pieces))
        if tiles is not None:
            sites += tiled_sites(names, of_trunk(boundary, blocks, names), tiles)
        sites += _sites(trunks[-1], blocks, names)
    first = trunks[0]
    whole = Cut(model, mesh, first) if isinstance(first, CutTrunk) else Whole(model, mesh, trunks)
    for site in sites:
        site.place()
    whole.place()
    _keep_from_nesting(model, whole)
    return model


def restore(model: Model) -> Model:
    """Undo ``parallelize`` and ``replace_mlp``, in place.

    Args:
        model: A model that was, or one that was not, which stays as it is.

    Returns:
        ``model``.
    """
    for module in model.modules():
        while (site := _site(module)) is not None:
            site.remove()
    return model


def _site(module: nn.Module) -> Site | None:
    found = module.__dict__.get("forward")
    return found if isinstance(found, Site) else None


def trunks_of(
    model: nn.Module, trunk: str | Boundary | Sequence[str | Boundary] | None
) -> Sequence[Boundary]:
    """Where tokens are spread, of ``parallelize``'s argument.

    Raises:
        TypeError: it is of another kind.
        ValueError: the trunk is not known or not there.
    """
    given = [trunk] if isinstance(trunk, str | Boundary) else trunk
    found = family(model) if given is None else [_boundary(item) for item in given]
    for boundary in found:
        boundary.blocks(model)
    return found


def _boundary(item: str | Boundary) -> Boundary:
    if isinstance(item, str):
        return Boundary(item)
    if isinstance(item, Boundary):
        return item
    raise TypeError(f"trunk must be a name, a usp.Boundary or several, got {item!r}")


def _sites(
    trunk: Trunk, blocks: Mapping[str, nn.Module], names: Mapping[str, nn.Module]
) -> list[Site]:
    """What stands in the place of the modules of a trunk; the outer ones behind the inner."""
    boundary, inside = trunk.boundary, _inside(trunk.boundary, blocks, names)
    _refuse_across(boundary.trunk, inside, trunk.mesh)
    attention = _outermost(boundary.attention, names, inside)
    sites: list[Site] = []
    across, alone = _of_others(boundary, names, inside)
    for name, module in reversed(inside.items()):
        if isinstance(module, nn.MultiheadAttention):
            _check_multihead(name, module)
            sites.append(Multihead(module, name, trunk))
        elif drops_samples(module):
            sites.append(Samples(module, name, trunk, False))
        elif name in across:
            sites.append(Across(module, name, trunk, across[name]))
        elif name in alone:
            sites.append(Alone(module, name, trunk, True))
        elif name not in blocks and (name in attention or not _is_of_torch(module)):
            sites.append(Inside(module, name, trunk, name in attention))
    sites += [
        Local(module, name, trunk)
        for name, module in _named(blocks)
        if any_means(boundary.local, name, names)
    ]
    reads = outermost(name for name in names if any_means(boundary.reads, name, names))
    sites += [Reader(names[name], name, trunk) for name in reads]
    holder = boundary.trunk.rpartition(".")[0]
    if boundary.states:
        sites.append(States(names[holder], holder, trunk))
    if trunk.mesh is not None and trunk.mesh.size > 1:  # refuses what would be wrong
        if boundary.check is not None:
            boundary.check(names[holder])
        if boundary.attributes is not None:
            for name in attention:
                boundary.attributes(names[name])
    last = len(blocks) - 1
    for index, (name, block) in enumerate(blocks.items()):
        must_answer = boundary.attention is None or name in attention
        sites.append(Block(block, name, trunk, must_answer, (index == 0, index == last)))
    return sites


def _refuse_across(where: str, modules: Mapping[str, nn.Module], mesh: SequenceMesh | None) -> None:
    faults = [
        f"{name} ({type(m).__qualname__}): {why}"
        for name, m in modules.items()
        if (why := reason(m))
    ]
    if faults and mesh is not None and mesh.size > 1:
        raise NotImplementedError(
            f"{where} holds modules that look at several tokens, and would see this "
            f"rank's own alone: {shortened(faults)}. End the trunk before them, or, where each "
            "means its own tokens, name them in usp.Boundary(local=...)"
        )


def _check_local(
    boundaries: Sequence[Boundary],
    names: Mapping[str, nn.Module],
    layout: Layout,
    mesh: SequenceMesh | None,
) -> None:
    """Where outputs are local, everything in the model sees this rank's tokens alone."""
    if len(boundaries) != 1:
        raise ValueError(f'outputs="local" takes a model of one trunk, got {len(boundaries)}')
    if layout != "contiguous":
        raise ValueError(
            f'layout={layout!r} beside outputs="local": each batch says its own, '
            "usp.cut_batch(batch, mesh, layout)"
        )
    (boundary,) = boundaries
    if boundary.joint is not None:
        raise NotImplementedError(
            f"{boundary.trunk} has two streams of tokens ({boundary.joint.argument}): a model is "
            'given one cut sequence where outputs="local"'
        )
    if boundary.reads:
        raise NotImplementedError(
            f"modules beside {boundary.trunk} look at several tokens of what is between its "
            f'modules ({boundary.reads!r}), and where outputs="local" no rank has them'
        )
    outside = {n: m for n, m in names.items() if not any_means(boundary.local, n, names)}
    _refuse_across(type(names[""]).__qualname__, outside, mesh)


def _inside(
    boundary: Boundary, blocks: Mapping[str, nn.Module], names: Mapping[str, nn.Module]
) -> dict[str, nn.Module]:
    """All modules in the trunk that are not local, each once, by name."""
    found: dict[nn.Module, str] = {}
    for name, module in _named(blocks):
        if not any_means(boundary.local, name, names):
            found.setdefault(module, name)
    return {name: module for module, name in found.items()}


def _named(blocks: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    for prefix, block in blocks.items():
        yield from block.named_modules(prefix=prefix)


def _is_of_torch(module: nn.Module) -> bool:
    return type(module).__module__.partition(".")[0] == "torch"


def _outermost(
    only: Only | None, names: Mapping[str, nn.Module], among: Mapping[str, nn.Module]
) -> list[str]:
    """Names of modules that are meant, without what these hold."""
    if only is None:
        return []
    for choice in choices(only):
        if not any(means(choice, name, names) for name in among):
            raise ValueError(f"{choice!r} means no module of the trunk: {shortened(among)}")
    return outermost(name for name in among if any_means(only, name, names))


def _of_others(
    boundary: Boundary, names: Mapping[str, nn.Module], among: Mapping[str, nn.Module]
) -> tuple[dict[str, str], list[str]]:
    """Attention that looks at tokens which all hold whole, with the argument that holds these; and
    that which sees the first of two streams alone. A family's models need not have either."""

    def found(patterns: Only) -> list[str]:
        there = [p for p in choices(patterns) if any(means(p, name, names) for name in among)]
        return _outermost(there, names, among) if there else []

    across = {name: boundary.whole[p] for p in boundary.whole for name in found(p)}
    return across, [] if boundary.joint is None else found(boundary.joint.alone)


def _check_multihead(name: str, module: nn.MultiheadAttention) -> None:
    try:
        check_class(module)
    except NotImplementedError as refusal:
        raise NotImplementedError(f"cannot answer for {name}: {refusal}") from None


def _keep_from_nesting(model: nn.Module, whole: Whole) -> None:
    """Encoders of torch would hand padded tokens on as NestedTensors in evaluation."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and module.use_nested_tensor:
            module.use_nested_tensor = False
            whole.nested_tensors.append(module)
