"""The keys of `config.lora`."""

import dataclasses
import math
from collections.abc import Sequence

from dspo_jax.errors import UserError
from dspo_jax.limits import DECAY, Limit, limited
from dspo_jax.models.lora import Scale


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """The keys of `config.lora`; configs/common.py says what they mean."""

    rank: int = limited(Limit("must be at least 1, or 0 to turn LoRA off", lambda rank: rank >= 0))
    targets: Sequence[str]
    init: str | None
    alpha: float | None = limited(
        Limit("must be above 0 and finite", lambda alpha: alpha is None or 0 < alpha < math.inf)
    )
    rank_stabilised: bool
    dora: bool
    dropout: float = limited(DECAY)

    def __post_init__(self) -> None:
        """Refuses keys of adapters where there are none."""
        for key, off in (("alpha", None), ("rank_stabilised", False), ("dora", False), ("dropout", 0)):
            if not self.on and getattr(self, key) != off:
                raise UserError(
                    f"config.lora.{key} = {getattr(self, key)}: LoRA is off; set config.lora.rank, or leave "
                    "this key out"
                )

    @property
    def on(self) -> bool:
        """Whether adapters are trained in place of whole networks."""
        return self.rank > 0 or self.init is not None

    @property
    def scale(self) -> Scale:
        """Factor of what the adapters add."""
        return Scale(self.alpha, self.rank_stabilised)
