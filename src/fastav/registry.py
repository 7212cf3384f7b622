"""Registries of methods, recipes, models, engines and tasks, both built in and from installed packages.

Built-in objects are found by file name: `methods/last_query.py` has `LastQuery`, whose name is `"last-query"`; a model
is a folder such as `models/videollama2/`, which exports `VideoLlama2Adapter`. To add one, add a file. Other packages
declare an entry point in the group of the same name (`fastav.methods`, `fastav.recipes`, `fastav.models`,
`fastav.engines`, `fastav.tasks`).
"""

import difflib
import importlib
import pkgutil
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from importlib.metadata import entry_points
from typing import Any

from fastav.errors import FastAVError, UnknownName, reason_of
from fastav.formatting import join_or
from fastav.installation import importable


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UnknownName:
    """The error for an unknown name, with the closest known names."""
    normalized = {_normalized(one): one for one in known}
    near = [normalized[one] for one in difflib.get_close_matches(_normalized(name), normalized, n=3, cutoff=0.4)]
    if _normalized(name) in normalized:
        near = near[:1]
    hint = f"did you mean {join_or([repr(str(one)) for one in near])}?" if near else f"known: {', '.join(known)}"
    return UnknownName(f"no {kind} is called {name!r}", hint)


def _normalized(name: str) -> str:
    """The name for comparison: `Qwen2.5_Omni` becomes `qwen2-5-omni`."""
    return re.sub(r"[._\s]+", "-", name.casefold())


class Registry(Mapping[str, Any]):
    """A read-only mapping from name to object. An object is imported when its name is looked up.

    Raises: UnknownName if a name is not there, with the closest names in its hint.
    """

    def __init__(self, kind: str, package: str, suffix: str = "") -> None:
        self.kind = kind
        self._package = package
        self._suffix = suffix

    @cached_property
    def _builtin(self) -> dict[str, str]:
        paths = importlib.import_module(self._package).__path__
        return {m.name.replace("_", "-"): m.name for m in pkgutil.iter_modules(paths) if not m.name.startswith("_")}

    @cached_property
    def _plugins(self) -> dict[str, Any]:
        return {point.name: point for point in entry_points(group=self._package)}

    def __getitem__(self, name: str) -> Any:
        if name in self._builtin:
            return self._load(self._builtin[name])
        if name in self._plugins:
            return self._load_plugin(name)
        raise unknown_name(self.kind, name, self)

    def _load(self, module_name: str) -> Any:
        with importable():
            module = importlib.import_module(f"{self._package}.{module_name}")
        target = (module_name.replace("_", "") + self._suffix).lower()
        return next(value for key, value in vars(module).items() if key.replace("_", "").lower() == target)

    def _load_plugin(self, name: str) -> Any:
        try:
            return self._plugins[name].load()
        except Exception as error:  # another package can raise anything when it is imported
            package = getattr(self._plugins[name].dist, "name", "another package")
            raise FastAVError(
                f"the {self.kind} {name!r} of {package} cannot be loaded: {reason_of(error, with_type=True)}",
                "repair or uninstall that package",
            ) from error

    def __contains__(self, name: object) -> bool:
        return name in self._builtin or name in self._plugins

    def __iter__(self) -> Iterator[str]:
        return iter([*sorted(self._builtin), *sorted(self._plugins.keys() - self._builtin.keys())])

    def __len__(self) -> int:
        return len({*self._builtin, *self._plugins})


METHODS = Registry("method", "fastav.methods")
RECIPES = Registry("recipe", "fastav.recipes")
MODELS = Registry("model", "fastav.models", suffix="Adapter")
ENGINES = Registry("engine", "fastav.engines", suffix="Engine")
TASKS = Registry("task", "fastav.tasks", suffix="Task")
