"""Layouts from text."""

from __future__ import annotations

from usp.planning.layout import DocumentZigzag, Held, Layout, Replicated, check_layout

FORMS = "contiguous, zigzag, striped, document-zigzag, held:COUNT,... of each rank, or replicated"


def integers(text: str) -> tuple[int, ...]:
    """Comma-separated integers."""
    return tuple(int(part) for part in text.split(","))


def parse_layout(text: str, length: int, cu_seqlens: tuple[int, ...] | None) -> Layout:
    """One of ``FORMS`` as that layout of so many tokens.

    Raises:
        ValueError: it is none of them, or documents are missing.
    """
    if text == "replicated":
        return Replicated(length)
    if text.startswith("held:"):
        return Held(integers(text.removeprefix("held:")))
    if text != "document-zigzag":
        return check_layout(text)
    if cu_seqlens is None:
        raise ValueError("--layout document-zigzag cuts documents: give them as --cu-seqlens 0,...")
    return DocumentZigzag(cu_seqlens)


def name_of(layout: Layout) -> str:
    """As it is written on a command line and in a table."""
    return "document-zigzag" if isinstance(layout, DocumentZigzag) else str(layout)


def code_of_layout(layout: Layout) -> str:
    """As it is written in Python."""
    return f"usp.{layout!r}" if isinstance(layout, DocumentZigzag) else f'"{layout}"'
