"""``usp plan --model``: which degrees, by predicted time, with what each takes."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from itertools import islice
from typing import Any

from usp.cli.console import UserError, add_json, present, table
from usp.cli.layouts import name_of
from usp.cli.paste import code_of
from usp.cli.scaling import draw_scaling, scaling_of, scaling_table
from usp.planning.choose.cluster import CLUSTERS, Cluster, cluster_of
from usp.planning.choose.here import NAME, measured_here
from usp.planning.choose.job import Choice, Job, Precision
from usp.planning.choose.model import MODELS, Model
from usp.planning.choose.search import Predicted, search
from usp.planning.choose.ways import meshes
from usp.planning.masks.mask import Mask

GIB, GB = 2**30, 1e9
_DEGREES = ("dp", "fsdp", "ring", "ulysses", "tp", "pp")
_SAVERS = ("tiles", "checkpointing", "offload", "chunks", "head_chunks", "micro")
_HOW = ("layout", "transport", "ring_outer", *_SAVERS)
_FP32 = Precision(weights=4, gradients=4, optimizer=8, element=4, matrix="fp32")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe what ``--model`` needs."""
    group = parser.add_argument_group(
        "which degrees to choose (--model; with --seq-len, --batch, a mask)"
    )
    group.add_argument(
        "--model",
        metavar="NAME",
        help=f"{', '.join(MODELS)}, or numbers: "
        "layers=32,hidden=4096,heads=32,kv_heads=8,mlp=14336,vocabulary=128256",
    )
    group.add_argument(
        "--cluster",
        default=NAME,
        help=f"{', '.join(CLUSTERS)}, or {NAME} (default), which --calibrate has measured",
    )
    group.add_argument("--devices", type=int, metavar="N", help="default: those of one node")
    group.add_argument("--memory", type=float, metavar="GIB", help="of a device, if it is another")
    group.add_argument(
        "--only", metavar="DEGREES", help="just these, as tp=1,pp=1,ring=2: any name of the table"
    )
    group.add_argument("--fp8", action="store_true", help="matrix products in 8 bits")
    group.add_argument("--forward", action="store_true", help="no training: a forward alone")
    group.add_argument("--top", type=int, default=8, metavar="N", help="default: %(default)s")
    group.add_argument(
        "--simulate", type=int, metavar="N", help="weak and strong scaling up to N devices"
    )
    group.add_argument("--sources", action="store_true", help="where models and clusters are from")
    group.add_argument(
        "--calibrate",
        nargs="?",
        const="",
        metavar="FILE",
        help=f"measure the cluster {NAME!r}; its links as usp bench comm --json FILE measured them",
    )
    add_json(parser)


def run(arguments: argparse.Namespace, mask: Mask | None) -> int:
    """Show the ranking, or the scaling, or sources.

    Args:
        arguments: Of ``usp plan``.
        mask: What was asked for; None is what the model has.

    Raises:
        UserError, ValueError: what cannot be planned.
    """
    if arguments.sources:
        return _show_sources(arguments)
    job = make_job(arguments, mask)
    only = _only(arguments.only)
    if arguments.simulate is not None:
        return _simulate(arguments, job, only)
    ranking = rank(job, only)
    shown = ranking[: _at_least_one("--top", arguments.top)]
    found = {"job": _of_job(job), "meshes": len(ranking), "choices": [_found(p) for p in shown]}
    present(arguments, found, lambda: _report(job, ranking, shown))
    return 0


def make_job(arguments: argparse.Namespace, mask: Mask | None) -> Job:
    """What the arguments describe."""
    model = parse_model(arguments.model, bool(arguments.causal))
    cluster = _cluster(arguments.cluster)
    precision = _FP32 if arguments.dtype == "float32" else Precision()
    if cluster.device == "cpu":
        precision = replace(precision, loss="torch")
    if arguments.fp8:
        precision = replace(precision, matrix="fp8")
    cluster.matrix_rate(precision.matrix)
    if arguments.memory is not None:
        if not arguments.memory > 0:
            raise ValueError(f"--memory must be above 0, got {arguments.memory}")
        cluster = replace(cluster, memory=arguments.memory * GIB)
    devices = cluster.node if arguments.devices is None else arguments.devices
    if arguments.seq_len is None:
        raise UserError("--model needs --seq-len: how many tokens a sequence has")
    return Job(
        model,
        arguments.seq_len,
        arguments.batch,
        cluster,
        devices,
        mask,
        precision,
        backward=not arguments.forward,
        fused=cluster.device != "cpu",
    )


