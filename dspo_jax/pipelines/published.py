"""Published models as architectures without weights, for plans and benchmarks at full size.

The config.json of runwayml/stable-diffusion-v1-5, stabilityai/stable-diffusion-2-1,
stabilityai/stable-diffusion-xl-base-1.0, stable-diffusion-3-medium, 3.5-medium and 3.5-large, without the
keys that repeat the classes' defaults; that of T5 has all keys of its file.
"""

from pathlib import Path

import numpy as np

from dspo_jax import spelling
from dspo_jax.errors import UserError
from dspo_jax.models.config import NetworkConfig
from dspo_jax.models.model import build_model
from dspo_jax.pipelines.conditioning import stack_tokens
from dspo_jax.pipelines.families import FAMILIES
from dspo_jax.pipelines.pipeline import Pipeline
from dspo_jax.pipelines.stable_diffusion_3 import T5, T5_LENGTH
from dspo_jax.schedules.process import SchedulerConfig

SD15_UNET: NetworkConfig = {
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
SD21_UNET = SD15_UNET | {
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "dual_cross_attention": False,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "sample_size": 96,
    "upcast_attention": True,
    "use_linear_projection": True,
}
SDXL_UNET = SD15_UNET | {
    "addition_embed_type": "text_time",
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_dim": 2048,
    "cross_attention_norm": None,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "mid_block_only_cross_attention": None,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "projection_class_embeddings_input_dim": 2816,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "sample_size": 128,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "upcast_attention": None,
    "use_linear_projection": True,
}
VAE: NetworkConfig = {
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
SDXL_VAE = VAE | {
    "force_upcast": True,
    "latents_mean": None,
    "latents_std": None,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
}
SD15_TEXT_ENCODER: NetworkConfig = {
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "vocab_size": 49408,
}
SD21_TEXT_ENCODER = SD15_TEXT_ENCODER | {
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
    "projection_dim": 512,
}
SDXL_TEXT_ENCODER = SD15_TEXT_ENCODER | {"projection_dim": 768}
SDXL_TEXT_ENCODER_2 = SD15_TEXT_ENCODER | {
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
}
SD3_MEDIUM: NetworkConfig = {
    "attention_head_dim": 64,
    "caption_projection_dim": 1536,
    "in_channels": 16,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 24,
    "out_channels": 16,
    "patch_size": 2,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
    "sample_size": 128,
}
SD35_MEDIUM = SD3_MEDIUM | {
    "dual_attention_layers": list(range(13)),
    "pos_embed_max_size": 384,
    "qk_norm": "rms_norm",
}
SD35_LARGE = SD3_MEDIUM | {
    "caption_projection_dim": 2432,
    "num_attention_heads": 38,
    "num_layers": 38,
    "qk_norm": "rms_norm",
}
SD3_VAE = SDXL_VAE | {
    "latent_channels": 16,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_post_quant_conv": False,
    "use_quant_conv": False,
}
T5_XXL: NetworkConfig = {
    "architectures": ["T5EncoderModel"],
    "classifier_dropout": 0.0,
    "d_ff": 10240,
    "d_kv": 64,
    "d_model": 4096,
    "decoder_start_token_id": 0,
    "dense_act_fn": "gelu_new",
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu",
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "is_gated_act": True,
    "layer_norm_epsilon": 1e-06,
    "model_type": "t5",
    "num_decoder_layers": 24,
    "num_heads": 64,
    "num_layers": 24,
    "output_past": True,
    "pad_token_id": 0,
    "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 32128,
}

_SCHEDULER: SchedulerConfig = {
    "_class_name": "PNDMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
}
_FLOW_SCHEDULER: SchedulerConfig = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 3.0,
}
# Of all models of Stable Diffusion 3, which differ in the transformer alone.
_OTHERS_OF_3: dict[str, tuple[str, NetworkConfig]] = {
    "vae": ("AutoencoderKL", SD3_VAE),
    "text_encoder": ("CLIPTextModelWithProjection", SDXL_TEXT_ENCODER),
    "text_encoder_2": ("CLIPTextModelWithProjection", SDXL_TEXT_ENCODER_2),
    "text_encoder_3": ("T5EncoderModel", T5_XXL),
}
NETWORKS: dict[str, dict[str, tuple[str, NetworkConfig]]] = {
    "sd15": {
        "unet": ("UNet2DConditionModel", SD15_UNET),
        "vae": ("AutoencoderKL", VAE),
        "text_encoder": ("CLIPTextModel", SD15_TEXT_ENCODER),
    },
    "sd21": {
        "unet": ("UNet2DConditionModel", SD21_UNET),
        "vae": ("AutoencoderKL", VAE | {"sample_size": 768}),
        "text_encoder": ("CLIPTextModel", SD21_TEXT_ENCODER),
    },
    "sdxl": {
        "unet": ("UNet2DConditionModel", SDXL_UNET),
        "vae": ("AutoencoderKL", SDXL_VAE),
        "text_encoder": ("CLIPTextModel", SDXL_TEXT_ENCODER),
        "text_encoder_2": ("CLIPTextModelWithProjection", SDXL_TEXT_ENCODER_2),
    },
    "sd3-medium": {"transformer": ("SD3Transformer2DModel", SD3_MEDIUM), **_OTHERS_OF_3},
    "sd35-medium": {"transformer": ("SD3Transformer2DModel", SD35_MEDIUM), **_OTHERS_OF_3},
    "sd35-large": {"transformer": ("SD3Transformer2DModel", SD35_LARGE), **_OTHERS_OF_3},
}
MODELS = tuple(NETWORKS)
CLASSES = {
    "sd15": "StableDiffusionPipeline",
    "sd21": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "sd3-medium": "StableDiffusion3Pipeline",
    "sd35-medium": "StableDiffusion3Pipeline",
    "sd35-large": "StableDiffusion3Pipeline",
}

# Tokens of the empty caption: start, end, and padding, which is 0 in SD 2.1's and SDXL's second tokenizer; of
# T5 the end and padding.
_START, _END, _LENGTH = 49406, 49407, 77
_PREDICTION = {"sd15": "epsilon", "sd21": "v_prediction", "sdxl": "epsilon"}
_PADDING = {"sd15": (_END,), "sd21": (0,)}  # of all others both


def architecture(name: str) -> Pipeline:
    """Makes a pipeline of one of `MODELS` whose shapes are known, but neither weights nor a vocabulary.

    Raises:
      UserError: an unknown name.
    """
    if name not in NETWORKS:
        raise UserError(spelling.unknown("published model", name, MODELS))
    networks = {part: build_model(*network) for part, network in NETWORKS[name].items()}
    family = FAMILIES[CLASSES[name]]
    scheduler = _FLOW_SCHEDULER
    if name in _PREDICTION:
        scheduler = {**_SCHEDULER, "prediction_type": _PREDICTION[name]}
    empty = [[_START, _END] + [pad] * (_LENGTH - 2) for pad in _PADDING.get(name, (_END, 0))]
    if T5 in networks:
        empty.append([1] + [0] * (T5_LENGTH - 1))
    denoiser = networks[family.denoiser]
    return Pipeline(
        path=Path(name),
        family=family,
        networks=networks,
        tokenizers=(),
        empty_tokens=stack_tokens([np.array([row], np.int32) for row in empty])[0],
        schedule=family.process.from_config(scheduler),
        scheduler_config=scheduler,
        zero_empty_captions=family.zero_empty_captions({}),
        trained={},
        made_buffers={key: np.zeros(shape, np.float32) for key, shape in denoiser.buffer_shapes().items()},
    )
