"""Write the rules `star` and `hyperparam` that are bundled today: STAR's nominal term alone, nothing meta-trained.

Both networks are drawn from seed 0 and have a zero output layer: direction 0, all factors 1. What is left is the
nominal term, an Adam with the mean of three momenta and no bias correction, at step size 1e-2. This is also where
meta-training starts. Run: python examples/nominal_rules.py [--out pretrained]. The suite tests that it reproduces the
bundled weights bit by bit.
"""

import argparse
import tempfile
from pathlib import Path

import torch

import lightning_lopt as lopt

CARD = """# {name}

**Not meta-trained.** The network of this {kind} rule was drawn from seed 0 and has a zero output layer, so that the
rule is exactly STAR's nominal term (Harrison et al. 2022, arXiv 2209.11208, eq. 21) at step size 1e-2:

    param <- param - 1e-2 * mean(m_1, m_2, m_3) / sqrt(v + 1e-6)

with momenta m of decay .9, .99, .999 and second moment v of decay .999, none bias-corrected (the first steps are about
ten times larger than later ones). The paper's own step size is 1e-3.

| | |
|---|---|
| meta-parameters | {count}, of which none is learned |
| made by | `python examples/nominal_rules.py --out pretrained` |
| state | 16 bytes per parameter, 12 per row and column of a matrix |
| what it is bad at | it cannot anneal: it does not know how long a run is. Large first steps without warm-up |

`make demo` shows it beside AdamW on scikit-learn's digits. A meta-trained `star` will replace it.
"""


def make_rule(kind: str) -> lopt.UpdateRule:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        options = {"step_mult": 1e-4} if kind == "star" else {}
        rule = lopt.rules.make(kind, nominal_stepsize=1e-2, **options)
    with torch.no_grad():
        rule.w2.zero_()
    return rule


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=None, help="folder; default: a temporary one")
    out = parser.parse_args().out or Path(tempfile.mkdtemp())
    for kind in ("star", "hyperparam"):
        rule = make_rule(kind)
        folder = lopt.save_rule(rule, out / kind, card=CARD.format(name=kind, kind=kind, count=rule.num_meta_params()))
        print(f"{folder}: {rule.num_meta_params()} meta-parameters")


if __name__ == "__main__":
    main()
