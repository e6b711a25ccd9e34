"""Preference fine-tuning: one command that starts or resumes a run.

    python -m dspo_jax.train --config configs/emoji_dspo.py --workdir runs/emoji

Every key of the config, with its default, stands in configs/common.py. The same command resumes a run that
was stopped, by Ctrl-C, SIGTERM or a crash. The workdir holds config.json, checkpoints/, metrics.jsonl,
tensorboard/.
"""

import json
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from types import FrameType

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict, config_flags

from dspo_jax import cli, spelling
from dspo_jax.checkpoint import Checkpoints
from dspo_jax.data import loader, shards
from dspo_jax.metrics import VALIDATION_PREFIX, Clock, MetricsWriter, Progress, read_validations
from dspo_jax.models import Params, lora
from dspo_jax.objectives import Objective, get_objective
from dspo_jax.optim import make_optimizer
from dspo_jax.pipeline import Pipeline, load_pipeline
from dspo_jax.sharding import check_batch_size, make_mesh, make_shardings, replicated, shard_batch
from dspo_jax.step import INPUTS, Metrics, Task, TrainState, compile_step, policy_params, predict
from dspo_jax.validate import Validator


def make_task(config: ConfigDict, pipe: Pipeline) -> Task:
    """What a config asks to be computed with a model.

    Raises:
      ValueError: a config value that is unknown or out of range, by key.
    """
    if config.compute_dtype not in ("float32", "bfloat16"):
        raise ValueError(
            spelling.unknown("config.compute_dtype", config.compute_dtype, ("float32", "bfloat16"))
        )
    for key in ("caption_dropout", "positive_ratio"):
        if not 0 <= config[key] <= 1:
            raise ValueError(f"config.{key} = {config[key]}: must be between 0 and 1")
    values = flatten_dict(config.to_dict(), sep=".")
    for key in ("steps", "batch_size", "accumulation", "log_every", "checkpoint.every"):
        if values[key] < 1:
            raise ValueError(f"config.{key} = {values[key]}: must be at least 1")
    if config.batch_size % config.accumulation:
        raise ValueError(
            f"config.accumulation = {config.accumulation}: must divide "
            f"config.batch_size = {config.batch_size}"
        )
    arguments = {name: value for name, value in config.objective.to_dict().items() if value is not None}
    optimizer, learning_rate = make_optimizer(config.optimizer.to_dict(), config.steps)
    return Task(
        pipe=pipe,
        objective=get_objective(arguments.pop("name"), **arguments),
        optimizer=optimizer,
        learning_rate=learning_rate,
        compute_dtype=config.compute_dtype,
        caption_dropout=config.caption_dropout,
        share_noise=config.share_noise,
        positive_ratio=config.positive_ratio,
        accumulation=config.accumulation,
        train_text_encoder=config.train_text_encoder,
    )


def make_adapters(config: ConfigDict, pipe: Pipeline) -> Params:
    """What is trained with LoRA at its start: adapters of the trained networks, or none where it is off.

    Raises:
      ValueError: a rank below 0, a pattern that is no regular expression, or a network without a match.
    """
    if config.lora.rank < 0:
        raise ValueError(f"config.lora.rank = {config.lora.rank}: must be at least 1, or 0 to turn LoRA off")
    if config.lora.rank == 0:
        return {}
    models = {"unet": pipe.unet, **(pipe.text_encoders if config.train_text_encoder else {})}
    key = jax.random.key(config.seed)
    try:
        return {
            name: lora.init_adapters(model.abstract_params(), config.lora.targets, config.lora.rank, key)
            for name, model in models.items()
        }
    except (ValueError, re.error) as error:
        raise ValueError(f"config.lora.targets = {config.lora.targets}: {error}") from error


def make_state(
    task: Task, mesh: jax.sharding.Mesh, adapters: Params | None = None
) -> tuple[TrainState, Params]:
    """The state at step 0 (float32) and the frozen reference (compute dtype), read from the model.

    With adapters these are what is trained. The reference has them too, as they start: they add nothing, and
    policy and reference remain one program.
    """

    def place(params: Params) -> Params:
        return jax.device_put(params, make_shardings(params, mesh))

    networks = ("unet", *task.pipe.text_encoders)
    if adapters:
        params = place(adapters)
        frozen = networks
    else:
        trained = networks if task.train_text_encoder else ("unet",)
        params = {name: place(task.pipe.read_params(name, "float32")) for name in trained}
        # What is not trained; and all of it where the objective looks at the reference.
        frozen = tuple(name for name in networks if task.objective.needs_reference or name not in trained)
    reference = {name: place(task.pipe.read_params(name, task.compute_dtype)) for name in frozen}
    if adapters:
        # Copies: the step donates the state, so nothing of it may be in the reference.
        copies = jax.tree.map(lambda leaf: jnp.array(leaf, task.compute_dtype), adapters)
        reference = lora.combine(reference, place(copies))
    shardings = make_shardings(jax.eval_shape(task.optimizer.init, params), mesh)
    opt_state = jax.jit(task.optimizer.init, out_shardings=shardings)(params)
    step = jax.device_put(jnp.zeros((), jnp.int32), replicated(mesh))
    return TrainState(step, params, opt_state, task), reference


