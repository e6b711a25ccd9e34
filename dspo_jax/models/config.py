"""Reading of a network's config.json: checked keys, ignored keys, values for each level."""

from collections.abc import Collection, Mapping
from typing import Any

from dspo_jax import schema
from dspo_jax.errors import UserError
from dspo_jax.json_files import shown
from dspo_jax.schema import Key

NetworkConfig = dict[str, Any]
"""The config.json of a network by key, as parsed or as `read_config` completes it."""

# Keys of bookkeeping that change no computation; the second row is what diffusers' `EMAModel` leaves behind.
_IGNORED = {
    *("architectures", "torch_dtype", "dtype", "transformers_version", "model_type"),
    *("decay", "min_decay", "inv_gamma", "power", "optimization_step", "update_after_step", "use_ema_warmup"),
}


def read_config(
    class_name: str, config: NetworkConfig, keys: Mapping[str, Key], ignored: Collection[str] = ()
) -> NetworkConfig:
    """Checks a network's config.json and fills in defaults.

    Args:
      class_name: the model class, for the message.
      config: the parsed config.json.
      keys: what the class reads, and what it computes in one way only.
      ignored: keys of the class that the computation does not depend on.

    Raises:
      UserError: names the key and value of what is not supported.
    """
    return schema.fill(f"{class_name} config", config, keys, {*_IGNORED, *ignored})


def per_level(class_name: str, key: str, value: object, levels: int) -> list[Any]:
    """Lists a value for each resolution level: a scalar is repeated, a list must have one entry a level."""
    if isinstance(value, list | tuple):
        if len(value) != levels:
            raise UserError(
                f"{class_name} config: {key} = {shown(value)} needs {levels} entries, one for each block"
            )
        return list(value)
    return [value] * levels


def check_multiple(class_name: str, key: str, value: int, divisor_key: str, divisor: int) -> None:
    """Raises UserError where the features `value` of `key` do not split into `divisor` parts."""
    if value % divisor:
        raise UserError(f"{class_name} config: {key} = {value} is no multiple of {divisor_key} = {divisor}")
