from lightning_lopt import rules
