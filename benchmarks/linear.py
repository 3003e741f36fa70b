"""Linear attention on four processes: states handed on, against gathering the whole sequence.

usp bench linear --quick
usp bench linear --json result.json        (1024 and 4096 tokens, 2 heads of 64)

Four gloo processes of one thread each, on two cores, run causal linear attention with a decay a
token and head (Mamba-2's SSD) over one sequence that they share. Five ways: gather and ring are
usp.linear_attention's; "plain" is gather in plain PyTorch, without kernels of our own; "all-gather"
gathers q, k, v and the decays and computes the whole on every rank; "quadratic" gathers k, v and
the decays and computes this rank's rows of all scores. --rules channels is a decay a token and
channel (GLA), without the last way. --rules delta is the delta rule, with a beta
a token and head (gated DeltaNet): gather, ring and all-gather. They run in turn in both orders, a
barrier before each; the slowest rank counts. A ratio is the median over rounds of time(other) /
time(gather). The bytes are those that usp.testing.WireBytes counts. Nothing is timed where those
of usp are not the formula's, or where results or gradients differ from the recurrence, token by
token in fp64.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

import usp
from usp.bench import world as worlds
from usp.bench.device import DTYPES
from usp.bench.exact import refuse_inexact, relative_error
from usp.bench.machine import introduce
from usp.bench.records import write_report
from usp.bench.ring_case import differentiated
from usp.bench.world import World
from usp.distributed.processes import Tell
from usp.linear_attention import families
from usp.planning.states import numbers_sent
from usp.testing import WireBytes, linear_recurrence

MESH, PROCESSES, CORES = (4, 1), 4, 2  # ulysses x ring
PASSES = ("forward", "both")
SCHEMES = {
    "decay": ("gather", "ring", "plain", "all-gather", "quadratic"),
    "channels": ("gather", "ring", "plain", "all-gather"),
    "delta": ("gather", "ring", "all-gather"),
}
NAMES = dict.fromkeys(("decay", "channels"), ("out", "dq", "dk", "dv", "ddecay"))
NAMES["delta"] = (*NAMES["decay"], "dbeta")
# Relative rms error against fp64 above which nothing is timed.
ALLOWED = {"fp32": 1e-5, "bf16": 2e-2}


@dataclass(frozen=True)
class LinearCase:
    rule: str
    dtype: str
    length: int
    heads: int
    head_dim: int

    def tensors(self) -> list[Tensor]:
        """q, k, v, logs of decays, by the delta rule betas, and a cotangent, of the whole."""
        random = torch.Generator().manual_seed(0)
        shape = (1, self.length, self.heads, self.head_dim)
        found = [torch.randn(shape, generator=random) for _ in range(4)]
        decays = shape if self.rule == "channels" else shape[:3]
        per_token = [-torch.rand(decays, generator=random) / 10]
        if self.rule == "delta":
            found[1] = torch.nn.functional.normalize(found[1], dim=-1)
            per_token.append(torch.rand(shape[:3], generator=random))
        *qkv, cotangent = (x.to(DTYPES[self.dtype]) for x in found)
        return [*qkv, *per_token, cotangent]

    def bytes_sent(self, scheme: str, mesh: usp.SequenceMesh, which: str) -> int:
        """By this rank, by the formula of a scheme of usp."""
        state = self.heads * self.head_dim**2
        channels = self.heads * self.head_dim
        told = {"decay": self.heads, "channels": channels, "delta": state}[self.rule]
        sent = numbers_sent(state, told, mesh.size, mesh.rank, scheme)
        return 4 * (sent.forward + (sent.backward if which == "both" else 0))


class Linear:
    """One rank's view of a case."""

    def __init__(self, case: LinearCase, mesh: usp.SequenceMesh) -> None:
        self.case, self.mesh = case, mesh
        parts = [usp.shard_sequence(x, mesh, 1).clone() for x in case.tensors()]
        *leaves, self.cotangent = parts
        self.leaves = [x.requires_grad_() for x in leaves]
        self.start = int(usp.positions(case.length, mesh)[0])

    def run(self, scheme: str, which: str) -> list[Tensor]:
        """Result, and for "both" every gradient."""
        attend: Callable[..., Tensor] = {
            "plain": self._plain,
            "all-gather": self._gathered,
            "quadratic": self._quadratic,
        }.get(scheme, partial(self._usp, scheme))
        return differentiated(attend, self.leaves, self.cotangent, which)

    def _usp(self, method: str, *tensors: Tensor) -> Any:
        options: dict[str, Any] = {"seq_len": self.case.length, "validate": False}
        return attend(*tensors, mesh=self.mesh, method=method, **options)

    def _plain(self, *tensors: Tensor) -> Any:
        with mock.patch.object(families, "FAMILIES", ()):
            return self._usp("gather", *tensors)

    def _whole(self, x: Tensor) -> Tensor:
        return usp.unshard_sequence(x, self.mesh, 1, "contiguous", self.case.length, validate=False)

    def _gathered(self, *tensors: Tensor) -> Any:
        out = attend(*[self._whole(x) for x in tensors])
        return out[:, self.start : self.start + tensors[0].shape[1]]

    def _quadratic(self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
        k, v, decay = (self._whole(x) for x in (k, v, decay))
        sums = decay.double().cumsum(1).transpose(1, 2)  # (1, H, all tokens)
        mine = torch.arange(self.start, self.start + q.shape[1])
        between = sums[:, :, mine, None] - sums[:, :, None, :]
        hidden = mine[:, None] < torch.arange(k.shape[1])
        factors = between.masked_fill(hidden, float("-inf")).exp().float()
        q, k, v = (x.transpose(1, 2).float() for x in (q, k, v))
        out = ((q @ k.mT) * factors) @ v
        return out.transpose(1, 2).to(self.cotangent.dtype)


def attend(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor | None = None, **options: Any
) -> Any:
    return usp.linear_attention(q, k, v, decay, beta=beta, **options)


def measure_all(world: World, rank: int, tell: Tell) -> list[dict[str, Any]]:
    """On each process: every case; the results of rank 0 are those of all."""
    with worlds.joined(world, rank):
        return measure(world.args, worlds.mesh(MESH, "cpu"))


def measure(args: argparse.Namespace, mesh: usp.SequenceMesh) -> list[dict[str, Any]]:
    results = []
    for rule, dtype, length in product(args.rules, args.dtypes, args.lengths):
        case = LinearCase(rule, dtype, length, args.heads, args.head_dim)
        linear, schemes = Linear(case, mesh), SCHEMES[rule]
        found = errors(case, linear)
        check(case, found)
        for which in PASSES:
            sent = {scheme: counted(linear, scheme, which) for scheme in schemes}
            candidates = {scheme: partial(linear.run, scheme, which) for scheme in schemes}
            times = worlds.turns(candidates, args.rounds, args.seconds)
            results.append(
                {
                    **asdict(case),
                    "pass": which,
                    "bytes_sent": sent,
                    "ratios": {s: times.ratio(s, "gather") for s in schemes[1:]},
                    "errors": found,
                    "seconds": times.seconds,
                    "median_seconds": {scheme: times.median(scheme) for scheme in schemes},
                }
            )
            if dist.get_rank() == 0:
                print_rows(results[-1])
    return results


def counted(linear: Linear, scheme: str, which: str) -> int:
    """Bytes of a pass, of the rank that sends most.

    Raises:
        ValueError: usp sends something else than the formula says.
    """
    with WireBytes() as wire:
        linear.run(scheme, which)
    expected = wire.sent
    if scheme in ("gather", "ring", "plain"):
        method = "gather" if scheme == "plain" else scheme
        expected = linear.case.bytes_sent(method, linear.mesh, which)
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, (wire.sent, expected))
    for rank, (sent, formula) in enumerate(told):
        if sent != formula:
            raise ValueError(
                f"{scheme}, {which}: rank {rank} sends {sent} bytes, the formula says {formula}: "
                "not timed"
            )
    return max(sent for sent, _ in told)


