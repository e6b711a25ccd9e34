"""Every key of a training run, with its default. The recipes beside this file only change it."""

from ml_collections import ConfigDict, config_dict

# Hyperparameters of the objectives: None means the objective's own default (see dspo_jax/objectives/).
_OBJECTIVE_ARGUMENTS = {
    "beta": float,  # diffusion_dpo, diffusion_dpo_l2, sdpo, ipo, dmpo, kto, dspo_sdxl: scale of the reward
    "lam": float,  # dspo, dspo_ref, dspo_e: lambda
    "gamma": float,  # dspo, dspo_ref, dspo_e
    "reward_scale": float,  # dspo, dspo_ref: the lambda inside G; default lam
    "score_weight": float,  # dspo, dspo_ref, dspo_e: s; default lam * gamma
    "detach": bool,  # dspo, dspo_ref: stop the gradient through G
    "released_switch": bool,  # dspo_sdxl: change the loss where the released code does
    "margin_weight": float,  # mapo: weight of the preference term
    "kappa": float,  # mapo: k of its score
    "scale": float,  # mapo: scale of the margin
    "alpha": float,  # dmpo: probability of the loser in the target
    "mu": float,  # sdpo: share of the winner's progress that the loser may not undo
    "reduction": str,  # "mean" or "sum" over an image
    "time_weight": str,  # "none" or "paper"
}


def get_config() -> ConfigDict:
    """The schema; a recipe sets at least `model` and `data.path`."""
    config = ConfigDict()

    # The model to align, and the frozen reference: a diffusers folder.
    config.model = config_dict.placeholder(str)
    # Of everything drawn: order of the data, noise, timesteps, dropped captions.
    config.seed = 0
    # Optimizer updates of the whole run.
    config.steps = 1000
    # Pairs in an update, over all devices.
    config.batch_size = 2048
    # Parts that a batch is worked through in, one after the other, to save memory. Does not change the
    # result.
    config.accumulation = 1
    # Share of the pairs that are trained without their caption, which guidance needs; one draw for a pair.
    # Without a caption is with the empty one, or for SDXL with zeros, as its model_index.json asks.
    config.caption_dropout = 0.2
    # Whether winner and loser share timestep and noise, as in every released code base (DSPO's Eq. 14 does
    # not).
    config.share_noise = True
    # Of an objective for single images with labels (kto) on pairs: one image is taken of each, the liked one
    # with this probability.
    config.positive_ratio = 0.8
    # Whether the text encoders are trained with the UNet.
    config.train_text_encoder = False
    # Adapters are trained in place of whole networks if the rank is above 0. They go beside the layers whose
    # paths, or ends of paths, one of these regular expressions matches: here the projections of all attention
    # layers. Also, for example, r"ff\.net\.0\.proj", r"conv\d", r"proj_(in|out)".
    config.lora = ConfigDict()
    config.lora.rank = 0
    config.lora.targets = (r"to_[qkv]", r"to_out\.0", r"(q|k|v|out)_proj")
    # What the networks compute in, "float32" or "bfloat16"; losses and the optimizer stay in float32.
    config.compute_dtype = "float32"
    # Steps between two lines of metrics.
    config.log_every = 10

    config.data = ConfigDict()
    # A dataset written by dspo_jax.encode.
    config.data.path = config_dict.placeholder(str)
    config.data.split = "train"

    config.objective = ConfigDict()
    # A name registered in dspo_jax/objectives/.
    config.objective.name = "dspo"
    for name, kind in _OBJECTIVE_ARGUMENTS.items():
        config.objective[name] = config_dict.placeholder(kind)

    config.optimizer = ConfigDict()
    # "adamw" or "adafactor".
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 2.048e-5
    config.optimizer.schedule = "constant"
    config.optimizer.warmup_steps = 500
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.eps = 1e-8
    config.optimizer.weight_decay = 1e-2
    # Gradients are scaled down to this global norm; 0 turns it off.
    config.optimizer.max_grad_norm = 1.0

    config.mesh = ConfigDict()
    # Devices along each axis; -1 takes all that are left.
    config.mesh.data = -1
    config.mesh.fsdp = 1
    config.mesh.tensor = 1

    config.checkpoint = ConfigDict()
    # Steps between two checkpoints; the last step is always saved.
    config.checkpoint.every = 500
    config.checkpoint.max_to_keep = 3

    config.validation = ConfigDict()
    config.validation.split = "validation"
    # Steps between two validations; the first and the last step are always validated. 0 turns it off.
    config.validation.every = 500
    # How many (timestep, noise) draws each held-out pair is judged by; the timesteps are spread evenly.
    config.validation.draws = 8
    # Held-out examples in one call of the networks.
    config.validation.batch_size = 32
    return config