def check_data(config: ConfigDict, pipe: Pipeline, objective: Objective) -> None:
    """Refuses data that is damaged, empty or made with another model, or single images where two compare."""
    if not config.data.path:
        raise ValueError(
            "config.data.path is not set: give --config.data.path=DIR, written by dspo_jax.encode"
        )
    manifest = shards.read_manifest(config.data.path)
    shards.check_manifest(manifest, pipe.fingerprint(), path=Path(config.data.path))
    images = manifest["images_per_example"]
    if objective.needs_loser and images == 1:
        raise ValueError(
            f"config.objective.name = {objective.name!r}: compares winner and loser, but {config.data.path} "
            "holds single images; use sft or ddpm, or encode pairs"
        )
    if objective.images == "one" and images == 1:
        raise ValueError(
            f"config.objective.name = {objective.name!r}: needs liked and disliked images, but "
            f"{config.data.path} holds single images without such labels; use sft or ddpm, or encode pairs"
        )
    for split in (config.data.split, *([config.validation.split] if config.validation.every else ())):
        loader.num_examples(config.data.path, split)  # raises where there are none
    shards.verify_shards(config.data.path, manifest)


def claim_workdir(workdir: Path, config: ConfigDict) -> None:
    """Write config.json into a fresh workdir, or check that it is the one this run was started with.

    Raises:
      ValueError: the workdir belongs to a run with another config; only what does not change the result may
        differ.
    """
    may_differ = {"log_every", "checkpoint", "validation", "mesh"}
    if config.optimizer.schedule == "constant":
        may_differ.add("steps")  # the other schedules end with the run
    path = workdir / "config.json"
    ours = json.loads(config.to_json())
    if path.is_file():
        mine, theirs = (flatten_dict(each, sep=".") for each in (ours, json.loads(path.read_text())))
        for key in sorted(mine.keys() | theirs.keys()):
            if mine.get(key) != theirs.get(key) and key.split(".")[0] not in may_differ:
                raise ValueError(
                    f"{path}: this run was started with config.{key} = {theirs.get(key)!r}, now it is "
                    f"{mine.get(key)!r}; resume with the same config or choose another --workdir"
                )
    workdir.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(ours, indent=2, sort_keys=True) + "\n")


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Turns SIGTERM and Ctrl-C into a question to ask between steps; a second Ctrl-C interrupts at once."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        del frame
        received.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    previous = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def train(config: ConfigDict, workdir: Path) -> int:
    """Runs or resumes a training run to `config.steps` or until it is asked to stop; returns the step."""
    if not config.model:
        raise ValueError("config.model is not set: give --config.model=DIR, a diffusers folder")
    pipe = load_pipeline(config.model)
    task = make_task(config, pipe)
    adapters = make_adapters(config, pipe)
    check_data(config, pipe, task.objective)
    mesh = make_mesh(config.mesh.to_dict())
    check_batch_size(
        config.batch_size // config.accumulation, mesh, "config.batch_size / config.accumulation"
    )
    claim_workdir(workdir, config)

    state, reference = make_state(task, mesh, adapters)
    checkpoints = Checkpoints(workdir / "checkpoints", config.checkpoint.max_to_keep)
    batches = loader.train_batches(
        config.data.path, batch_size=config.batch_size, seed=config.seed, split=config.data.split
    )
    clock = Clock()
    if checkpoints.latest_step() is not None:
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state.arrays()
        )
        arrays, extra, _ = checkpoints.restore(abstract)
        state = TrainState(**arrays, task=task)
        batches.set_state(extra["data"])
        clock = Clock(**extra["clock"])
    start = int(state.step)
    describe(config, task, mesh, state, start)

    step_fn = compile_step(state)
    key = jax.device_put(jax.random.key(config.seed), replicated(mesh))
    validator = None
    if config.validation.every:
        validator = Validator(
            partial(predict, task),
            pipe.schedule,
            mesh,
            directory=config.data.path,
            split=config.validation.split,
            batch_size=config.validation.batch_size,
            draws=config.validation.draws,
        )
    with (
        closing(batches),
        checkpoints,
        MetricsWriter(workdir, start) as writer,
        stop_requests() as stop_requested,
        Progress("train", config.steps, start) as progress,
    ):
        if start >= config.steps:
            logging.info("%s: already at step %d of %d", workdir, start, config.steps)
            return start

        def check(step: int) -> None:
            if validator is None:
                return
            with clock.paused():
                policy = policy_params(task, state.params, reference)
                scores = validator(policy, reference if task.objective.needs_reference else None)
            writer.write(step, {VALIDATION_PREFIX + name: value for name, value in scores.items()})

        def save(step: int) -> None:
            with clock.paused():
                checkpoints.save(step, state.arrays(), {"data": data_position, "clock": clock.state()})

        if start == 0:
            check(0)
        pending: tuple[int, Metrics] | None = None
        logged = start

        def log(step: int, metrics: Metrics) -> None:
            nonlocal logged
            values = {name: float(value) for name, value in metrics.items()}  # waits until the step is done
            clock.tick((step - logged) * config.batch_size)
            logged = step
            write_metrics(writer, progress, clock, step, values)

        for step in range(start + 1, config.steps + 1):
            batch = next(batches)
            data_position = batches.get_state()
            inputs = {name: batch[name] for name in INPUTS}
            inputs["index"] = inputs["index"].astype(np.uint32)
            state, metrics = step_fn(state, reference, shard_batch(inputs, mesh), key)
            # The metrics of a step are read only after the next one was dispatched: the device never waits.
            if pending is not None:
                log(*pending)
                pending = None
            stopping = stop_requested()
            last = stopping or step == config.steps
            if step % config.log_every == 0 or last:
                pending = (step, metrics)
            saving = last or step % config.checkpoint.every == 0
            checking = validator is not None and (step == config.steps or step % config.validation.every == 0)
            if saving or checking:
                # What still runs is training time. And a run that is killed just after a checkpoint would
                # never write the metrics that are still pending.
                jax.block_until_ready(state)
                if pending is not None:
                    log(*pending)
                    pending = None
            if checking:
                check(step)
            if saving:
                save(step)
            if stopping:
                logging.info("asked to stop: saved step %d; the same command resumes it", step)
                break
    return step


