"""The start of a run: its config as settings, task, mesh and datasets, and its parameters on the devices.

Every refusal that needs no step is made here.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh
from jax.tree_util import KeyPath
from jaxtyping import PyTree
from ml_collections import ConfigDict

from dspo_jax.data.datasets import Dataset, check_scores, count_examples
from dspo_jax.data.records import HostBatch
from dspo_jax.errors import UserError
from dspo_jax.kernels.layouts import choose_formats
from dspo_jax.models import lora, quantized
from dspo_jax.models.model import Params
from dspo_jax.monitoring.metrics import import_wandb
from dspo_jax.parallel.host_memory import check_host_memory, on_host
from dspo_jax.parallel.mesh import check_batch_size, make_mesh
from dspo_jax.parallel.rules import make_shardings, place
from dspo_jax.pipelines.loading import load_pipeline
from dspo_jax.pipelines.pipeline import Pipeline
from dspo_jax.samplers.spacing import check_steps
from dspo_jax.sampling.prompts import read_prompts
from dspo_jax.training import lora_init
from dspo_jax.training.make_task import make_task
from dspo_jax.training.offload import MOMENTS, REFERENCE
from dspo_jax.training.online_checks import check_own_images, check_self_play
from dspo_jax.training.own_images import OwnImages, open_own_images
from dspo_jax.training.reference import check_reference, open_reference
from dspo_jax.training.reference_errors import check_draws, of_reference_and_data
from dspo_jax.training.settings import Settings, parse
from dspo_jax.training.step import TrainState, init_state
from dspo_jax.training.task import POLICY, Task
from dspo_jax.training.training_data import check_images, open_data, use_stored_states
from dspo_jax.weights import model_dir
from dspo_jax.weights.layout import DTYPES


@dataclasses.dataclass(frozen=True, eq=False)
class Experiment:
    """A run before its weights are read.

    Attributes:
      settings: the parsed config.
      task: static configuration of the step.
      mesh: the devices.
      datasets: read and verified; none where there are `examples`.
      examples: N encoded pairs in memory, in place of datasets.
      prompts: of `config.samples`, those of files among them; none where captions are drawn.
      adapters: LoRA's trained parameters at their start; {} where whole networks are trained.
      own_images: prompts and rewards of a run on the model's own images; None for one on a dataset.
      reference_errors: from `store_errors`, [K, N, P] float32; None where the step runs the reference.
    """

    settings: Settings
    task: Task
    mesh: Mesh
    datasets: Sequence[Dataset]
    examples: HostBatch | None
    prompts: Sequence[str]
    adapters: Params
    own_images: OwnImages | None = None
    reference_errors: np.ndarray | None = None

    @property
    def images_per_example(self) -> int:
        """Images of an example of a batch: as the dataset holds them, else a pair or a list of own images."""
        if self.examples is not None:
            return int(self.examples["moments"].shape[1])
        if not self.datasets or self.settings.stream.kind == "self_play":
            return self.settings.images_per_row
        images: int = self.datasets[0].manifest["images_per_example"]
        return images

    def pins(self) -> dict[str, str]:
        """Tells apart what stands behind the keys that name a reference, prompts and rewards, by key."""
        pins = {} if self.own_images is None else self.own_images.pins()
        init = self.settings.lora.init
        if init is not None:
            pins = pins | {"lora.init": f"a file of the digest {lora_init.digest(init)}"}
        if self.settings.reference.draws:
            digest = of_reference_and_data(self.task, self.datasets)
            pins = pins | {"reference.draws": f"a reference and data of the digest {digest}"}
        return pins if self.task.reference is None else pins | self.task.reference.pins()

    def count_examples(self) -> dict[str, int]:
        """Counts the examples or prompts to train on by image size, "HEIGHTxWIDTH" in pixels."""
        if self.own_images is not None:
            height, width = self.task.pipe.image_size
            return {f"{height}x{width}": len(self.own_images.prompts)}
        if self.examples is None:
            return count_examples(self.datasets, self.settings.data.split)
        number, _, *sides, _ = self.examples["moments"].shape
        height, width = (side * self.task.pipe.vae_scale_factor for side in sides)
        return {f"{height}x{width}": number}


def prepare(config: ConfigDict | Settings, examples: HostBatch | None = None) -> Experiment:
    """Makes everything of a run that can be refused before weights are read.

    Args:
      config: the keys of configs/common.py, or what `settings.parse` made of them.
      examples: encoded pairs in memory (`data.in_memory.encode_pairs`), in place of those of `config.data`,
        for a loop of your own: validation and samples are turned off.

    Raises:
      UserError, OSError: a config, model or data that cannot be trained.
    """
    settings = config if isinstance(config, Settings) else parse(config)
    if not settings.model:
        raise UserError("config.model is not set: give --config.model=DIR, a diffusers folder")
    pipe = load_pipeline(settings.model, **dataclasses.asdict(settings.text))
    settings = settings.with_sequence_length(pipe.max_sequence_length).with_sampler(pipe.schedule)
    for line in model_dir.foresee_export(pipe.path):
        logging.warning("config.model = %s: %s", settings.model, line)
    adapters = make_adapters(settings, pipe)
    datasets: Sequence[Dataset] = ()
    own_images = None
    if examples is None and settings.stream.needs_prompts:
        own_images = open_own_images(settings, pipe.image_size)
        count = len(own_images.prompts)
        check_images(settings.objective, 2, "config.stream")
    elif examples is None:
        pipe, datasets = use_stored_states(settings, pipe, open_data(settings, pipe))
        count = sum(count_examples(datasets, settings.data.split).values())
    else:
        settings = _turn_watching_off(settings)
        if settings.data.curriculum_groups > 1:
            raise UserError(
                f"config.data.curriculum_groups = {settings.data.curriculum_groups}: orders pairs of shards, "
                "and these are in memory; leave it 1"
            )
        count, images = examples["moments"].shape[:2]
        labelled = bool((np.asarray(examples["preference"]) < 1).any())
        check_images(settings.objective, images, "the batch in memory", labelled=labelled)
    if settings.method_key == "objective" and settings.objective.needs_scores:
        key = "config.objective.smpo_weight"
        if examples is None and settings.stream.kind == "dataset":
            check_scores(datasets, key)
        elif examples is None and settings.stream.kind == "self_play":
            raise UserError(f"{key}: needs a score of each image, and drawn losers have none; leave it out")
        elif examples is not None and "scores" not in examples:
            raise UserError(f"{key}: needs the scores of the images, which the examples have not")
    settings = settings.for_examples(count)
    name = settings.reference.model
    reference = open_reference(name, pipe) if name else None
    task = make_task(settings, pipe, own_images.trained if own_images else None, reference)
    mesh = mesh_of(settings)
    check_heads(pipe, mesh)
    if datasets and settings.stream.kind == "self_play":
        check_self_play(settings, pipe, mesh)
    check_reference(settings, needed=task.loss.needs_reference)
    check_draws(settings, datasets)
    if settings.stream.kind != "trajectories" or own_images is None:
        check_batch_size(
            settings.batch_size // settings.accumulation, mesh, "config.batch_size / config.accumulation"
        )
    if own_images is not None:
        check_own_images(settings, pipe, mesh, own_images)
    elif settings.validation.every:
        check_batch_size(settings.validation.batch_size, mesh, "config.validation.batch_size")
    prompts: list[str] = []
    if settings.samples.every:
        try:
            for text in settings.samples.prompts:
                found = read_prompts(text, image_columns=(), option=None)
                prompts += [prompt.text for prompt in found]
        except (UserError, FileNotFoundError) as error:
            raise UserError(f"config.samples.prompts = {text!r}: {error}") from error
        try:
            check_steps(pipe.schedule.num_train_timesteps, settings.samples.num_inference_steps)
        except UserError as error:
            raise UserError(f"config.samples.{error}") from error
    if settings.wandb_project:
        import_wandb(settings.wandb_project)
    return Experiment(settings, task, mesh, datasets, examples, prompts, adapters, own_images)


def _turn_watching_off(settings: Settings) -> Settings:
    """Turns off what only `run.train` does, and warns where it was on."""
    periods = {"validation": settings.validation.every, "samples": settings.samples.every}
    unused = [f"config.{name}.every = {every}" for name, every in periods.items() if every]
    if unused:
        logging.info(
            "%s: not used with examples in memory: `fit` calls only the hooks that it is given",
            " and ".join(unused),
        )
    return dataclasses.replace(
        settings,
        validation=dataclasses.replace(settings.validation, every=0),
        samples=dataclasses.replace(settings.samples, every=0),
    )


def mesh_of(settings: Settings, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh that `config.mesh` asks for, over all devices or the given ones."""
    sizes = dataclasses.asdict(settings.mesh)
    dcn_sizes = sizes.pop("dcn")
    return make_mesh(sizes, devices, dcn_sizes)


