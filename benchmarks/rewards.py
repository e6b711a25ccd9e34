"""Images a second of PickScore, here and by transformers in torch, in one run.

    python -m benchmarks.rewards

Both score the same pictures of 512 x 512 pixels under the same prompts with the same random weights, in
float32, preparation included; the first batch, which compiles, is timed by itself. On a CPU, two of JAX's
devices share the cores better than one. Needs torch (the `test` extra); the full ViT-H/14 takes 16 GB of
memory and 4 GB of disk, and fewer layers take less.
"""

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
import torch
from absl import flags
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from benchmarks import measuring
from dspo_jax import cli
from dspo_jax.rewards import load_reward
from dspo_jax.rewards.publish import RECIPES, prepare

Score = Callable[[Sequence[np.ndarray], Sequence[str]], np.ndarray]


def write_weights(folder: Path, layers: int, text_layers: int) -> None:
    """A transformers folder of ViT-H/14's sizes, with a tokenizer that knows letters only."""
    tokens = [
        *(chr(letter) for letter in range(97, 123)),
        *(f"{chr(letter)}</w>" for letter in range(97, 123)),
    ]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    text = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
    text |= {"num_hidden_layers": text_layers, "vocab_size": len(tokens), "eos_token_id": len(tokens) - 1}
    text |= {"bos_token_id": len(tokens) - 2, "pad_token_id": 0}
    vision = {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 16, "patch_size": 14}
    vision["num_hidden_layers"] = layers
    activation = {"hidden_act": "gelu"}
    config = CLIPConfig(text_config=text | activation, vision_config=vision | activation, projection_dim=1024)
    torch.manual_seed(0)
    CLIPModel(config).bfloat16().save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")


def ours(folder: Path, batch_size: int) -> Score:
    """Scores as a user of this project does."""
    job = prepare(
        "pickscore", folder / "rewards" / "pickscore", weights=str(folder), tokenizer=None, head=None
    )
    RECIPES["pickscore"].write(job)
    return load_reward("pickscore", folder / "rewards", batch_size=batch_size).score


def theirs(folder: Path, batch_size: int) -> Score:
    """Scores as the released code does, on a device of the same kind."""
    device = measuring.torch_device(jax.default_backend())
    model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval().to(device)
    processor, tokenizer = CLIPImageProcessorPil(), CLIPTokenizer.from_pretrained(folder)

    def score(images: Sequence[np.ndarray], prompts: Sequence[str]) -> np.ndarray:
        pixels = processor(images=[Image.fromarray(image) for image in images], return_tensors="pt")
        tokens = tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=77, return_tensors="pt"
        )
        with torch.inference_mode():
            scores = model(**pixels.to(device), **tokens.to(device)).logits_per_image
            return scores.diagonal().cpu().numpy()

    del batch_size
    return score


def main(argv: Sequence[str]) -> None:
    """Prints the table."""
    del argv
    values = flags.FLAGS
    batch_size, batches = values.batch_size, values.batches
    jax.config.update("jax_num_cpu_devices", values.cpu_devices)
    print(
        f"PickScore, {values.layers} + {values.text_layers} layers, batches of {batch_size}, "
        f"{jax.device_count()} {jax.default_backend()} device(s), torch: {torch.get_num_threads()} threads"
    )
    draw = np.random.default_rng(0)
    images = list(draw.integers(0, 256, (batch_size, 512, 512, 3), np.uint8))
    prompts = [f"a picture of {name}" for name in "abcdefghijklmnopqrstuvwxyz" * batch_size][:batch_size]
    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        write_weights(Path(temporary), values.layers, values.text_layers)
        for name, make in (("transformers, torch", theirs), ("dspo_jax", ours)):
            score = make(Path(temporary), batch_size)
            seconds = []
            for _ in range(batches + 1):
                started = time.perf_counter()
                scores = score(images, prompts)
                seconds.append(time.perf_counter() - started)
            results[name] = scores, batch_size * batches / sum(seconds[1:])
            print(
                f"{name:<20}{results[name][1]:8.3f} images/s; the first batch {seconds[0]:.1f} s", flush=True
            )
            del score  # and with it the weights
    (a, slow), (b, fast) = results.values()
    difference = np.abs(a - b).max() / np.abs(a).max()
    print(f"ratio {fast / slow:.2f}; largest difference of the scores {difference:.1e} of the largest")


if __name__ == "__main__":
    flags.DEFINE_integer("layers", 32, "Of the image tower.")
    flags.DEFINE_integer("text_layers", 24, "Of the text tower.")
    flags.DEFINE_integer("batch_size", 8, "Images in a batch.")
    flags.DEFINE_integer("batches", 3, "Timed batches, after the first.")
    cli.run(main)
