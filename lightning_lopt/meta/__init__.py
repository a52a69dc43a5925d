"""Meta-training of update rules: the inner loop, estimators of the meta-gradient, and `MetaTrainer`."""
