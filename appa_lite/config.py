"""Configurations: Hydra composes YAML files, ``build`` turns mappings with a ``class`` into objects of this package.

A command's configuration is, each over the one before: ``configs/COMMAND.yaml``, its groups, the experiment, the size,
and what the user typed. Experiments and sizes are trees of the same form: top-level keys hold for every command that
has them; a mapping named after a command (``simulate: {frames: 100}``) for that command; one named after a command and
choices (``train trainable=denoiser: {...}``) only with those. A group's option may be given by name (``sampler: euler``).
An experiment may hold such trees per size, under ``sizes``.
"""

import difflib
import importlib
import inspect
import re
import tempfile
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from appa_lite.core.errors import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

#: key of a configuration -> the folder of ``configs/`` that holds its options
GROUPS = {name: name for name in ("simulator", "trainable", "guidance", "sampler", "forecaster", "verification")}
GROUPS |= {"network": "observations", "method": "rare_event", "experiment": "experiment", "size": "size"}
OBJECTS = tuple(key for key in GROUPS if key not in ("experiment", "size"))  #: groups whose options are mappings with a class
EXTRAS = {"sizes", "description"}  #: keys of an experiment that are not keys of a command
USER_EXPERIMENT = "user_experiment"


def directory() -> Path:
    """The folder of YAML files: inside an installed package, or beside it in a checkout."""
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).parents[1] / "configs"


def options(group: str) -> list[str]:
    """Names of the options of a group of ``GROUPS`` (the commands: '')."""
    return sorted(path.stem for path in (directory() / GROUPS.get(group, group)).glob("*.yaml"))


