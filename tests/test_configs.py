"""Configurations: every YAML composes and fits its class; layers in order; mistakes in one line."""

import re
from abc import ABC, abstractmethod
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from appa_lite import config
from appa_lite.config import GROUPS, OBJECTS, build, compose, describe, options, resolve
from appa_lite.core.errors import UserError
from appa_lite.simulators.base import Simulator

COMMANDS = options("")


def nested_classes(tree):
    """Every mapping with a class, wherever it stands."""
    if isinstance(tree, dict):
        if "class" in tree:
            yield tree
        for value in tree.values():
            yield from nested_classes(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from nested_classes(value)


# The shipped files


@pytest.mark.parametrize("experiment", [None, *options("experiment")])
@pytest.mark.parametrize("size", options("size"))
@pytest.mark.parametrize("command", COMMANDS)
def test_every_experiment_composes_with_every_command(command, size, experiment):
    chosen = [f"{key}={value}" for key, value in {"size": size, "experiment": experiment}.items() if value and has(command, key)]
    cfg = compose(command, chosen, partial=True)
    assert cfg.command == command and set(cfg) == {"command", *config._top(command)}


def has(command: str, key: str) -> bool:
    return key in config._top(command)


@pytest.mark.parametrize(("group", "option"), [(g, o) for g in OBJECTS for o in options(g)])
def test_every_option_fits_the_signature_of_its_class(group, option):
    tree = config._read(config.directory() / GROUPS[group] / f"{option}.yaml")
    found = list(nested_classes(tree))
    assert found or group == "verification"
    for entry in found:
        resolve(entry, object)


@pytest.mark.parametrize("path", sorted((config.directory() / "experiment").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_class_of_an_experiment_exists(path):
    for entry in nested_classes(config._read(path)):
        resolve(entry, object)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_key_has_a_meaning(command):
    text = (config.directory() / f"{command}.yaml").read_text()
    rows = describe(command)
    assert rows and all(meaning for _, _, meaning in rows), [key for key, _, meaning in rows if not meaning]
    assert config._top(command) == set(config._read(config.directory() / f"{command}.yaml")) - {"defaults"}
    if "defaults:" in text:
        common = [key for key in OBJECTS if key not in ("simulator", "network", "method")]
        method = ["rare_event@method"] * ("rare_event@method" in text)
        assert re.findall(r"^  - (?!_self_)(.*): \w+$", text, re.M) == [
            "simulator",
            "observations@network",
            *common,
            *method,
            "experiment",
        ]


# Layers


@pytest.fixture
def mine(tmp_path: Path) -> str:
    (tmp_path / "mine.yaml").write_text(
        """
defaults:
  - override /simulator: lorenz96
members: 3
network: random_points
simulate: {trajectories: 5, frames: 50, simulator: {F: 10}}
simulate size=small: {batch: 2}
"simulate simulator=lorenz96_two_scale": {frames: 70}
sizes:
  debug:
    simulate: {frames: 4}
"""
    )
    return str(tmp_path / "mine.yaml")


def test_layers_in_order(mine):
    plain = compose("simulate", [f"experiment={mine}", "out=a.zarr"])
    assert (plain.trajectories, plain.frames, plain.simulator.F, plain.batch) == (5, 50, 10, 2)
    debug = compose("simulate", [f"experiment={mine}", "out=a.zarr", "size=debug"])
    assert (debug.trajectories, debug.frames, debug.size) == (2, 4, "debug")
    user = compose("simulate", [f"experiment={mine}", "out=a.zarr", "size=debug", "frames=9", "simulator.F=7.5", "trajectories=1"])
    assert (user.trajectories, user.frames, user.simulator.F) == (1, 9, 7.5)
    other = compose("simulate", [f"experiment={mine}", "out=a.zarr", "simulator=lorenz96_two_scale"])
    assert other.frames == 70 and other.simulator["class"].endswith("TwoScale")


def test_names_of_options_and_keys_of_other_commands(mine):
    observe = compose("observe", [f"experiment={mine}", "truth=a.zarr", "out=b.csv", "network.networks.0.error_std=0.5"])
    assert observe.network.networks[0].error_std == 0.5 and "members" not in observe
    assert compose("observe", [f"experiment={mine}", "network=stations"], partial=True).network.networks[0].name == "station"
    assert compose("reanalysis", [f"experiment={mine}", "observations=a.csv"], partial=True).members == 3


def test_composing_leaves_no_global_state_and_works_anywhere(mine, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    compose("simulate", ["experiment=mine.yaml", "out=a.zarr"])
    assert not GlobalHydra.instance().is_initialized()


def test_values():
    def value(text):
        return compose("simulate", ["simulator=lorenz96", f"out={text}"]).out

    assert value("area_mean(v, box) > s") == "area_mean(v, box) > s"
    assert value("2017-01-25T00:00") == "2017-01-25T00:00"
    assert value("[1,2.5,x]") == [1, 2.5, "x"]
    assert value("a b/ü.zarr") == "a b/ü.zarr"
    assert value("null") is None
    train = compose("train", ["weights.eta1=16", "training.batch=2", "+dataset.level=500"], partial=True)
    assert (train.weights.eta1, train.training.batch, train.dataset.level) == (16, 2, 500)
    assert compose("simulate", ["simulator=lorenz96", "out=a", "seed=1e3"]).seed == 1000


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["framse=3"], "unknown key of simulate 'framse': did you mean 'frames'"),
        (["simulator=lorenz69"], "unknown simulator 'lorenz69': did you mean 'lorenz96'"),
        (["experiment=lorenz69"], "unknown experiment 'lorenz69': did you mean 'lorenz96'"),
        (["experiment=nowhere.yaml"], "no experiment file nowhere.yaml"),
        (["size=tiny"], "unknown size 'tiny'"),
        (["guidance=x"], "unknown key of simulate 'guidance'"),
        (["simulator=lorenz96"], r"needs out=\.\.\.: file to write"),
        (["out=a"], r"needs simulator=\.\.\.: .* \(one of: .*lorenz96"),
        (["frames=ten"], "is a number, found 'ten'"),
        (["frames=2.5"], "is a whole number"),
        (["frames=true"], "is not true or false"),
        (["frames=1,2"], r"write a list as 'frames=\[1,2\]'"),
        (["frames=[1"], "close every bracket"),
        (["seed.a=1"], "is a value, not a mapping"),
        (["frames"], "expected key=value"),
    ],
)
def test_mistakes_of_a_user(overrides, message):
    with pytest.raises(UserError, match=message) as caught:
        compose("simulate", overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("simulate: {framse: 3}", "did you mean 'frames'"),
        ("simluate: {frames: 3}", "did you mean 'simulate'"),
        ("simulate: 3", "is a section"),
        ("simulator: lorenz69", "did you mean 'lorenz96'"),
        ("defaults: [override /simulator: lorenz69]", "lorenz69"),
        ("sizes: {small: {simulate: {frames: x}}}", "is a number"),
        ("- a", "not a YAML mapping"),
        ("a: [", "not YAML"),
        ("simulate: {out: '${nothing}'}", "does not resolve"),
    ],
)
def test_mistakes_of_an_experiment(tmp_path, text, message):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        compose("simulate", [f"experiment={tmp_path}/mine.yaml", "simulator.class=x", "out=a"][: 3 if "nothing" not in text else 2])
    assert "\n" not in str(caught.value)


