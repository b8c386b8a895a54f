"""The paper's recipe: AffectGPT on Qwen2.5-7B-Instruct (arXiv 2501.16566, section 4 and appendix).

Every key that training reads stands here, with its meaning; other configs change a few of them.
"""

from ml_collections import ConfigDict

from affectgpt_jax.data.modalities import projectors


def data_set(
    source: str, *, weight: float = 1.0, share: float = 1.0, label: str = "", input: str = ""
) -> ConfigDict:
    """One training set of a mixture, for `data.mixture`.

    Args:
        source: as `data.train`.
        weight: how often an epoch draws each clip; 0.5 is every other epoch.
        share: of its clips that is used at all; a clip's name alone decides.
        label: as `config.label`, which "" stands for.
        input: as `config.input`, which "" stands for.
    """
    return ConfigDict(
        {"source": source, "weight": weight, "share": share, "label": label, "input": input}
    )


def reinforcement() -> ConfigDict:
    """The section `rl` of a run of `affectgpt reinforce`, with its defaults."""
    c = ConfigDict()
    # Which run it starts from: written by the command, whose --from and --step name it.
    c.start = ""
    c.start_step = 0
    c.start_sha256 = ""
    c.data = ""  # clips, as data.train, that supervision has not seen; "" is the demo's own split
    c.question = "ovlabel"  # or onehot, onehot_candidates, sentiment
    c.prompts = 64  # of a step
    c.group = 4  # answers to each
    c.temperature = 1.0  # of the answers; method=grpo takes 1 alone
    c.top_p = 1.0  # likewise
    c.max_new_tokens = 48
    c.merge_lora = "false"  # as generate.merge_lora: answers of merged weights get weights, see cap
    c.reward = "wheel_f"  # wheel_f | wheel_f_corpus | hit | sentiment: evaluation/rewards.py
    c.lexicon = ""  # directory of the wheels; "" is the one that ships
    c.lexicon_sha256 = ""  # written by the command
    c.wheels = (1, 2, 3, 4, 5)  # that reward; all of them score
    c.test_lexicon = ""  # of another lexicon by which the result is scored as well
    c.format_weight = 0.1  # for an answer in the form of its question that ends by itself
    c.length_penalty = 0.05  # for every label beyond those of the truth and
    c.length_free = 1  # so many more
    c.allow_hacking = False  # lets reward=hit stand without length_penalty
    c.method = "grpo"  # grpo | best: supervision on the best answer of each group
    c.loss = "tokens"  # tokens | answers | constant: training/policy.py
    c.scale = "none"  # none | group | batch: the deviation that advantages are divided by
    c.beta = 0.0  # weight of the KL to the start
    c.kl = "k2"  # its estimator: k2, with the KL's gradient | k3, GRPO's
    c.epsilon = 0.2  # a ratio is clipped below 1 - epsilon
    c.epsilon_high = 0.28  # and above 1 + epsilon_high
    c.weight_cap = 2.0  # of exp(training's - rollout's log-probability)
    c.updates = 1  # on the answers of a step; more take a constant learning rate
    c.drop_flat = True  # leave out groups whose rewards are all alike
    c.mask_cut = True  # leave out answers that reached max_new_tokens
    c.share_prompt = True  # one row for the answers to a prompt; False: a row each
    c.sft_share = 0.0  # supervised rows of the run's own training clips beside those of a step
    c.stop_kl = 0.5  # mean over tokens at which the run ends; 0: never
    c.shuffle_rewards = False  # a control: the truth of another clip
    c.val_clips = 256
    c.test_clips = 512  # asked before and after
    c.test_samples = 4  # of each, whose mean reward is compared
    c.consensus = 16  # samples that agree
    return c


