"""How states are shared, sequences that grow with the devices, and rings beside data ranks.

``pytest -s`` prints what the model says beside what others measured. Orders, borders and ratios are
held; absolute rates where a line says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import pytest

from usp.planning.choose.cluster import CLUSTERS, GB, GIB, Link
from usp.planning.choose.job import Choice, Job, Precision
from usp.planning.choose.memory import fits, memory_of
from usp.planning.choose.model import MODELS, Model
from usp.planning.choose.search import Predicted, predict

K = 1024
BF16 = Precision(gradients=2)
A100 = CLUSTERS["a100"]


@pytest.mark.parametrize(
    ("tp", "group", "paper"),
    [
        (1, 0, (4062, 3842, 3752, 3690, 3571, 3209, 2861, 2271)),
        (1, 8, (4078, 3939, 3919, 3944, 3928, 3920, 3835, 3625)),
        (2, 0, (3822, 3595, 3475, 3438, 3308, 3094, 2992, 2785)),
        (2, 4, (3761, 3658, 3655, 3650, 3651, 3653, 3589, 3486)),
    ],
)
def test_states_of_a_node_beat_those_of_all(tp: int, group: int, paper: tuple[int, ...]) -> None:
    """InternLM/InternEvo, doc/en/train_performance.md: 7B, 2048 tokens, 8 samples a GPU and step, 8
    to 1024 A100, four adapters of 100 Gb/s a node; the optimizer's states shared by all data ranks
    (0) or by those of a node; tokens a second and GPU. Rates within 10 % where a node shares them,
    falling where all do, and less than the paper's: it sends each weight from who has its state."""
    slow = Link(0, 0.8 * 6.25 * GB, 14e-6, 0.8 * 12.5 * GB, 25e-6, 2.5 * GB)
    cluster = replace(A100, levels=(A100.levels[0], slow))
    model = Model("internlm-7b", 32, 4096, 32, 32, 11008, 103168)
    devices = [2**n for n in range(3, 11)]

    def told(devices: int, group: int) -> float:
        dp = devices // tp
        job = Job(model, 2048, 8 * devices, cluster, devices, precision=BF16, zero=1, as_usp=False)
        choice = Choice(dp=dp, fsdp=group or dp, tp=tp, micro=2 * tp)
        return predict(job, choice).tokens_a_second / devices

    found = [told(n, group) for n in devices]
    print(f"InternEvo tp {tp}, states of {group or 'all'}: {[round(r) for r in found]}, {paper}")
    assert all(more > less for more, less in pairwise(found))
    if group:
        assert all(r == pytest.approx(p, rel=0.1) for r, p in zip(found, paper, strict=True))
        others = [told(n, 0) for n in devices[1:]]
        assert all(node > all_ for node, all_ in zip(found[1:], others, strict=True))
        assert found[-1] / others[-1] > 1.05  # the paper: 1.6 and 1.25


def test_a_ring_beside_data_ranks_on_one_node() -> None:
    """jzhang38/EasyContext's README: Llama2-7B on 8 A100, ZeRO-3 offload, checkpoints, flash-attn's
    cross entropy; tokens a second of all. Within 10 %, but for 128K, which is slower there than its
    neighbours allow (4266; by 64K and 512K it should be some 6000)."""

    def rate(tokens: int, batch: int, **degrees: int) -> float:
        job = Job(MODELS["llama2-7b"], tokens * K, batch, A100, 8)
        layout = "zigzag" if degrees.get("ring") else "contiguous"
        saved = Choice(fsdp=8, tiles="loss", checkpointing="full", offload="states", **degrees)
        return predict(job, replace(saved, layout=layout)).tokens_a_second

    data = rate(64, 8, dp=8)
    ring = {tokens: rate(tokens, 1, ring=8) for tokens in (64, 128, 512, 700)}
    paper = {64: 7816, 512: 2133, 700: 1603}
    print(f"EasyContext: 64K by data ranks {data:.0f}, 10240; rings {ring}, {paper}")
    assert data == pytest.approx(10240, rel=0.1) and data > ring[64] > ring[128] > ring[512]
    assert all(ring[t] == pytest.approx(published, rel=0.1) for t, published in paper.items())


