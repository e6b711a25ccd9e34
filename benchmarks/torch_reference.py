"""Pairs a second of the released trainers' step, written with diffusers and torch, on a synthetic batch.

    python -m benchmarks.torch_reference --config configs/emoji_diffusion_dpo.py --options=channels_last
    python -m benchmarks.torch_reference --config configs/sd15_dspo.py --published=sd15 --config.batch_size=16

The step of the trainers that Diffusion-DPO and DSPO released, in our words: text encoder, policy, frozen
reference, clipping, AdamW (or Adafactor), under autocast where the recipe computes in bfloat16; with LoRA
peft's adapters, and the base model as reference. It reads the recipe that `train_step` reads. The released
trainers encode both images in every step: `--options=online_vae`; without it the latents are drawn from what
encoding would have given. Needs torch (the `test` extra).
"""

import copy
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from absl import flags
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from ml_collections import ConfigDict
from peft import LoraConfig
from torch.nn import functional
from transformers import Adafactor, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from benchmarks import measuring
from dspo_jax import cli, spelling
from dspo_jax.errors import UserError
from dspo_jax.monitoring.devices import host_memory_peak
from dspo_jax.pipelines import published

OPTIONS = ("channels_last", "compile", "online_vae")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CLASSES: dict[str, Any] = {
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
}
TOKENS = 77


def load_networks(config: ConfigDict) -> dict[str, Any]:
    """The recipe's networks with their weights, or a published model's with random ones, by component."""
    if not flags.FLAGS.published:
        names = ("unet", "vae", "text_encoder")
        return {
            name: CLASSES[name].from_pretrained(config.model, subfolder=name, local_files_only=True)
            for name in names
        }
    networks = {}
    for name, (_, settings) in published.NETWORKS[flags.FLAGS.published].items():
        text = name.startswith("text_encoder")
        networks[name] = CLASSES[name](CLIPTextConfig(**settings)) if text else CLASSES[name](**settings)
    return networks