# Objects


class Shape(ABC):
    @abstractmethod
    def area(self): ...


class Square(Shape):
    def __init__(self, side: float, name: str | None = None, sizes: tuple[int, ...] = (), extra: dict | None = None):
        self.side, self.name, self.sizes, self.extra = side, name, sizes, extra

    def area(self):
        return self.side**2


@pytest.fixture
def shapes(monkeypatch):
    """The two classes as if they were of this package."""
    import appa_lite.core.fields as home

    for cls in (Shape, Square):
        monkeypatch.setattr(cls, "__module__", "appa_lite.core.fields")
        monkeypatch.setattr(home, cls.__name__, cls, raising=False)
    return "appa_lite.core.fields."


def test_build(shapes):
    square = build({"class": shapes + "Square", "side": 2, "sizes": [1, 2], "extra": {"a": {"b": 1}}}, Shape)
    assert square.area() == 4.0 and isinstance(square.side, float) and square.sizes == (1, 2)
    assert type(square.extra) is dict and type(square.extra["a"]) is dict
    assert build({"class": shapes + "Square"}, Shape, side=3.0).area() == 9.0


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"class": "{}Square"}, "Square needs side"),
        ({"class": "{}Square", "side": 1, "sise": 2}, "unknown keyword of Square 'sise': did you mean 'side'"),
        ({"class": "{}Square", "side": "big"}, "side of Square is expected to be float"),
        ({"class": "{}Shape"}, "abstract"),
        ({"class": "{}Grid"}, "is not a Shape"),
        ({"class": "{}Nothing"}, "is not a Shape"),
        ({"class": "os.system"}, "not of this package"),
        ({"class": "appa_lite.core.fields.np.load"}, "no module"),
        ({"class": "appa_lite.nowhere.Thing"}, "no module appa_lite.nowhere"),
        ({"side": 1}, "with a 'class'"),
    ],
)
def test_build_refuses(shapes, entry, message):
    entry = {**entry, "class": entry["class"].format(shapes)} if "class" in entry else entry
    with pytest.raises(UserError, match=message):
        build(entry, Shape)


def test_build_from_a_composed_configuration():
    simulator = build(compose("simulate", ["experiment=lorenz96", "out=a"]).simulator, Simulator)
    assert simulator.spec.names