def _cluster(name: str) -> Cluster:
    if name != NAME:
        return cluster_of(name)
    cluster = measured_here()
    if cluster is None:
        raise UserError(
            f"cluster {NAME} was not measured yet: usp plan --calibrate, or name another: "
            f"{', '.join(CLUSTERS)}"
        )
    return cluster


def parse_model(text: str, causal: bool = False) -> Model:
    """A name of ``MODELS``, or numbers.

    Raises:
        ValueError: neither; lists the names.
    """
    if text in MODELS:
        return MODELS[text]
    names = {field.name for field in fields(Model)} - {"name", "gated", "causal", "source"}
    given: dict[str, int] = {}
    for part in text.split(","):
        name, equals, number = part.partition("=")
        if name not in names or not equals or not number.isdigit():
            wrong = f"unknown model {text!r}" if "=" not in text else f"--model has {part!r}"
            raise ValueError(
                f"{wrong}: there are {', '.join(MODELS)}; or numbers of "
                f"{', '.join(sorted(names))}, as layers=24,hidden=1024,heads=16,mlp=4096"
            )
        given[name] = int(number)
    missing = [name for name in ("layers", "hidden", "heads", "mlp") if name not in given]
    if missing:
        raise ValueError(f"--model lacks {', '.join(missing)}: got {text!r}")
    words = given.get("vocabulary", 0) > 0
    rest: dict[str, Any] = {"kv_heads": given["heads"], **given}
    return Model(text, **rest, gated=words, causal=causal or words)


def _only(text: str | None) -> dict[str, str]:
    """Names and values that a choice must have."""
    found: dict[str, str] = {}
    for part in (text or "").split(",") if text else ():
        name, equals, value = part.partition("=")
        if name not in (*_DEGREES, *_HOW) or not equals:
            raise ValueError(
                f"--only takes {', '.join((*_DEGREES, *_HOW))} with a value each, got {part!r}"
            )
        found[name] = value
    return found


def rank(job: Job, only: dict[str, str]) -> list[Predicted]:
    """The best of each mesh, the fastest first.

    Raises:
        ValueError: nothing fits, or no mesh is as ``only`` says.
    """
    before = {name: value for name, value in only.items() if name in (*_DEGREES, "layout")}
    before |= {n: value for n, value in only.items() if n in ("transport", "ring_outer")}
    before.pop("fsdp", None)
    asked = [choice for choice in meshes(job, (), "layout" in only) if _is(choice, before)]
    if only and not asked:
        raise ValueError(f"no mesh of {job.devices} devices has {only}")
    found = [one for one in search(job, asked) if _is(one.choice, only)]
    if not found:
        raise ValueError(f"of the fastest meshes none has {only}")
    best: dict[tuple[int, ...], Predicted] = {}
    for one in found:
        choice = one.choice
        mesh = choice.dp, choice.ring, choice.ulysses, choice.tp, choice.pp
        best.setdefault(mesh, one)
    return list(best.values())


def _is(choice: Choice, wanted: dict[str, str]) -> bool:
    return all(_shown(choice, name) == value for name, value in wanted.items())


def _shown(choice: Choice, name: str) -> str:
    value = getattr(choice, name)
    return name_of(value) if name == "layout" else str(value)


def _at_least_one(name: str, number: int) -> int:
    if number < 1:
        raise ValueError(f"{name} must be 1 or more, got {number}")
    return number


