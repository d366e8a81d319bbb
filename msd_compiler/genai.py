"""Folders for onnxruntime-genai: a ``genai_config.json``, the models it names, tokenizer files and whatever else.

A result is a folder of its own: the models compiled under their old names, the native library beside the config, which
names it as ``custom_ops_library``, and a copy of the rest.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from .aside import Aside
from .errors import ModelError, OutputError
from .report import Method, Report, SiteRow, Verification, summarize
from .runtime import library_path
from .save import sync, sync_folder
from .source import load

CONFIG = "genai_config.json"

VERSIONS = (
    "onnxruntime-genai 0.9.1 and later loads it; an earlier one refuses it until custom_ops_library is removed from "
    f"{CONFIG}, and then runs without the library, slower"
)
"""Found by generating with 0.6.0 to 0.18.0; 0.9.1 is the first to look for the library in the model's folder."""

_KEY = "custom_ops_library"
_BASES = ("decoder", "draft")
"""Entries whose session options always count; the others, if they have none, take the decoder's."""


def is_genai(folder: Path) -> bool:
    """Whether this is a folder with a GenAI configuration."""
    return (folder / CONFIG).is_file()


def is_result(folder: Path) -> bool:
    """Whether this is a folder whose configuration names our library: a result, now or earlier."""
    try:
        config = _parsed(_text(folder / CONFIG), folder / CONFIG)
    except ModelError:
        return False
    return any(part.library is not None for part in _parts(config["model"]))


@dataclass(frozen=True)
class GenaiFolder:
    """A folder as it was given: read and checked, nothing written yet."""

    path: Path
    """As the user named it."""
    text: str
    """The configuration, as it is."""
    models: tuple[str, ...]
    """The model files that it names, relative to the folder, the decoder first."""
    rest: tuple[str, ...]
    """All other files but the configuration and the models' external data."""

    @classmethod
    def read(cls, path: Path) -> GenaiFolder:
        """Read the configuration and see what there is to compile and what to copy.

        Raises:
            ModelError: the configuration is malformed, names a file outside the folder or one that is no model, or the
                folder holds a symbolic link or what is no file.
        """
        text = _text(path / CONFIG)
        config = _parsed(text, path / CONFIG)
        models = _model_names(config, path / CONFIG)
        files = _files(path.resolve())
        for name in models:
            if name not in files:
                raise ModelError(f"{str(path / CONFIG)!r} names model {name!r}, which is not in {str(path)!r}")
        return cls(path, text, models, tuple(_rest(path, files, models)))

    def config_with_library(self, library: str) -> str:
        """The configuration with the library in the session options of every model."""
        config = json.loads(self.text)
        parts = [part for part in _parts(config["model"]) if part.has_own_options]
        if all(part.library == library for part in parts):
            return self.text
        for part in parts:
            part.entry.setdefault("session_options", {})[_KEY] = library
        indent = re.search(r"\n([ \t]+)", self.text)
        end = self.text[len(self.text.rstrip()) :]
        return json.dumps(config, indent=indent[1] if indent else None, ensure_ascii=self.text.isascii()) + end


