"""Every subject, by family."""

from __future__ import annotations

from subjects import Subject, gcn, gluon, gpu_emulated, native, ptx, triton

FAMILIES: dict[str, list[Subject]] = {
    "native": [*native.SUBJECTS],
    "gpu_emulated": [*gpu_emulated.SUBJECTS],
    "triton": [*triton.SUBJECTS],
    "gluon": [*gluon.SUBJECTS],
    "ptx": [*ptx.SUBJECTS],
    "gcn": [*gcn.SUBJECTS],
}
SUBJECTS = [subject for family in FAMILIES.values() for subject in family]


def of(*families: str) -> list[Subject]:
    return [subject for family in families for subject in FAMILIES[family]]
