"""The default run: a complete AffectGPT in small, on generated clips, on two CPU cores."""

from ml_collections import ConfigDict

from affectgpt_jax.configs import affectgpt_qwen25_7b


def get_config() -> ConfigDict:
    """affectgpt train --config=configs/demo.py --workdir=runs/demo"""
    c = affectgpt_qwen25_7b.get_config()
    c.llm = "tiny"
    c.prompts = "compact"
    c.max_tokens = 64
    c.data.train = c.data.val = c.data.test = "demo"

    # Updates count for more than clips: batches of 64 and two thirds of the steps take as long, and
    # in some worlds end far below the ceiling.
    c.steps = 450
    c.batch_size = 48
    c.num_buckets = 1
    c.dtype = "float32"

    # A model four orders of magnitude smaller, trained for a minute, wants larger steps.
    c.optimizer.learning_rate = 3e-3
    c.optimizer.warmup_learning_rate = 0.0
    c.optimizer.warmup_steps = 30
    c.optimizer.final_learning_rate = 1e-4
    c.optimizer.clip_norm = 1.0

    # Drawing masks takes time on a CPU, and 450 steps hardly overfit.
    c.lora.dropout = 0.0

    c.projectors.fusion_width = 128
    c.qformer.width = 128
    c.qformer.heads = 4
    c.qformer.intermediate = 256

    c.generate.batch_size = 256
    c.generate.max_new_tokens = 16  # descriptions have up to 15

    c.log_every = 1
    c.checkpoint_every = 90
    c.max_to_keep = 2
    return c
