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


def get_config(batch_size: str = "3") -> ConfigDict:
    """affectgpt train --config=configs/affectgpt_qwen25_7b.py --workdir=runs/paper \\
    --config.llm=/models/Qwen2.5-7B-Instruct --config.data.train=/records/mercaptionplus

    `--config=affectgpt_qwen25_7b:192` is the same training in batches of 192: as many clips in
    fewer updates, of which warm-up, validation and learning rate follow. A comment stands above its
    key, or behind it; `affectgpt train --help` shows them.
    """
    batch = int(batch_size) if batch_size.isdecimal() else 0
    if not batch:
        raise ValueError(f"affectgpt_qwen25_7b:{batch_size} names no batch size of 1 or more")
    c = ConfigDict()
    c.seed = 0  # of initialisation, data order, label draw and dropout
    c.llm = "Qwen2.5-7B-Instruct"  # directory of the frozen base; "tiny" is the one that ships
    c.init_from = ""  # a PEFT adapter's directory or a .pth of the PyTorch release; "" is fresh
    c.input = "multi_audio_face_text"  # the input mode: data/modalities.py
    # hybrid: description or ovlabel, drawn anew at each access; others: onehot, onehot_candidates,
    # sentiment, valence, caption, qa, preference; "a+b" draws of both
    c.label = "hybrid"
    c.prompts = "default"  # default | compact | a TOML file
    c.max_tokens = 1024  # of a training example
    c.too_long = "error"  # error | drop: what becomes of longer examples

    c.data = ConfigDict()
    c.data.train = ""  # a record directory, "tfds:DIR:SPLIT", "demo" or "demo:WORLD"
    c.data.mixture = ConfigDict()  # several training sets by name instead, each a `data_set(...)`
    c.data.val = ""  # as data.train; "" holds out data.val_share of the training clips
    c.data.val_share = 0.02  # of the training clips, where data.val is ""
    c.data.test = ""  # as data.train; scored at the end; "" scores nothing
    c.data.verify = True  # hash every record shard at the start, against its manifest
    c.demo_seed = 0  # of the generated world, where data is "demo"

    c.strict_leaks = False  # refuse clips that are in training and evaluation; False reports them

    c.steps = 900_000 // batch  # updates; the paper's are 60 epochs of 5,000 steps of 3 clips
    c.batch_size = batch  # rows in one update, over all devices; a row is a clip, unless packed
    c.gradient_accumulation_steps = 1  # microbatches of a batch, run one after the other
    c.num_buckets = 4  # row lengths that batches come in; each costs one compilation
    # tokens of a row that holds as many clips as fit; 0: a clip a row. All training batches then
    # have this one shape, and num_buckets is for validation and answers. A row of 2048 holds 8
    # clips of the paper's lengths on average: divide batch_size accordingly
    c.pack_length = 0
    c.mesh = "data:-1"  # axes data, fsdp, tensor, e.g. "data:2,fsdp:4"; -1 is all that are left
    c.dtype = "bfloat16"  # of the base and of computation; what is trained is float32
    c.base_precision = ""  # of the base's projections: int8 | fp8 | nf4; "" is as dtype
    # auto | none | save_attention | save_projections | full: what the backward pass recomputes;
    # auto is the first of the others that fits into the device's memory
    c.remat = "auto"
    # auto | xla | cudnn | cudnn_masked | cudnn_packed; auto is the fastest that runs here
    c.attention = "auto"
    c.xla_options = ""  # compiler options of the train step, "NAME=VALUE NAME=VALUE"

    # The paper's rate is for batches of 3. AdamW divides a gradient by its own size, so that of a
    # larger batch, which is less noisy, makes no larger step by itself: in as many clips it would
    # get less far. The square root of the batch is the usual rule for that; it was not measured
    # here. Look at the first few hundred updates, and at half and twice the rate, before a long run
    scale = (batch / 3) ** 0.5
    c.optimizer = ConfigDict()
    c.optimizer.learning_rate = 1e-5 * scale  # peak; the paper's 1e-5 by the root of batch_size / 3
    c.optimizer.warmup_learning_rate = 1e-6 * scale  # at the first update
    c.optimizer.warmup_steps = 15_000 // batch  # updates until the peak
    # cosine decay to here; equal to its start: constant
    c.optimizer.final_learning_rate = 1e-5 * scale
    c.optimizer.weight_decay = 0.05  # decoupled, of AdamW
    c.optimizer.beta1 = 0.9  # of the mean of gradients
    c.optimizer.beta2 = 0.999  # of the mean of their squares
    c.optimizer.epsilon = 1e-8  # beside the root of that
    c.optimizer.clip_norm = 0.0  # largest norm of the gradient; 0 is off

    c.lora = ConfigDict()
    c.lora.rank = 16  # 0 trains projectors and fusion alone
    c.lora.alpha = 32.0  # adapters are scaled by alpha / rank
    c.lora.dropout = 0.05  # of what goes into an adapter
    # projections of a layer that have adapters
    c.lora.targets = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )

    c.fusion = "attention"  # pre-fusion outside the LLM: attention | qformer | none
    # of the heads video, audio and image (data/modalities.py): how a head computes its soft tokens
    # (attention | mean | qformer; image: mean | qformer), and the width of its features in the
    # records
    c.projectors = ConfigDict(projectors())
    c.projectors.fusion_width = 1024  # common width inside the pre-fusion
    # of heads and pre-fusions that are a qformer
    c.qformer = ConfigDict()
    c.qformer.width = 768  # of its layers
    c.qformer.heads = 12  # of attention
    c.qformer.layers = 2  # how many
    c.qformer.intermediate = 3072  # width of the feed-forward part
    c.qformer.dropout = 0.1  # in training

    c.generate = ConfigDict()
    c.generate.batch_size = 32  # answers that are written at a time
    c.generate.max_new_tokens = 1200  # limit of an answer
    # auto | true | false: LoRA is added to the base's weights before answers are written: faster,
    # and rounded once more; auto does so where a second copy of them fits easily
    c.generate.merge_lora = "auto"

    c.log_every = 10  # steps between lines of metrics.jsonl
    # steps between validations, each followed by a checkpoint
    c.checkpoint_every = max(1, 15_000 // batch)
    c.max_to_keep = 12  # newest checkpoints kept, beside the best on validation
    # s without progress after which a run shows its threads and ends; 0: no limit
    c.step_timeout = 900.0
    c.wandb_project = ""  # also log to this project of Weights & Biases; "" does not
    c.profile_steps = ""  # "10:15" traces steps 10 to 14
    return c
