"""Every key of a training run, with its default. The recipes beside this file only change it."""

from ml_collections import ConfigDict, config_dict

# Hyperparameters of the objectives: None means the objective's own default (see dspo_jax/objectives/).
_OBJECTIVE_ARGUMENTS = {
    # Scale of the reward: diffusion_dpo and its relatives, kto, dspo_sdxl, lpo_list, dgpo, crd, rwr. Of orpo
    # the weight of the comparison; of nft, how far its mixtures lie from the reference.
    "beta": float,
    "lam": float,  # dspo, dspo_ref, dspo_e: lambda
    "gamma": float,  # dspo, dspo_ref, dspo_e
    "reward_scale": float,  # dspo, dspo_ref: the lambda inside G; default lam
    "score_weight": float,  # dspo, dspo_ref, dspo_e: s; default lam * gamma
    "detach": bool,  # dspo, dspo_ref: stop the gradient through G
    "released_switch": bool,  # dspo_sdxl: change the loss where the released code does
    "margin_weight": float,  # mapo: weight of the preference term
    "clip": float,  # awm, dgpo: of the ratio of likelihoods to the reference's
    "kappa": float,  # mapo: k of its score
    "scale": float,  # mapo: scale of the margin
    "alpha": float,  # dmpo: probability of the loser in the target; alpha_dpo: factor of its order
    "mu": float,  # sdpo: share of the winner's progress that the loser may not undo
    # Cap of the weight of small t; 5 is its paper's: ddpm, sft, rwr, and diffusion_dpo and its relatives.
    "min_snr_gamma": float,
    # diffusion_dpo: weight of each pair by the scores of its images, as own_pairs and data encoded with
    # `score` have them.
    "smpo_weight": float,
    # diffusion_dpo and its relatives, but for ipo and linear_dpo: decay of the moving mean of the margins'
    # sizes, 0.99 for example; beta falls as that grows, and never exceeds the one that is set.
    "auto_beta": float,
    "temperature": float,  # diffusion_rpo: of the weights of other prompts' losers
    "sft_weight": float,  # comparisons with a reference: weight of the winner's denoising error, added
    "anchor_weight": float,  # the same: of the squared distance to the reference's predictions, added
    "softmax_over": str,  # rwr: whose rewards are compared, of the "round" or of each "prompt"
    "reduction": str,  # "mean" or "sum" over an image
    "time_weight": str,  # "none", "epsilon" or "paper"
}
# Those of the methods that train on the model's own images (see docs/online.md), in the same way.
_POLICY_GRADIENT_ARGUMENTS = {
    "reduction": str,  # "mean" or "sum" over an image
    "clip": float,  # ddpo, grpo, dpok, d3po: of the ratio of probabilities
    "advantage_clip": float,  # ddpo, ddpo_sf, grpo: in deviations
    "alpha": float,  # dpok: weight of the advantages
    "beta": float,  # grpo, dpok: weight of the divergence from the reference; d3po: scale of the reward
    "kl": str,  # grpo, dpok: "kl_loss", "prediction" or "kl_in_reward"
}
_REWARD_GRADIENT_ARGUMENTS = {
    "k": float,  # draft_k, draft_lv, draft_plus: the last K steps get gradients
    "beta": float,  # weight of the squared difference from the reference's predictions
    "draw": str,  # alignprop: "once" an update, or for "each_step"
    "first": float,  # refl: share of the steps before which none is drawn
    "threshold": float,  # refl
    "weight": float,  # refl
}