def preference() -> ConfigDict:
    """The section `dpo` of a run of `affectgpt prefer`, with its defaults."""
    c = ConfigDict()
    c.start = ""  # as in `rl`: written by the command
    c.start_step = 0
    c.start_sha256 = ""
    c.lexicon_sha256 = ""
    c.data = ""  # clips, as data.train, that supervision has not seen; "" is the demo's own split
    c.source = "records"  # records: their alternatives and preferred | samples: best against worst
    c.pairs = 32  # of a step
    c.val_share = 0.1  # of the pairs, held out by the clip's name
    c.beta = 0.1  # how strongly the model is held to the start
    c.label_smoothing = 0.0  # share of preferences that are taken to be wrong
    c.nll_weight = 0.2  # of the preferred answer's mean -log p of a token; 0: DPO alone
    c.gap = 0.2  # of the rewards of best and worst, at the least; for source=samples
    c.question = "ovlabel"  # asked before and after, and for source=samples
    c.prompts = 64  # asked at a time
    c.group = 4  # samples of each
    c.max_new_tokens = 48
    c.lexicon = ""  # directory of the wheels; "" is the one that ships
    c.test_lexicon = ""  # of another lexicon by which the result is scored as well
    c.test_clips = 512  # asked before and after
    c.test_samples = 4  # of each, whose mean reward is compared
    c.consensus = 16  # samples that agree
    return c


