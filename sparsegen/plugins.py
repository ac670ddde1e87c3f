"""Find plug-ins: a plug-in is a file, its stem is its name, and it is imported on first use."""

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType

from sparsegen.errors import BindingError, did_you_mean


def discover(package: str, noun: str, extra_paths: Iterable[str | Path] = ()) -> "Plugins":
    """Return the plug-ins of a package and of further folders, without importing any.

    Args:
        package: dotted name of the package whose folder holds the files shipped with sparsegen.
        noun: what one of them is called in error messages, such as "architecture".
        extra_paths: further folders to look in, as for `Plugins.register_path`.
    """
    plugins = Plugins(package, noun)
    for folder in extra_paths:
        plugins.register_path(folder)
    return plugins


class Plugins(Mapping[str, ModuleType]):
    """Map the stem of each plug-in file to its module.

    Listing the names reads the folders and imports nothing; looking a name up imports that one
    file. Files whose name starts with an underscore or a dot are not plug-ins.
    """

    def __init__(self, package: str, noun: str) -> None:
        self._package = package
        self._noun = noun
        self._extra: list[Path] = []

    def register_path(self, folder: str | Path) -> None:
        """Look in one more folder; its files stand beside the shipped ones.

        Raises:
            BindingError: the folder does not exist.
        """
        path = Path(folder).resolve()
        if not path.is_dir():
            raise BindingError(
                f"no folder {str(path)!r} to look for {self._noun} files in",
                hint="pass a folder that exists",
            )
        if path not in self._extra:
            self._extra.append(path)

    def unregister_path(self, folder: str | Path) -> None:
        """Stop looking in a folder that `register_path` added."""
        self._extra.remove(Path(folder).resolve())

    def files(self) -> dict[str, Path]:
        """Return the file of every plug-in, sorted by name.

        Raises:
            BindingError: two folders hold the same name, or the package is not installed.
        """
        found: dict[str, Path] = {}
        for folder in (*self._package_folders(), *self._extra):
            for path in folder.glob("*.py"):
                if path.name.startswith(("_", ".")):
                    continue
                if path.stem in found:
                    raise BindingError(
                        f"two {self._noun} files are named {path.stem!r}: "
                        f"{found[path.stem]} and {path}",
                        hint="rename one of them",
                    )
                found[path.stem] = path
        return dict(sorted(found.items()))

    def require(self, name: str) -> ModuleType:
        """Return the module of a name the user gave.

        Raises:
            BindingError: there is no such plug-in; the hint offers the closest name.
        """
        files = self.files()
        if name not in files:
            raise BindingError(f"unknown {self._noun} {name!r}", hint=did_you_mean(name, files))
        return self._import(name, files[name])

    def __getitem__(self, name: str) -> ModuleType:
        return self._import(name, self.files()[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.files())

    def __len__(self) -> int:
        return len(self.files())

    def __contains__(self, name: object) -> bool:
        return name in self.files()

    def _package_folders(self) -> list[Path]:
        spec = importlib.util.find_spec(self._package)
        if spec is None or spec.submodule_search_locations is None:
            raise BindingError(
                f"the package {self._package!r} is not installed",
                hint="run `pip install -e .` in the checkout, or leave its folder when you "
                "mean the installed sparsegen",
            )
        return [Path(folder) for folder in spec.submodule_search_locations]

    def _import(self, name: str, path: Path) -> ModuleType:
        if path.parent not in self._extra:
            return importlib.import_module(f"{self._package}.{name}")
        # Two folders may hold different files of one name, at different times in one process.
        digest = hashlib.sha256(str(path).encode()).hexdigest()[:12]
        qualified = f"_sparsegen_plugin_{digest}_{name}"
        if qualified in sys.modules:
            return sys.modules[qualified]
        spec = importlib.util.spec_from_file_location(qualified, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        # Dataclasses look their module up while it runs, so it is entered before, like an import.
        sys.modules[qualified] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[qualified]
            raise
        return module
