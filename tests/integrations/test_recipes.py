"""docs/recipes.md: its texts train a spread model to the parameters of one process."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import logging
import os
import re
import socket
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import libraries
import pytest
import real_libraries as real
import torch
import torch.distributed as dist
import torch.nn.functional as F
from integration_models import WIDTH, make_encoder
from places import ROOT
from pool import Pool
from torch import nn
from torch.utils.data import TensorDataset

import usp

pytestmark = pytest.mark.library
TEXT = (ROOT / "docs" / "recipes.md").read_text()
TOKENS, SAMPLES, BATCH, RATE, CLIP = 13, 16, 2, 0.1, 0.7


def texts(title: str) -> list[str]:
    """The blocks under a heading of the page."""
    (section,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", TEXT, re.DOTALL | re.MULTILINE)
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


def dataset(dtype: torch.dtype) -> TensorDataset:
    shape, generator = (2, SAMPLES, TOKENS, WIDTH), torch.Generator().manual_seed(1)
    return TensorDataset(*torch.randn(shape, generator=generator).to(dtype))


def of_one_process(model: nn.Module, samples: int, dtype: torch.dtype) -> None:
    """Steps over two batches of so many samples."""
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    inputs, targets = dataset(dtype).tensors
    norms = []
    for step, batch in enumerate(range(0, SAMPLES, samples), 1):
        mine = slice(batch, batch + samples)
        (F.mse_loss(model(inputs[mine]), targets[mine]) / 2).backward()
        if step % 2 == 0:
            norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
            optimizer.step()
            optimizer.zero_grad()
    assert min(norms) < CLIP < max(norms)  # a factor, which clipping would hide, is found out, too


@contextlib.contextmanager
def launched_here() -> Iterator[None]:
    """What torchrun tells a process that it starts."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = [free.getsockname()[1]]
    dist.broadcast_object_list(port, 0)
    rank, world = dist.get_rank(), dist.get_world_size()
    told: dict[str, Any] = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "GROUP_RANK": 0,
        "MASTER_PORT": port[0],
    }
    told |= {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "localhost"}
    told |= {"TORCHELASTIC_RUN_ID": "recipe", "OMP_NUM_THREADS": 1, "DS_ACCELERATOR": "cpu"}
    told |= {"LOCAL_SIZE": world}
    with mock.patch.dict(os.environ, {name: str(value) for name, value in told.items()}):
        yield


def names(model: nn.Module, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """What the page says is the reader's."""
    given = {"usp": usp, "torch": torch, "dist": dist, "model": model, "dataset": dataset(dtype)}
    given |= {"optimizer": torch.optim.SGD(model.parameters(), RATE), "criterion": F.mse_loss}
    return given | {"device_type": "cpu", "__name__": "recipe"}


def compared(recipe: Any, dtype: torch.dtype = torch.float64) -> dict[str, float]:
    """On a worker: which parameters differ from those of one process, and by how much."""
    wanted, model = make_encoder().to(dtype), make_encoder().to(dtype)
    start = copy.deepcopy(wanted)
    of_one_process(wanted, BATCH * dist.get_world_size() // 2, dtype)
    with launched_here():
        found = recipe(model)
    tolerance = {torch.float64: 1e-12, torch.float32: 5e-7}[dtype]
    moved = [
        (a - b).abs().max() for a, b in zip(wanted.parameters(), start.parameters(), strict=True)
    ]
    assert min(moved) > 1e-6  # each has something to be compared
    pairs = zip(wanted.named_parameters(), found, strict=True)
    wrong = {name: float((p - other.detach()).abs().max()) for (name, p), other in pairs}
    return {name: error for name, error in wrong.items() if not error <= tolerance}


# ---- accelerate


def by_accelerate(model: nn.Module) -> list[torch.Tensor]:
    library = libraries.library("accelerate")
    state = importlib.import_module("accelerate.state")
    (text,) = texts("accelerate")
    with mock.patch.object(
        library, "Accelerator", functools.partial(library.Accelerator, cpu=True)
    ):
        try:
            exec(
                text.replace("_(model.parameters(), 1.0)", f"_(model.parameters(), {CLIP})"),
                names(model),
            )
        finally:
            state.AcceleratorState._reset_state(True)
    return list(model.parameters())


def accelerate_compared() -> dict[str, float]:
    return compared(by_accelerate)


@pytest.mark.parametrize("ranks", [2, 4])
def test_accelerate(pool, ranks) -> None:
    libraries.library("accelerate")
    for wrong in pool.run(accelerate_compared, ranks=ranks):
        assert wrong == {}


# ---- Lightning


def by_lightning(model: nn.Module, kind: str) -> list[torch.Tensor]:
    library = libraries.library("lightning")
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    text, sharded = texts("Lightning")
    ranks = dist.get_world_size()
    text = text.replace("devices=4", f"devices={ranks}").replace("clip_val=1.0", f"clip_val={CLIP}")
    quiet = {f"enable_{part}": False for part in ("progress_bar", "checkpointing", "model_summary")}
    changes = {"logger": False, **quiet}
    given = names(model)
    if kind == "sharded":
        definition, fit = text.split("trainer = ")
        text = definition + sharded + "trainer = " + fit.replace("Spread(model)", "Sharded(model)")
        strategies = importlib.import_module("lightning.pytorch.strategies")
        strategy = strategies.ModelParallelStrategy(ranks // 2, 2, process_group_backend="gloo")
        changes["strategy"] = strategy

    def trainer(**options: Any) -> Any:
        return library.pytorch.Trainer(**options | changes)

    with mock.patch.object(library, "Trainer", trainer):
        exec(text, given)
    return [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]


def lightning_compared(kind: str) -> dict[str, float]:
    return compared(functools.partial(by_lightning, kind=kind))


@pytest.mark.parametrize(("kind", "ranks"), [("plain", 2), ("plain", 4), ("sharded", 4)])
def test_lightning(pool, kind, ranks) -> None:
    libraries.library("lightning")
    for wrong in pool.run(lightning_compared, kind, ranks=ranks):
        assert wrong == {}


# ---- DeepSpeed


def start_deepspeed() -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    if real.FOLDER.is_dir():
        sys.path.append(str(real.FOLDER))


@pytest.fixture(scope="module")
def others() -> Iterator[Pool]:
    pool = Pool(size=4, setup=start_deepspeed)
    yield pool
    pool.close()


def by_deepspeed(model: nn.Module, stage: int) -> list[torch.Tensor]:
    deepspeed = importlib.import_module("deepspeed")
    # it would compile one for minutes; and deepspeed.comm.torch is torch
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    config = {"train_micro_batch_size_per_gpu": BATCH, "gradient_accumulation_steps": 2}
    config |= {
        "gradient_clipping": CLIP,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
    }
    # the pool fills new memory, and a bucket of theirs is 2 GB otherwise
    config |= {"zero_optimization": {"stage": stage, "reduce_bucket_size": 10**5}}
    given = names(model, torch.float32) | {"config": config}
    exec(*texts("DeepSpeed"), given)
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
        return [p.detach().clone() for p in model.parameters()]


def deepspeed_compared(stage: int) -> dict[str, float] | str:
    """Or what is not installed."""
    try:
        importlib.import_module("deepspeed")
    except ModuleNotFoundError as missing:
        return str(missing.name)
    return compared(functools.partial(by_deepspeed, stage=stage), torch.float32)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed(others, stage, ranks) -> None:
    for wrong in others.run(deepspeed_compared, stage, ranks=ranks):
        if isinstance(wrong, str):
            pytest.skip(f"{wrong} is not installed: {libraries.INSTALL}")
        assert wrong == {}