def get_config() -> ConfigDict:
    """Returns the schema; a recipe sets at least `model`, and `data.path` or `stream`."""
    config = ConfigDict()

    # The model to align, and the frozen reference unless `reference.model` names another: a diffusers folder.
    config.model = config_dict.placeholder(str)
    # Random seed: data order, noise, timesteps, caption dropout.
    config.seed = 0
    # Optimizer updates of the whole run.
    config.steps = 1000
    # In place of `steps`: how often the run goes through the training examples, for example 10.0.
    config.epochs = config_dict.placeholder(float)
    # Pairs in an update, over all devices, or whole lists; images where `stream.kind` is "prompts" or
    # "trajectories". `rwr` trains on all images of a prompt and takes them two by two, so that its images are
    # twice as many.
    config.batch_size = 2048
    # Parts of a batch, computed one after the other to save memory. The result does not change, except for
    # `kto`, `alpha_dpo`, `diffusion_rpo` and `dspo_sdxl`'s released switch: their mean over examples is then
    # over those of a part. With "trajectories" the parts are of the batch's denoising steps, batch_size x
    # num_inference_steps.
    config.accumulation = 1
    # Share of the pairs that are trained without their caption, which guidance needs; one draw for a pair.
    # A dropped caption is the empty one, or for SDXL zeros, as its model_index.json asks.
    config.caption_dropout = 0.2
    # Of Stable Diffusion 3: probability with which each text encoder is without the caption of a pair, drawn
    # for each by itself, beside `caption_dropout`. And what a dropped caption is: "empty", the empty one,
    # which encoders read; or "zeros" in place of what they say, as in kohya-ss. None is "empty".
    config.encoder_dropout = 0.0
    config.dropped_captions = config_dict.placeholder(str)
    # Whether winner and loser share their timestep, as in every released code base and in the papers' prints,
    # and their noise, as in every released code base; the prints (DSPO's Eq. 14) draw noise for each image.
    config.share_timesteps = True
    config.share_noise = True
    # Deviation of a number that is drawn for each image and channel and added to all of its noise, so that
    # brightness and colours of a whole image are learned, too; 0 is none, 0.1 Emu's. Not in validation.
    config.noise_offset = 0.0
    # An objective for single images with labels (kto) takes one image of each pair, the winner with this
    # probability.
    config.positive_ratio = 0.8
    # How captions are read, in training and by whatever draws with the run. `max_chunks`: captions longer
    # than 75 tokens in up to so many chunks, as the data were encoded. `clip_skip`, of Stable Diffusion 1 and
    # 2: 1 reads the text encoder's last layer, 2 the layer before it, as many community models want.
    # `max_sequence_length`, of Stable Diffusion 3: tokens of T5, as the data were encoded, or without T5 rows
    # of zeros; None is 256.
    config.text = ConfigDict()
    config.text.max_chunks = 1
    config.text.clip_skip = 1
    config.text.max_sequence_length = config_dict.placeholder(int)
    # Whether the text encoders are trained with the UNet.
    config.train_text_encoder = False
    # Adapters are trained in place of whole networks if the rank is above 0. They go beside the layers whose
    # paths, or ends of paths, one of these regular expressions matches: here the projections of all attention
    # layers. Also, for example, r"ff\.net\.0\.proj", r"conv\d", r"proj_(in|out)".
    config.lora = ConfigDict()
    config.lora.rank = 0
    config.lora.targets = (
        *(r"to_[qkv]", r"to_out\.0", r"(q|k|v|out)_proj"),
        *(r"add_[qkv]_proj", r"to_add_out", r"SelfAttention\.[qkvo]"),  # of Stable Diffusion 3's text, and T5
    )
    # A LoRA file, PEFT's or kohya's, that the adapters start from, FILE or FILE:WEIGHT; None starts from ones
    # that add nothing. With rank = 0 layers and ranks are the file's, else both must be as asked for above.
    config.lora.init = config_dict.placeholder(str)
    # What an adapter adds is multiplied by alpha / rank, or, rank-stabilised, by alpha / sqrt(rank). None is
    # the rank of each adapter, with which the factor is 1, or sqrt(rank).
    config.lora.alpha = config_dict.placeholder(float)
    config.lora.rank_stabilised = False
    # DoRA: kernels also get a length of their own for each output, which is trained.
    config.lora.dora = False
    # Probability with which each element of an adapter's input is dropped in training, in the policy alone.
    config.lora.dropout = 0.0
    # Compute dtype of the networks, "float32" or "bfloat16"; losses and the optimizer are float32.
    config.compute_dtype = "float32"
    # Dtype of the trained parameters. In bfloat16 (8 bits) an update below 1/512 of a weight is lost.
    config.param_dtype = "float32"
    # Dtype of the reference; None is the lower precision of the two above. "int8": with LoRA, kernels of the
    # base in one byte a number (docs/training.md); needs pip install 'dspo_jax[quant]'.
    config.reference_dtype = config_dict.placeholder(str)
    # Activations that the backward pass recomputes: "none"; "dots", all but the outputs of linear layers and
    # convolutions; "blocks", whole blocks, which takes the least memory and up to one more forward pass.
    config.remat = "none"
    # What lies in the host's memory, from which a device copies it as the step needs it: "reference", the
    # frozen copy of what is trained; "moments", the state of the optimizer (docs/training.md).
    config.offload = ()
    # Timesteps that are drawn, both ends included; None is the last of the model's schedule. Not of models of
    # rectified flow.
    config.timesteps = ConfigDict()
    config.timesteps.first = 0
    config.timesteps.last = config_dict.placeholder(int)
    # Noise levels sigma, 0 for the image and 1 for the noise, that a model of rectified flow is trained at
    # (docs/flow.md); None is the default. `draw`: "logit_normal", the sigmoid of a normal number of `mean` 0
    # and `std` 1; "mode", of a `scale` of 1.29; or "uniform". `shift` a, by default 1, adds ln a to logits.
    config.levels = ConfigDict()
    config.levels.draw = config_dict.placeholder(str)
    config.levels.mean = config_dict.placeholder(float)
    config.levels.std = config_dict.placeholder(float)
    config.levels.scale = config_dict.placeholder(float)
    config.levels.shift = config_dict.placeholder(float)
    # Decay of a moving average of the trained parameters, which is validated and exported in their place; 0
    # turns it off. (Of schedule_free the optimizer's own average is.)
    config.ema_decay = 0.0
    # Steps between two lines of metrics.
    config.log_every = 10
    # A project of Weights & Biases that also gets the metrics; needs pip install 'dspo_jax[wandb]'.
    config.wandb_project = config_dict.placeholder(str)

    config.data = ConfigDict()
    # A dataset written by dspo_jax.encode, or several separated by commas. Held-out examples are those of all
    # that have some.
    config.data.path = config_dict.placeholder(str)
    # How often each dataset is drawn from, up to a factor: one number for each. None: every example of all
    # of them once an epoch.
    config.data.weights = ()
    config.data.split = "train"
    # More than 1: pairs that the score of the data tells apart most come first. They are cut into so many
    # groups by the gap of their scores, and after every `curriculum_every` updates the next group joins.
    config.data.curriculum_groups = 1
    config.data.curriculum_every = 500

    config.objective = ConfigDict()
    # A name in dspo_jax/objectives/registry.py.
    config.objective.name = "dspo"
    for name, kind in _OBJECTIVE_ARGUMENTS.items():
        config.objective[name] = config_dict.placeholder(kind)

    # Where batches come from: "dataset", encoded pairs of `data`; or the model's own images: "prompts", where
    # the gradient of a reward flows back through the sampler (`reward_gradient`); "trajectories", where a
    # reward weights the steps that led to an image (`policy_gradient`); "own_pairs", where the best and the
    # worst image of a prompt are a pair for `objective`, or all of its images a list for one that takes lists
    # (`dgpo` and the like), or all are weighed by their rewards (`rwr`). Or both: "self_play", where the
    # winners are images of `data` and the losers those that the reference draws for their captions; it needs
    # `reference.every` and no rewards.
    config.stream = ConfigDict()
    config.stream.kind = "dataset"
    # Prompts to draw, or names of files of them, as `sample --prompts` takes them.
    config.stream.prompts = ()
    # In "trajectories" and "own_pairs": images of each prompt in a round, and updates with a round's images.
    config.stream.images = 4
    config.stream.updates = 1
    # Images that are drawn, decoded and scored together in a round, over all devices; in "self_play" those of
    # a batch that are drawn together.
    config.stream.batch_size = 16
    # How images are drawn: "ddim", with `eta`, "ddpm" or "euler_ancestral"; of models of rectified flow
    # "flow_ancestral" or "flow_grpo", with `eta`, or "flow_euler". None is "ddim"; of a flow "flow_euler", in
    # "trajectories" "flow_ancestral".
    config.stream.sampler = config_dict.placeholder(str)
    config.stream.eta = 1.0
    config.stream.num_inference_steps = 50
    # s in uncond + s (cond - uncond), in drawing and in training; at 1 or less there is no guidance.
    config.stream.guidance_scale = 5.0
    # How far the guided prediction takes the standard deviation of the one under the prompt, from 0 to 1.
    config.stream.guidance_rescale = 0.0

    config.rewards = ConfigDict()
    # The reward to train by: a name, FILE.py:FUNCTION, or a sum such as "pickscore,0.5*aesthetic".
    config.rewards.train = ""
    # Rewards to watch, which are not trained by; the first chooses the best checkpoint.
    config.rewards.validation = ()
    # Holds the weights of each reward under its name, as dspo_jax.rewards.convert writes them.
    config.rewards.folder = "rewards"
    # Prompts to watch them on, or names of files; and images of each.
    config.rewards.prompts = ()
    config.rewards.images = 2

    config.reference = ConfigDict()
    # What the policy is compared with: a diffusers folder, hub id or training workdir (WORKDIR@best,
    # WORKDIR@STEP) with the architecture, schedule, VAE and tokenizers of `model`; None is `model` itself.
    config.reference.model = config_dict.placeholder(str)
    # Updates after which the frozen reference moves to the policy; 0 leaves it as it was at the start. With a
    # decay it moves by a share alone, decay * reference + (1 - decay) * policy: a moving average.
    config.reference.every = 0
    config.reference.decay = 0.0
    # Draws of timestep, noise and dropped caption of each example, which come round epoch by epoch. The
    # reference's errors are computed for all of them before the first step, and stored, so that a step does
    # not run it. 0 draws anew in every epoch. For objectives of one margin of errors.
    config.reference.draws = 0

    config.policy_gradient = ConfigDict()
    # "ddpo", "ddpo_sf", "grpo", "dpok" or "d3po".
    config.policy_gradient.name = "ddpo"
    for name, kind in _POLICY_GRADIENT_ARGUMENTS.items():
        config.policy_gradient[name] = config_dict.placeholder(kind)

    # A policy gradient's advantages: rewards less their mean, over their deviation.
    config.advantages = ConfigDict()
    # Of the images of a "prompt" in this round and before, of the "group" of a prompt's images in this round,
    # or of the whole "round".
    config.advantages.of = "prompt"
    # Of "group": what rewards are divided by, the deviation of the "group" or of all images of the round,
    # "global".
    config.advantages.deviation = "group"
    # Of "prompt": rewards of a prompt that are remembered, and how many there must be; before, the round's
    # are taken.
    config.advantages.buffer_size = 32
    config.advantages.min_count = 16

    config.reward_gradient = ConfigDict()
    # "draft", "draft_k", "draft_lv", "draft_plus", "alignprop" or "refl".
    config.reward_gradient.name = "draft_k"
    for name, kind in _REWARD_GRADIENT_ARGUMENTS.items():
        config.reward_gradient[name] = config_dict.placeholder(kind)

    config.optimizer = ConfigDict()
    # "adamw", "adafactor", "ademamix", "lion", "muon", "prodigy" or "schedule_free".
    config.optimizer.name = "adamw"
    # Of prodigy, a factor of the rate that it finds: 1.
    config.optimizer.learning_rate = 2.048e-5
    # That of the text encoders or their adapters; None is the same one. They share schedule and `scale_lr`.
    config.optimizer.text_encoder_learning_rate = config_dict.placeholder(float)
    # Whether the rate is one example's, to be multiplied by batch_size.
    config.optimizer.scale_lr = False
    # After warm-up: "constant", "cosine", "inverse_sqrt" or "linear".
    config.optimizer.schedule = "constant"
    config.optimizer.warmup_steps = 500
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    # Decay of ademamix's slow moment, and the factor of that moment.
    config.optimizer.b3 = 0.9999
    config.optimizer.alpha = 2.0
    # Decay of muon's momentum of matrices; what is no matrix has b1 and b2.
    config.optimizer.momentum = 0.95
    config.optimizer.eps = 1e-8
    config.optimizer.weight_decay = 1e-2
    # Dtype of the first moment of adamw, lion and muon, "float32" or "bfloat16".
    config.optimizer.moment_dtype = "float32"
    # Which two axes adafactor factors second moments over: "largest", or "released", as transformers'
    # Adafactor in the released trainers: those of a matrix, and the height and width of a convolution's
    # kernel, of which it keeps 6 numbers of 9: 0.86 GiB of SDXL, 1.5 of Stable Diffusion 1.5.
    config.optimizer.factored_axes = "largest"
    # Gradients are scaled down to this global norm; 0 turns it off.
    config.optimizer.max_grad_norm = 1.0

    config.mesh = ConfigDict()
    # Devices along each axis; -1 takes all that are left.
    config.mesh.data = -1
    config.mesh.fsdp = 1
    config.mesh.tensor = 1

    # How many slices (several TPU slices, or the hosts of a cluster) lie along each axis; 1 everywhere lets
    # JAX arrange all devices as one.
    config.mesh.dcn = ConfigDict()
    config.mesh.dcn.data = 1
    config.mesh.dcn.fsdp = 1
    config.mesh.dcn.tensor = 1

    # An update with a loss or gradients that are not finite is skipped.
    config.stability = ConfigDict()
    # More skipped ones in a row than this stop the run.
    config.stability.max_skipped = 10
    # An update is skipped, too, if its loss is so many standard deviations above the running mean; 0 turns it
    # off.
    config.stability.loss_spike = 0.0
    # Rather than stop, go back to the last checkpoint and on past the examples of the skipped updates.
    config.stability.rollback = False

    config.checkpoint = ConfigDict()
    # Steps between two checkpoints; the last step is always saved, and each that the held-out pairs find
    # better than all before.
    config.checkpoint.every = 500
    # The newest so many are kept, and the best.
    config.checkpoint.max_to_keep = 3
    # Resume from an older checkpoint if the newest is damaged.
    config.checkpoint.fallback = False

    config.validation = ConfigDict()
    config.validation.split = "validation"
    # Steps between two validations; the first and the last step are always validated. 0 turns it off.
    config.validation.every = 500
    # How many (timestep, noise) draws each held-out pair is judged by; the timesteps are spread evenly.
    config.validation.draws = 8
    # After so many validations without a better score than all before, the run ends with the next step (with
    # several processes, the one after); 0 turns that off. The score is the implicit accuracy, and the margin
    # where that is equal; or, where there is no reference, the winners' error.
    config.validation.patience = 0
    # Held-out examples in one call of the networks.
    config.validation.batch_size = 32

    config.samples = ConfigDict()
    # Steps between two grids of images, drawn by the model at the start beside the current one. 0 turns it
    # off.
    config.samples.every = 500
    # One row of the grid each, or the name of a file of them, as `sample --prompts` takes it; none means the
    # first captions of the validation split.
    config.samples.prompts = ()
    # One column each, under either model.
    config.samples.seeds = (0,)
    # Steps of an image, of DDIM, or of Euler's method for models of rectified flow.
    config.samples.num_inference_steps = 25
    # s in uncond + s (cond - uncond); at 1 or less there is no guidance.
    config.samples.guidance_scale = 7.5

    config.profile = ConfigDict()
    # Steps that are not traced after this process began, so that nothing compiles in the trace.
    config.profile.start = 10
    # Steps that are traced, into profile/ in the workdir; 0 turns it off.
    config.profile.steps = 0
    return config