def unknown(what: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that is not among ``known``, with the nearest of them."""
    known = sorted(map(str, known))
    near = difflib.get_close_matches(name, known, 1, 0.5)
    hint = f" did you mean '{near[0]}'?" if near else ""
    return UserError(f"unknown {what} '{name}':{hint} known: {', '.join(known) or 'none'}")


def compose(command: str, overrides: Sequence[str] = (), partial: bool = False) -> "DictConfig":
    """The configuration of a command, with the ``key=value`` overrides of a user.

    Args:
        command: name of a file in ``configs/``.
        overrides: ``key=value``, ``nested.key=value``, ``group=option``, ``experiment=NAME`` or ``experiment=FILE.yaml``,
            ``size=debug``; ``+key=value`` adds a key that has no default.
        partial: leave required keys that were not given as ``???`` rather than raise.

    Raises:
        UserError: a key, option, experiment or value that cannot be, or a required key that is missing.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if command not in options(""):
        raise unknown("command", command, options(""))
    chosen, values = _split(overrides)
    base = _read(directory() / f"{command}.yaml")
    keys = [key for key in base if key != "defaults"]
    for key in chosen:
        if key not in keys:
            raise unknown(f"key of {command}", key, keys)
    composed, picked = _hydra(command, chosen)
    config = {key: composed[key] for key in keys if key in composed}
    layers = _Layers(command, config, base, picked, frozenset(chosen))
    size = chosen.get("size", config.get("size", "small"))
    if size not in options("size"):
        raise unknown("size", size, options("size"))
    experiment = chosen.get("experiment", config.get("experiment"))
    where = f"experiment {experiment}"
    layers.name_groups(where)
    rest = {key: value for key, value in composed.items() if key not in config}
    layers.apply({key: value for key, value in rest.items() if key != "sizes"}, where)
    layers.apply(_read(directory() / "size" / f"{size}.yaml"), f"size {size}")
    layers.apply((rest.get("sizes") or {}).get(size) or {}, f"{where}, size {size}")
    for key, value, new in values:
        layers.put(key, value, new)
    config |= {key: value for key, value in {"experiment": experiment, "size": size}.items() if key in config}
    result = OmegaConf.create({"command": command} | config)
    try:
        missing = OmegaConf.missing_keys(result)
        if missing and not partial:
            raise _missing(command, min(missing, key=lambda key: keys.index(key.split(".")[0])))
        OmegaConf.resolve(result)
    except OmegaConfBaseException as error:
        raise UserError(f"the configuration does not resolve: {_line(error)}") from error
    OmegaConf.set_struct(result, True)
    return result


def _missing(command: str, key: str) -> UserError:
    meaning = next((text for name, _, text in describe(command) if name == key), "")
    choices = f" (one of: {', '.join(options(key))})" if key in GROUPS else ""
    return UserError(f"{command} needs {key}=...{': ' + meaning if meaning else ''}{choices}")


def describe(command: str) -> list[tuple[str, str, str]]:
    """(key, default, meaning) of every key of a command, from the text and comments of its YAML file alone."""
    rows, parents, picked = [], [], {}
    for line in (directory() / f"{command}.yaml").read_text().splitlines():
        match = re.match(r"^( *)([A-Za-z_]\w*):(?:\s+([^\s#].*?))??\s*(?:\s#\s*(.*))?$", line)
        if not match:
            picked |= dict(re.findall(r"^  - (?:\w+@)?(\w+): (?!null)(\w+)$", line))
            continue
        indent, name, default, meaning = match.groups()
        parents = [(depth, key) for depth, key in parents if depth < len(indent)]
        path = [key for _, key in parents] + [name]
        parents.append((len(indent), name))
        if path[0] != "defaults" and (default or meaning):
            rows.append((".".join(path), picked.get(".".join(path), default or ""), meaning or ""))
    return rows


# Composition


def _split(overrides: Sequence[str]) -> tuple[dict[str, str], list[tuple[str, Any, bool]]]:
    """Overrides sorted into choices of options {group: option} and values (key, value, may be new)."""
    chosen, values = {}, []
    for override in overrides:
        match = re.fullmatch(r"(\+{0,2})([A-Za-z_][\w.]*)=(.*)", override, re.DOTALL)
        if not match:
            raise UserError(f"expected key=value, found '{override}'")
        plus, key, text = match.groups()
        if key in GROUPS and text[:1] not in ("{", "") and text != "null":
            chosen[key] = text
        else:
            values.append((key, _value(key, text), bool(plus)))
    return chosen, values


def _value(key: str, text: str) -> Any:
    """A value in Hydra's grammar; what is not in that grammar is a string."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_override(f"key={text}")
    except HydraException as error:
        if text[:1] in "[{":
            raise UserError(f"{key}={text} is not a list or mapping: close every bracket, quote odd characters") from error
        return text
    if parsed.is_sweep_override():
        raise UserError(f"{key}={text} holds several values: write a list as '{key}=[{text}]'")
    return parsed.value()


def _hydra(command: str, chosen: Mapping[str, str]) -> tuple[dict, dict[str, str]]:
    """Command, groups and experiment as Hydra composes them, unresolved, and the option picked in each group."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    with tempfile.TemporaryDirectory() as folder:
        wanted = []
        for group, option in chosen.items():
            if group == "experiment" and option.endswith((".yaml", ".yml")):
                _copy_experiment(Path(option), Path(folder))
                wanted += [f"hydra.searchpath=[file://{folder}]", f"experiment={USER_EXPERIMENT}"]
            elif group != "size":
                if option not in options(group):
                    raise unknown(group, option, options(group))
                wanted.append(f"{group if GROUPS[group] == group else f'{GROUPS[group]}@{group}'}={option}")
        before = GlobalHydra.instance().hydra
        try:
            with initialize_config_dir(str(directory().resolve()), version_base="1.3"):
                composed = hydra_compose(command, wanted, return_hydra_config=True)
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(f"{command} {' '.join(f'{k}={v}' for k, v in chosen.items())}: {_line(error)}") from error
        finally:
            GlobalHydra.instance().hydra = before
    choices = {group.split("@")[-1]: option for group, option in composed.hydra.runtime.choices.items() if option}
    plain = OmegaConf.to_container(composed, resolve=False)
    return {key: value for key, value in plain.items() if key != "hydra"}, choices


def _copy_experiment(source: Path, folder: Path) -> None:
    """An experiment file of the user's, where Hydra finds it, with the package header if it lacks one."""
    if not source.is_file():
        raise UserError(f"there is no experiment file {source}")
    _read(source)
    header = "" if "@package" in source.read_text() else "# @package _global_\n"
    (folder / "experiment").mkdir()
    (folder / "experiment" / f"{USER_EXPERIMENT}.yaml").write_text(header + source.read_text())


def _read(path: Path) -> dict:
    from omegaconf import OmegaConf
    from yaml import YAMLError

    try:
        tree = OmegaConf.to_container(OmegaConf.load(path), resolve=False) or {}
    except (YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path} is not YAML: {_line(error)}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path} is not a YAML mapping of keys to values")
    return tree


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


