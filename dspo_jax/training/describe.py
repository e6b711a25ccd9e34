"""Describes a run before its first step: model, data, optimizer, memory on each device."""

from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import PyTree

from dspo_jax.data.datasets import count_examples, mixing_weights
from dspo_jax.models.lora import find_ranks
from dspo_jax.models.model import Params
from dspo_jax.monitoring.devices import has_bfloat16, in_units, short
from dspo_jax.objectives.advantages import rounds_to_fill
from dspo_jax.parallel.rules import bytes_per_device, host_bytes_per_device, replicated_bytes
from dspo_jax.pipelines.pipeline import Pipeline
from dspo_jax.samplers import SAMPLERS
from dspo_jax.training.costs import flops_per_drawing, flops_per_example
from dspo_jax.training.losses.reward_gradient import REWARD
from dspo_jax.training.settings import Settings
from dspo_jax.training.start import Experiment
from dspo_jax.training.step import TrainState
from dspo_jax.training.task import POLICY

_MANY_EPOCHS, _FEW_HELD_OUT, _FEW_UPDATES = 200, 30, 50


def held(state: TrainState, reference: Params) -> dict[str, object]:
    """Trees of arrays, or shapes with their sharding, that are held whatever the batch, by name."""
    gradients = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=leaf.sharding), state.params
    )
    parts = {
        "parameters": state.params,
        "optimizer": state.opt_state,
        "moving average": state.ema,
        "gradients": gradients,
        "reference": {name: part for name, part in reference.items() if name != POLICY},
        "frozen weights of the policy": reference.get(POLICY),
    }
    return {name: part for name, part in parts.items() if part is not None}


def list_bytes(parts: Mapping[str, PyTree]) -> tuple[str, int]:
    """Lists the bytes of `held` on one device, and counts them."""
    sizes = {name: bytes_per_device(part) for name, part in parts.items()}
    listed = ", ".join(f"{name} {in_units(size)}" for name, size in sizes.items())
    return listed, sum(sizes.values())


def describe_host_bytes(parts: Mapping[str, PyTree]) -> Iterator[str]:
    """Yields a line of what of `held` lies in the host's memory, if anything does."""
    sizes = {name: size for name, part in parts.items() if (size := host_bytes_per_device(part))}
    if sizes:
        listed = ", ".join(f"{name} {in_units(size)}" for name, size in sizes.items())
        yield f"in the host's memory for each device: {listed}; a step copies them to the device"