def test_sequences_grow_with_the_gpus() -> None:
    """DeepSpeed-Ulysses, arXiv:2309.14509, and its blog's picture: a GPT of 1.2B on A100 of 40 GB,
    128K tokens on 8 GPUs, 256K on 16, 512K on 32, 1M on 64, none of them twice as many, and at one
    rate (94 to 96 TFLOPS; ours is 1.6 times that). Heads are assumed to be as many as GPUs."""
    cluster = replace(A100, memory=40 * GIB)
    gpt = Model("gpt-1.2b", 24, 2048, 64, 64, 8192, 50257, gated=False)
    rates = []
    for devices in (8, 16, 32, 64):
        job = Job(gpt, 16 * K * devices, 1, cluster, devices, precision=BF16, as_usp=False)
        choice = Choice(fsdp=devices, ulysses=devices)
        longer = replace(job, seq_len=2 * job.seq_len)
        assert fits(job, memory_of(job, choice)) and not fits(longer, memory_of(longer, choice))
        rates.append(predict(job, choice).flops)
    print(f"DeepSpeed-Ulysses: TFLOPS on 8 to 64 GPUs {[r / 1e12 for r in rates]}, paper 94 to 96")
    assert min(rates) > 0.9 * max(rates)


@pytest.mark.parametrize(
    ("model", "ulysses", "megatron"),
    [
        (
            Model("gpt-7b", 32, 4096, 32, 32, 16384, 50257, gated=False),
            (159, 175, 178, 181, 177, 175),
            (106, 143, 164, 165, 158, None),
        ),
        (
            Model("gpt-30b", 48, 7168, 64, 64, 28672, 50257, gated=False),
            (166, 157, 152, 147, 140, 134),
            (45, 67, 86, 104, None, None),
        ),
    ],
)
def test_ulysses_beside_megatron(
    model: Model, ulysses: tuple[int, ...], megatron: tuple[int | None, ...]
) -> None:
    """The same blog's pictures, read off: 64 A100, TFLOPS a GPU of Ulysses with ZeRO-3 and of
    Megatron's tensor and sequence parallelism, each at its best degree and batch, 8K to 256K; None
    is out of memory. Ulysses first at each length, with rates within 25 %. Megatron's 45 of 30B at
    8K are tensor parallelism over nodes; what it runs out of is not in the paper."""

    def ways(tokens: int, tensor: bool) -> Iterator[Predicted]:
        for degree in (1, 2, 4, 8, 16, 32, 64):
            for micro, checkpointing in ((4, "none"), (1, "none"), (1, "full")):
                dp = 64 // degree
                job = Job(model, tokens * K, dp * micro, A100, 64, precision=BF16, as_usp=False)
                job = replace(job, zero=1 if tensor else 3)
                choice = Choice(dp=dp, checkpointing=checkpointing, micro=micro)
                if model.heads % degree:
                    continue
                if tensor:
                    choice = replace(choice, tp=degree)
                else:
                    choice = replace(choice, ulysses=degree, fsdp=64)
                found = predict(job, choice)
                if found.fits:
                    yield found

    for tokens, ours, theirs in zip((8, 16, 32, 64, 128, 256), ulysses, megatron, strict=True):
        cut, tensor = (max(one.flops for one in ways(tokens, t)) / 1e12 for t in (False, True))
        print(f"{model.name} {tokens}K: Ulysses {cut:.0f}, {ours}; Megatron {tensor:.0f}, {theirs}")
        assert cut > tensor and cut == pytest.approx(ours, rel=0.25)


@pytest.mark.parametrize("devices", [16, 32, 64, 128])
def test_linear_attention_fits_as_much_a_gpu(devices: int) -> None:
    """LASP, arXiv:2404.02882, a picture in its repository: TNL-1B under FSDP on A100 of 80 GB, 32K
    tokens a GPU fit (67 GB; 16K 35 GB) and 64K do not, from 16 GPUs to 128, which is 4096K. Shapes
    of its MLP and vocabulary are assumed. What a layer keeps does not ask how it attends; gates are
    not counted, and the formula is 21 % low."""
    tnl = Model("tnl-1b", 16, 2048, 16, 16, 5632, 64000)
    job = Job(tnl, 32 * K * devices, 1, A100, devices, as_usp=False)
    longer, choice = replace(job, seq_len=2 * job.seq_len), Choice(fsdp=devices, ring=devices)
    told = memory_of(job, choice).total / GB
    print(f"LASP {devices} GPUs: {told:.0f} GB, paper 67")
    assert told == pytest.approx(67, rel=0.25)
    assert fits(job, memory_of(job, choice)) and not fits(longer, memory_of(longer, choice))
