"""The keys of configs/common.py as frozen values, parsed and checked once at the start of a run.

A field is a key, with its limit beside it; configs/common.py says what the keys mean.
"""

import dataclasses
import json
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from ml_collections import ConfigDict

from dspo_jax import limits
from dspo_jax.errors import UserError
from dspo_jax.json_files import JsonObject
from dspo_jax.limits import (
    AT_LEAST_1,
    DECAY,
    FINITE_NOT_NEGATIVE,
    NOT_NEGATIVE,
    PROBABILITY,
    Limit,
    choice,
    limited,
)
from dspo_jax.models import quantized
from dspo_jax.models.model import COMPUTE_DTYPES
from dspo_jax.models.remat import POLICIES
from dspo_jax.objectives import Objective, get_objective
from dspo_jax.objectives.policy_gradient import get_policy_gradient
from dspo_jax.objectives.reward_gradient import RewardGradient, get_reward_gradient
from dspo_jax.objectives.steps import PolicyGradient
from dspo_jax.schedules.process import Process
from dspo_jax.training.lora_settings import LoraSettings
from dspo_jax.training.offload import OFFLOADS
from dspo_jax.training.optim import OptimizerSettings
from dspo_jax.training.stream_settings import (
    AdvantageSettings,
    ReferenceSettings,
    RewardSettings,
    StreamSettings,
)
from dspo_jax.training.watch_settings import (
    CheckpointSettings,
    ProfileSettings,
    SampleSettings,
    ValidationSettings,
)
from dspo_jax.weights.saved_params import name_step, split_run


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The keys of `config.data`."""

    path: str | None
    weights: Sequence[float]
    split: str
    curriculum_groups: int = limited(AT_LEAST_1)
    curriculum_every: int = limited(AT_LEAST_1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextSettings:
    """The keys of `config.text`, with which `load_pipeline` reads the model."""

    max_chunks: int = limited(AT_LEAST_1)
    clip_skip: int = limited(AT_LEAST_1)
    max_sequence_length: int | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TimestepSettings:
    """The keys of `config.timesteps`."""

    first: int
    last: int | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class LevelSettings:
    """The keys of `config.levels`, which the model's process checks (`Process.make_draw`)."""

    draw: str | None
    mean: float | None
    std: float | None
    scale: float | None
    shift: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SliceSettings:
    """The keys of `config.mesh.dcn`."""

    data: int
    fsdp: int
    tensor: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshSettings:
    """The keys of `config.mesh`."""

    data: int
    fsdp: int
    tensor: int
    dcn: SliceSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class StabilitySettings:
    """The keys of `config.stability`."""

    max_skipped: int = limited(NOT_NEGATIVE)
    loss_spike: float = limited(NOT_NEGATIVE)
    rollback: bool


Method = TypeVar("Method")


