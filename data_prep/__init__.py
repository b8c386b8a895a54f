"""Scripts that make what training reads; run from a checkout as `python -m data_prep.NAME`."""
