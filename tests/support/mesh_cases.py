"""Any mesh, layout, transport, backend, mask and option, drawn at random; and corners of them."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from cases import Case
from hypothesis import strategies as st

import usp
from usp.planning.route import TRANSPORTS

QUERIES_MOVE = ("queries", "query_ring", "grid")
MESHES = [(u, r) for u in range(1, 7) for r in range(1, 7) if u * r <= 6]
LENGTHS = st.one_of(
    st.sampled_from([1, 2, 3, 5, 7, 11, 13, 17, 23, 31, 43, 61]), st.integers(1, 64)
)
# what masks are filled with, and any other offset that a row's keys may share
FILLS = ["lowest", "lowest", -1e30, -1e9, -65504.0, -1e4, -1500.0, 1e4, 3e38]
BACKENDS = ["auto", "reference", "sdpa"]
if usp.backends()["native"] == "can run here":
    BACKENDS.append("native")


@st.composite
def masks(draw: st.DrawFn, seq_len: int, self_attention: bool) -> dict[str, object]:
    """Any combination of the conditions on who sees whom."""
    bound = st.one_of(st.none(), st.integers(0, seq_len + 2))
    mask: dict[str, object] = {"causal": draw(st.booleans())}
    if draw(st.booleans()):
        mask["window"] = draw(st.tuples(bound, bound))
    if mask["causal"] and draw(st.integers(0, 3)) == 0:
        mask["prefix_len"] = draw(st.integers(0, seq_len + 2))
    if self_attention and draw(st.integers(0, 2)) == 0:
        mask["cu_seqlens"] = draw(documents(seq_len))
    return mask


def documents(seq_len: int) -> st.SearchStrategy[tuple[int, ...]]:
    """Boundaries of packed documents, some of them without tokens."""
    inner = st.lists(st.integers(0, seq_len), max_size=6)
    return inner.map(lambda cuts: (0, *sorted(cuts), seq_len))


def held(seq_len: int, ranks: int) -> st.SearchStrategy[tuple[int, ...]]:
    """Tokens of each rank, some of them without any."""
    cuts = st.lists(st.integers(0, seq_len), min_size=ranks - 1, max_size=ranks - 1)
    return cuts.map(lambda cuts: tuple(b - a for a, b in pairwise((0, *sorted(cuts), seq_len))))


@st.composite
def heads(draw: st.DrawFn) -> dict[str, int]:
    group_size, kv_heads = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    dims = {"head_dim": draw(st.integers(1, 9)), "value_dim": draw(st.integers(1, 9))}
    return {"heads": group_size * kv_heads, "kv_heads": kv_heads, **dims}


@st.composite
def extras(draw: st.DrawFn, filled: bool) -> dict[str, object]:
    """What reaches a score or a weight beside the mask, each in some of the cases."""
    options = {
        "padding": st.sampled_from([0.0, 0.3, 0.9, 1.0]),
        "bias": st.sampled_from(["", "b", "h", "q", "bh", "bq", "hq", "bhq"]),
        "softcap": st.sampled_from([0.7, 5.0]),
        "alibi": st.sampled_from(["h", "bh"]),
        "dropout_p": st.sampled_from([0.1, 0.5, 0.9]),
        "softmax_scale": st.sampled_from([0.0, -0.5, 0.3]),
        "return_lse": st.just(True),
        "magnitude": st.sampled_from([0.0, 30.0]),
        "unions": st.sampled_from(["one", "each", "table"]),
        "key_lengths": st.just(True),
        "query_offset": st.sampled_from([-1, -1, 1, 40]),
        "sinks": st.just(True),
    }
    chosen = draw(st.sets(st.sampled_from(sorted(options)), max_size=5))
    drawn = {name: draw(options[name]) for name in sorted(chosen)}
    if filled:
        drawn |= {"bias": draw(options["bias"]), "bias_fill": draw(st.sampled_from(FILLS))}
    if "bias" in drawn:
        drawn["bias_hides"] = draw(st.sampled_from([0.0, 0.0, 0.2, 0.9]))
        drawn["bias_dtype"] = draw(st.sampled_from([None, "float32"]))
    return drawn


def chunks() -> st.SearchStrategy[dict[str, object]]:
    """Pieces of tokens and of heads, more than there are too."""
    return st.fixed_dictionaries(
        {
            "chunks": st.sampled_from([1, 2, 3, 4, 7, 99]),
            "head_chunks": st.sampled_from([1, 1, 2, 3, 99]),
            "offload": st.sampled_from([None, "cpu"]),
        }
    )


@st.composite
def cases(draw: st.DrawFn, filled: bool = False) -> Case:
    """Any case; ``filled``: one with a bias whose rows and columns share large offsets."""
    ulysses, ring = draw(st.sampled_from(MESHES))
    seq_len = draw(LENGTHS)
    self_attention = draw(st.integers(0, 4)) > 0
    case = Case(
        ulysses=ulysses,
        ring=ring,
        ring_outer=draw(st.sampled_from([n for n in (1, 2, 3) if ring % n == 0])),
        on_mesh=ulysses * ring > 1 or draw(st.booleans()),
        layout=draw(st.sampled_from(["contiguous", "zigzag", "striped"])),
        transport=draw(st.sampled_from(TRANSPORTS)),
        backend=draw(st.sampled_from(BACKENDS)),
        batch=draw(st.integers(1, 4)),
        seq_len=seq_len,
        key_len=None if self_attention else draw(LENGTHS),
        dtype=draw(st.sampled_from(["float64", "float64", "float32", "bfloat16", "float16"])),
        strided=draw(st.sampled_from([None, "heads", "last"])),
        seed=draw(st.integers(0, 2**16)),
        **draw(masks(seq_len, self_attention)),
        **draw(heads()),
        **draw(extras(filled)),
    )
    if case.query_offset is not None:  # a drawn mask or documents fit whole lengths alone
        case = replace(case, unions=None, cu_seqlens=None)
    if case.cu_seqlens is not None and draw(st.booleans()):
        case = replace(case, layout="documents")
    if self_attention and draw(st.integers(0, 4)) == 0:
        counts = draw(held(seq_len, case.ranks))
        case = replace(case, layout="held", counts=counts)
    if draw(st.integers(0, 4)) == 0:
        key_layout = draw(st.sampled_from(["contiguous", "zigzag", "striped", "held", "held"]))
        counts = draw(held(case.num_keys, case.ranks)) if key_layout == "held" else ()
        case = replace(case, key_layout=key_layout, key_counts=counts)
    if draw(st.integers(0, 5)) == 0:
        case = replace(case, replicated=draw(st.sampled_from(["queries", "keys"])))
    if case.dtype != "float64" and case.magnitude > 1:
        # scores in the hundreds lose digits of the inputs' own dtype: see test_numerics
        case = replace(case, magnitude=1.0)
    if case.dtype == "float64":
        # its gradient could be no better than its own dtype
        case = replace(case, bias_dtype=None)
    if case.replicated == "queries":  # which takes no bias
        case = replace(case, bias=None, bias_dtype=None, bias_hides=0.0)
        filled = False
    if case.transport == "grid" and not 1 < case.ring_outer < case.ring:
        case = replace(case, transport="auto")
    if case.transport in QUERIES_MOVE and (case.bias is not None or case.unions == "table"):
        case = replace(case, transport="auto")  # on a mesh a table is a bias, which does not move
    moves = case.replicated == "queries" or case.transport in QUERIES_MOVE
    if not moves and draw(st.booleans()):
        case = replace(case, **draw(chunks()))
    if case.backend == "sdpa":
        return replace(case, backend="auto") if filled else for_sdpa(case)
    return case


def for_sdpa(case: Case) -> Case:
    """The nearest case that torch's own kernel takes."""
    plain = dict.fromkeys(("padding", "bias", "bias_dtype", "softcap", "alibi"))
    scale = case.softmax_scale
    if scale is not None and scale <= 0:
        scale = None
    case = replace(case, **plain, dropout_p=0.0, return_lse=False, softmax_scale=scale)
    if case.unions == "table":  # on a mesh that is a bias
        case = replace(case, unions="each")
    return replace(case, value_dim=case.head_dim, sinks=False)


