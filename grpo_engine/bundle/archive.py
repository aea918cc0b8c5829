"""A bundle's zip file, which may come from anybody: opened with everything checked that its directory tells.

Invariants:
    - Members have names this program knows, each once, and are plain files, so none leads out of a folder:
      no absolute path, no "..", no backslash, no link, nothing encrypted. Others are refused, not skipped.
    - No member is larger than its kind may be, nor all of them than `FILE_BYTES`; and what is announced is
      the most that is ever read: `zipfile` stops there, and refuses a member whose checksum then differs.
    - The directory itself is measured before it is read, so a small file can't ask for much memory.
"""

from __future__ import annotations

import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from ..store import StoreError

MANIFEST = "bundle.json"
CONFIG = "config.yaml"
NUMBERS = "metrics.json"
LOG = "grpo_training.log"
TABLES = ("steps.jsonl", "rollouts.jsonl", "evaluations.jsonl", "items.jsonl", "events.jsonl")
POLICY = "checkpoint/"
POLICY_FILES = {
    "lora": ("adapter_model.safetensors", "adapter_config.json", "config.yaml"),
    "full": ("trainable.safetensors", "config.yaml"),
}

MIB = 1 << 20
FILE_BYTES = 2_000_000_000  # of a bundle, packed and unpacked: zip's own limit is 2 GiB without its extensions
ROWS_BYTES = 512 * MIB  # of all rows: what a database takes in while other programs wait
LINE_BYTES = 4 * MIB
PICTURE_BYTES = 64 * MIB
MEMBERS = 60_000
DIRECTORY_BYTES = 16 * MIB
RATIO = 200  # unpacked to packed; rows of text reach about 30

_LIMITS = {
    MANIFEST: MIB,
    CONFIG: MIB // 4,
    NUMBERS: 128 * MIB,
    LOG: 256 * MIB,
    **dict.fromkeys(TABLES, ROWS_BYTES),
    f"{POLICY}state.json": 8 * MIB,
    f"{POLICY}adapter_config.json": MIB,
    f"{POLICY}config.yaml": MIB // 4,
    f"{POLICY}adapter_model.safetensors": FILE_BYTES,
    f"{POLICY}trainable.safetensors": FILE_BYTES,
}
_PART = r"[a-z0-9_-][a-z0-9_.-]{0,119}"
_PICTURE = re.compile(rf"images/(?:{_PART}/){{1,4}}{_PART}\.(?:png|webp|jpg)")
_END = struct.Struct("<4s4H2LH")  # the end of a zip file: APPNOTE 4.3.16
_LOCATOR = (b"PK\x06\x07", 20)  # of the extension for large files: mark, bytes
_FLAGS = 0x80E  # of a member: UTF-8 name, size after the data, how hard it was packed


class BundleError(StoreError):
    """A bundle that can't be written or opened; the message is one plain sentence."""


def most_bytes(name: str) -> int | None:
    """The size a member of this name may have, unpacked; None: a bundle has no such member."""
    return PICTURE_BYTES if _PICTURE.fullmatch(name) else _LIMITS.get(name)


class Archive:
    """A bundle opened for reading; a context manager.

    Attributes:
        names: of all members.

    Raises:
        BundleError: not a bundle, damaged, or made to do harm.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._reading():
            if not path.is_file():
                raise BundleError(f"There is no file {path}; give a bundle that 'export --format bundle' has written.")
            packed = path.stat().st_size
            self._check_end(packed)
            self._zip = zipfile.ZipFile(path)
        try:
            self._members: dict[str, zipfile.ZipInfo] = {}
            for member in self._zip.infolist():
                self._admit(member)
            for name in (MANIFEST, CONFIG, *TABLES):
                if name not in self._members:
                    raise self.bad(f"it has no {name}")
            rows = sum(self._members[name].file_size for name in TABLES)
            total = sum(member.file_size for member in self._members.values())
            if rows > ROWS_BYTES or total > FILE_BYTES or total > MIB + RATIO * packed:
                raise self.bad(f"it would unpack to {total:,} bytes")
        except BaseException:
            self.close()
            raise
        self.names = frozenset(self._members)

    def __enter__(self) -> Archive:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._zip.close()

    def bad(self, why: str) -> BundleError:
        """What to raise about this file."""
        return BundleError(f"{self.path} is not a bundle that can be opened: {why}; export the run again.")

    def read(self, name: str) -> bytes:
        """All of a member."""
        return b"".join(self.chunks(name))

    def chunks(self, name: str) -> Iterator[bytes]:
        """A member in pieces of at most a mebibyte."""
        with self._reading():
            stream = self._zip.open(self._members[name])
        with stream:
            while True:
                with self._reading():
                    block = stream.read(MIB)
                if not block:
                    return
                yield block

    def lines(self, name: str) -> Iterator[tuple[int, bytes]]:
        """A text member's lines without their ends, counted from 1."""
        number, rest = 0, b""
        for block in self.chunks(name):
            *whole, rest = (rest + block).split(b"\n")
            for line in whole:
                number += 1
                yield number, line
            if len(rest) > LINE_BYTES:
                raise self.bad(f"line {number + 1} of {name} is longer than {LINE_BYTES:,} bytes")
        if rest:
            yield number + 1, rest

    def _check_end(self, size: int) -> None:
        """The last bytes say how large the directory is; `zipfile` would believe whatever they say."""
        if size > FILE_BYTES:
            raise self.bad(f"it has {size:,} bytes, more than {FILE_BYTES:,}")
        with self.path.open("rb") as handle:
            tail = _END.size + _LOCATOR[1]
            handle.seek(max(0, size - tail))
            data = handle.read(tail)
        if len(data) < _END.size:
            raise self.bad("it is too short")
        mark, _, _, _, members, directory, start, comment = _END.unpack(data[-_END.size :])
        if mark != b"PK\x05\x06" or comment or start + directory + _END.size != size:
            raise self.bad("it does not end like one")
        if members > MEMBERS or directory > DIRECTORY_BYTES or data.startswith(_LOCATOR[0]):
            raise self.bad(f"it has more than {MEMBERS:,} files")

    def _admit(self, member: zipfile.ZipInfo) -> None:
        name = member.orig_filename  # `filename` is what zipfile made of it
        limit = most_bytes(name)
        if limit is None or name != member.filename:
            raise self.bad(f"it has a file {name[:80]!r}, which no bundle has")
        if name in self._members:
            raise self.bad(f"it has two files {name}")
        mode = stat.S_IFMT(member.external_attr >> 16)
        if mode not in (0, stat.S_IFREG) or member.flag_bits & ~_FLAGS:
            raise self.bad(f"{name} is a link, encrypted or otherwise special")
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise self.bad(f"{name} is packed in a way that bundles are not")
        if member.file_size > limit:
            raise self.bad(f"{name} has {member.file_size:,} bytes, more than {limit:,}")
        self._members[name] = member

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise BundleError(f"{self.path} can't be read ({error.strerror or error}); correct that first.") from error
        except (
            # All that zipfile raises at bytes that make no sense: it has no single error for them.
            *(zipfile.BadZipFile, zlib.error, struct.error),
            *(EOFError, ValueError, OverflowError, NotImplementedError, RuntimeError),
        ) as error:
            raise self.bad(f"it is damaged ({error})") from error
