"""AffectGPT in JAX: multimodal emotion understanding (arXiv 2501.16566).

This package imports nothing by itself, so that tools which need no accelerator stay light.
"""
