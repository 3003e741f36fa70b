"""In a region, torch's attention of local tokens is that of the whole sequence on one device."""

from __future__ import annotations

from typing import Any

import pool as workers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as known_by_another_name

import usp

MESHES = [(1, 1), (2, 1), (1, 2), (2, 2), (1, 3)]
F64 = torch.float64
# what a mask has of queries: all, one for all, this rank's
ROWS = ["whole", "one", "own"]


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    heads = draw(st.sampled_from([(3, 3), (4, 2), (2, 1), (1, 3)]))
    mask = draw(st.sampled_from([None, None, "bool", "float"]))
    form = {
        "dims": draw(st.sampled_from([2, 3, 4, 5])),
        "rows": draw(st.sampled_from(ROWS)),
        "keys": draw(st.sampled_from(["whole", "whole", "one"])),
        "each": draw(st.tuples(st.booleans(), st.booleans())),
    }
    # a single token's row is told apart from one of all neither by us nor by torch
    mesh, length = draw(st.sampled_from(MESHES)), draw(st.sampled_from([1, 2, 5, 13]))
    packed = (0, length // 2, length) if length > 1 and draw(st.booleans()) else None
    if length <= mesh[0] * mesh[1] * 2 > 2:
        form["keys"] = "whole"
    own_row = form["keys"] == "one" and draw(st.booleans()) and form["rows"] == "one"
    if own_row:
        form |= {"keys": "own", "each": (form["each"][0], False)}
    return {
        "mesh": mesh,
        "layout": draw(st.sampled_from(["contiguous", "zigzag", "striped"])),
        "length": length,
        "documents": packed,
        "batch": draw(st.sampled_from([(), (1,), (2,), (2, 3)])),
        "heads": heads,
        "gqa": heads == (4, 2) or (draw(st.booleans()) and heads == (2, 1)),
        "value_dim": draw(st.sampled_from([4, 6])),
        "mask": mask,
        "form": form,
        "causal": mask is None and draw(st.booleans()),
        "scale": draw(st.sampled_from([None, 0.3])),
    }


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def leaves(case: dict[str, Any]) -> list[Tensor]:
    """Query, key, value and a mask: whole, on every rank."""
    batch, length, (queries, keys) = case["batch"], case["length"], case["heads"]
    q, k = (random(*batch, h, length, 4, seed=h) for h in (queries, keys))
    made = [q, k, random(*batch, keys, length, case["value_dim"], seed=9)]
    if case["mask"] is not None:
        made.append(random(*mask_shape(case["form"], batch, max(queries, keys), length), seed=3))
    return [x.requires_grad_() for x in made]


def mask_shape(
    form: dict[str, Any], batch: tuple[int, ...], heads: int, length: int
) -> tuple[int, ...]:
    samples, each_head = form["each"]
    shape = [n if samples else 1 for n in batch] + [heads if each_head else 1]
    shape += [1 if form[name] == "one" else length for name in ("rows", "keys")]
    return tuple(shape[-form["dims"] :])


def given_mask(case: dict[str, Any], mask: Tensor, spread: usp.Spread | None) -> Tensor:
    """As the model passes it: of whichever rows and keys."""
    mask = mask > -0.5 if case["mask"] == "bool" else mask
    if spread is not None:
        for dim, name in ((-2, "rows"), (-1, "keys")):
            if case["form"][name] == "own":
                mask = spread.shard(mask, dim)
    return mask


def attend(case: dict[str, Any], tensors: list[Tensor], spread: usp.Spread | None) -> Tensor:
    q, k, v, *rest = tensors
    if spread is not None:
        q, k, v = (spread.shard(x, -2) for x in (q, k, v))
    mask, causal = given_mask(case, rest[0], spread) if rest else None, case["causal"]
    if spread is None and case["documents"] is not None:
        mask, causal = in_documents(case, mask), False
    out = known_by_another_name(
        q, k, v, mask, 0.0, causal, scale=case["scale"], enable_gqa=case["gqa"]
    )
    assert type(out) is Tensor
    return out


def in_documents(case: dict[str, Any], mask: Tensor | None) -> Tensor:
    """A mask, or what causal says, and each token sees its document alone."""
    document = torch.bucketize(
        torch.arange(case["length"]), torch.tensor(case["documents"][1:-1]), right=True
    )
    seen = document[:, None] == document
    if mask is None:
        return seen.tril() if case["causal"] else seen
    return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, -torch.inf)


def results(case: dict[str, Any], out: Tensor, tensors: list[Tensor], ranks: int) -> list[Tensor]:
    used = [x for x in tensors if case["mask"] != "bool" or x is not tensors[-1]]
    gradients = torch.autograd.grad(out, used, random(*out.shape, seed=5) / ranks)
    return [out.detach(), *gradients]


def run(case: dict[str, Any]) -> list[Tensor]:
    mesh = workers.mesh(*case["mesh"])
    spread = usp.Spread(mesh, case["layout"], case["length"], case["documents"])
    tensors = leaves(case)
    with usp.spread_attention(spread) as region:
        out = attend(case, tensors, spread)
    assert region.answered == 1
    return results(case, spread.unshard(out, -2), tensors, mesh.size)


@settings(max_examples=settings.default.max_examples // 3)
@given(cases())
def test_the_whole_sequence_is_meant(pool, case: dict[str, Any]) -> None:
    tensors = leaves(case)
    out, *wanted = results(case, attend(case, tensors, None), tensors, 1)
    found = pool.run(run, case, ranks=case["mesh"][0] * case["mesh"][1])
    seen = ~out.isnan()
    for whole, *_ in found:
        torch.testing.assert_close(whole[seen], out[seen], rtol=1e-9, atol=1e-9)
    if not seen.all():  # torch has no gradient where a query sees nothing
        return
    parts = zip(*(gradients for _, *gradients in found), strict=True)
    for part, gradient in zip(parts, wanted, strict=True):
        torch.testing.assert_close(sum(part), gradient, rtol=1e-9, atol=1e-9)