def _maker(get: Callable[..., Method]) -> Callable[[Mapping[str, object]], Method]:
    """Returns a function from a group of keys, a name and arguments, to a method; None is a default."""

    def make(keys: Mapping[str, object]) -> Method:
        arguments = {name: value for name, value in keys.items() if value is not None and name != "name"}
        return get(str(keys.get("name")), **arguments)

    return make


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """A config of a training run, its ranges checked, its objective made and `reference_dtype` decided.

    Attributes:
      given: the config as config.json holds it: JSON types, and None where nothing was set.
      recipe: name of its file, for titles.
      frozen_kernels: one of `quantized.KINDS` where `reference_dtype` asked for it, which then is that of the
        other frozen parameters; else None.
      steps: of no meaning where there are `epochs`, until `for_examples` has made steps of them.
    """

    model: str | None
    seed: int = limited(Limit(f"must be between 0 and {2**32 - 1}", lambda seed: 0 <= seed < 2**32))
    steps: int = limited(AT_LEAST_1)
    epochs: float | None = limited(
        Limit("must be above 0 and at most a million", lambda epochs: epochs is None or 0 < epochs <= 1e6)
    )
    batch_size: int = limited(AT_LEAST_1)
    accumulation: int = limited(AT_LEAST_1)
    caption_dropout: float = limited(PROBABILITY)
    encoder_dropout: float = limited(PROBABILITY)
    dropped_captions: str | None = choice("empty", "zeros", optional=True)
    share_timesteps: bool
    share_noise: bool
    noise_offset: float = limited(FINITE_NOT_NEGATIVE)
    positive_ratio: float = limited(PROBABILITY)
    text: TextSettings
    train_text_encoder: bool
    lora: LoraSettings
    compute_dtype: str = choice(*COMPUTE_DTYPES)
    param_dtype: str = choice(*COMPUTE_DTYPES)
    reference_dtype: str = choice(*COMPUTE_DTYPES, *quantized.KINDS, optional=True)
    remat: str = choice(*POLICIES)
    offload: Sequence[str] = limited(OFFLOADS)
    timesteps: TimestepSettings
    levels: LevelSettings
    ema_decay: float = limited(DECAY)
    log_every: int = limited(AT_LEAST_1)
    wandb_project: str | None
    data: DataSettings
    objective: Objective = dataclasses.field(metadata={"make": _maker(get_objective)})
    stream: StreamSettings
    rewards: RewardSettings
    reference: ReferenceSettings
    policy_gradient: PolicyGradient = dataclasses.field(metadata={"make": _maker(get_policy_gradient)})
    advantages: AdvantageSettings
    reward_gradient: RewardGradient = dataclasses.field(metadata={"make": _maker(get_reward_gradient)})
    optimizer: OptimizerSettings
    mesh: MeshSettings
    stability: StabilitySettings
    checkpoint: CheckpointSettings
    validation: ValidationSettings
    samples: SampleSettings
    profile: ProfileSettings
    given: JsonObject = dataclasses.field(default_factory=dict)
    recipe: str = ""
    frozen_kernels: str | None = None

    @property
    def drawn_per_example(self) -> int:
        """Images that are drawn for an example of a batch of `trajectories` or `own_pairs`."""
        if self.stream.kind != "own_pairs":
            return 1
        return 2 if self.objective.needs_weight else self.stream.images

    @property
    def round_images(self) -> int:
        """Images of a round of `trajectories` or `own_pairs`, over all processes."""
        return self.batch_size * self.stream.updates * self.drawn_per_example

    @property
    def images_per_row(self) -> int:
        """Images of a row of a batch of own images, P: all of a prompt where lists are taken, else a pair."""
        lists = self.stream.kind == "own_pairs" and self.objective.takes_lists
        return self.stream.images if lists else 2

    @property
    def method_key(self) -> str:
        """Name of the group of keys that says what trains."""
        return {"prompts": "reward_gradient", "trajectories": "policy_gradient"}.get(
            self.stream.kind, "objective"
        )

    @property
    def validations_compare(self) -> bool:
        """Whether of two validations of a run the one with the higher score is of the better model."""
        moves = self.reference.every > 0 and not self.stream.needs_prompts
        return not moves and (self.method_key != "objective" or self.objective.score_rises)

    @property
    def method(self) -> str:
        """Name of the objective, the policy gradient or the reward gradient that trains."""
        name: str = getattr(self, self.method_key).name
        return name

    def with_sequence_length(self, length: int | None) -> "Settings":
        """Returns the settings with the model's `max_sequence_length` in place of its default."""
        text = dataclasses.replace(self.text, max_sequence_length=length)
        return dataclasses.replace(self, text=text, given={**self.given, "text": dataclasses.asdict(text)})

    def with_sampler(self, process: Process) -> "Settings":
        """Returns the settings with the stream's sampler for a model's process in place of its default."""
        stream = self.stream.with_sampler(process)
        given = {**self.given, "stream": {**self.given["stream"], "sampler": stream.sampler}}
        return dataclasses.replace(self, stream=stream, given=given)

    def for_examples(self, count: int) -> "Settings":
        """Returns the settings with `epochs`, if there are any, turned into the steps of so many examples."""
        if self.epochs is None:
            return self
        steps = max(1, round(self.epochs * count / self.batch_size))
        return dataclasses.replace(self, steps=steps, epochs=None)


