"""A choice as code."""

from __future__ import annotations

import re

from usp import masks
from usp.cli.layouts import code_of_layout
from usp.planning.choose.job import Choice
from usp.planning.choose.search import Predicted
from usp.planning.masks.mask import Mask

_AXES = ("pp", "dp", "ring_outer", "ring", "ulysses", "tp")


def code_of(one: Predicted) -> str:
    """What makes the mesh and wraps a model whose blocks are ``model.layers``, each with an
    ``attention`` of q, k, v and an ``mlp``."""
    choice, job = one.choice, one.job
    device = job.cluster.device
    nodes, node = job.cluster.nodes(job.devices), min(job.cluster.node, job.devices)
    start = f"torchrun --nnodes {nodes} --nproc-per-node {node} train.py"
    if job.cluster.name == "frontier":  # whose launcher gives each process a GCD
        start = f"srun -N {nodes} -n {job.devices} -c7 --gpus-per-task=1 python train.py"
    parts = [
        f"# {start}",
        *_imports(choice),
        "",
        *_mesh(choice, device),
        *_attention(one),
        *_savers(choice, job.model.vocabulary > 0),
        *_sharing(choice, device),
        *_step(choice),
    ]
    return "\n".join(parts)


def _imports(choice: Choice) -> list[str]:
    lines = ["import usp"]
    if choice.checkpointing == "attention":
        lines.insert(0, "from functools import partial")
        lines.insert(1, "import torch")
    if choice.checkpointing != "none":
        names = ", create_selective_checkpoint_contexts" * (choice.checkpointing == "attention")
        lines.append(f"from torch.utils.checkpoint import checkpoint{names}")
    if choice.devices > choice.sp or choice.fsdp > 1:
        lines.append("from torch.distributed.device_mesh import init_device_mesh")
    if choice.fsdp > 1:
        policy = "CPUOffloadPolicy, " if choice.offload == "states" else ""
        lines.append(f"from torch.distributed.fsdp import {policy}fully_shard")
    return lines


def _mesh(choice: Choice, device: str) -> list[str]:
    if choice.devices == choice.sp and choice.fsdp == 1:
        outer = f"ring_outer_degree={choice.ring_outer}, " if choice.ring_outer > 1 else ""
        return [
            f"mesh = usp.init_mesh(ulysses_degree={choice.ulysses}, ring_degree={choice.ring}, "
            f'{outer}device_type="{device}")'
        ]
    degrees = {name: getattr(choice, name) for name in _AXES}
    degrees["ring"] //= choice.ring_outer  # of a DeviceMesh it is the axis inside a node
    names = [name for name in _AXES if degrees[name] > 1 or name in ("ring", "ulysses")]
    sizes = ", ".join(str(degrees[name]) for name in names)
    return [
        f"names = {_quoted(names)}",
        f'world = init_device_mesh("{device}", ({sizes}), mesh_dim_names=names)',
        "mesh = usp.SequenceMesh.from_device_mesh(world)",
    ]


def _quoted(names: list[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)


def _attention(one: Predicted) -> list[str]:
    choice, job = one.choice, one.job
    mask = f"mask={_code_of_mask(job.mask)}" if job.mask is not None else ""
    causal = "causal=True" if job.model.causal and job.mask is None else ""
    how = [causal, mask, f"layout={code_of_layout(choice.layout)}"]
    if choice.ring > 1:
        how.append(f'transport="{choice.transport}"')
    how.append(f"seq_len={job.seq_len}")
    if choice.chunks > 1:
        how.append(f'chunks={choice.chunks}, offload="cpu"')
    if choice.head_chunks > 1:
        how.append(f"head_chunks={choice.head_chunks}")
    options = f"options = dict({', '.join(filter(None, how))})"
    if job.model.latent:
        return [
            options,
            "# each attention: usp.latent_attention(q, latent, rope_key, up_k, up_v, mesh, "
            "**options)",
        ]
    return [
        options,
        "for layer in model.layers:  # what takes and returns (batch, tokens, heads, head dim)",
        "    layer.attention = usp.LongContextAttention(mesh, **options)",
    ]


def _code_of_mask(mask: Mask) -> str:
    """Masks print themselves as calls; of which module, the code says."""
    return re.sub(rf"\b({'|'.join(masks.__all__)})\(", r"usp.masks.\1(", repr(mask))


def _savers(choice: Choice, has_logits: bool) -> list[str]:
    lines = []
    if choice.tiles == "mlp+loss":
        lines.append('model = usp.replace_mlp(model, tiles=8, only="*.mlp")')
    if choice.tiles != "none" and has_logits:
        lines.append("# the loss: usp.tiled_cross_entropy(hidden, head.weight, labels, mesh)")
    if choice.checkpointing == "attention":
        lines += [
            "ops = [torch.ops.usp.attention.default]",
            "saved = partial(create_selective_checkpoint_contexts, ops)",
            "# in the forward: x = checkpoint(layer, x, use_reentrant=False, context_fn=saved)",
        ]
    elif choice.checkpointing == "full":
        lines.append("# in the forward: x = checkpoint(layer, x, use_reentrant=False)")
    if choice.offload != "none":
        lines.append("# around it: with torch.autograd.graph.save_on_cpu(pin_memory=True):")
    if choice.tp > 1 or choice.pp > 1:
        lines.append("# tp and pp: examples/train_hybrid.py does it with all five axes")
    return lines


def _sharing(choice: Choice, device: str) -> list[str]:
    if choice.fsdp == 1:
        return []
    replicas = choice.dp * choice.sp // choice.fsdp
    if choice.tp * choice.pp > 1:
        outer = choice.ring_outer
        held = {"dp": choice.dp, "ring_outer": outer, "ring": choice.ring // outer}
        held["ulysses"] = choice.ulysses
        names = [name for name, degree in held.items() if degree > 1]
        made = f"world[{_quoted(names)}]"
        made += '._flatten("all")' if len(names) > 1 else ""
    elif replicas == 1:
        made = 'world._flatten("all")'
    else:
        made = f'init_device_mesh("{device}", ({replicas}, {choice.fsdp}), '
        made += 'mesh_dim_names=("replica", "shard"))'
    offload = ", offload_policy=CPUOffloadPolicy()" if choice.offload == "states" else ""
    return [
        f"shared = {made}",
        "for module in (*model.layers, model):",
        f"    fully_shard(module, mesh=shared{offload})",
        "# FSDP averages over all, the ranks of a sequence add: (loss * mesh.size).backward()",
    ]


def _step(choice: Choice) -> list[str]:
    lines = [
        f"# {choice.micro} sample{'s' * (choice.micro > 1)} at a time, cut by "
        f"usp.shard_sequence(x, mesh, dim=1, layout={code_of_layout(choice.layout)})"
    ]
    if choice.fsdp == 1:
        group = ', world.get_group("dp")' if choice.dp > 1 else ""
        lines.append(f"# after the last backward: usp.all_reduce_gradients(model, mesh{group})")
    return lines