class _Layers:
    """A configuration under way, in place: trees of experiments and sizes, then single values, go over it."""

    def __init__(self, command: str, config: dict, base: dict, picked: dict[str, str], chosen: frozenset[str]):
        self.command, self.config, self.base, self.picked, self.chosen = command, config, base, picked, chosen

    def name_groups(self, where: str) -> None:
        """Options that the experiment gave by name at its top level."""
        for group in OBJECTS:
            value = self.config.get(group)
            if isinstance(value, str) and value != "???":
                self._pick(group, self.picked[group] if group in self.chosen else value, where)

    def apply(self, tree: Mapping[str, Any], where: str) -> None:
        """A tree of keys and of sections per command."""
        commands = options("")
        sections = {key: value for key, value in tree.items() if key.split()[:1] and key.split()[0] in commands and value is not None}
        known = EXTRAS.union(GROUPS, *(_top(command) for command in commands))
        for key, value in tree.items():
            if key in sections:
                continue
            if key not in known:
                raise unknown(f"key of {where}", key, known | set(commands))
            if key in self.config:
                self._merge(self.config, key, value, self.base, where)
        for key in sorted(sections, key=lambda key: len(key.split())):
            name, *conditions = key.split()
            if name == self.command and all(self._holds(condition) for condition in conditions):
                if not isinstance(sections[key], Mapping):
                    raise UserError(f"{where}: '{key}' is a section of the command {name}, expected a mapping of its keys")
                for inner, value in sections[key].items():
                    self._merge(self.config, inner, value, self.base, f"{where}, {key}")

    def put(self, path: str, value: Any, new: bool) -> None:
        """One value of the user's; ``new`` allows a key that has no default."""
        *parents, last = path.split(".")
        target, base, free = self.config, self.base, new
        for depth, name in enumerate(parents):
            here = ".".join(parents[: depth + 1])
            if isinstance(target, list):
                if not name.isdigit() or int(name) >= len(target):
                    raise UserError(f"{here}: expected a number below {len(target)}, the place in a list")
                target = target[int(name)]
                continue
            if name not in target and not free:
                raise unknown(f"key of {self.command}", here, target)
            free = free or name in OBJECTS or "class" in target or base.get(name) == {}
            if target.get(name) in (None, "???"):
                target[name] = {}
            target, base = target[name], base.get(name) if isinstance(base.get(name), dict) else {}
            if not isinstance(target, dict | list):
                raise UserError(f"{here} is a value, not a mapping: {path} cannot be set")
        if isinstance(target, list):
            raise UserError(f"{path} is within a list: give the whole list, or a key of one of its mappings")
        self._merge(target, last, value, base, self.command, free or "class" in target)

    def _merge(self, target: dict, key: str, value: Any, base: dict, where: str, free: bool = False) -> None:
        """``target[key] = value``, mappings merged, names checked unless ``free``, kinds checked against the default."""
        if key not in target and not free:
            raise unknown(f"key of {where}", key, target)
        old = target.get(key)
        if target is self.config and key in OBJECTS and isinstance(value, str):
            if key not in self.chosen:
                self._pick(key, value, where)
        elif isinstance(value, Mapping) and isinstance(old, dict) and value.get("class", old.get("class")) == old.get("class"):
            inner_free = free or key in OBJECTS or "class" in old or not base.get(key)
            for inner, entry in value.items():
                self._merge(old, inner, entry, base.get(key) if isinstance(base.get(key), dict) else {}, f"{where}.{key}", inner_free)
        elif not (isinstance(value, Mapping) and key in self.chosen and target is self.config):
            target[key] = _conform(f"{key} of {where}", value, base.get(key))

    def _pick(self, group: str, option: str, where: str) -> None:
        if option not in options(group):
            raise unknown(f"{group} of {where}", option, options(group))
        self.picked[group] = option
        self.config[group] = _read(directory() / GROUPS[group] / f"{option}.yaml")

    def _holds(self, condition: str) -> bool:
        key, _, value = condition.partition("=")
        return self.picked.get(key, str(self.config.get(key))) == value


