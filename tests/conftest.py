"""One torch thread per process, and Hypothesis examples that are the same on every day."""

import atexit
import os
import tempfile

# For the subprocesses that tests start; torch in this one is set below.
os.environ["OMP_NUM_THREADS"] = "1"

import hypothesis
import pytest
import torch

torch.set_num_threads(1)

# Without a GPU Triton's kernels run in its interpreter. It looks when it is first imported, which Lightning does.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# huggingface_hub reads these when it is imported: no telemetry, no Xet (the tests' Hub has none), and neither the
# user's token nor the user's cache.
_HF_HOME = tempfile.TemporaryDirectory(prefix="lopt-tests-hf-")
atexit.register(_HF_HOME.cleanup)
os.environ.update(HF_HOME=_HF_HOME.name, HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_TELEMETRY="1", DO_NOT_TRACK="1")
os.environ.update(HF_HUB_DISABLE_PROGRESS_BARS="1", NO_PROXY="127.0.0.1,localhost")
for _name in ("HF_TOKEN", "HF_TOKEN_PATH", "HF_ENDPOINT", "HF_HUB_CACHE", "HF_HUB_OFFLINE"):
    os.environ.pop(_name, None)

# A verdict must not depend on the day. To look for new counterexamples: pytest --hypothesis-profile=explore
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=500, print_blob=True)
hypothesis.settings.load_profile("fixed")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
