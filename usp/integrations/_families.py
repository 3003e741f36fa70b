"""Models whose trunk is known: a line each."""

from __future__ import annotations

from torch import nn

from usp.integrations._boundary import Boundary

# by the class of the model, or of what it derives from
FAMILIES = {
    "torch.nn.modules.transformer.TransformerEncoder": Boundary("layers"),
    "torchvision.models.vision_transformer.VisionTransformer": Boundary("encoder.layers"),
    "timm.models.vision_transformer.VisionTransformer": Boundary("blocks", "*.attn"),
    "timm.models.beit.Beit": Boundary("blocks", "*.attn"),
}

# drop whole samples, so that all ranks must drop the same
OF_SAMPLES = frozenset(("DropPath", "StochasticDepth"))


def family(model: nn.Module) -> Boundary:
    """The trunk of a model that is known.

    Raises:
        ValueError: it is not.
    """
    for kind in type(model).__mro__:
        name = f"{kind.__module__}.{kind.__qualname__}"
        if name in FAMILIES:
            return FAMILIES[name]
    raise ValueError(
        f"the trunk of {type(model).__qualname__} is not known: name the modules that follow each "
        'other, and between which tokens are spread, trunk="encoder.layers", or describe it, '
        "trunk=usp.Boundary(...)"
    )
