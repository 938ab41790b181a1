"""The house of the design: imports go strictly down, rooms on a floor do not know each other, files stay readable."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "appa_lite"
FILES = sorted(PACKAGE.rglob("*.py"))
LONGEST = 400

MAY_IMPORT = {
    "core": set(),
    **{room: {"core"} for room in ("simulators", "observations", "nn", "diffusion", "data", "verification")},
    "models": {"nn", "diffusion", "core"},
    "guidance": {"diffusion", "observations", "core"},
}
BELOW = {"core", "simulators", "observations", "nn", "diffusion", "data", "verification", "models", "guidance"}
MAY_IMPORT |= {"forecasters": BELOW, "training": BELOW}
MAY_IMPORT |= {"config": {"core"}, "stages": BELOW | {"forecasters", "training", "config"}, "cli": {"stages", "config", "core"}}
MAY_IMPORT |= {"api": {"stages", "config", "core", "models", "observations"}, "__main__": {"cli"}, "__init__": set(MAY_IMPORT)}

#: modules that the leaves of a room may import beside ``base``; a leaf is any other module
HELPERS = {
    "simulators": {"random_fields", "rings", "stepping"},
    "observations": {"build", "cells", "correlation", "discrete", "network", "options", "points", "rows", "table", "tracks", "units"},
    "diffusion": {"noise_laws", "schedule"},
    "guidance": {"error_laws", "gaussian", "modes", "scores"},
    "models": {"deterministic", "margins", "normalizer"},
    "training": {
        "checkpoints",
        "costs",
        "data",
        "denoiser",
        "ema",
        "emulator",
        "fully_shard",
        "latents",
        "logs",
        "muon",
        "prepare",
        "processes",
        "profile",
        "schedule",
        "signals",
        "strategy",
        "zero",
    },
    "forecasters": {
        "designs",
        "ensemble",
        "event_scores",
        "initial",
        "laboratory",
        "latent_diffusion",
        "localisation",
        "posterior",
        "rollout",
    },
    "stages": {
        "assimilation",
        "assimilation_twins",
        "comparison",
        "device",
        "event_laws",
        "heavy_tails",
        "matrix",
        "parallel",
        "prior",
        "rare_events",
        "twin",
    },
}
#: modules whose trade is to know the leaves: they read what is saved or tabulated and find its class, or chain commands
ASSEMBLERS = {"observations": {"build"}, "models": {"checkpoint"}, "stages": {"quickstart", "tune"}}
#: rooms of functions that build on each other, without leaves; only cycles are wrong there
WORKSHOPS = {"core", "nn", "data", "verification"}


def room(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def imports(path: Path) -> Iterator[tuple[str, ...]]:
    """(room, module, ...) of every module of ours that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: import by the full name"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = tuple(name.split("."))
            if parts[0] == "appa_lite" and parts[1:] != ("__version__",):
                yield parts[1:]


def modules(target: tuple[str, ...]) -> tuple[str, str | None]:
    """The room of an imported name, and its module if it is one of the room's files."""
    inner = target[1] if len(target) > 1 and (PACKAGE / target[0] / f"{target[1]}.py").exists() else None
    return target[0], inner


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path):
    here = room(path)
    assert here in MAY_IMPORT, f"{here} is no room of the house"
    for target in imports(path):
        there, _ = modules(target)
        assert there == here or there in MAY_IMPORT[here], f"{path.name} in {here} imports {'.'.join(target)}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_leaves_do_not_know_each_other(path):
    here, name = room(path), path.stem
    helpers = HELPERS.get(here, set()) | {"base"}
    if here in WORKSHOPS or name == "__init__" or name in ASSEMBLERS.get(here, ()):
        return
    for target in imports(path):
        there, module = modules(target)
        if there == here and module is not None and module != name:
            assert module in helpers, f"{here}/{name}.py imports the leaf {module}: move what they share into base or a helper"


@pytest.mark.parametrize("name", sorted({room(p) for p in FILES}))
def test_no_cycles_in_a_room(name):
    edges = {p.stem: {m for r, m in map(modules, imports(p)) if r == name and m and m != p.stem} for p in FILES if room(p) == name}
    while edges:
        free = [module for module, needs in edges.items() if not needs & edges.keys()]
        assert free, f"the modules {sorted(edges)} of {name} import each other in a circle"
        for module in free:
            del edges[module]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_habits(path):
    text = path.read_text()
    assert len(text.splitlines()) <= LONGEST, f"{path.name} is longer than {LONGEST} lines"
    tree = ast.parse(text)
    assert path.name == "__init__.py" or ast.get_docstring(tree), f"{path.name} does not say what it is"
    for node in ast.walk(tree):
        where = f"{path.name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.ExceptHandler):
            broad = node.type is None or (isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException"))
            assert not broad or any(isinstance(n, ast.Raise) for n in ast.walk(node)), f"{where}: bare except"
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            assert not {"pickle", "cPickle", "dill", "joblib"} & set(names), f"{where}: pickle"
        elif isinstance(node, ast.Call):
            check_call(node, path, where)


def check_call(node: ast.Call, path: Path, where: str) -> None:
    called = ast.unparse(node.func)
    keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
    assert called != "torch.load", f"{where}: torch.load: safetensors only"
    assert keywords.get("strict") != "False" or called == "zip", f"{where}: strict=False"
    assert keywords.get("allow_pickle") != "True", f"{where}: allow_pickle"
    seeds = {"np.random.seed", "random.seed"} | (set() if room(path) in ("training", "stages") else {"torch.manual_seed"})
    assert called not in seeds, f"{where}: global random state"  # layers such as dropout draw from torch's own generator
    assert called != "print" or room(path) in ("cli", "stages"), f"{where}: print in the library"
