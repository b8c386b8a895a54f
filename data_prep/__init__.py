"""Commands that make what training reads.

A wheel has this folder as `affectgpt_jax.data_prep`, where `affectgpt extract` finds it; in a
checkout it is `data_prep`, and `python -m data_prep.extract` works too. Imports within it are
relative, so that it works under both names.
"""