def get_config(batch_size: str = "3") -> ConfigDict:
    """affectgpt train --config=configs/affectgpt_qwen25_7b.py --workdir=runs/paper \\
    --config.llm=/models/Qwen2.5-7B-Instruct --config.data.train=/records/mercaptionplus

    `--config=affectgpt_qwen25_7b:192` is the same training in batches of 192: as many clips in
    fewer updates, which warm-up, validation and learning rate follow.
    """
    batch = int(batch_size) if batch_size.isdecimal() else 0
    if not batch:
        raise ValueError(f"affectgpt_qwen25_7b:{batch_size} names no batch size of 1 or more")
    c = ConfigDict()
    c.seed = 0  # of initialisation, data order, label draw and dropout; 0 to 2^32 - 1
    # The frozen base: a directory, or a model of the hub, OWNER/NAME; "tiny": the one that ships
    c.llm = "Qwen2.5-7B-Instruct"
    # What to start from: the workdir of a run, whose best checkpoint it is, a PEFT adapter's
    # directory or a .pth of the PyTorch release, here or on the hub; "": fresh
    c.init_from = ""
    c.input = "multi_audio_face_text"  # the input mode, one of those of data/modalities.py
    c.label = "hybrid"  # description | ovlabel | hybrid (one of both, drawn anew at each access) |
    # onehot | onehot_candidates | sentiment | valence | caption | qa | preference; "a+b" is drawn
    # like hybrid
    c.prompts = "default"  # the prompt set: default | compact | a TOML file
    c.max_tokens = 1024  # of the longest training example
    c.too_long = "error"  # longer training examples: error (stop by name) | drop (and count them)

    c.data = ConfigDict()  # where clips come from
    c.data.train = ""  # a record directory, "tfds:DIR:SPLIT", "demo" or "demo:WORLD"
    c.data.mixture = ConfigDict()  # several training sets by name instead, each a `data_set(...)`
    c.data.val = ""  # the same, for validation; "" holds out `val_share` of the training clips
    c.data.val_share = 0.02  # of the training clips; a clip's name alone decides
    c.data.test = ""  # the same, for the score at the end; "" scores nothing
    c.data.verify = True  # hash every record shard at the start, against its manifest
    c.demo_seed = 0  # of the generated world, where data is "demo"

    c.strict_leaks = False  # refuse clips that are in training and evaluation; False reports them

    c.steps = 900_000 // batch  # updates; of 3 clips: 60 epochs of 5,000, as the paper counts them
    c.batch_size = batch  # rows in one update, over all devices; a row is a clip, unless packed
    c.gradient_accumulation_steps = 1  # microbatches of a batch, run one after the other
    c.num_buckets = 4  # row lengths that batches come in; each costs one compilation
    c.pack_length = 0  # tokens of a row that holds as many clips as fit; 0: a clip a row. All
    # training batches then have this one shape, and num_buckets is for validation and answers. A
    # row of 2048 holds 8 clips of the paper's lengths on average: divide batch_size accordingly
    c.mesh = "data:-1"  # devices by axis: data, fsdp, tensor, e.g. "data:2,fsdp:4"; -1: all others
    c.dtype = "bfloat16"  # of the base and of computation; what is trained is float32
    c.base_precision = ""  # of the base's projections: int8 | fp8 | nf4; "": as dtype
    # What the backward pass recomputes: auto | none | save_attention | save_projections | full;
    # auto is the first of the others that fits into the device's memory, for packed rows on a GPU
    # without "none", which is no faster there
    c.remat = "auto"
    # The attention backend: auto | xla | cudnn | cudnn_masked | cudnn_packed; auto is the fastest
    # that runs here
    c.attention = "auto"
    c.xla_options = ""  # compiler options of the train step, "NAME=VALUE NAME=VALUE"

    # The paper's rate of 1e-5 belongs to batches of 3. AdamW divides a gradient by its own size: a
    # larger batch is less noisy, but its step is no longer, and as many clips in fewer steps would
    # get less far. The usual rule is the square root of the batch; it was not measured here. Before
    # a long run, compare a few hundred updates with half and twice the rate. (The release, in
    # float16, overflowed at 2e-5; bfloat16 has float32's range.)
    root = (batch / 3) ** 0.5
    c.optimizer = ConfigDict()  # AdamW
    c.optimizer.learning_rate = 1e-5 * root  # after the warm-up
    c.optimizer.warmup_learning_rate = 1e-6 * root  # at the first step; it rises linearly
    c.optimizer.warmup_steps = 15_000 // batch
    c.optimizer.final_learning_rate = 1e-5 * root  # cosine decay to here; as its start: constant
    c.optimizer.weight_decay = 0.05  # of matrices; biases and norms have none
    c.optimizer.beta1 = 0.9
    c.optimizer.beta2 = 0.999
    c.optimizer.epsilon = 1e-8
    c.optimizer.clip_norm = 0.0  # largest norm of the gradient; 0: no clipping

    c.lora = ConfigDict()  # adapters of the base
    c.lora.rank = 16  # 0 trains projectors and fusion alone
    c.lora.alpha = 32.0  # the product of the adapters is scaled by alpha / rank
    c.lora.dropout = 0.05  # of their input, with a mask of its own for each projection
    c.lora.targets = (  # the projections that have adapters
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )

    # Pre-fusion outside the LLM: attention | qformer | projected (attention over the soft tokens of
    # both heads in place of their features; worse in the paper) | none
    c.fusion = "attention"
    # Of the heads video, audio and image (data/modalities.py): how a head computes its soft tokens,
    # as in projectors.video = "attention" (attention | mean | qformer; image: mean | qformer), and
    # the width of its features in the records, as in projectors.video_width = 768
    c.projectors = ConfigDict(projectors())
    c.projectors.fusion_width = 1024  # common width inside the pre-fusion
    c.qformer = ConfigDict()  # of pre-fusion and heads of the kind qformer
    c.qformer.width = 768
    c.qformer.heads = 12
    c.qformer.layers = 2
    c.qformer.intermediate = 3072  # width of the feed-forward layers
    c.qformer.dropout = 0.1

    c.generate = ConfigDict()  # answers, in validation and afterwards
    c.generate.batch_size = 32  # answers at a time
    c.generate.max_new_tokens = 1200  # of an answer
    # Whether LoRA is added to a copy of the base's weights first, which is faster and rounds once
    # more: auto | true | false; auto does so where a second copy of them fits easily
    c.generate.merge_lora = "auto"

    c.log_every = 10  # steps between lines of metrics.jsonl
    # steps between validations, each followed by a checkpoint
    c.checkpoint_every = max(1, 15_000 // batch)
    c.max_to_keep = 12  # newest checkpoints kept, beside the best on validation
    c.step_timeout = 900.0  # s without progress; then a run shows its threads and ends; 0: none
    c.wandb_project = ""  # also log to this project of Weights & Biases; "": no
    c.profile_steps = ""  # "10:15" traces steps 10 to 14
    return c