def _top(command: str) -> set[str]:
    return {key.split(".")[0] for key, _, _ in describe(command)}


def _conform(name: str, value: Any, default: Any) -> Any:
    """``value``, if a number, flag or text stands where the default is one."""
    if default is None or default == "???" or value is None or (isinstance(value, str) and "${" in value):
        return value
    if isinstance(default, bool) != isinstance(value, bool) and not isinstance(default, str):
        raise UserError(f"{name} is {'true or false' if isinstance(default, bool) else 'not true or false'}, found {value!r}")
    if isinstance(default, int | float) and not isinstance(value, int | float):
        raise UserError(f"{name} is a number, found {value!r}")
    if isinstance(default, int) and isinstance(value, float) and not value.is_integer():
        raise UserError(f"{name} is a whole number, found {value!r}")
    return value


# Objects


def build(config: Mapping[str, Any], kind: type, **given: Any) -> Any:
    """The object that ``config`` describes: ``class``, a final class of this package and of that kind, and its keywords.

    Args:
        config: ``{"class": "appa_lite.room.module.Name", keyword: value, ...}``; nested mappings arrive as plain dicts.
        kind: the abstract class that it must derive from.
        given: keywords that are objects of the caller's rather than configuration.

    Raises:
        UserError: another class than one of ours of that kind, unknown or missing keywords, values of the wrong type.
    """
    cls, keywords = resolve(config, kind)
    try:
        return cls(**keywords, **given)
    except TypeError as error:
        absent = _required(cls) - keywords.keys() - given.keys()
        if absent:
            raise UserError(f"{cls.__name__} needs {', '.join(sorted(absent))}") from error
        raise


def resolve(config: Mapping[str, Any], kind: type) -> tuple[type, dict[str, Any]]:
    """The class that ``config`` names and its keywords, checked against the signature but not yet called."""
    from omegaconf import DictConfig, OmegaConf

    plain = OmegaConf.to_container(config, resolve=True) if isinstance(config, DictConfig) else config
    if not isinstance(plain, Mapping) or not isinstance(plain.get("class"), str):
        raise UserError(f"expected a mapping with a 'class' that is a {kind.__name__}, found {plain!r}")
    keywords = {key: value for key, value in plain.items() if key != "class"}
    cls = _locate(plain["class"], kind)
    hints = typing.get_type_hints(cls.__init__)
    known = list(inspect.signature(cls).parameters)
    for name, value in keywords.items():
        if name not in known:
            raise unknown(f"keyword of {cls.__name__}", str(name), known)
        keywords[name] = _cast(f"{name} of {cls.__name__}", value, hints.get(name))
    return cls, keywords


def _locate(path: str, kind: type) -> type:
    module, _, name = path.rpartition(".")
    if not re.fullmatch(r"appa_lite(\.[A-Za-z_]\w*)+", module) or not name.isidentifier():
        raise UserError(f"class '{path}' is not of this package: expected appa_lite.room.module.Name")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("appa_lite"):
            raise
        raise UserError(f"class '{path}': there is no module {error.name}") from error
    if not (isinstance(found, type) and issubclass(found, kind) and found.__module__.startswith("appa_lite.")):
        raise UserError(f"class '{path}' is not a {kind.__name__}")
    if inspect.isabstract(found):
        raise UserError(f"class '{path}' is abstract: name one of its subclasses")
    return found


def _required(cls: type) -> set[str]:
    return {name for name, parameter in inspect.signature(cls).parameters.items() if parameter.default is parameter.empty}


def _cast(name: str, value: Any, hint: Any) -> Any:
    """``value`` for a parameter annotated with a plain type: whole numbers serve as floats, lists as tuples."""
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union else (hint,)
    if isinstance(value, list) and any(typing.get_origin(a) is tuple or a is tuple for a in allowed) and list not in allowed:
        return tuple(tuple(v) if isinstance(v, list) else v for v in value)
    if not all(a in (int, float, bool, str, type(None)) for a in allowed):
        return value
    if float in allowed and int not in allowed and type(value) is int:
        return float(value)
    if type(value) not in allowed:
        expected = " or ".join("null" if a is type(None) else a.__name__ for a in allowed)
        raise UserError(f"{name} is expected to be {expected}, found {value!r}")
    return value
