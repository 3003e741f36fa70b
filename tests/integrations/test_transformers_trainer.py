"""transformers' Trainer trains a language model whose tokens are spread as one process would."""

from __future__ import annotations

import copy
import os
import tempfile
from typing import Any
from unittest import mock

import doors
import libraries
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

import usp
from usp.integrations import transformers as door

pytestmark = pytest.mark.library
TOKENS, SAMPLES, STEPS, RATE = 27, 24, 3, 0.5
CASES = [((1, 2), 1, 2), ((2, 1), 2, 2), ((1, 2), 2, 4)]  # the last: two sequences at a time
LLAMA = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "vocab_size": 61}
LLAMA |= {"intermediate_size": 64, "num_key_value_heads": 3, "head_dim": 8, "pad_token_id": 0}


def llama() -> nn.Module:
    library = libraries.library("transformers")
    door.register()
    config = library.LlamaConfig(**LLAMA, use_cache=False)
    model = library.LlamaForCausalLM._from_config(config, attn_implementation="usp")
    return doors.randomize(model)


def samples() -> list[dict[str, Tensor]]:
    """Of unequal numbers of labels, so that a mean of means would be another loss."""
    generator, found = torch.Generator().manual_seed(1), []
    for n in range(SAMPLES):
        ids = torch.randint(1, 61, (TOKENS,), generator=generator)
        labels = ids.clone()
        labels[: n % 20] = -100
        found.append({"input_ids": ids, "labels": labels})
    return found


def collated(batch: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([sample[name] for sample in batch]) for name in batch[0]}


def of_one_process(model: nn.Module, batches: int, size: int) -> list[float]:
    """Plain steps, each over so many batches; their losses."""
    optimizer, losses, data = torch.optim.SGD(model.parameters(), RATE), [], samples()
    for step in range(STEPS):
        batch = collated(data[step * batches * size : (step + 1) * batches * size])
        logits = model(batch["input_ids"]).logits[:, :-1].flatten(0, 1)
        loss = F.cross_entropy(logits, batch["labels"][:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def of_trainer(model: nn.Module, mesh: Any, batches: int, size: int, folder: str) -> Any:
    library = libraries.library("transformers")
    replicas = torch.distributed.get_world_size() // mesh.size
    place = torch.distributed.get_rank() // mesh.size

    class Trainer(library.Trainer):
        def get_train_dataloader(self) -> DataLoader:
            sampler = DistributedSampler(self.train_dataset, replicas, place, shuffle=False)
            options = {"batch_size": size // replicas, "collate_fn": self.data_collator}
            return DataLoader(self.train_dataset, sampler=sampler, **options)

        def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
            return self.get_train_dataloader()

    options = {"max_steps": STEPS, "gradient_accumulation_steps": batches, "logging_steps": 1}
    options |= {"optim": "sgd", "learning_rate": RATE, "lr_scheduler_type": "constant"}
    options |= {"report_to": "none", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
    options |= {"logging_nan_inf_filter": False, "per_device_eval_batch_size": size}
    trainer = Trainer(
        model,
        library.TrainingArguments(folder, **options),
        data_collator=lambda batch: usp.cut_batch(collated(batch), mesh, "zigzag"),
        train_dataset=samples(),
    )
    trainer.train()
    return trainer


def _compared(degrees: tuple[int, int], batches: int, world: int) -> dict[str, float]:
    state = libraries.library("accelerate.state")
    group, _ = torch.distributed.new_subgroups(degrees[0] * degrees[1])
    mesh, model = usp.init_mesh(*degrees, device_type="cpu", group=group), llama()
    ours = usp.parallelize(copy.deepcopy(model), mesh, outputs="local")
    told = {
        "MASTER_ADDR": "localhost",
        "OMP_NUM_THREADS": 1,
        "WORLD_SIZE": world,
        "RANK": torch.distributed.get_rank(),
        "LOCAL_RANK": mesh.rank,
    }
    size = 2
    wanted = of_one_process(model, batches, size)
    try:
        with (
            mock.patch.dict(os.environ, {name: str(value) for name, value in told.items()}),
            tempfile.TemporaryDirectory() as folder,
        ):
            trainer = of_trainer(ours, mesh, batches, size, folder)
            evaluated = trainer.evaluate()["eval_loss"]
    finally:
        state.AcceleratorState._reset_state(True)
    found = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert len(found) == STEPS
    pairs = {f"loss {n}": pair for n, pair in enumerate(zip(wanted, found, strict=True))}
    wrong = {name: abs(a - b) for name, (a, b) in pairs.items()}
    theirs = dict(model.named_parameters())
    wrong |= {n: (p - theirs[n]).abs().max().item() for n, p in ours.named_parameters()}
    wrong["evaluated"] = abs(evaluated - whole_loss(model, size))
    return {name: error for name, error in wrong.items() if not error <= 2e-6}


def whole_loss(model: nn.Module, size: int) -> float:
    """The mean over batches of their means, as they evaluate."""
    losses, data = [], samples()
    for start in range(0, SAMPLES, size):
        batch = collated(data[start : start + size])
        with torch.no_grad():
            logits = model(batch["input_ids"]).logits[:, :-1].flatten(0, 1)
        losses.append(F.cross_entropy(logits, batch["labels"][:, 1:].flatten()))
    return torch.stack(losses).mean().item()


@pytest.mark.parametrize(("degrees", "batches", "world"), CASES)
def test_trainer_makes_the_steps_of_one_process(pool, degrees, batches, world) -> None:
    for name in ("transformers", "accelerate"):
        libraries.library(name)
    for wrong in pool.run(_compared, degrees, batches, world, ranks=world):
        assert wrong == {}
