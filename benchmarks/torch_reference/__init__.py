"""AffectGPT in PyTorch: `torch`, `transformers` and `peft`, written for comparison.

It reads the batches of `affectgpt_jax.data.pipeline` as they are, and its modules bear the names of
the published release, so that a release checkpoint fits it key by key. Numbers
(`benchmarks.parity`) and speed are measured against it. Nothing under `affectgpt_jax/` imports it.
"""
