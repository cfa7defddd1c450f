"""Keys in the files of a folder, as Kubernetes mounts a Secret: of clients, models and the object store.

Such a folder holds links through `..data`, which a rotation turns to another folder at once. So all files are read
there: a key of before a rotation fits no secret of after it.
"""

from __future__ import annotations

import hmac
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

log = logging.getLogger(__name__)
ReadKeys = Callable[[], Sequence[str]]
CLIENT_KEYS = "COWEST_CLIENT_API_KEYS"  # who may ask this server
PROXY_KEYS = "COWEST_PROXY_KEYS"  # what this process shows to the job's proxy
OF_ONE_MOMENT = "..data"
TRIES = 3  # a folder that is rotated away while it is read


def texts_in(folder: Path, below: bool = False) -> dict[str, str]:
    """Name and text of each file of one moment, in order of their names; `below`: of its folders too.

    Raises `OSError`, also where there is no such folder, and `UnicodeDecodeError`.
    """
    for left in reversed(range(TRIES)):
        try:
            linked = folder / OF_ONE_MOMENT
            now = (linked if linked.exists() else folder).resolve()
            return {str(path.relative_to(now)): path.read_text("utf-8") for path in sorted(_files(now, below))}
        except FileNotFoundError:
            if not left:
                raise
    raise AssertionError("unreachable: the last try returns or raises")


def _files(folder: Path, below: bool) -> Iterator[Path]:
    # os.walk, since a mounted Secret consists of links, which Path.rglob does not follow.
    for place, folders, files in os.walk(folder, followlinks=True, onerror=_raise):
        folders[:] = [name for name in folders if below and not name.startswith("..")]
        yield from (Path(place, name) for name in files if not name.startswith(".."))


def _raise(error: OSError) -> None:
    raise error


def lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


class Keys:
    """Keys as they were given, and those in the files of a folder: one a line, read anew at each `load`."""

    def __init__(
        self,
        given: Sequence[str] = (),
        folder: Path | None = None,
        given_names: Sequence[str] = (),
        *,
        below: bool = False,
    ) -> None:
        self.folder, self._below = folder, below
        self.current: tuple[str, ...] = ()
        self.names: Mapping[str, str] = {}  # of each key its file's, "" where nobody said
        self._given = dict(zip(given, (*given_names, *[""] * len(given)), strict=False))
        self._trouble = ""
        self.load()

    @property
    def are_wanted(self) -> bool:
        """Also while the folder holds none: a Secret that was emptied must not open the door to everybody."""
        return bool(self._given) or self.folder is not None

    def load(self) -> bool:
        """Look at the folder. True: other keys hold now."""
        try:
            texts = texts_in(self.folder, self._below) if self.folder else {}
        except (OSError, UnicodeDecodeError) as error:
            if self._trouble != str(error):
                log.warning("Keys in %s cannot be read (%s); those read before go on.", self.folder, error)
            self._trouble = str(error)
            return False
        self._trouble = ""
        found = self._given | {key: name for name, text in texts.items() for key in lines(text)}
        before, self.current, self.names = self.current, tuple(found), found
        return before != self.current

    def read(self) -> Sequence[str]:
        """Those of now."""
        self.load()
        return self.current

    def shown(self, authorization: str) -> str | None:
        """The key that a client sends, None where it is none of these."""
        is_bearer = authorization[:7].lower() == "bearer "
        given = authorization[7:] if is_bearer else authorization
        # All are compared, each in constant time, so that timing tells nothing.
        return (
            given if any([hmac.compare_digest(given.encode("latin-1"), key.encode()) for key in self.current]) else None
        )


def keys_of(environment: Mapping[str, str], name: str, whose: str = "", *, below: bool = False) -> Keys:
    """From the variable `name`, one a line, and from the files of the folder that `name`_FOLDER names.

    `whose`: of each line its owner's name.
    """
    folder = environment.get(f"{name}_FOLDER")
    names = [line.strip() for line in whose.split("\n")] if whose else []
    return Keys(lines(environment.get(name, "")), Path(folder) if folder else None, names, below=below)
