"""Write the bundled rule `hyperparam`: STAR's nominal term alone, not meta-trained.

The network is drawn from seed 0 and its output layer is zero, so all its factors are 1. What remains is the nominal
term: Adam with the mean of three momenta and no bias correction, at step size 1e-2. Meta-training starts from it, and
meta-trained rules are compared with it. Run: python examples/nominal_rules.py [--out pretrained]. A test checks that it
reproduces the bundled weights bit by bit.
"""

import argparse
import tempfile
from pathlib import Path

import torch

import lightning_lopt as lopt

CARD = """# {name}

**Not meta-trained.** The network of this {kind} rule was drawn from seed 0 and its output layer is zero. The rule is
therefore exactly STAR's nominal term (Harrison et al. 2022, arXiv 2209.11208, eq. 21) at step size 1e-2:

    param <- param - 1e-2 * mean(m_1, m_2, m_3) / sqrt(v + 1e-6)

with momenta m of decays .9, .99, .999 and second moment v of decay .999, without bias correction (the first steps are
about ten times larger than later ones). The paper's own step size is 1e-3.

| | |
|---|---|
| meta-parameters | {count}, none of them learned |
| made by | `python examples/nominal_rules.py --out pretrained` |
| state | 16 bytes per parameter, 12 per row and column of a matrix |
| what it is bad at | it does not use the length of the run, so it cannot anneal; its first steps are large |

`lopt evaluate` shows it beside every learned rule.
"""


def make_rule(kind: str) -> lopt.UpdateRule:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        rule = lopt.rules.make(kind, nominal_stepsize=1e-2)
    with torch.no_grad():
        rule.w2.zero_()
    return rule


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=None, help="folder; default: a temporary one")
    out = parser.parse_args().out or Path(tempfile.mkdtemp())
    rule = make_rule("hyperparam")
    card = CARD.format(name=rule.kind, kind=rule.kind, count=rule.num_meta_params())
    print(f"{lopt.save_rule(rule, out / rule.kind, card=card)}: {rule.num_meta_params()} meta-parameters")


if __name__ == "__main__":
    main()
