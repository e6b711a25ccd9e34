"""Model folders as they are published, the runs trained from them, and what must be left of either."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from configs import common
from dspo_jax.pipelines.loading import load_pipeline
from dspo_jax.weights import tensors
from dspo_jax.weights.checkpoints import Checkpoints
from dspo_jax.weights.layout import flatten, unflatten

UNET_FILE = "unet/diffusion_pytorch_model.safetensors"
TEXT_FILE = "text_encoder/model.safetensors"


def contents(folder):
    """File or tensor -> bytes of everything in a folder; tensors whole or in shards, with shape and dtype."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        if path.suffix == ".safetensors":
            for tensor_name, tensor in tensors.open_file(path).items():
                found[f"{path.parent.name}:{tensor_name}"] = (
                    tensor.shape,
                    str(tensor.dtype),
                    tensor.read().tobytes(),
                )
        elif not name.endswith(".index.json"):
            found[name] = path.read_bytes()
    return found


def edit(path, change):
    values = load_file(path)
    change(values)
    save_file(values, path, metadata={"format": "pt"})


def write_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


def publish(model):
    """Makes a folder like published ones: half precision, old names, constants, and shards."""

    def halve(values):
        values.update({name: value.astype(np.float16) for name, value in values.items()})

    def rename(values):
        for today, before in (
            ("to_q", "query"),
            ("to_k", "key"),
            ("to_v", "value"),
            ("to_out.0", "proj_attn"),
        ):
            for name in [name for name in values if f".{today}." in name]:
                values[name.replace(f".{today}.", f".{before}.")] = values.pop(name)

    edit(model / UNET_FILE, halve)
    edit(model / "vae" / "diffusion_pytorch_model.safetensors", rename)
    edit(model / TEXT_FILE, halve)
    write_config(model / "text_encoder", torch_dtype="float32")  # which transformers loads it as
    edit(
        model / TEXT_FILE,
        lambda values: values.update({"text_model.embeddings.position_ids": np.arange(77)[None]}),
    )
    whole = tensors.open_file(model / UNET_FILE)
    (model / UNET_FILE).unlink()  # which stays readable: it is open
    tensors.write_tensors(model / UNET_FILE, whole, max_shard_bytes=20_000)
    assert len(tensors.list_files(tensors.index_path(model / UNET_FILE))) > 2
    return model


def make_run(
    workdir,
    model,
    steps=(3,),
    trained=("unet", "text_encoder"),
    change=0.0,
    scores=None,
    params=None,
    lora=(),
):
    """A workdir whose checkpoints hold the model's own weights in float32, plus `change` times the step.

    Or `params`, such as adapters of the settings `lora`.
    """
    config = common.get_config()
    config.model, config.data.path = str(model), str(workdir / "pairs")
    config.objective.name, config.objective.beta = "diffusion_dpo", 5000.0
    config.lora.update(dict(lora))
    workdir.mkdir(parents=True)
    (workdir / "config.json").write_text(config.to_json())
    if params is None:
        params = {name: load_pipeline(model).read_params(name, "float32") for name in trained}
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        for step in steps:
            moved = {
                name: unflatten(
                    {path: jnp.asarray(leaf + change * step) for path, leaf in flatten(tree).items()}
                )
                for name, tree in params.items()
            }
            state = {"params": moved, "opt_state": jnp.zeros(3)}
            checkpoints.save(step, state, {}, (scores or {}).get(step), wait=True)
    return workdir


def refused(message, error=ValueError):
    return pytest.raises(error, match=f"^{message}[^\n]*$")


def assert_nothing_written(out):
    assert list(out.parent.iterdir()) == []