def pair_loss(config: ConfigDict, policy: torch.Tensor, frozen: torch.Tensor, target: torch.Tensor) -> Any:
    """Returns the objective of predictions [2B, C, h, w], winners before losers, in float32."""
    objective = config.objective
    (win, lose), (win_frozen, lose_frozen), (win_target, lose_target) = (
        tensor.float().chunk(2) for tensor in (policy, frozen, target)
    )

    def error(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (prediction - target).square().mean((1, 2, 3))

    gain = error(win, win_target) - error(win_frozen, win_target)
    margin = gain - (error(lose, lose_target) - error(lose_frozen, lose_target))
    if objective.name == "diffusion_dpo":
        return -functional.logsigmoid(-0.5 * objective.beta * margin).mean()
    if objective.name == "dspo_sdxl":
        return torch.sigmoid(0.5 * objective.beta * margin).square().mean()
    if objective.name == "dspo":
        scale = objective.lam if objective.reward_scale is None else objective.reward_scale
        weight = objective.lam if objective.score_weight is None else objective.score_weight
        weights = weight * torch.sigmoid(0.5 * scale * margin)[:, None, None, None]
        return (win - win_target - weights * (win - win_frozen)).square().mean()
    raise UserError(
        spelling.unknown("config.objective.name", objective.name, ("diffusion_dpo", "dspo", "dspo_sdxl"))
    )


class Trainer:
    """The step and what it trains."""

    def __init__(self, config: ConfigDict, options: Sequence[str], device: torch.device):
        """Puts everything on the device."""
        self._config, self._options, self._device = config, options, device
        self._dtype = DTYPES[config.compute_dtype]
        self._layout = torch.channels_last if "channels_last" in options else torch.contiguous_format
        self._networks = load_networks(config)
        self._settings = {name: network.config for name, network in self._networks.items()}
        if "online_vae" not in options:
            del self._networks["vae"]
        for network in self._networks.values():
            network.requires_grad_(False).to(device, self._dtype, memory_format=self._layout)
        policy = self._networks["unet"]
        self._frozen: Any = None  # with LoRA it is the policy without its adapters
        if config.lora.rank:
            policy.add_adapter(
                LoraConfig(
                    r=config.lora.rank,
                    lora_alpha=config.lora.rank,
                    init_lora_weights="gaussian",
                    target_modules=["to_k", "to_q", "to_v", "to_out.0"],
                )
            )
        else:
            self._frozen = copy.deepcopy(policy)
            policy.requires_grad_(True)
        self._trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        for parameter in self._trained:
            parameter.data = parameter.data.float()
        policy.train()
        if config.remat != "none":
            policy.enable_gradient_checkpointing()
        rates = {"lr": config.optimizer.learning_rate, "weight_decay": config.optimizer.weight_decay}
        if config.optimizer.name == "adafactor":
            self._optimizer: Any = Adafactor(
                self._trained, scale_parameter=False, relative_step=False, warmup_init=False, **rates
            )
        else:
            self._optimizer = torch.optim.AdamW(self._trained, fused=True, **rates)
        self._policy: Any = policy
        if "compile" in options:
            self._policy = torch.compile(policy)
            self._frozen = self._frozen and torch.compile(self._frozen)
        self._schedule: Any = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")

    @property
    def default_resolution(self) -> int:
        """Side in pixels of the images that the UNet was made for."""
        return self._settings["unet"].sample_size * self._pixels_per_latent

    @property
    def _pixels_per_latent(self) -> int:
        return 2 ** (len(self._settings["vae"].block_out_channels) - 1)

    def make_batch(self, pairs: int, resolution: int) -> dict[str, torch.Tensor]:
        """Returns random images or latents [B, 2, C, h, w], winners first, and captions of random tokens."""
        vae = self._settings["vae"]
        side = resolution // self._pixels_per_latent
        encoders = [name for name in self._networks if name.startswith("text_encoder")]
        vocabulary = min(self._settings[name].vocab_size for name in encoders)
        on_device: Any = {"device": self._device}
        batch = {"tokens": torch.randint(0, vocabulary, (pairs, len(encoders), TOKENS), **on_device)}
        ids = torch.tensor([resolution, resolution, 0, 0, resolution, resolution], **on_device)
        batch["time_ids"] = ids.expand(pairs, 2, 6)
        if "online_vae" in self._options:
            pixels = torch.rand((pairs, 2, 3, resolution, resolution), **on_device)
            return batch | {"pixels": 2 * pixels - 1}
        mean, deviation = torch.randn((2, pairs, 2, vae.latent_channels, side, side), **on_device)
        return batch | {"mean": mean, "deviation": deviation.abs()}

    def step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Makes one update; returns the loss."""
        parts = self._config.accumulation
        total = torch.zeros((), device=self._device)
        for part in range(parts):
            loss = self._loss({name: tensor[part::parts] for name, tensor in batch.items()})
            (loss / parts).backward()
            total += loss.detach() / parts
        if self._config.optimizer.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self._trained, self._config.optimizer.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return total

    def _loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        mixed = self._dtype != torch.float32
        with torch.autocast(self._device.type, self._dtype) if mixed else nullcontext():
            with torch.no_grad():
                latents = self._latents(batch)
                pairs = len(latents) // 2
                # The images of a pair share timestep and noise.
                noise = torch.randn_like(latents[:pairs]).repeat(2, 1, 1, 1)
                timesteps = torch.randint(0, 1000, (pairs,), device=self._device).repeat(2)
                noisy = self._schedule.add_noise(latents, noise, timesteps)
                inputs = self._inputs(batch)
                frozen = self._reference(noisy, timesteps, inputs)
            policy = self._policy(noisy, timesteps, **inputs).sample
        return pair_loss(self._config, policy, frozen, noise)

    def _latents(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """[2B, C, h, w], winners before losers."""
        if "pixels" in batch:
            vae = self._networks["vae"]
            posterior = vae.encode(_winners_then_losers(batch["pixels"]).to(self._dtype)).latent_dist
            latents = posterior.sample().float() * vae.config.scaling_factor
        else:
            mean, deviation = (_winners_then_losers(batch[name]) for name in ("mean", "deviation"))
            latents = mean + deviation * torch.randn_like(mean)
        return latents.contiguous(memory_format=self._layout)

    def _inputs(self, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Encodes the captions for the UNet, once for a pair."""
        tokens = batch["tokens"]
        first = self._networks["text_encoder"]
        if "text_encoder_2" not in self._networks:
            return {"encoder_hidden_states": first(tokens[:, 0]).last_hidden_state.repeat(2, 1, 1)}
        second = self._networks["text_encoder_2"]
        outputs = [
            encoder(tokens[:, i], output_hidden_states=True) for i, encoder in enumerate((first, second))
        ]
        states = torch.cat([output.hidden_states[-2] for output in outputs], -1)
        added = {
            "text_embeds": outputs[1].text_embeds.repeat(2, 1),
            "time_ids": _winners_then_losers(batch["time_ids"]),
        }
        return {"encoder_hidden_states": states.repeat(2, 1, 1), "added_cond_kwargs": added}

    def _reference(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, inputs: dict[str, Any]
    ) -> torch.Tensor:
        if self._frozen is not None:
            return self._frozen(noisy, timesteps, **inputs).sample
        unet = self._networks["unet"]
        unet.disable_adapters()
        output = self._policy(noisy, timesteps, **inputs).sample
        unet.enable_adapters()
        return output


def _winners_then_losers(pairs: torch.Tensor) -> torch.Tensor:
    return torch.cat(pairs.unbind(1))


def main(argv: Sequence[str]) -> None:
    """Measures."""
    del argv
    values, config = flags.FLAGS, flags.FLAGS.config
    measuring.check_model(config)
    for option in values.options:
        if option not in OPTIONS:
            raise UserError(spelling.unknown("--options", option, OPTIONS))
    device = measuring.torch_device(values.platform or ("gpu" if torch.cuda.is_available() else "cpu"))
    torch.manual_seed(config.seed)
    trainer = Trainer(config, values.options, device)
    resolution = values.resolution or trainer.default_resolution
    batch = trainer.make_batch(config.batch_size, resolution)
    on_gpu = device.type == "cuda"
    kind = torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} threads, cpu"
    print(f"{measuring.describe_recipe(config, resolution)}; {kind}", flush=True)

    def wait(loss: torch.Tensor) -> None:
        loss.item()

    started = time.perf_counter()
    wait(trainer.step(batch))
    first = time.perf_counter() - started  # torch.compile compiles here
    seconds = measuring.time_steps(lambda: trainer.step(batch), wait, values.steps)
    result = measuring.make_result(
        measuring.describe_recipe(config, resolution),
        " + ".join(("torch", *values.options)),
        pairs=config.batch_size,
        seconds=seconds,
        device=kind,
        compile_seconds=first,
        peak_memory_gib=torch.cuda.max_memory_allocated() / 2**30 if on_gpu else host_memory_peak(),
    )
    measuring.report(result, values.json)


if __name__ == "__main__":
    measuring.define_flags()
    flags.DEFINE_list("options", [], f"Of {', '.join(OPTIONS)}.")
    flags.DEFINE_enum("platform", None, ["cpu", "gpu"], "Where (default: a GPU if torch sees one).")
    cli.run(main)