def describe_run(experiment: Experiment, state: TrainState, reference: Params) -> Iterator[str]:
    """Lines that a user should see before the first step.

    Args:
      experiment: from `start.prepare`.
      state, reference: from `start.make_state`, abstract or not.
    """
    settings, task, mesh = experiment.settings, experiment.task, experiment.mesh
    device, axes = mesh.devices.flat[0], " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    examples = experiment.examples
    own = experiment.own_images
    source = settings.data.path if examples is None else "examples in memory"
    yield f"{settings.model} over {source if own is None else 'its own images'}"
    yield f"{mesh.size} {device.device_kind} device(s) of {jax.process_count()} process(es), mesh {axes}"
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    what = " and ".join(state.params)
    if task.adapters is not None:
        ranks = set(find_ranks(state.params).values())
        kind = "DoRA" if task.dora else "LoRA"
        what += f", {kind} of rank {' to '.join(map(str, sorted({min(ranks), max(ranks)})))}"
        what += f" from {settings.lora.init}" if settings.lora.init else ""
    yield (
        f"{settings.method}: {count:,} trainable parameters ({what}), kept in "
        f"{settings.param_dtype}, computed in {settings.compute_dtype}, remat {settings.remat!r}"
    )
    if task.reference is not None:
        differing = " and ".join(task.reference.differing)
        yield (
            f"the reference is {settings.reference.model}, "
            + (f"with another {differing} than the start of the policy" if differing else "the same weights")
        )
    yield from _describe_data(experiment) if own is None else _describe_own_images(experiment)
    if task.pipe.stored_states is not None:
        counts = [dataset.manifest["captions"]["count"] for dataset in experiment.datasets]
        yield f"T5 is not loaded: what it says of {sum(counts):,} captions is stored with the data"
    optimizer = settings.optimizer
    peak = optimizer.peak_rate(settings.batch_size)
    if optimizer.name == "prodigy":
        rate = f"{peak:g} times the learning rate that it finds"
    else:
        rate = (
            f"learning rate {peak:g} for {settings.batch_size} examples a step, which is "
            f"{peak / settings.batch_size:g} an example (what trainers that scale the rate by the batch are "
            "given)"
        )
    if optimizer.text_encoder_learning_rate is not None:
        rate += f", of the text encoders {peak * optimizer.text_encoder_quotient:g}"
    yield f"{optimizer.name}, {rate}, {optimizer.schedule} after {optimizer.warmup_steps} warm-up steps"
    if settings.validation.every and not settings.validations_compare:
        yield "no checkpoint is marked best: of this run held-out scores do not compare; take the newest"
    parts = held(state, reference)
    listed, size = list_bytes(parts)
    yield f"on each device: {listed}; together {in_units(size)}, and activations"
    yield from describe_host_bytes(parts)
    if settings.validation.every or settings.samples.every:
        copied = [
            leaf.size * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(reference.get(REWARD, {}))
            if not leaf.sharding.is_fully_replicated
        ]
        if copied:
            whole = in_units(sum(copied))
            yield f"and the weights of the trained reward once more, whole, to score files: {whole}"
    if mesh.size > 1:
        size, largest = replicated_bytes(parts)
        yield f"of that the same on every device: {in_units(size)}, the largest array {largest}"
    if settings.compute_dtype == "bfloat16" and not has_bfloat16(device):
        yield (
            f"warning: {device.device_kind} has no bfloat16 arithmetic and emulates it slowly; set "
            "--config.compute_dtype=float32"
        )
    if settings.param_dtype == "bfloat16":
        yield "warning: parameters kept in bfloat16 lose every update below 1/512 of a weight"
    if own is not None:
        height, width = task.pipe.latent_size
    elif examples is None:
        side = experiment.datasets[0].manifest["resolution"] // task.pipe.vae_scale_factor
        height, width = side, side
    else:
        height, width = examples["moments"].shape[2:4]
    in_parts = settings.accumulation > 1 and settings.method_key == "objective"
    if in_parts and settings.objective.needs_whole_batch:
        yield (
            f"warning: config.accumulation = {settings.accumulation}: the loss of {settings.method} has in "
            "it a mean or a comparison over examples, now over the "
            f"{settings.batch_size // settings.accumulation} of a part: another loss than that of the whole "
            "batch at once; keep the parts large"
        )
    yield from task.loss.notes(height * width * task.pipe.latent_channels)


def warm_up_warning(settings: Settings) -> Iterator[str]:
    """Yields a line if a run ends before its learning rate has risen."""
    if settings.optimizer.warmup_steps > settings.steps:
        yield (
            f"warning: config.optimizer.warmup_steps = {settings.optimizer.warmup_steps}: the run has "
            f"{settings.steps} steps, and never reaches its learning rate; lower it"
        )


def warnings(settings: Settings, examples: int) -> Iterator[str]:
    """Yields what the length of a run and its number of examples make doubtful, a line each.

    Args:
      settings: of the run, with its steps known.
      examples: to train on.
    """
    drawn, epochs = settings.steps * settings.batch_size, settings.given.get("epochs")
    yield from warm_up_warning(settings)
    if settings.batch_size > examples:
        yield (
            f"warning: config.batch_size = {settings.batch_size}: more than the {examples:,} examples, of "
            "which every step holds some several times, and takes the memory and time of as many; lower it"
        )
    elif epochs and settings.steps < _FEW_UPDATES:
        yield (
            f"warning: config.epochs = {epochs:g}: of {examples:,} examples that is {settings.steps} "
            "updates, which hardly move a model; raise it, or lower config.batch_size"
        )
    if drawn > _MANY_EPOCHS * examples:
        fix = (
            "lower config.epochs"
            if epochs
            else "set --config.epochs=10 or the like, in place of config.steps"
        )
        yield (
            f"warning: {drawn / examples:,.0f} epochs of {examples:,} examples: a model forgets more than it "
            f"learns; {fix}"
        )


