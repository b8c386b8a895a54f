"""From unlabelled clips to a described and filtered training set, as the paper made MER-Caption."""
