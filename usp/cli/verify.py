"""``usp verify``: a model whole and sharded, and the first module that differs."""

from __future__ import annotations

import argparse
import importlib
import sys
import traceback
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from torch import nn

import usp
from usp.cli.console import Exit, UserError, add_json, present

if TYPE_CHECKING:
    from usp.cli.console import Commands


def add_arguments(commands: Commands) -> argparse.ArgumentParser:
    """Describe ``usp verify`` to the parser of the command line."""
    parser = commands.add_parser(
        "verify", help="run a model whole and sharded, and name the first module that differs"
    )
    parser.add_argument(
        "factory",
        metavar="PACKAGE:FACTORY",
        help="returns (model, inputs), or a dict of the arguments of usp.verify: model, inputs, "
        "sharded, loss, trunk, ...",
    )
    parser.add_argument("--ulysses", type=int, default=2, help="Ulysses degree (default 2)")
    parser.add_argument("--ring", type=int, default=2, help="ring degree (default 2)")
    parser.add_argument("--trunk", help="where tokens are spread, where it is not known")
    parser.add_argument(
        "--layout", default="contiguous", choices=("contiguous", "zigzag", "striped")
    )
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="how long the ranks may take (default 60)"
    )
    add_json(parser)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """0: the same. 1: not. 3: a rank came no further."""
    given = _made(arguments.factory)
    if arguments.trunk is not None:
        given["trunk"] = arguments.trunk
    try:
        options: dict[str, Any] = {
            "mesh_shape": (arguments.ulysses, arguments.ring),
            "layout": arguments.layout,
            "seconds": arguments.seconds,
        }
        found = usp.verify(**(options | given))
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from error
    present(arguments, asdict(found), lambda: str(found))
    if found.kind == "hang":
        return Exit.NO_ANSWER
    return Exit.RIGHT if found else Exit.WRONG


def _theirs(name: str, error: Exception) -> UserError:
    """What the user's own code raised, and where."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return UserError(
        f"{name} raises {type(error).__name__}: {error} ({place.filename}, line {place.lineno})"
    )


def _made(name: str) -> dict[str, Any]:
    """Arguments of ``usp.verify``, by what ``package:factory`` returns."""
    module_name, colon, factory_name = name.partition(":")
    if not (module_name and colon and factory_name):
        raise UserError(f"takes PACKAGE:FACTORY, as my_models.vit:make, got {name!r}")
    if "" not in sys.path:
        sys.path.insert(0, "")  # as python -m does
    try:
        factory = getattr(importlib.import_module(module_name), factory_name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"cannot find {name}: {error}") from error
    except Exception as error:
        raise _theirs(name, error) from error
    try:
        found = factory() if callable(factory) else factory
    except Exception as error:
        raise _theirs(name, error) from error
    if isinstance(found, dict) and isinstance(found.get("model"), nn.Module):
        return dict(found)
    if isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], nn.Module):
        return {"model": found[0], "inputs": found[1]}
    raise UserError(
        f"{name} must return (model, inputs), or a dict with both and other arguments of "
        f"usp.verify, got {type(found).__name__}"
    )
