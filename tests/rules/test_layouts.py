"""Networks of small_fc_lopt on torch's layout act as they did on the layout that they were trained on."""

import field_goldens as field
import goldens
import pytest
import torch

from lightning_lopt.rules import STAR, make
from lightning_lopt.rules import features as feats

RECORD = field.record("small_fc")
OPTIONS = {"hidden_size": 32, "step_mult": 1e-3, "exp_mult": 1e-3}
TIES = {"edges/b_square", "edges/e_cube", "hard/c_huge", "hard/f_rank6", "hard/g_conv_square"}  # of the largest dims


def small_fc():
    return STAR.from_jax(field.theta("small_fc"), **OPTIONS)


@pytest.mark.parametrize("leaf", field.LEAVES)
def test_weights_trained_in_jax_act_on_transposed_tensors_as_at_home(leaf):
    rule = small_fc()
    assert rule.config.layout == "jax"
    field.assert_replays(rule, RECORD, leaf)


@pytest.mark.parametrize("leaf", field.LEAVES)
def test_without_the_layout_they_would_not_where_dims_are_equal(leaf):
    jax = small_fc()
    rule = make("blackbox", **{**jax.config.to_dict(), "layout": "torch"})
    rule.load_state_dict(jax.state_dict(), assign=True)
    if leaf in TIES:
        with pytest.raises(AssertionError, match="Tensor-likes are not close"):
            field.assert_replays(rule, RECORD, leaf)
    else:
        field.assert_replays(rule, RECORD, leaf)


@pytest.mark.parametrize("leaf", field.LEAVES)
def test_dims_are_the_recorded_ones(leaf):
    recorded = field.inputs("factored_dims", leaf).tolist()
    shape = goldens.to_torch(field.inputs("params0", leaf)).shape
    order = feats.jax_order(len(shape))
    found = feats.factored_dims(shape, "jax") or ()
    assert [order.index(dim) for dim in found] == recorded
    assert feats.init_accumulators(torch.zeros(shape), "jax").factored_dims.tolist() == list(found)


def test_the_order_undoes_the_transposition():
    for leaf in field.LEAVES:
        array = field.inputs("params0", leaf)
        tensor = goldens.to_torch(array)
        assert torch.equal(tensor.permute(feats.jax_order(tensor.dim())), torch.tensor(array))


@pytest.mark.parametrize("layout", ["numpy", "", None, 1])
def test_other_layouts_are_refused(layout):
    with pytest.raises(ValueError, match=r"layout=.* is not allowed: it must be one of \['torch', 'jax'\]"):
        make("blackbox", layout=layout)
