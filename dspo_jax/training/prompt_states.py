"""T5's states of the prompts that a run draws while it trains without T5."""

import dataclasses

from dspo_jax.data.caption_encoder import CaptionEncoder
from dspo_jax.pipelines.stored import T5_KEY
from dspo_jax.training.start import Experiment


def with_prompt_states(experiment: Experiment) -> Experiment:
    """Returns a run whose model has T5's states of `Experiment.prompts` among its stored ones.

    Those that the data store are read. For others T5 is loaded, run and dropped again, which needs its
    memory before that of the run is taken; every process of a run does so by itself.
    """
    pipe, dataset = experiment.task.pipe, experiment.datasets[0]
    table = dataset.caption_table
    assert table is not None
    found = {prompt: table.find(prompt) for prompt in ["", *experiment.prompts]}
    states = {prompt: stored for prompt, stored in found.items() if stored is not None}
    others = [prompt for prompt in found if prompt not in states]
    if others:
        encoder = CaptionEncoder(pipe, dataset.manifest[T5_KEY]["dtype"])
        states |= dict(zip(others, encoder(others), strict=True))
    pipe = dataclasses.replace(pipe, stored_states=states)
    return dataclasses.replace(experiment, task=dataclasses.replace(experiment.task, pipe=pipe))
