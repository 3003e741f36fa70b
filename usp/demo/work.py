"""What each process of the demo does: train, one plain step, one sharded step."""

from __future__ import annotations

import os
import platform
from datetime import timedelta

import torch
from torch import Tensor

import usp
from usp.demo.attention_map import attention_rows, query_patches, record_attention_inputs
from usp.demo.image import cut_patches, load_photograph
from usp.demo.limit import OutOfMemory, Refusal, memory_limit
from usp.demo.measure import Cost, measured_step
from usp.demo.model import PatchTransformer, train
from usp.demo.settings import Settings
from usp.distributed.processes import Tell
from usp.testing import WireBytes

WEIGHTS, PATCHES, PLAIN, SHARDED = "weights.pt", "patches.pt", "plain.pt", "sharded.pt"
LONG = "long.pt"
_FEW = 64


def train_model(settings: Settings, rank: int, tell: Tell) -> list[float]:
    """Cut the patches, train the weights a little, leave both in files; the losses."""
    # Small windows: threads would wait for each other more than they work.
    torch.set_num_threads(1)
    torch.manual_seed(0)
    patches = cut_patches(load_photograph(), settings.grid)
    model = settings.model()
    losses: list[float] = []

    def on_step(step: int, loss: float) -> None:
        losses.append(loss)
        tell(step, settings.train_steps)

    train(model, patches, settings.grid, steps=settings.train_steps, on_step=on_step)
    torch.save(model.state_dict(), settings.file(WEIGHTS))
    torch.save(patches, settings.file(PATCHES))
    return losses


def plain_step(settings: Settings, rank: int, tell: Tell) -> Cost:
    """Forward and backward with `nn.MultiheadAttention` in one process."""
    # On a GPU only if the sharded run has one for each process: the two are compared.
    model, patches = _load(settings, torch.device(device_type(settings.processes)))
    cost, values = measured_step(settings, model, patches, None, tell)
    values |= _parameter_gradients(model)
    torch.save({name: value.cpu() for name, value in values.items()}, settings.file(PLAIN))
    return cost


def alone_step(settings: Settings, rank: int, tell: Tell) -> Cost | OutOfMemory:
    """Forward and backward with `usp.MultiheadAttention` in one process."""
    model, patches = _load(settings, torch.device(device_type(settings.processes)))
    usp.replace_attention(model, None)
    with Refusal() as refusal, memory_limit(settings.limit):
        cost, _ = measured_step(settings, model, patches, None, tell)
    return cost if refusal.found is None else refusal.found


def sharded_step(settings: Settings, rank: int, tell: Tell) -> Cost:
    """This rank's part of forward and backward with `usp.MultiheadAttention`."""
    device = _join(settings, rank)
    try:
        mesh = usp.init_mesh(settings.ulysses_degree, settings.ring_degree, device_type=device.type)
        model, patches = _load(settings, device)
        # No comparing of arguments at the first call: the bytes to count are attention's own.
        usp.replace_attention(
            model,
            mesh,
            layout=settings.layout,
            seq_len=settings.tokens,
            validate="never",
        )
        inputs = record_attention_inputs(model)
        with memory_limit(settings.limit):
            cost, values = measured_step(settings, model, patches, mesh, tell)
        usp.all_reduce_gradients(model, mesh)
        values |= _parameter_gradients(model)
        for name in ("output", "gradient of the patches"):
            values[name] = usp.unshard_sequence(
                values[name], mesh, 1, settings.layout, settings.tokens
            )
        if settings.times == 1:
            values["attention"] = attention_rows(
                settings, mesh, model.last_attention, inputs[0], query_patches(patches[0])
            )
        if rank == 0:
            file = settings.file(SHARDED if settings.times == 1 else LONG)
            torch.save({name: v.cpu() for name, v in values.items()}, file)
        return cost
    finally:
        torch.distributed.destroy_process_group()


def _join(settings: Settings, rank: int) -> torch.device:
    """Enter the process group, on a GPU of one's own if there are enough, else on the CPU."""
    device = torch.device(device_type(settings.processes))
    if device.type == "cpu":
        _set_threads(settings.processes)
    else:
        device = torch.device(device.type, rank)
        torch.accelerator.set_device_index(rank)
    # gloo would look up this machine's name to find an address; loopback is enough here.
    loopback = {"Linux": "lo", "Darwin": "lo0"}.get(platform.system())
    if loopback:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
    torch.distributed.init_process_group(
        "gloo" if device.type == "cpu" else None,
        # not by its URL: torch takes %20 for a part of the name
        store=torch.distributed.FileStore(
            str(settings.file(f"rendezvous-{settings.times}")), settings.processes
        ),
        rank=rank,
        world_size=settings.processes,
        timeout=timedelta(minutes=10),
    )
    return device


def device_type(processes: int) -> str:
    """Where the steps run that are compared."""
    enough = torch.cuda.is_available() and torch.cuda.device_count() >= processes
    return "cuda" if enough else "cpu"


def _set_threads(processes: int) -> None:
    torch.set_num_threads(max(1, torch.get_num_threads() // processes))


def _load(settings: Settings, device: torch.device) -> tuple[PatchTransformer, Tensor]:
    """The trained model and the whole sequence of patches (1, tokens, patch_dim)."""
    model = settings.model()
    model.load_state_dict(torch.load(settings.file(WEIGHTS)))
    patches = torch.load(settings.file(PATCHES))[None].repeat(1, settings.times, 1)
    model = model.to(device, settings.parameter_dtype)
    patches = patches.to(device, settings.parameter_dtype)
    _touch(settings, patches[:, :_FEW])
    return model, patches


def _touch(settings: Settings, few: Tensor) -> None:
    """A step over a few patches, by torch and by usp: threads, modules that are imported late and
    pages of libraries are no memory of the step's own."""
    shape = few.shape[:2]
    for replaced in (False, True):
        model = settings.model().to(few.device, few.dtype)
        if replaced:
            usp.replace_attention(model, None)
        with settings.autocast(few.device.type), WireBytes():
            output = model(few, few.new_zeros(*shape, 2), few.new_zeros(shape, dtype=torch.bool))
        output.sum().backward()


def _parameter_gradients(model: PatchTransformer) -> dict[str, Tensor]:
    return {f"gradient of {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