def _found(one: Predicted) -> dict[str, Any]:
    """For programs."""
    sent = one.sent
    return {
        **vars(one.choice) | {"layout": name_of(one.choice.layout)},
        "seconds": one.time.total,
        "flops_a_device": one.flops,
        "tokens_a_second": one.tokens_a_second,
        "limit": one.limit,
        "seconds_of": one.time.parts,
        "bytes": one.memory.total,
        "bytes_of": {
            "states": one.memory.states,
            "kept": one.memory.kept,
            one.memory.moment: one.memory.working,
        },
        "sent": {**vars(sent), "total": sent.total},
    }


def _of_job(job: Job) -> dict[str, Any]:
    return {
        "model": vars(job.model),
        "weights": job.model.weights,
        "seq_len": job.seq_len,
        "batch": job.batch,
        "mask": repr(job.who_sees),
        "cluster": job.cluster.name,
        "devices": job.devices,
    }


def _report(job: Job, ranking: Sequence[Predicted], shown: Sequence[Predicted]) -> str:
    best = shown[0]
    what = "a step" if job.backward else "a forward"
    parts = [
        f"{job.model.name}: {job.model.weights / 1e9:.2f}e9 weights; {job.batch} x {job.seq_len} "
        f"tokens {what}, {job.who_sees}; {job.devices} x {job.cluster.name}\n"
        f"{job.cluster.source}",
        f"{len(ranking)} meshes fit; of each the best, by seconds that the model predicts\n"
        f"{_ranking(shown)}",
        f"where the first one's {best.time.total:.4g} s go\n{_shares(best)}",
        f"and its {best.memory.total / GIB:.1f} of {job.cluster.memory / GIB:.0f} GiB a rank\n"
        f"{_memory(best)}",
        f"the first one\n\n{code_of(best)}",
    ]
    return "\n\n".join(parts)


def _ranking(shown: Iterable[Predicted]) -> str:
    heads = *_DEGREES, *_HOW, "s", "TFLOP/s", "GiB", "GB sent", "limit"
    rows: list[tuple[object, ...]] = [heads]
    for one in shown:
        choice = one.choice
        numbers = (
            f"{one.time.total:.4g}",
            f"{one.flops / 1e12:.3g}",
            f"{one.memory.total / GIB:.1f}",
            f"{one.sent.total / GB:.3g}",
        )
        how = (_shown(choice, name) for name in (*_DEGREES, *_HOW))
        rows.append((*how, *numbers, one.limit))
    return table(rows)


def _shares(one: Predicted) -> str:
    total = one.time.total
    parts = sorted(one.time.parts.items(), key=lambda part: -part[1])
    return table(
        [(name, f"{s:.4g} s", f"{100 * s / total:.1f}%") for name, s in parts if s > 1e-3 * total]
    )


def _memory(one: Predicted) -> str:
    memory = one.memory
    rows = (
        ("weights, gradients, optimizer", memory.states),
        ("activations kept for the backward", memory.kept),
        (f"most beside them, at the {memory.moment}", memory.working),
    )
    return table([(name, f"{size / GIB:.2f} GiB") for name, size in rows])


def _show_sources(arguments: argparse.Namespace) -> int:
    found = {
        "models": {name: model.source for name, model in MODELS.items()},
        "clusters": {name: cluster.source for name, cluster in CLUSTERS.items()},
    }

    def text() -> str:
        return "\n\n".join(f"{kind}\n{table(rows.items())}" for kind, rows in found.items())

    present(arguments, found, text)
    return 0


def _simulate(arguments: argparse.Namespace, job: Job, only: dict[str, str]) -> int:
    if arguments.simulate < job.devices:
        raise ValueError(
            f"--simulate {arguments.simulate} is below the {job.devices} devices to begin with"
        )
    curves = scaling_of(job, arguments.simulate, lambda one: next(islice(rank(one, only), 1)))
    found = {
        "job": _of_job(job),
        "scaling": {
            name: [
                {"devices": point.devices, "batch": point.batch, "efficiency": point.efficiency}
                | ({} if point.best is None else _found(point.best))
                for point in curve
            ]
            for name, curve in curves.items()
        },
    }
    if arguments.png is not None:
        draw_scaling(job, curves, arguments.png)
    present(arguments, found, lambda: scaling_table(job, curves))
    return 0