def write_metrics(
    writer: MetricsWriter, progress: Progress, clock: Clock, step: int, values: dict[str, float]
) -> None:
    """One line of metrics, and the progress bar."""
    speed = clock.lap()
    writer.write(step, {**values, "pairs_per_second": speed})
    shown = {"pairs/s": speed}
    shown |= {name: values[name] for name in ("loss", "implicit_accuracy") if name in values}
    progress.update(step, shown)


def describe(config: ConfigDict, task: Task, mesh: jax.sharding.Mesh, state: TrainState, start: int) -> None:
    """The lines a user should see before the first step."""
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    examples = loader.num_examples(config.data.path, config.data.split)
    platform, axes = mesh.devices.flat[0].platform, dict(mesh.shape)
    logging.info(
        "%s over %s, %d %s device(s), mesh %s", config.model, config.data.path, mesh.size, platform, axes
    )
    logging.info(
        "%s: %d trainable parameters (%s), %d examples, %d a step, steps %d to %d",
        task.objective.name,
        count,
        " and ".join(state.params) + (f", LoRA of rank {config.lora.rank}" if config.lora.rank else ""),
        examples,
        config.batch_size,
        start,
        config.steps,
    )
    optimizer = config.optimizer
    logging.info(
        "learning rate %g for %d examples a step, which is %g an example (what trainers that scale the rate "
        "by the batch are given), %s after %d warm-up steps",
        optimizer.learning_rate,
        config.batch_size,
        optimizer.learning_rate / config.batch_size,
        optimizer.schedule,
        optimizer.warmup_steps,
    )
    side = shards.read_manifest(config.data.path)["resolution"] // task.pipe.vae_scale_factor
    for note in task.objective.notes(side * side * task.pipe.latent_channels):
        logging.info("%s", note)


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    del argv
    workdir = Path(flags.FLAGS.workdir)
    step = train(flags.FLAGS.config, workdir)
    print(f"{workdir}: step {step}")
    validations = list(read_validations(workdir / "metrics.jsonl").values())
    for when, scores in zip(("before", "after"), validations[:1] + validations[1:][-1:], strict=False):
        if "implicit_accuracy" in scores:
            low, high = scores["implicit_accuracy_low"], scores["implicit_accuracy_high"]
            print(
                f"held-out implicit accuracy {when}: "
                f"{scores['implicit_accuracy']:.3f} [{low:.3f}, {high:.3f}]"
            )


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "What to train, e.g. configs/emoji_dspo.py.")
    flags.mark_flag_as_required("config")
    flags.DEFINE_string("workdir", None, "Folder of the run; a run that is there is resumed.", required=True)
    cli.run(main)
