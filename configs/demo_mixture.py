"""A mixture: the demo's clips in three roles, each with its own inputs, questions and weight."""

from ml_collections import ConfigDict

from affectgpt_jax.configs import demo
from affectgpt_jax.configs.affectgpt_qwen25_7b import data_set


def get_config() -> ConfigDict:
    """affectgpt train --config=configs/demo_mixture.py --workdir=runs/mixture"""
    c = demo.get_config()
    c.data.train = ""
    # Everything, as in the default run.
    c.data.mixture.whole = data_set("demo")
    # A third of the clips without faces, twice per epoch: what a voice corpus would be.
    c.data.mixture.voices = data_set(
        "demo", share=0.33, weight=2.0, label="onehot", input="audio_text"
    )
    # Half of the clips, every other epoch, asked for the sentiment alone.
    c.data.mixture.feelings = data_set("demo", share=0.5, weight=0.5, label="sentiment")
    return c
