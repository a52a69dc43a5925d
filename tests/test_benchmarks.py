"""The benchmarks of optimizer steps time the networks that they name, and all that they say goes into their tables."""

import importlib.util
import time
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent.parent / "examples" / "benchmarks"


def script(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PUBLISHED = {
    "resnet18": 11_173_962,  # for 32 px and 10 classes
    "resnet50": 25_557_032,
    "gpt2": 124_439_808 + 768 * 50_257 + 50_257,  # with an output layer of its own
    "vit": 86_567_656 - 2 * 768,  # ViT-B/16 without class token
}


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED.items())
def test_networks_have_the_published_size(name, parameters):
    with torch.device("meta"):
        network = script("training").MODELS[name][0]()
    assert sum(p.numel() for p in network.parameters()) == parameters


def test_resnet20_has_the_published_size():
    shapes = script("steps").CASES["resnet20"]
    assert (len(shapes), sum(torch.Size(shape).numel() for shape in shapes)) == (59, 269_722)


def test_a_case_is_measured_drawn_and_compared_with_itself(tmp_path):
    steps = script("steps")
    kept = ("AdamW foreach", "star")
    without = [label for label in steps.contenders(steps.new_params([(3, 2)])) if label not in kept]
    rows = steps.measure("tiny", [(30, 20), (20,)], 2, time.process_time, without)
    assert [(row["optimizer"], row["parameters"], row["tensors"]) for row in rows] == [
        ("AdamW foreach", 620, 2),
        ("star", 620, 2),
    ]
    assert rows[0]["ratio"] == 1.0
    assert rows[0]["lowest ratio"] <= rows[0]["ratio"] <= rows[0]["highest ratio"]
    steps.draw(rows, tmp_path / "steps.png")
    assert (tmp_path / "steps.png").read_bytes().startswith(b"\x89PNG")
    training = script("training")
    row = training.measure("mlp", 4, 1, 1, time.process_time)
    assert row["parameters"] == 118_282
    for label in ("star",):
        assert row[f"{label} lowest"] == row[f"{label} ratio"] == row[f"{label} highest"]
    training.draw([row], tmp_path / "training.png")
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
