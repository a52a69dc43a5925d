"""Meta-training: the inner loop, gradient estimators, and the trainer of update rules."""
