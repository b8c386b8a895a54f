"""The crowd: small networks that learned emotions from human labels, and vote on unlabelled clips.

`members` trains them, `votes` counts, `run` does both for directories of records.
"""