def parse(config: ConfigDict) -> Settings:
    """Parses the config of a run. The model and the data may be unset, as a plan can do without.

    Raises:
      UserError: a key is unknown, missing or out of range, two do not go together, or the model is a run's
        workdir.
    """
    settings = limits.parse(Settings, config.to_dict(), "config")
    if settings.model and (run := split_run(settings.model)):
        step = "" if run[1] is None else f" --step={run[1]}"
        raise UserError(
            f"config.model = {settings.model!r}: a training workdir; write its model out, and name that: "
            f"python -m dspo_jax.convert export --run={run[0]}{step} --out=DIR"
        )
    # An update by trajectories is split by the steps of its images, see `trajectory_stream.check_rows`.
    if settings.stream.kind != "trajectories" and settings.batch_size % settings.accumulation:
        raise UserError(
            f"config.accumulation = {settings.accumulation}: must divide "
            f"config.batch_size = {settings.batch_size}"
        )
    if settings.method_key != "objective":
        _refuse_keys_of_noised_examples(settings)
    if settings.data.curriculum_groups > 1 and settings.stream.kind != "dataset":
        raise UserError(
            f"config.data.curriculum_groups = {settings.data.curriculum_groups}: orders pairs of a dataset, "
            f"and config.stream.kind = {settings.stream.kind!r} draws images of its own; leave it 1"
        )
    if settings.optimizer.text_encoder_learning_rate is not None and not settings.train_text_encoder:
        raise UserError(
            "config.optimizer.text_encoder_learning_rate = "
            f"{settings.optimizer.text_encoder_learning_rate:g}: the text encoders are not trained; set "
            "config.train_text_encoder=True, or leave this key out"
        )
    if settings.dropped_captions and not (settings.caption_dropout or settings.encoder_dropout):
        raise UserError(
            f"config.dropped_captions = {settings.dropped_captions!r}: says what a dropped caption is, and "
            "none is dropped; set config.caption_dropout or config.encoder_dropout above 0, or leave it unset"
        )
    weighs = settings.method_key == "objective" and settings.objective.needs_weight
    if weighs and settings.stream.kind != "own_pairs":
        raise UserError(
            f"config.objective.name = {settings.objective.name!r}: weighs the model's own images by their "
            f"rewards, which config.stream.kind = {settings.stream.kind!r} has not; set "
            "--config.stream.kind=own_pairs"
        )
    given = json.loads(config.to_json())
    given["objective"]["name"] = settings.objective.name  # not an alias
    if settings.reference.model:
        # The newest or best checkpoint of a run may be another one when this run is resumed.
        named = given["reference"]["model"] = name_step(settings.reference.model)
        settings = dataclasses.replace(
            settings, reference=dataclasses.replace(settings.reference, model=named)
        )
    if not settings.validation.every:
        settings = dataclasses.replace(
            settings, validation=dataclasses.replace(settings.validation, patience=0)
        )
    if settings.validation.patience and not settings.validations_compare:
        why = (
            f"the held-out score of objective {settings.method!r} falls as it learns"
            if settings.method_key == "objective" and not settings.objective.score_rises
            else f"with config.reference.every = {settings.reference.every} held-out scores are against a "
            "reference that moves, and do not compare"
        )
        raise UserError(f"config.validation.patience = {settings.validation.patience}: {why}; set it to 0")
    # By default the lower precision of parameters and computation.
    lesser = "bfloat16" if "bfloat16" in (settings.param_dtype, settings.compute_dtype) else "float32"
    kernels = settings.reference_dtype if settings.reference_dtype in quantized.KINDS else None
    if kernels is not None:
        _check_quantized(settings)
    settings = dataclasses.replace(
        settings,
        reference_dtype=lesser if kernels else settings.reference_dtype or lesser,
        frozen_kernels=kernels,
        given=given,
    )
    if settings.reference.every and settings.reference.decay and settings.reference_dtype == "bfloat16":
        raise UserError(
            f"config.reference.decay = {settings.reference.decay:g}: a moving average in bfloat16 loses its "
            "small steps; set --config.reference_dtype=float32"
        )
    # The policy is rounded to param_dtype and then to the compute dtype. Where the reference is rounded
    # otherwise, the two differ before the first update. (With fresh adapters they are one tree; and a
    # reference of another model differs anyway.)
    policy_rounded, reference_rounded = (
        "bfloat16" in (settings.compute_dtype, dtype)
        for dtype in (settings.param_dtype, settings.reference_dtype)
    )
    fresh = settings.lora.on and settings.lora.init is None
    if policy_rounded != reference_rounded and not (fresh or settings.reference.model):
        raise UserError(
            f"config.reference_dtype = {settings.reference_dtype!r}: policy and reference would differ from "
            f"the start, with config.param_dtype = {settings.param_dtype!r} and config.compute_dtype = "
            f"{settings.compute_dtype!r}; leave reference_dtype unset, or set it to {settings.param_dtype!r}"
        )
    return settings


def _check_quantized(settings: Settings) -> None:
    """Refuses quantized frozen kernels where policy and reference do not share them, or they would move."""
    key = f"config.reference_dtype = {settings.reference_dtype!r}"
    if not settings.lora.on:
        raise UserError(
            f"{key}: is of frozen kernels that adapters are trained beside; a policy that is trained whole "
            "would differ from its reference from the start; set --config.lora.rank=8 or the like, or leave "
            "it unset"
        )
    if settings.reference.model and settings.reference.every:
        raise UserError(
            f"{key}: such kernels cannot move, and config.reference.every = {settings.reference.every} moves "
            f"those of config.reference.model = {settings.reference.model!r}; leave reference_dtype unset, "
            "or set reference.every to 0"
        )
    quantized.import_qwix(str(settings.reference_dtype))


def _refuse_keys_of_noised_examples(settings: Settings) -> None:
    """Refuses keys that a run does not read which trains on the steps of a sampler."""
    keys: dict[str, object] = {
        "encoder_dropout": 0,
        "dropped_captions": None,
        "noise_offset": 0,
        "lora.dropout": 0,
        "timesteps.first": 0,
        "timesteps.last": None,
        **{f"levels.{field.name}": None for field in dataclasses.fields(LevelSettings)},
    }
    for key, unset in keys.items():
        value = operator.attrgetter(key)(settings)
        if value != unset:
            raise UserError(
                f"config.{key} = {value!r}: is of noised examples, and config.stream.kind = "
                f"{settings.stream.kind!r} trains on the steps of a sampler; leave it {unset}"
            )
