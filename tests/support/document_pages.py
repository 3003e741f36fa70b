"""What each page of the documentation takes for granted, and what its blocks must come to.

A story fills the page's names; a block runs at each ``yield``. ``yield "library: ..."`` leaves the
block out and says why. A page without a story gets ``usp`` and ``torch`` and has the rest itself.
Pages on models are in ``document_models.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import document_blocks
import document_models  # noqa: F401 (its stories)
import torch
import torch.nn.functional as F
from document_blocks import STORIES, Names, page, same
from integration_models import WIDTH, make_encoder
from pool import mesh
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import usp


def run_alone(name: str) -> list[str]:
    told = STORIES.get(name)
    return document_blocks.run(name, told and told.story)


def run_on_mesh(name: str, libraries: bool = False) -> list[str]:
    """On each of four workers; with blocks that need libraries, or without."""
    told = STORIES[name]
    assert told.shape is not None
    return document_blocks.run(name, told.story, mesh=mesh(*told.shape), libraries=libraries)


# ---- what newcomers read


@page("README.md", (2, 2))
def readme(names: Names) -> Iterator[str | None]:
    yield None
    assert names["whole"].shape == (1, 1009, 8, 64)
    model = make_encoder()
    names.update(model=model, seq_len=1009, data_parallel_group=None)
    yield None
    weights = torch.cat([p.flatten() for p in model.parameters()])
    names["this_rank_token_losses"] = weights.square().sum() * torch.ones(3)
    yield None


@page("docs/extend/layout.md", (2, 2))
@page("docs/extend/mask.md", (2, 2))
@page("docs/extend/transport.md", (1, 4))
@page("docs/extend/backend.md", (2, 2))
@page("docs/extend/door.md", (2, 2))
@page("docs/planner.md", (2, 2))
@page("docs/tutorial.md", (2, 2))
def by_itself(names: Names) -> Iterator[str | None]:
    """It makes its own mesh, of the four processes that it says it needs."""
    yield None


# ---- attention


@page("docs/masks.md")
def masks(names: Names) -> Iterator[str | None]:
    names.update(zip("qkv", torch.randn(3, 2, 17, 4, 8), strict=True))
    yield None


@page("docs/rings.md", (1, 4))
def rings(names: Names) -> Iterator[str | None]:
    yield None
    made = names["mesh"]
    names["init_device_mesh"] = lambda kind, *shape, **named: init_device_mesh(
        "cpu", *shape, **named
    )
    yield None
    assert names["mesh"].ring_degree == made.ring_degree == 4
    names["mesh"] = made
    here, proj = names["mesh"], nn.Linear(12, 4 * (8 + 6), bias=False)
    assert here.ring_outer_degree == 2
    given = torch.randn(2, 17, 4, 8 + 3), torch.randn(2, 17, 12), torch.randn(2, 17, 3)
    shards = (usp.shard_sequence(x, here, 1, "zigzag") for x in given)
    names.update(zip(("q", "latent", "rope_key"), shards, strict=True), kv_b_proj=proj)
    yield None
    found = usp.unshard_sequence(names["out"], here, 1, "zigzag", seq_len=17)
    same(found, usp.latent_attention(*given, names["up_k"], names["up_v"], causal=True))


@page("docs/offload.md", (2, 2))
def offload(names: Names) -> Iterator[str | None]:
    here, whole = names["mesh"], torch.randn(3, 2, 17, 4, 8)
    names.update(zip("qkv", (usp.shard_sequence(x, here, 1) for x in whole), strict=True))
    yield None
    expected = usp.long_context_attention(*whole, causal=True)
    again = names["attention"](*(names[name] for name in "qkv"))
    for found in (names["out"], again):
        same(usp.unshard_sequence(found, here, 1, seq_len=17), expected)


@page("docs/decoding.md", (1, 4))
def decoding(names: Names) -> Iterator[str | None]:
    q, k, v = torch.randn(3, 2, 18, 4, 8)
    names.update(q=q[:, :17], k=k[:, :17], v=v[:, :17])
    names.update(new_q=q[:, 17:], new_k=k[:, 17:], new_v=v[:, 17:])
    whole = usp.long_context_attention(q, k, v, causal=True)
    yield None
    same(names["out"], whole[:, 17:])
    yield None
    assert names["out"].shape == (2, 1, 4, 6)
    assert names["several"].k.shape[0] == 3
    yield None
    found = usp.unshard_sequence(names["out"], names["mesh"], 1, "zigzag", seq_len=17)
    same(found, whole[:, :17])
    if not names.get("libraries"):
        yield "library: transformers; run by make test-doors"
        return
    import transformers_models as models

    from usp.integrations import transformers as door

    loads = SimpleNamespace(from_pretrained=lambda name, **options: models.model_of("Llama"))
    names.update(door=door, AutoModelForCausalLM=loads, name="a name")
    names["inputs"] = models.inputs_of("Llama", None)
    yield None
    assert names["text"].shape[1] > names["inputs"]["input_ids"].shape[1]


@page("docs/dsp.md", (2, 2))
def dsp(names: Names) -> Iterator[str | None]:
    names.update(video=torch.randn(2, 3, 5, 32), text=torch.randn(2, 4, 12))
    yield None
    assert names["out"].shape == (2, 3, 5, 32)
    yield None


@page("docs/linear_attention.md", (2, 2))
def linear_attention(names: Names) -> Iterator[str | None]:
    here, x, decay = names["mesh"], torch.randn(2, 5, 2, 3), -torch.ones(2)
    names.update(dict.fromkeys("qkv", usp.shard_sequence(x, here, 1)), decay=decay)
    yield None
    found = usp.unshard_sequence(names["out"], here, 1, seq_len=5)
    same(found, usp.linear_attention(x, x, x, decay))
    weight, bias = torch.randn(6, 4), torch.randn(6)
    names.update(weight=weight, bias=bias, x=names["q"])
    yield None
    found = usp.unshard_sequence(names["mixed"], here, 1, seq_len=5)
    same(found, F.silu(usp.causal_conv1d(x.flatten(2), weight, bias)))
    names["x"] = x
    yield None
    assert names["out"].shape == x.shape


@page("docs/spread.md", (2, 2))
def spread(names: Names) -> Iterator[str | None]:
    here, layout, n = names["mesh"], "zigzag", 13
    x = usp.shard_sequence(torch.randn(2, n, WIDTH), here, 1, layout)
    names.update(x=x, layout=layout, n=n, F=F, w=(0.5, 2.0), eps=1e-5)
    names.update(head=nn.Linear(WIDTH, 3), labels=torch.tensor([0, 2]))
    yield None
    assert names["loss"].isfinite() and names["x"].shape == x.shape
    names.update(text=torch.randn(1, 7, WIDTH), image=torch.randn(1, 25, WIDTH))
    names["qkv"] = lambda y: (y.unflatten(-1, (4, 3)),) * 3
    yield None
    assert names["text_out"].shape[1] == len(usp.positions(7, here))
    q = usp.shard_sequence(torch.randn(1, n, 4, 3), here, 1, layout)
    k = torch.ones(1, 77 if here.rank == 0 else 0, 4, 3)
    names.update(q=q, k=k, v=k)
    yield None
    assert names["out"].shape == q.shape
    yield None
    model = SimpleNamespace(mesh=here, table=torch.randn(n, WIDTH), blocks=[lambda x, spread: x])
    model.head = nn.Identity()
    whole = torch.randn(2, n, WIDTH)
    same(names["forward"](model, whole), whole[:, :1] + model.table[:1])


# ---- run elsewhere


@page("docs/recipes.md")
def recipes(names: Names) -> Iterator[str | None]:
    for library in ("accelerate", "Lightning", "Lightning", "DeepSpeed"):
        yield f"library: {library}; tests/integrations/test_recipes.py runs this very text"


@page("docs/backends.md")
def backends(names: Names) -> Iterator[str | None]:
    yield "library: kernels, and a GPU for what it loads; the loader: tests/backends/library"


@page("docs/design.md")
def design(names: Names) -> Iterator[str | None]:
    for _ in range(2):
        yield "excerpt: of usp/attention/ring.py, which every test of a ring runs"


@page("docs/verify.md")
def verify(names: Names) -> Iterator[str | None]:
    yield "elsewhere: it starts processes; tests/verification/test_processes.py"
