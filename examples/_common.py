"""What the training examples share: options, processes, a bar, the curve, and going on later."""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh

import usp

# torch says so of each checkpoint of one process by itself
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
# each parameter's state under the parameter's name: a rank may have other ones than the next
BY_NAME = StateDictOptions(flatten_optimizer_state_dict=True)
Batch = TypeVar("Batch")
Train = Callable[[argparse.Namespace, "usp.SequenceMesh | None", torch.device], list[float]]


def parser(description: str, layouts: list[str], steps: int = 50) -> argparse.ArgumentParser:
    """The options of all; the first layout is what is taken."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--ulysses", type=int, default=1, help="ranks that share heads")
    options.add_argument("--ring", type=int, default=1, help="ranks that pass keys around")
    options.add_argument("--layout", default=layouts[0], choices=layouts)
    options.add_argument("--steps", type=int, default=steps)
    options.add_argument("--lr", type=float, default=1e-3)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--device", help="cpu or cuda; by default a GPU for each process, if any")
    options.add_argument("--log-every", type=int, default=10)
    options.add_argument("--plot", metavar="PNG", help="draw the losses")
    options.add_argument("--save", metavar="FOLDER", help="save checkpoints in there")
    options.add_argument("--save-every", type=int, default=0, help="steps; 0 is behind the last")
    options.add_argument(
        "--resume", metavar="FOLDER", help="go on from the newest in there, if any"
    )
    options.add_argument("--compare", action="store_true", help="then train again on one process")
    return options


class Run:
    """The steps of one training, from where the last one ended, whatever its mesh was.

    Attributes:
        losses: Of all steps, those before this run included.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        mesh: usp.SequenceMesh | DeviceMesh | None,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self.args, self.mesh, self.model, self.optimizer = args, mesh, model, optimizer
        self.losses: list[float] = []
        self._is_first = mesh is None or dist.get_rank() == 0
        if args.resume:
            self._resume()

    def over(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches that are left; each is behind us when the loop comes back for the next."""
        first, began = len(self.losses), time.perf_counter()
        for batch in islice(batches, first, self.args.steps):
            yield batch
            step = len(self.losses)
            if self._is_first:
                self._tell(step, (time.perf_counter() - began) / (step - first))
            every = self.args.save_every
            if self.args.save and (step == self.args.steps or (every and step % every == 0)):
                dcp.save(self._state(), checkpoint_id=self._folder(step), no_dist=self.mesh is None)

    def step(self, loss: Tensor) -> None:
        """Backward and one step, with the gradients of all ranks; ``loss`` is this rank's part."""
        loss.backward()
        usp.all_reduce_gradients(self.model, self.mesh)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _tell(self, step: int, seconds: float) -> None:
        """A bar where somebody looks, and a line now and then."""
        steps, loss = self.args.steps, self.losses[-1]
        if sys.stderr.isatty():
            bar = ("=" * (30 * step // steps)).ljust(30)
            left = f"{(steps - step) * seconds:.0f} s left"
            print(f"\r[{bar}] {step}/{steps}  loss {loss:.4f}  {left}  ", end="", file=sys.stderr)
            if step == steps or step % self.args.log_every == 0:
                print("\r" + " " * 75, end="\r", file=sys.stderr, flush=True)
        if step % self.args.log_every == 0:
            print(f"step {step:4}  loss {loss:.6f}", flush=True)

    def _folder(self, step: int) -> Path:
        return Path(self.args.save) / f"step-{step:06}"

    def _state(self) -> dict[str, object]:
        """Nothing of a mesh is in it: ranks draw in step, so one state is that of all."""
        model, optimizer = get_state_dict(self.model, self.optimizer, options=BY_NAME)
        losses = torch.zeros(self.args.steps, dtype=torch.float64)
        losses[: len(self.losses)] = torch.tensor(self.losses)
        return {"model": model, "optimizer": optimizer, "random": torch.get_rng_state()} | {
            "losses": losses,
            "step": torch.tensor(len(self.losses)),
        }

    def _resume(self) -> None:
        """A checkpoint counts once its ``.metadata`` is there, which is written last."""
        found = [str(max(Path(self.args.resume).glob("step-*/.metadata"), default=""))]
        if self.mesh is not None:
            dist.broadcast_object_list(found, 0)
        if not found[0]:
            return
        state = self._state()
        folder = Path(found[0]).parent
        state["losses"] = torch.zeros(_length(folder), dtype=torch.float64)
        dcp.load(state, checkpoint_id=folder, no_dist=self.mesh is None)
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=BY_NAME,
        )
        torch.set_rng_state(state["random"])
        self.losses = state["losses"][: int(state["step"])].tolist()
        if self._is_first:
            print(f"going on behind step {len(self.losses)}, from {folder}", flush=True)


def added(loss: Tensor, mesh: usp.SequenceMesh | None) -> Tensor:
    """The loss of the whole, from this rank's part of it."""
    total = loss.detach().clone()
    if mesh is not None:
        dist.all_reduce(total)
    return total


def _length(folder: Path) -> int:
    """Of the losses in a checkpoint, which may be of another number of steps."""
    metadata = dcp.FileSystemReader(folder).read_metadata()
    return metadata.state_dict_metadata["losses"].size[0]


def draw(losses: list[float], file: str, title: str) -> None:
    """The loss curve as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    axes.plot(range(1, len(losses) + 1), losses, linewidth=1.5)
    axes.set(xlabel="step", ylabel="loss", title=title)
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def start(args: argparse.Namespace) -> tuple[usp.SequenceMesh | None, torch.device]:
    """The mesh of all processes, None for one by itself, and the device of this one."""
    if args.ulysses * args.ring > 1 or "RANK" in os.environ or "SLURM_PROCID" in os.environ:
        # Makes this process's own device the current one, or says why there is none.
        mesh = usp.init_mesh(args.ulysses, args.ring, device_type=args.device)
        return mesh, torch.device(mesh.device_type)
    accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    return None, torch.device(args.device or accelerator)


def main(args: argparse.Namespace, train: Train) -> int:
    """Train on all processes; afterwards the picture, and the same on one process."""
    mesh, device = start(args)
    began, status = time.perf_counter(), 0
    losses = train(args, mesh, device)
    if mesh is None or mesh.rank == 0:
        world, seconds = 1 if mesh is None else mesh.size, time.perf_counter() - began
        print(f"{args.steps} steps on {world} process(es): {seconds:.1f} s")
        if args.plot:
            draw(losses, args.plot, f"{Path(sys.argv[0]).stem}, {world} process(es)")
        if args.compare:
            args.save = args.resume = None
            alone = train(args, None, device)
            difference = max(abs(a - b) for a, b in zip(losses, alone, strict=True))
            print(f"largest difference of the loss from one process: {difference:.1e}")
            status = int(not difference <= 1e-5)
    if mesh is not None:
        dist.destroy_process_group()
    return status
