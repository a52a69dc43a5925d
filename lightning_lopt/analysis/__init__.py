"""Analyze what an optimizer has learned: update functions, fixed points, modes, trajectories, and stability theory."""

from lightning_lopt.analysis import nqm
from lightning_lopt.analysis.coordinate import CoordinateDynamics
from lightning_lopt.analysis.dynamics import (
    FixedPoints,
    Linearization,
    LinearRule,
    find_fixed_points,
    linearize,
    visited_states,
)
from lightning_lopt.analysis.response import Clipping, clipping, effective_learning_rate, update_function
from lightning_lopt.analysis.trajectories import (
    Projection,
    Recording,
    Schedule,
    SCurve,
    Trajectory,
    autonomous,
    principal_components,
    record,
    s_curve,
)

__all__ = [
    "CoordinateDynamics",
    "Clipping",
    "FixedPoints",
    "LinearRule",
    "Linearization",
    "Projection",
    "Recording",
    "SCurve",
    "Schedule",
    "Trajectory",
    "autonomous",
    "clipping",
    "effective_learning_rate",
    "find_fixed_points",
    "linearize",
    "nqm",
    "principal_components",
    "record",
    "s_curve",
    "update_function",
    "visited_states",
]