def check_heads(pipe: Pipeline, mesh: Mesh) -> None:
    """Refuses a mesh that would cut through the heads of a transformer or of T5.

    Raises:
      UserError: by key.
    """
    tensor, networks = mesh.shape["tensor"], pipe.networks
    counts = {name: heads for name in pipe.components if (heads := networks[name].split_heads)}
    for name, heads in counts.items():
        if heads % tensor:
            common = math.gcd(*counts.values())
            allowed = ", ".join(str(ways) for ways in range(1, common + 1) if common % ways == 0)
            raise UserError(
                f"config.mesh.tensor = {tensor}: does not divide the {heads} attention heads of {name}; for "
                f"this model it can be {allowed}"
            )


def make_adapters(settings: Settings, pipe: Pipeline) -> Params:
    """Makes LoRA's adapters of the trained networks at their start, or {} where LoRA is off.

    Raises:
      FileNotFoundError: the file of `config.lora.init` is missing.
      UserError: a pattern of `config.lora.targets` is no regular expression, or a network has no match; the
        file is refused.
    """
    if not settings.lora.on:
        return {}
    trained = pipe.components if settings.train_text_encoder else (pipe.denoiser,)
    models = {name: pipe.networks[name] for name in trained}
    init = settings.lora.init
    read = partial(
        lora_init.read_adapters,
        settings.lora,
        {name: pipe.networks[name] for name in pipe.components},
        trained,
    )
    if init is not None and settings.lora.rank == 0:
        return read(None)
    key = jax.random.key(settings.seed)
    try:
        fresh = {
            name: lora.init_adapters(model.abstract_params(), settings.lora.targets, settings.lora.rank, key)
            for name, model in models.items()
        }
    except (UserError, re.error) as error:
        raise UserError(f"config.lora.targets = {settings.lora.targets}: {error}") from error
    return fresh if init is None else read(fresh)