def kept_state_bytes(settings: Settings, pipe: Pipeline, mesh: Mesh) -> int:
    """Returns bytes on each device of the sampler's states that a run keeps at a time, in float32.

    In `trajectories` all states of a round's images, in `own_pairs` the last; in `prompts` those before each
    step, of the images that are worked on at a time.
    """
    stream, (height, width) = settings.stream, pipe.latent_size
    steps, images = stream.num_inference_steps, settings.round_images
    if stream.kind == "prompts":
        states = steps * (settings.batch_size // settings.accumulation)
    else:
        states = images * (steps + 1 if stream.kind == "trajectories" else 1)
    return 4 * height * width * pipe.latent_channels * states // (mesh.shape["data"] * mesh.shape["fsdp"])


def _describe_own_images(experiment: Experiment) -> Iterator[str]:
    """Prompts, rewards, and how many images a run draws."""
    settings, own = experiment.settings, experiment.own_images
    assert own is not None
    stream = settings.stream
    unit = f"lists of {stream.images} images" if settings.images_per_row > 2 else stream.unit
    drawn = settings.steps * settings.batch_size * settings.drawn_per_example
    yield (
        f"{len(own.prompts):,} prompts, {settings.batch_size} {unit} an update, "
        f"{settings.steps} updates: {drawn:,} images are drawn and scored, {_describe_drawing(settings)}"
    )
    yield from _describe_rounds(experiment)
    yield from _describe_flops(experiment)
    yield from warm_up_warning(settings)
    trained, others = own.watched[: len(own.weights)], own.watched[len(own.weights) :]
    if settings.data.path:
        yield (
            f"warning: config.data.path = {settings.data.path!r}: not read, as config.stream.kind = "
            f"{stream.kind!r} trains on the model's own images; leave it unset"
        )
    yield "trained by " + ", ".join(f"{reward.name} ({reward.version})" for reward in trained)
    if settings.validation.every:
        names = ", ".join(reward.name for reward in others)
        yield (
            f"watched on {len(own.held_out):,} held-out prompts, {settings.rewards.images} images of each"
            + (f": {names}" if names else "")
        )
        if not others:
            yield (
                "warning: config.rewards.validation is empty: a trained reward rises whatever becomes of the "
                "images; name one that is not trained by"
            )
        if set(own.held_out) & set(own.prompts):
            yield "warning: some prompts of config.rewards.prompts are trained on, too"


def _describe_drawing(settings: Settings) -> str:
    """Says how the images of a run are drawn."""
    drawing = settings.stream.drawing
    eta = f", eta {drawing.eta:g}" if drawing.sampler and SAMPLERS[drawing.sampler].eta else ""
    guidance = f"guidance {drawing.guidance_scale:g}"
    if drawing.guidance_rescale:
        guidance += f" rescaled by {drawing.guidance_rescale:g}"
    return f"each by {drawing.steps} steps of {drawing.sampler}{eta}, {guidance}"


def _describe_rounds(experiment: Experiment) -> Iterator[str]:
    """Rounds with the states that a device keeps of one, and when statistics per prompt begin."""
    settings, own, stream = experiment.settings, experiment.own_images, experiment.settings.stream
    assert own is not None
    kept = in_units(kept_state_bytes(settings, experiment.task.pipe, experiment.mesh))
    if stream.kind == "prompts":
        yield f"the states of an image on its way are kept for the backward pass: {kept} on each device"
        return
    images, rounds = settings.round_images, settings.steps // stream.updates
    yield (
        f"{rounds:,} rounds of {images:,} images, {stream.updates} update(s) with each; their states in "
        f"float32 are {kept} on each device"
    )
    if stream.kind == "trajectories" and settings.policy_gradient.images == 1:
        advantages = settings.advantages
        if advantages.of == "prompt":
            needed = rounds_to_fill(
                advantages.buffer_size,
                advantages.min_count,
                prompts=len(set(own.prompts)),
                images_per_round=images,
                rounds=rounds,
            )
            yield (
                f"a prompt has the {advantages.min_count} rewards of its own statistics after {needed} "
                "round(s) on average; before, rewards are compared with those of the whole round"
            )


def _describe_flops(experiment: Experiment) -> Iterator[str]:
    """FLOPs of an image, where the backend can count them."""
    settings, task = experiment.settings, experiment.task
    update = flops_per_example(task, 2, task.pipe.image_size)
    drawing = flops_per_drawing(task, settings.stream.drawing)
    if update is None or drawing is None:
        return
    rest = "decoding and rewards come on top"
    if settings.stream.kind == "prompts":
        yield f"{short(update / 1e12)} TFLOP an image, drawn and trained by; {rest}"
        return
    update *= settings.batch_size * settings.stream.updates / settings.round_images
    yield (
        f"{short((drawing + update) / 1e12)} TFLOP an image: {short(drawing / 1e12)} to draw it and "
        f"{short(update / 1e12)} to train by it; {rest}"
    )


def _describe_data(experiment: Experiment) -> Iterator[str]:
    """Examples, batches and epochs; shares of several datasets; image sizes."""
    settings, datasets = experiment.settings, experiment.datasets
    buckets = experiment.count_examples()
    examples, drawn = sum(buckets.values()), settings.steps * settings.batch_size
    ways = experiment.mesh.shape["data"] * experiment.mesh.shape["fsdp"]
    yield (
        f"{examples:,} examples, {settings.batch_size} a step: {settings.accumulation} part(s) of "
        f"{settings.batch_size // settings.accumulation // ways} on each of {ways} device(s) or groups of "
        f"them; {settings.steps} steps are {short(drawn / examples)} epochs"
    )
    yield from warnings(settings, examples)
    if draws := settings.reference.draws:
        yield (
            f"each example has {draws} draws of noise, which come round; the reference's errors of all "
            f"{draws * examples:,} are stored before the first step"
        )
        if drawn <= draws * examples:
            yield (
                f"warning: config.reference.draws = {draws}: the run has {short(drawn / examples)} epochs: "
                "storing the errors takes as long as it saves, or longer; lower it, or set it to 0"
            )
    groups, every = settings.data.curriculum_groups, settings.data.curriculum_every
    if datasets and groups > 1:
        yield (
            f"a curriculum of {groups} groups by the gap of scores: from update {(groups - 1) * every:,} on "
            f"all pairs are drawn, of {settings.steps:,}"
        )
    if datasets and settings.stream.kind == "self_play":
        yield (
            f"the losers are {drawn:,} images that the reference draws, {_describe_drawing(settings)}; it "
            f"moves every {settings.reference.every} steps"
        )
    if settings.validation.every:
        held_out = sum(count_examples(datasets, settings.validation.split).values())
        yield f"{held_out:,} held-out examples, split {settings.validation.split!r}"
        if held_out < _FEW_HELD_OUT:
            yield (
                f"warning: {held_out} held-out examples: the interval of their implicit accuracy is about "
                f"±{100 / held_out**0.5:.0f} points; encode the data again with more of them "
                "(config.source.validation_share)"
            )
    if len(datasets) > 1:
        rows = mixing_weights(datasets, settings.data.split, settings.data.weights).values()
        for dataset, column in zip(datasets, zip(*rows, strict=True), strict=True):
            share = sum(column) / sum(map(sum, rows))
            count = sum(dataset.buckets(settings.data.split).values())
            yield (
                f"of them {count:,} from {dataset.folder}, {share:.3g} of what is drawn: "
                f"{short(drawn * share / count)} epochs"
            )
    if len(buckets) > 1:
        sizes = ", ".join(f"{bucket} ({count:,})" for bucket, count in buckets.items())
        yield f"{len(buckets)} image sizes, and the step is compiled for each: {sizes}"
        small = [bucket for bucket, count in buckets.items() if count < settings.batch_size]
        if small:
            yield f"warning: a batch holds examples twice where a size has fewer than it: {', '.join(small)}"