def errors(case: LinearCase, linear: Linear) -> dict[str, dict[str, float]]:
    """Relative rms errors of each scheme, against the recurrence in fp64; empty but on rank 0."""
    exact: dict[str, Tensor] = {}
    if dist.get_rank() == 0:
        *leaves, cotangent = (x.double() for x in case.tensors())
        leaves = [x.requires_grad_() for x in leaves]
        with worlds.threads(CORES):
            results = differentiated(_recurrence, leaves, cotangent, "both")
        exact = dict(zip(NAMES[case.rule], results, strict=True))
    found = {}
    for scheme in SCHEMES[case.rule]:
        ours = [linear._whole(x.detach()) for x in linear.run(scheme, "both")]
        found[scheme] = {
            name: relative_error(x.double(), exact[name])
            for name, x in zip(NAMES[case.rule], ours, strict=True)
            if exact
        }
    return found


def _recurrence(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor | None = None
) -> Tensor:
    return linear_recurrence(q, k, v, decay, beta=beta)[0]


def check(case: LinearCase, errors: dict[str, dict[str, float]]) -> None:
    refuse_inexact(case, errors, ALLOWED[case.dtype])


def print_rows(result: dict[str, Any]) -> None:
    for scheme, seconds in result["median_seconds"].items():
        line = f"{result['rule']:9}{result['dtype']:6}{result['length']:<8}"
        line += f"{result['pass']:9}{scheme:11}"
        line += f"{1e3 * seconds:12.1f}{result['bytes_sent'][scheme] / 1e6:9.3f}"
        if scheme in result["ratios"]:
            line += f"{result['ratios'][scheme]:14.2f}"
        print(line, flush=True)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--lengths", type=int, nargs="+", default=[1024, 4096], help="tokens of the whole")
    add("--heads", type=int, default=2)
    add("--head-dim", type=int, default=64)
    add("--dtypes", nargs="+", choices=ALLOWED, default=["fp32", "bf16"])
    add("--rules", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    add("--rounds", type=int, default=9, help="of each case, at most")
    add("--seconds", type=float, default=60.0, help="after which a case gets no further round")
    add("--quick", action="store_true", help="256 and 1024 tokens, 3 rounds")
    add("--json", type=Path, help="write every time taken there")
    args = parser.parse_args(argv)
    args.device, args.cores = "cpu", CORES
    if args.quick:
        args.lengths, args.rounds = [256, 1024], 3
    if min(args.lengths) < 4:
        parser.error(f"--lengths {min(args.lengths)} has no token for each of 4 processes")
    return args


def main() -> None:
    args = parse()
    about = introduce("linear")
    print(
        f"\n{args.heads} heads of {args.head_dim}; MB: that leave a rank\n"
        "rule     dtype tokens  pass     scheme     milliseconds      MB   time/gather"
    )
    results = worlds.in_processes(measure_all, args, PROCESSES)[0]
    write_report(args.json, about, cases=results)


if __name__ == "__main__":
    main()
