"""How far two runs lie apart, tensor by tensor."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Difference:
    """The largest difference of one tensor.

    Attributes:
        name: Which tensor.
        absolute: Largest absolute difference.
        largest: Largest absolute value of the reference.
    """

    name: str
    absolute: float
    largest: float

    @property
    def relative(self) -> float:
        """Relative to the largest value; NaN counts as infinitely far."""
        if self.absolute == 0:
            return 0.0
        ratio = self.absolute / self.largest if self.largest else float("inf")
        return ratio if ratio == ratio else float("inf")


def difference(name: str, actual: Tensor, expected: Tensor) -> Difference:
    """Compare in fp64.

    Raises:
        ValueError: the shapes differ; names both.
    """
    if actual.shape != expected.shape:
        raise ValueError(f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    gap = (actual.double() - expected.double()).abs().max()
    return Difference(name, float(gap), float(expected.double().abs().max()))


OF_TOKENS = ("output", "gradient of the patches")


def of_copies(expected: dict[str, Tensor], times: int) -> dict[str, Tensor]:
    """What a sequence must give that is a picture many times over, by what the picture gave.

    Attention sees each key so many times, which changes no weighted mean: every copy has the output
    of the picture. The mean loss has its gradients, those of the patches spread over their copies.
    """
    output, gradient = (expected[name].repeat(1, times, 1) for name in OF_TOKENS)
    return {**expected, OF_TOKENS[0]: output, OF_TOKENS[1]: gradient / times}


def differences(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> list[Difference]:
    """The output, the gradient of the patches, and the worst of the parameters' gradients.

    Raises:
        ValueError: one of them lacks a tensor.
    """
    missing = expected.keys() - actual.keys()
    if missing:
        raise ValueError(f"the sharded run has no {', '.join(sorted(missing))}")
    all_of_them = [difference(name, actual[name], value) for name, value in expected.items()]
    main = [d for d in all_of_them if d.name in OF_TOKENS]
    parameters = [d for d in all_of_them if d not in main]
    worst = max(parameters, key=lambda d: d.relative)
    return [*main, worst]
