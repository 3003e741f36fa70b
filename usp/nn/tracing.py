"""What ``torch.fx`` sees of our modules: one node each, as of the modules of torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import torch
from torch import nn
from torch.fx import Proxy

Module = TypeVar("Module", bound=nn.Module)
Given = ParamSpec("Given")
Found = TypeVar("Found")


def one_node(
    forward: Callable[Concatenate[Module, Given], Found],
) -> Callable[Concatenate[Module, Given], Found]:
    """A ``forward`` that records a call of its module where ``torch.fx`` traces it.

    The tracer takes modules whose class lies in ``torch.nn`` for nodes and walks through all
    others, which stops where shapes are compared. It hands out proxies, and knows by what name
    the model holds this module: that is all a node needs.
    """

    @wraps(forward)
    def call(self: Module, *args: Given.args, **kwargs: Given.kwargs) -> Found:
        for x in (*args, *kwargs.values()):
            if isinstance(x, Proxy):
                return cast(Found, _record(self, x.tracer, args, kwargs))
        return forward(self, *args, **kwargs)

    return call


def _record(module: nn.Module, tracer: Any, args: Any, kwargs: Any) -> Any:
    name = tracer.path_of_module(module)
    if not name:
        raise torch.fx.proxy.TraceError(
            f"{type(module).__name__} is one node of a graph, so it cannot be the whole of it: "
            "trace a module that holds it"
        )
    return tracer.create_proxy("call_module", name, args, kwargs)