def make_state(
    task: Task, mesh: Mesh, adapters: Params | None = None, *, abstract: bool = False
) -> tuple[TrainState, Params]:
    """Returns the state at step 0 and the frozen reference, read from the model; every array is born sharded.

    With adapters these are what is trained. The reference has them too, so that policy and reference remain
    one program: as they start, or, where it is named by itself, with products of zero. Where the reference is
    another model, the frozen parameters of the policy that are not the reference's lie beside those of the
    reference, under `task.POLICY`.

    Args:
      task: from `make_task`.
      mesh: from `mesh_of`.
      adapters: from `make_adapters`.
      abstract: read nothing, and return `jax.ShapeDtypeStruct` leaves with their sharding.

    Raises:
      UserError: `config.offload` on devices without host memory.
    """

    if bool(adapters) != (task.adapters is not None):
        raise ValueError(f"adapters: {'not trained' if adapters else 'needed'} by this task")
    if task.offload:
        check_host_memory(mesh.devices.flat[0])

    def put(params: Params, dtype: str, kernels: str | None = None, *, host: bool = False) -> Params:
        def store(path: KeyPath, leaf: Any) -> Any:
            if kernels is not None and quantized.is_stored_so(path):
                make = partial(quantized.quantize, kind=kernels)
                return jax.eval_shape(make, leaf) if abstract else jax.device_get(make(leaf))
            kept = "float32" if lora.is_magnitude(path) else dtype
            return jax.ShapeDtypeStruct(leaf.shape, kept) if abstract else np.asarray(leaf, DTYPES[kept])

        stored = jax.tree_util.tree_map_with_path(store, params)
        shardings = make_shardings(stored, mesh)
        formats = on_host(stored, shardings) if host else choose_formats(stored, shardings, mesh)
        return _abstract(stored, formats) if abstract else place(stored, formats)

    other = task.pipe if task.reference is None or abstract else task.reference.pipe
    if other is None:
        raise ValueError("task.reference: not opened; give `make_task` what `open_reference` returns")

    precision = task.precision

    def read(
        name: str,
        dtype: str,
        pipe: Pipeline = task.pipe,
        kernels: str | None = None,
        *,
        host: bool = False,
    ) -> Params:
        read_as = dtype if kernels is None else "float32"  # rounded once
        params = pipe.networks[name].abstract_params() if abstract else pipe.read_params(name, read_as)
        return put(params, dtype, kernels, host=host)

    def read_frozen(name: str, pipe: Pipeline) -> Params:
        # The policy reads what is not trained, too.
        host = REFERENCE in task.offload and name in trained
        return read(name, precision.reference_dtype, pipe, precision.frozen_kernels, host=host)

    networks = task.pipe.components
    trained = () if adapters else networks if task.train_text_encoder else (task.pipe.denoiser,)
    params = {name: read(name, precision.param_dtype) for name in trained}
    # Networks that are not trained; and every network where the loss looks at the reference.
    frozen = [name for name in networks if task.loss.needs_reference or name not in trained]
    reference = {name: read_frozen(name, other) for name in frozen}
    if adapters:
        params = put(adapters, precision.param_dtype)
        frozen_adapters = adapters if task.reference is None else lora_init.without_products(adapters)
        reference = lora.combine(reference, put(frozen_adapters, precision.reference_dtype))
    own = [name for name in task.reference.differing if name not in trained] if task.reference else []
    if own:
        reference[POLICY] = {name: read_frozen(name, task.pipe) for name in own}
    if task.dora:

        def add_magnitudes(whole: Params, params: Params) -> Params:
            found = lora_init.find_magnitudes(task, whole, mesh, abstract=abstract)
            return lora.combine(put(found, "float32"), params)  # those of a file stay

        bases = reference | reference.get(POLICY, {})
        params = add_magnitudes(lora.combine({name: bases[name] for name in params}, params), params)
        reference = add_magnitudes({name: reference[name] for name in params}, reference)
    beside = task.loss.frozen_params(task.pipe, abstract=abstract)
    reference |= {name: put(part, "float32") for name, part in beside.items()}
    shapes = jax.eval_shape(partial(init_state, task), params)
    shardings = make_shardings(shapes, mesh)
    formats = choose_formats(shapes, shardings, mesh)
    if MOMENTS in task.offload:
        held = on_host(shapes.opt_state, shardings.opt_state)
        formats = dataclasses.replace(formats, opt_state=held)
    if abstract:
        return _abstract(shapes, formats), reference
    return jax.jit(partial(init_state, task), donate_argnums=0, out_shardings=formats)(params), reference


def _abstract(tree: PyTree, formats: PyTree) -> PyTree:
    return jax.tree.map(
        lambda array, format_: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=format_), tree, formats
    )
