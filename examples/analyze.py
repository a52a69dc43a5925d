"""See what an optimizer has learned, in a few lines. `lopt analyze NAME` writes the whole analysis as a page.

Run: python examples/analyze.py. A few seconds.
"""

import torch

import lightning_lopt as lopt
from lightning_lopt.analysis import effective_learning_rate, find_fixed_points, linearize, update_function

torch.manual_seed(0)
rule = lopt.rules.make("gru", hidden_size=16, initial_lr=0.1, initial_beta=0.9)  # or lopt.load_rule(name)

# Without gradients the state comes to rest at a fixed point. Linearized there, this rule is momentum.
point = find_fixed_points(rule).states[0]
modes = linearize(rule, point)
print(f"momentum {modes.timescales[modes.dominant]:.3f} with learning rate {modes.learning_rates.sum():.3f}")
print(f"effective learning rate {effective_learning_rate(rule, point):.3f}")

# The update function: linear for small gradients, clipped for large ones.
for gradient, update in zip(
    (0.1, 1.0, 10.0, 100.0), update_function(rule, point, torch.tensor([0.1, 1, 10, 100])), strict=True
):
    print(f"gradient {gradient:>5}: update {update:+.3f}")

# The linearization is a rule too, so it can train: lopt.RuleOptimizer(model.parameters(), linear).
linear = modes.rule()
print(linear)