class FolderOutput:
    """The place of a resulting folder. Leaving the block without `commit` leaves everything as it was.

    Raises:
        OutputError: the folder cannot be made there, lies in the source or around it, or exists and is no earlier result.
    """

    def __init__(self, path: Path, source: GenaiFolder):
        self.path = path
        self._source = source
        _check_place(path, source.path)
        self._place = path.resolve()
        try:
            self._aside = Aside(self._place.parent, self._place.name)
        except OSError as error:
            raise OutputError(f"output folder {str(path)!r} cannot be made: {error.strerror}") from error
        self._old = self._aside.path.with_suffix(".old")
        self._new = self._aside.path / "new"  # within, for the folder aside is nobody else's to read

    def model(self, name: str) -> Path:
        """Where a compiled model goes until `commit`."""
        try:
            return self._place_for(name)
        except OSError as error:
            raise self._refused(error) from error

    def commit(self, *, with_library: bool) -> None:
        """Write configuration, library and the rest, and let the folder appear in the place of an earlier result."""
        try:
            self._write_rest(with_library)
            if self._place.exists():
                self._place.rename(self._old)
            self._new.rename(self._place)
            sync_folder(self._place.parent)
        except OSError as error:
            raise self._refused(error) from error

    def _place_for(self, name: str) -> Path:
        place = self._new / name
        place.parent.mkdir(parents=True, exist_ok=True)
        return place

    def _refused(self, error: OSError) -> OutputError:
        return OutputError(f"output folder {str(self.path)!r} cannot be written: {error.strerror} ({error.filename!r})")

    def _write_rest(self, with_library: bool) -> None:
        for name in self._source.rest:
            _copy(self._source.path / name, self._place_for(name))
        text = self._source.text
        if with_library:
            library = _library()
            _copy(library, self._place_for(library.name))
            text = self._source.config_with_library(library.name)
        with self._place_for(CONFIG).open("wb") as file:
            file.write(text.encode())
            sync(file)
        sync_folder(self._new)

    def __enter__(self) -> FolderOutput:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._old.exists() and not self._place.exists():
            self._old.rename(self._place)
        self._aside.remove()
        shutil.rmtree(self._old, ignore_errors=True)


def default_folder(folder: Path) -> Path:
    """``FOLDER`` -> ``FOLDER-msd`` beside it."""
    named = folder if folder.name not in ("", "..") else folder.resolve()
    return named.with_name(named.name + "-msd")


def merged_report(source: Path, result: Path, reports: Mapping[str, Report]) -> Report:
    """One report for the models of a folder: that of the only model, or all rows, each under its model's name."""
    first = next(iter(reports.values()))
    if len(reports) == 1:
        return first
    sites = [_under(name, site) for name, report in reports.items() for site in report.sites]
    checked = {name: report.verification for name, report in reports.items() if report.verification}
    return Report(
        source=str(source),
        result=str(result),
        opset=first.opset,
        summary=summarize(sites),
        sites=sites,
        verification=_merged_verification(checked) if checked else None,
    )


def _merged_verification(checked: Mapping[str, Verification]) -> Verification:
    by_site = any(v.method is Method.SITES for v in checked.values())
    return Verification(
        method=Method.SITES if by_site else Method.WHOLE,
        passed=all(v.passed for v in checked.values()),
        note="; ".join(f"{name}: {v.note}" for name, v in checked.items() if v.note) or None,
        outputs=[o.model_copy(update={"name": f"{name}: {o.name}"}) for name, v in checked.items() for o in v.outputs],
        sites=[s.model_copy(update={"node": f"{name}: {s.node}"}) for name, v in checked.items() for s in v.sites],
    )


