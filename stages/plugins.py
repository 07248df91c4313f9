"""Python modules of users that add quantizers, networks, generators or classifiers to every command.

Defining the class registers it, so importing its module is all that is needed. A module is imported if the user names
it with `--import`, or if an installed package declares it as an entry point:

    [project.entry-points."vqpipe.plugins"]
    mine = "my_package.my_quantizer"

Nothing that an artifact, a preset or a data set holds names a module to import.
"""

import importlib.util
import sys
from functools import cache
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType

from vqpipe.errors import ConfigError

GROUP = "vqpipe.plugins"


def import_named(names: list[str] | None) -> list[str] | None:
    """Import the values of --import: names of modules, or paths of .py files.

    Raises:
        ConfigError: there is no such module or file, or its import fails.
    """
    for name in names or []:
        try:
            if name.endswith(".py"):
                import_file(Path(name))
            else:
                import_module(name)
        except ConfigError:
            raise
        except Exception as error:
            raise failed(f"--import {name}", name, error) from error
    return names


def import_file(path: Path) -> ModuleType:
    """Import a .py file as the module of its name."""
    if not path.is_file():
        raise ConfigError(f"--import {path}: no such file", "Give the path of a .py file, or the name of a module")
    loaded = sys.modules.get(path.stem)
    if loaded is not None:
        if loaded.__file__ is not None and Path(loaded.__file__).resolve() == path.resolve():
            return loaded
        raise ConfigError(f"--import {path}: another module is called {path.stem}", "Rename the file")
    spec = importlib.util.spec_from_file_location(path.stem, path.resolve())
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise
    return module


def import_installed() -> None:
    """Import the modules that installed packages declare.

    Raises:
        ConfigError: the import of one fails.
    """
    for entry in declared(tuple(sys.path)):
        try:
            entry.load()
        except Exception as error:
            package = entry.dist.name if entry.dist else "a package"
            raise failed(f"the plugin {entry.name} of {package}", entry.module, error) from error


@cache
def declared(path: tuple[str, ...]) -> metadata.EntryPoints:
    """The modules that packages in these folders declare. (Python reads a file of every package.)"""
    return metadata.entry_points(group=GROUP)


def failed(what: str, module: str, error: Exception) -> ConfigError:
    """The error of an import that failed."""
    if isinstance(error, ModuleNotFoundError) and error.name == module.partition(".")[0]:
        return ConfigError(
            f"{what}: no module of that name is installed", "Install it, set PYTHONPATH, or give the path of a .py file"
        )
    return ConfigError(f"{what} cannot be imported: {type(error).__name__}: {error}", "Correct it, or leave it out")
