"""Speaker check: is the person who is seen in a clip the one who is heard?

`synchrony` judges without any weights, `networks` are Light-ASD and LR-ASD, `tracks` finds and
follows faces, `check` judges clips, `calibrate` compares verdicts with labels.
"""
