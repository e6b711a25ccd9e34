"""Where a single-file checkpoint keeps the tensors of a component."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from dspo_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Place:
    """The place of a component's tensor in the single file.

    Attributes:
      name: the name of the tensor there.
      kind: "same"; "1x1", a linear map kept as a convolution [O, I, 1, 1]; "transposed" [I, O]; "third", one
        of three stacked along the first axis; "swapped", whose halves along the first axis change places; or
        "identity", which the file does not hold, as no other value is meant.
      part: which third.
    """

    name: str
    kind: str = "same"
    part: int = 0


@dataclasses.dataclass(frozen=True)
class Layout:
    """One component's names in the single file.

    Attributes:
      root: prefix of all names there.
      modules: module of the component -> module there; the longest that fits decides.
      tensors: tensor of the component -> tensor there, where it does not follow its module.
      passed_over: a pattern of further names below `root` that the component does not need.
    """

    root: str
    modules: Mapping[str, str]
    tensors: Mapping[str, Place] = dataclasses.field(default_factory=dict)
    passed_over: str = r"(?!)"

    def place(self, name: str) -> Place:
        """Finds the place of the component's tensor `name`.

        Raises:
          UserError: the layout has no such tensor.
        """
        if name in self.tensors:
            place = self.tensors[name]
            return dataclasses.replace(place, name=self.root + place.name)
        parts = name.split(".")
        for cut in range(len(parts) - 1, 0, -1):
            module = self.modules.get(".".join(parts[:cut]))
            if module is not None:
                return Place(".".join([self.root + module, *parts[cut:]]))
        raise UserError(f"tensor {name} has no place in a single-file checkpoint")


def swap_halves(value: np.ndarray) -> np.ndarray:
    """Returns an array whose halves along the first axis have changed places."""
    first, second = np.split(value, 2)
    return np.concatenate([second, first])