def _under(name: str, site: SiteRow) -> SiteRow:
    return site.model_copy(update={"node": f"{name}: {site.node}"})


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except OSError as error:
        raise ModelError(f"{str(path)!r} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ModelError(f"{str(path)!r} is not UTF-8 text") from error


def _parsed(text: str, path: Path) -> dict[str, Any]:
    """The configuration, known to have ``model.decoder``.

    Raises:
        ModelError: it is no JSON, or not of the form that is edited.
    """
    config: dict[str, Any]
    try:
        config = json.loads(text)
        json.dumps(config, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{str(path)!r} is not JSON: {error}") from error
    model = config.get("model") if isinstance(config, dict) else None
    if not isinstance(model, dict) or not isinstance(model.get("decoder"), dict):
        raise ModelError(f"{str(path)!r} has no object 'decoder' in an object 'model'")
    for part in _parts(model):
        _check_part(part, path)
    return config


@dataclass(frozen=True)
class _Part:
    """An object of the configuration that stands for a session, or, the decoder, for several."""

    entry: dict[str, Any]
    is_base: bool

    @property
    def has_own_options(self) -> bool:
        """Whether its session options are made from nothing, and not from the decoder's."""
        own = "session_options" in self.entry and not self.entry.get("inherit_session_options")
        return self.is_base or own

    @property
    def library(self) -> Any:
        """What it loads, if anything."""
        return self.entry.get("session_options", {}).get(_KEY)


def _parts(model: dict[str, Any]) -> Iterator[_Part]:
    """The decoder, and every object that names a model file, the decoder's first."""
    for key in sorted(model, key=lambda key: key != "decoder"):
        if key in _BASES and isinstance(model[key], dict):
            yield _Part(model[key], is_base=True)
            yield from (_Part(entry, is_base=False) for entry in _named(list(model[key].values())))
        else:
            yield from (_Part(entry, is_base=False) for entry in _named(model[key]))


def _named(value: Any) -> Iterator[dict[str, Any]]:
    """Every object that names a model file."""
    if isinstance(value, dict):
        if "filename" in value:
            yield value
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from _named(inner)


def _check_part(part: _Part, path: Path) -> None:
    where = f"{str(path)!r}: model {part.entry.get('filename')!r}"
    if not isinstance(part.entry.get("session_options", {}), dict):
        raise ModelError(f"{where} has session_options that are no object")
    if part.library not in (None, _library().name):
        raise ModelError(f"{where} has a {_KEY} already, {part.library!r}; onnxruntime-genai loads one only")
    if part.entry.get("shared_initializers"):
        raise ModelError(f"{where} has shared_initializers: weights that models share cannot be packed")


def _model_names(config: dict[str, Any], path: Path) -> tuple[str, ...]:
    names: dict[str, None] = {}
    for part in _parts(config["model"]):
        if "filename" not in part.entry:
            continue
        name = part.entry["filename"]
        if not isinstance(name, str) or not name or "\0" in name:
            raise ModelError(f"{str(path)!r}: filename is {name!r}; it must name a model file")
        relative = Path(name)
        if relative.is_absolute() or ".." in relative.parts:
            raise ModelError(f"{str(path)!r} names model {name!r}; it must be a relative path without '..'")
        names[relative.as_posix()] = None
    if not names:
        raise ModelError(f"{str(path)!r} names no model: the decoder has no filename")
    return tuple(names)


def _files(root: Path) -> list[str]:
    """Every file below a folder but what lies in hidden folders, where download tools and git keep their books."""
    found: list[str] = []

    def stop(error: OSError) -> None:
        raise ModelError(f"folder {error.filename!r} cannot be read: {error.strerror}") from error

    for folder, folders, names in os.walk(root, onerror=stop):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(folder, name) for name in (*folders, *sorted(names))):
            if path.is_symlink():
                raise ModelError(f"{str(path)!r} is a symbolic link; it must be a file in the model's folder")
            if path.is_file():
                found.append(path.relative_to(root).as_posix())
            elif path.name in names:
                raise ModelError(f"{str(path)!r} is neither a file nor a folder; it cannot be copied")
    return found


def _rest(root: Path, files: list[str], models: tuple[str, ...]) -> Iterator[str]:
    """The files to copy: not the models, nor the external data that nothing else needs."""
    ours: set[Path] = set()
    others: set[Path] = set()
    for name in files:
        if name in models:
            ours |= {file.resolve() for file in load(root / name).files()}
        elif name.endswith(".onnx"):
            with suppress(ModelError):
                others |= {file.resolve() for file in load(root / name).files()}
    left_out = {*ours - others, *((root / name).resolve() for name in models)}
    return (name for name in files if name != CONFIG and (root / name).resolve() not in left_out)


def _check_place(path: Path, source: Path) -> None:
    whole, around = path.resolve(), source.resolve()
    if whole == around or whole.is_relative_to(around) or around.is_relative_to(whole):
        raise OutputError(f"output folder {str(path)!r} is the model's folder, or one lies in the other; name another")
    if not whole.parent.is_dir():
        raise OutputError(f"output folder {str(path)!r} lies in {str(path.parent)!r}, which does not exist")
    if path.is_symlink() or (path.exists() and not is_result(path)):
        raise OutputError(f"output {str(path)!r} exists and is no result of an earlier run; name another, or remove it")


def _library() -> Path:
    try:
        return library_path()
    except FileNotFoundError as error:
        raise OutputError(str(error)) from error


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    with target.open("rb+") as file:
        sync(file)
