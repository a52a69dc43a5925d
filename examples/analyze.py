"""What has an optimizer learned? The analysis of a rule in a few lines; `lopt analyze NAME` writes all of it as a page.

python examples/analyze.py
"""

import torch

import lightning_lopt as lopt
from lightning_lopt.analysis import effective_learning_rate, find_fixed_points, linearize, update_function

torch.manual_seed(0)
rule = lopt.rules.make("gru", hidden_size=16, initial_lr=0.1, initial_beta=0.9)  # or lopt.load_rule(name)

# Without gradients its state comes to rest; there, it is momentum.
point = find_fixed_points(rule).states[0]
modes = linearize(rule, point)
print(f"momentum {modes.timescales[modes.dominant]:.3f} with learning rate {modes.learning_rates.sum():.3f}")
print(f"effective learning rate {effective_learning_rate(rule, point):.3f}")

# Its update function: linear for small gradients, clipped for large ones.
for gradient, update in zip(
    (0.1, 1.0, 10.0, 100.0), update_function(rule, point, torch.tensor([0.1, 1, 10, 100])), strict=True
):
    print(f"gradient {gradient:>5}: update {update:+.3f}")

# The linearized optimizer is a rule too: optimizer = lopt.RuleOptimizer(model.parameters(), linear)
linear = modes.rule()
print(linear)
