"""Networks of small_fc_lopt on torch's layout act as they did on the layout that they were trained on."""

import field_goldens as field
import goldens
import pytest
import torch

from lightning_lopt.rules import STAR, StepContext, make
from lightning_lopt.rules import features as feats

RECORD = field.record("small_fc")
OPTIONS = {"hidden_size": 32, "step_mult": 1e-3, "exp_mult": 1e-3}
TIES = {"edges/b_square", "edges/e_cube", "hard/c_huge", "hard/f_rank6", "hard/g_conv_square"}  # of the largest dims


def small_fc(layout="torch"):
    return STAR.from_jax(field.theta("small_fc"), **OPTIONS, layout=layout)


def _start(leaf):
    return field.inputs("params0", leaf), field.inputs("grads", leaf)[3]


@pytest.mark.parametrize("leaf", field.LEAVES)
@pytest.mark.parametrize("layout", feats.LAYOUTS)
def test_weights_trained_in_jax_act_on_transposed_tensors_as_at_home(layout, leaf):
    field.assert_replays(small_fc(layout), RECORD, leaf)


@pytest.mark.parametrize("leaf", field.LEAVES)
def test_in_the_wrong_layout_they_would_not_where_dims_are_equal(leaf):
    """So that the test before it is one: torch's tensors, read as JAX's."""
    param, grad = (goldens.to_torch(array).double() for array in _start(leaf))
    ends = []
    for rule in map(small_fc, feats.LAYOUTS):
        meta_params = {name: value.detach() for name, value in rule.meta_params().items()}
        context = StepContext(torch.tensor(0.0, dtype=torch.float64))
        ends.append(rule.update(meta_params, grad, rule.init_state(param), param, context)[0])
    assert torch.allclose(*ends, rtol=1e-9, atol=0) == (leaf not in TIES)


@pytest.mark.parametrize("leaf", field.LEAVES)
def test_dims_are_the_recorded_ones(leaf):
    recorded = field.inputs("factored_dims", leaf).tolist()
    shape = goldens.to_torch(field.inputs("params0", leaf)).shape
    order = feats.jax_order(len(shape))
    found = feats.factored_dims(shape) or ()
    assert [order.index(dim) for dim in found] == recorded
    assert list(feats.factored_dims(field.inputs("params0", leaf).shape, "jax") or ()) == recorded
    assert feats.init_accumulators(torch.zeros(shape)).factored_dims.tolist() == list(found)


def test_the_order_undoes_the_transposition():
    for leaf in field.LEAVES:
        array = field.inputs("params0", leaf)
        tensor = goldens.to_torch(array)
        assert torch.equal(tensor.permute(feats.jax_order(tensor.dim())), torch.tensor(array))


@pytest.mark.parametrize("layout", ["numpy", "", None, 1])
def test_other_layouts_are_refused(layout):
    with pytest.raises(ValueError, match=r"layout=.* is not allowed: it must be one of \['torch', 'jax'\]"):
        make("blackbox", layout=layout)
