"""How the weights of two models differ: names, shapes, dtypes, and the values of one tensor at a time."""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from nanochat.formats.parameters import cropped_shape
from nanochat.inspection.contents import Contents, TensorFacts

CHUNK = 2**22  # numbers that are compared at once, in float64


@dataclass
class TensorDiff:
    """A tensor whose values differ. Norms and cosine are of both tensors as vectors, None where they are not finite."""

    name: str
    max: float | None  # the largest absolute difference
    relative: float | None  # |A - B| / |A|
    cosine: float | None
    rounded: bool  # one is the other, rounded to its dtype


@dataclass
class WeightsDiff:
    """`compared`: "values", "hashes" (of equal files), or "shapes" where the values were not asked for."""

    tensors: tuple[int, int]
    compared: str
    identical: int = 0
    changed: list[TensorDiff] = field(default_factory=list)  # largest relative difference first
    only_a: list[str] = field(default_factory=list)
    only_b: list[str] = field(default_factory=list)
    shapes: dict[str, tuple[list[int], list[int]]] = field(default_factory=dict)
    dtypes: dict[str, int] = field(default_factory=dict)  # "F32, BF16": number of tensors

    @property
    def same(self) -> bool:
        """Whether nothing that was compared differs. A dtype does not count where its values are the same."""
        return not (self.changed or self.only_a or self.only_b or self.shapes)

    @property
    def rounded(self) -> bool:
        """Whether all that differs is rounding to a smaller dtype."""
        return (
            bool(self.changed)
            and all(t.rounded for t in self.changed)
            and not (self.only_a or self.only_b or self.shapes)
        )

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "rounded": self.rounded}


def compare_weights(a: Contents, b: Contents, values: bool, progress: Callable[[int, int], None]) -> WeightsDiff:
    """The weights of two models. `progress(done, all)` is called before each tensor whose values are read.

    The rows that pad the vocabulary are no part of the model.
    """
    shared = [name for name in a.tensors if name in b.tensors]
    first, second = a.hashes.get("model.safetensors"), b.hashes.get("model.safetensors")
    equal_files = first is not None and first == second
    found = WeightsDiff((len(a.tensors), len(b.tensors)), "hashes" if equal_files else "values" if values else "shapes")
    found.only_a = [name for name in a.tensors if name not in b.tensors]
    found.only_b = [name for name in b.tensors if name not in a.tensors]
    for number, name in enumerate(shared):
        one, two = a.tensors[name], b.tensors[name]
        shapes = shape_of(name, a), shape_of(name, b)
        if shapes[0] != shapes[1]:
            found.shapes[name] = shapes
            continue
        if one.dtype != two.dtype:
            key = f"{one.dtype}, {two.dtype}"
            found.dtypes[key] = found.dtypes.get(key, 0) + 1
        if equal_files:
            found.identical += 1
        elif values:
            progress(number, len(shared))
            difference = compare_values(name, crop(one, shapes[0]), crop(two, shapes[1]))
            found.changed += [difference] if difference else []
            found.identical += difference is None
    found.changed.sort(key=lambda t: math.inf if t.relative is None else t.relative, reverse=True)
    return found


def shape_of(name: str, model: Contents) -> list[int]:
    """A tensor's shape without the rows that pad the vocabulary."""
    shape = model.tensors[name].shape
    return list(cropped_shape(name, shape, model.config) if model.config else shape)


def crop(tensor: TensorFacts, shape: list[int]) -> torch.Tensor:
    value = tensor.read()
    return value if list(value.shape) == shape else value[: shape[0]]


def compare_values(name: str, a: torch.Tensor, b: torch.Tensor) -> TensorDiff | None:
    """The difference of two tensors of one shape; None if all values are equal, NaN to NaN."""
    largest = difference = dot = norm_a = norm_b = 0.0
    equal = rounded = True
    narrow = min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
    for x, y in zip(chunks(a), chunks(b)):
        if not ((x == y) | (x.isnan() & y.isnan())).all():
            equal, delta = False, x - y
            rounded = rounded and a.dtype != b.dtype and torch.equal(x.to(narrow).double(), y.to(narrow).double())
            most = delta.abs().max().item()
            largest = max(largest, most) if math.isfinite(most) else math.inf
            difference += delta.square().sum().item()
        dot, norm_a, norm_b = dot + (x * y).sum().item(), norm_a + (x * x).sum().item(), norm_b + (y * y).sum().item()
    if equal:
        return None
    sizes = math.sqrt(norm_a) * math.sqrt(norm_b)
    relative = math.sqrt(difference / norm_a) if norm_a else math.inf
    cosine = dot / sizes if sizes else math.nan
    return TensorDiff(name, finite(largest), finite(relative), finite(cosine), rounded)


def chunks(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Its numbers in float64, a part at a time."""
    for part in tensor.reshape(-1).split(CHUNK):
        yield part.double()


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def group_of(name: str) -> str:
    """The role of a tensor: its name without the numbers of layers."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
