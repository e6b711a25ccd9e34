"""The config.json of published models, at full size, without the keys that the classes' defaults repeat.

Beside those of pipelines/published.py: of timbrooks/instruct-pix2pix and madebyollin/taesd. Those of CLIP are
in the form in which transformers 4 wrote them, with everything that such a file repeats.
"""

from typing import Any

from dspo_jax.pipelines.published import (
    SD3_MEDIUM,
    SD3_VAE,
    SD15_TEXT_ENCODER,
    SD15_UNET,
    SD21_TEXT_ENCODER,
    SD21_UNET,
    SD35_LARGE,
    SD35_MEDIUM,
    SDXL_TEXT_ENCODER,
    SDXL_TEXT_ENCODER_2,
    SDXL_UNET,
    SDXL_VAE,
    T5_XXL,
)

__all__ = [
    "SD3_MEDIUM",
    "SD3_VAE",
    "SD15_TEXT_ENCODER",
    "SD21_TEXT_ENCODER",
    "SD21_UNET",
    "SD35_LARGE",
    "SD35_MEDIUM",
    "SDXL_TEXT_ENCODER",
    "SDXL_TEXT_ENCODER_2",
    "SDXL_UNET",
    "SDXL_VAE",
    "T5_XXL",
]

PIX2PIX_UNET = SD15_UNET | {"in_channels": 8}
TAESD: dict[str, Any] = {
    "act_fn": "relu",
    "decoder_block_out_channels": [64] * 4,
    "encoder_block_out_channels": [64] * 4,
    "force_upcast": False,
    "in_channels": 3,
    "latent_channels": 4,
    "latent_magnitude": 3,
    "latent_shift": 0.5,
    "num_decoder_blocks": [3, 3, 3, 1],
    "num_encoder_blocks": [1, 3, 3, 3],
    "out_channels": 3,
    "scaling_factor": 1.0,
    "upsampling_scaling_factor": 2,
}

# What transformers 4 added to the config of any network.
_TRANSFORMERS_4: dict[str, Any] = {
    "_name_or_path": "",
    "add_cross_attention": False,
    "architectures": None,
    "bad_words_ids": None,
    "chunk_size_feed_forward": 0,
    "cross_attention_hidden_size": None,
    "decoder_start_token_id": None,
    "diversity_penalty": 0.0,
    "do_sample": False,
    "early_stopping": False,
    "encoder_no_repeat_ngram_size": 0,
    "finetuning_task": None,
    "forced_bos_token_id": None,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "is_decoder": False,
    "is_encoder_decoder": False,
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "length_penalty": 1.0,
    "max_length": 20,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_scores": False,
    "prefix": None,
    "problem_type": None,
    "pruned_heads": {},
    "remove_invalid_values": False,
    "repetition_penalty": 1.0,
    "return_dict": True,
    "return_dict_in_generate": False,
    "sep_token_id": None,
    "task_specific_params": None,
    "temperature": 1.0,
    "tf_legacy_loss": False,
    "tie_encoder_decoder": False,
    "tie_word_embeddings": True,
    "tokenizer_class": None,
    "top_k": 50,
    "top_p": 1.0,
    "torch_dtype": None,
    "torchscript": False,
    "transformers_version": "4.24.0",
    "typical_p": 1.0,
    "use_bfloat16": False,
}


def _old_clip(
    projection: int, text: dict[str, Any], vision: dict[str, Any], repeated: bool
) -> dict[str, Any]:
    text = {"num_hidden_layers": 12, **text}
    rest = {"attention_dropout": 0.0, "dropout": 0.0, "initializer_factor": 1.0, "initializer_range": 0.02}
    ids = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    config = {
        "_commit_hash": None,
        "architectures": ["CLIPModel"],
        "initializer_factor": 1.0,
        "logit_scale_init_value": 2.6592,
        "model_type": "clip",
        "projection_dim": projection,
        "text_config": {
            **_TRANSFORMERS_4,
            **rest,
            **ids,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-05,
            "max_position_embeddings": 77,
            "model_type": "clip_text_model",
            "projection_dim": 512,
            "vocab_size": 49408,
            **text,
        },
        "torch_dtype": "float32",
        "transformers_version": None,
        "vision_config": {
            **_TRANSFORMERS_4,
            **rest,
            **dict.fromkeys(ids),
            "hidden_act": "quick_gelu",
            "image_size": 224,
            "layer_norm_eps": 1e-05,
            "model_type": "clip_vision_model",
            "num_channels": 3,
            "patch_size": 14,
            "projection_dim": 512,
            **vision,
        },
    }
    return config | ({"text_config_dict": text, "vision_config_dict": vision} if repeated else {})


_TEXT_H = {
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
}
_VISION_H = {
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 16,
    "num_hidden_layers": 32,
    "patch_size": 14,
}
CLIP_H = _old_clip(1024, _TEXT_H, _VISION_H, repeated=True)
PICKSCORE = _old_clip(1024, _TEXT_H, _VISION_H, repeated=False)
CLIP_L = _old_clip(
    768,
    {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "projection_dim": 768},
    {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
    },
    repeated=True,
)
