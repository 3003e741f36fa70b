"""A language model's batch, cut: labels before it is, positions of documents, the count."""

from __future__ import annotations

from typing import Any

import pool as workers
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import usp

DOCUMENTS = (0, 4, 4, 9, 13)
IDS = torch.arange(26).view(2, 13)


def _joined(layout: Any, cu_seqlens: Any) -> tuple[dict[str, Tensor], int]:
    mesh = workers.mesh(2, 2)
    mask = torch.ones(2, 13, dtype=torch.int64)
    mask[1, 10:] = 0
    labels = IDS.masked_fill(mask == 0, -100)
    batch = {"input_ids": IDS, "labels": labels, "attention_mask": mask, "use_cache": False}
    cut = usp.cut_batch(batch, mesh, layout, cu_seqlens=cu_seqlens)
    assert cut["use_cache"] is False and cut["labels"] is cut["shift_labels"]
    spread = cut["spread"]
    tensors = ("input_ids", "labels", "attention_mask", "position_ids")
    assert {cut[name].shape[1] for name in tensors} == {spread.local_seq_len}
    found = {name: spread.unshard(cut[name]) for name in tensors}
    return found, int(cut["num_items_in_batch"])


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", usp.DocumentZigzag(DOCUMENTS)], ids=str)
def test_labels_are_shifted_before_the_cut(pool, layout) -> None:
    told = isinstance(layout, usp.DocumentZigzag)
    ends = (3, 8, 12) if told else (12,)
    for found, count in pool.run(_joined, layout, None, ranks=4):
        assert torch.equal(found["input_ids"], IDS)
        wanted = [[-100 if t in ends else int(IDS[b, t + 1]) for t in range(13)] for b in range(2)]
        wanted[1][9:12] = [-100] * 3
        assert found["labels"].tolist() == wanted
        assert count == sum(label != -100 for row in wanted for label in row)
        places = [0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 1, 2, 3] if told else list(range(13))
        assert found["position_ids"].tolist() == [places, places]


def test_documents_are_read_off_positions_that_jump() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2]])
    ids = torch.arange(8)[None]
    batch = {"input_ids": ids, "position_ids": positions, "labels": ids}
    cut = usp.cut_batch(batch, None)
    assert cut["spread"].cu_seqlens == (0, 3, 5, 8)
    assert cut["labels"].tolist() == [[1, 2, -100, 4, -100, 6, 7, -100]]
    padded = usp.cut_batch(batch | {"attention_mask": torch.ones(1, 8)}, None)
    assert padded["spread"].cu_seqlens is None
    assert "labels" not in usp.cut_batch({"ids": ids}, None)
    assert "num_items_in_batch" not in usp.cut_batch({"ids": ids}, None)


def _three_positions(rows: int) -> list[Any]:
    places = torch.arange(13)
    grid = torch.stack((places % 5, places, places // 2, places % 3))[4 - rows :]
    grid = grid[:, None].expand(-1, 2, -1)
    cut = usp.cut_batch({"input_ids": IDS, "position_ids": grid}, workers.mesh(2, 2), "zigzag")
    spread = cut["spread"]
    assert cut["position_ids"].shape == (rows, 2, spread.local_seq_len)
    assert torch.equal(spread.unshard(cut["position_ids"], 2), grid)
    return [spread.cu_seqlens]


def test_several_positions_a_token_stand_in_front_of_the_samples(pool) -> None:
    """Of M-RoPE; the first of four says where documents begin."""
    assert pool.run(_three_positions, 3, ranks=4) == 4 * [[None]]
    assert pool.run(_three_positions, 4, ranks=4) == 4 * [[(0, 5, 10, 13)]]


def test_what_does_not_fit_is_refused() -> None:
    ids = torch.zeros(2, 6, dtype=torch.int64)
    for batch, options, message in (
        ({"labels": ids}, {}, "needs one of input_ids, inputs_embeds, ids, got labels"),
        ({"ids": ids, "labels": ids[:, :5]}, {}, r"labels is \(2, 5\), .* has 6 tokens"),
        ({"ids": ids, "attention_mask": torch.ones(2, 1, 6, 6)}, {}, r"is \(2, 1, 6, 6\)"),
        ({"ids": ids, "position_ids": torch.zeros(3, 6, 2)}, {}, r"is \(3, 6, 2\), and the batch"),
        ({"ids": ids, "cu_seq_lens_q": torch.tensor([0, 6])}, {}, "its cu_seqlens"),
        ({"ids": ids}, {"cu_seqlens": (0, 5)}, "the one length"),
        ({"ids": ids, "position_ids": torch.tensor([[0, 1, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]])}, {},
         r"jump \[1, 0\] times"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            usp.cut_batch(batch, None, **options)


def _of_all_data() -> float:
    ids = torch.zeros(1, 5 + 4 * dist.get_rank(), dtype=torch.int64)
    cut = usp.cut_batch({"ids": ids, "labels": ids}, None, data_parallel_group=dist.group.WORLD)
    return float(cut["num_items_in_batch"])


def test_data_ranks_divide_by_their_mean_count(pool) -> None:
    assert pool.run(_of_all_data, ranks=2) == [6.0, 6.0]
