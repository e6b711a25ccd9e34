"""Flags of how images are drawn, shared by several commands; options.py reads them.

What is allowed is written out, as modules that know it take seconds to import; tests/test_usage.py compares.
"""

from absl import flags


def define_drawing_flags() -> None:
    """Defines the drawing flags; a command calls this once."""
    flags.DEFINE_enum(
        "sampler",
        None,
        (
            *("ddim", "ddpm", "dpmpp_2m", "euler", "euler_ancestral", "pndm"),
            *("flow_ancestral", "flow_dpmpp_2m", "flow_euler", "flow_grpo", "flow_heun"),
        ),
        "How noise becomes an image (default: ddim; of a model of rectified flow flow_euler).",
    )
    flags.DEFINE_integer("steps", 50, "Steps of the sampler.")
    flags.DEFINE_float(
        "eta",
        0.0,
        "Of ddim and flow_ancestral: from 0, no noise in steps, to 1, as much as ddpm adds; flow_grpo's a.",
    )
    flags.DEFINE_float("guidance_scale", 7.5, "s in uncond + s (cond - uncond); at 1 or less, no guidance.")
    flags.DEFINE_list("guidance_interval", ["0", "1000"], "The smallest and largest timestep that is guided.")
    flags.DEFINE_float(
        "guidance_rescale", 0.0, "From 0 to 1: how far guidance keeps the prediction's standard deviation."
    )
    flags.DEFINE_list(
        "skip_layers",
        None,
        "Blocks that skip-layer guidance leaves out; of Stable Diffusion 3.5 medium 7,8,9.",
    )
    flags.DEFINE_float("skip_layer_scale", None, "How much of the difference is added (default: 2.8).")
    flags.DEFINE_float("skip_layer_start", None, "Share of the steps before it (default: 0.01).")
    flags.DEFINE_float("skip_layer_stop", None, "Share of the steps after which it ends (default: 0.2).")
    flags.DEFINE_integer("batch_size", 16, "Images drawn at a time.")
    flags.DEFINE_string("negative_prompt", None, "What to steer away from.")
    define_text_flags()
    flags.DEFINE_string("init_image", None, "A picture to start from; a .jsonl of prompts may name one each.")
    flags.DEFINE_bool(
        "allow_outside", False, "Read images that lie outside the folder of the file that names them."
    )
    flags.DEFINE_float("strength", None, "How much of it is drawn anew, in (0, 1] (default: 0.75).")
    flags.DEFINE_integer("height", None, "In pixels (default: what the model was made for).")
    flags.DEFINE_integer("width", None, "In pixels.")
    flags.DEFINE_enum("format", "png", ("png", "webp"), "Of the images; webp without loss.")
    flags.DEFINE_enum(
        "compute_dtype",
        None,
        ("float32", "bfloat16"),
        "Of UNet and text encoders; the VAE is float32 (default: bfloat16 on an accelerator).",
    )
    flags.DEFINE_integer("vae_tile", 1024, "Larger images are decoded in tiles of this side; 0: never.")
    flags.DEFINE_bool("overwrite", False, "Delete images of other settings that are in the folder.")


def define_text_flags() -> None:
    """Defines how captions are read, as `load_pipeline` takes it; a command calls this once."""
    flags.DEFINE_integer(
        "max_chunks",
        None,
        "Prompts longer than 75 tokens are read in up to so many chunks of 75 (default: as a run was "
        "trained; of a folder 1, which cuts them).",
        lower_bound=1,
    )
    flags.DEFINE_integer(
        "clip_skip",
        None,
        "Of Stable Diffusion 1 and 2: 2 reads the text encoder's layer before the last, 3 the one before "
        "that (default: as a run was trained; of a folder 1, the last layer).",
        lower_bound=1,
    )
    flags.DEFINE_integer(
        "max_sequence_length",
        None,
        "Of Stable Diffusion 3: tokens of T5, or without T5 rows of zeros in their place (default: as a run "
        "was trained; of a folder 256, as in diffusers).",
        lower_bound=0,
        upper_bound=512,
    )