# cases that once failed, and corners that a random draw reaches seldom
CORNERS = [
    Case(ulysses=2, ring=3, seq_len=1, causal=True, return_lse=True),
    Case(ulysses=6, seq_len=5, heads=4, kv_heads=1, bias="hq"),
    Case(ring=6, seq_len=4, layout="zigzag", causal=True, transport="allgather"),
    Case(ulysses=3, ring=2, seq_len=13, heads=2, kv_heads=2, layout="striped", causal=True),
    Case(ulysses=2, ring=2, seq_len=7, heads=3, kv_heads=3, bias="h", padding=0.5, seed=3),
    Case(ulysses=4, seq_len=6, heads=4, kv_heads=2, bias="bq", batch=2),
    Case(ring=3, seq_len=11, key_len=2, causal=True, dropout_p=0.5, return_lse=True),
    Case(ring=2, ulysses=3, seq_len=5, padding=1.0, return_lse=True),
    Case(ring=4, seq_len=37, layout="documents", cu_seqlens=(0, 0, 3, 3, 20, 37), causal=True),
    Case(ring=5, seq_len=29, window=(0, 0), return_lse=True, dtype="float32"),
    Case(ulysses=2, seq_len=1, heads=2, kv_heads=2, head_dim=1, padding=0.0, strided="last"),
    Case(batch=0, ring=2, ulysses=2, heads=3, kv_heads=3, bias="h"),
    Case(batch=0, backend="sdpa"),
    Case(seq_len=0, ring=2, return_lse=True, padding=0.0),
    Case(seq_len=5, key_len=0, ring=2, return_lse=True, causal=True),
    Case(seq_len=0, key_len=5, ring=2, ulysses=2, padding=0.3, transport="allgather"),
    Case(seq_len=5, key_len=0, bias="hq", heads=2, kv_heads=1, ulysses=2),
    Case(seq_len=5, key_len=0, backend="sdpa"),
    Case(ulysses=2, ring=2, seq_len=11, layout="held", counts=(0, 7, 4, 0), causal=True, heads=2),
    Case(ring=3, seq_len=7, key_len=5, layout="zigzag", key_layout="held", key_counts=(0, 5, 0)),
    Case(ulysses=2, ring=2, seq_len=9, causal=True, key_layout="striped", padding=0.3, heads=2),
    Case(ulysses=3, seq_len=7, layout="held", counts=(0, 0, 7), bias="hq", heads=4, kv_heads=2),
    Case(ulysses=2, ring=3, seq_len=3, key_len=31, replicated="queries", return_lse=True),
    Case(ulysses=3, ring=2, seq_len=29, key_len=7, replicated="keys", bias="hq", layout="zigzag"),
    Case(ring=6, ring_outer=2, seq_len=31, causal=True, window=(9, None), padding=0.3, heads=2),
    Case(ring=6, ring_outer=3, seq_len=23, layout="striped", bias="hq", return_lse=True),
]
