"""What the head of a DICOM file says about its series, read without any package; the voxels stay unread.

Which images belong together, and which of them can be a volume, must be known before common/dicom.py has them
converted. Explicit and implicit headers of both byte orders are read, with or without the 128 bytes in front.
"""

import os
import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

PREAMBLE = 128  # bytes before the letters DICM
DICOM_ENDINGS = (".dcm", ".dicom", ".ima")  # of DICOM files, though many have none
IMPLICIT, DEFLATED, BIG_ENDIAN = (f"1.2.840.10008.1.2{end}" for end in ("", ".1.99", ".2"))
UNCOMPRESSED = (IMPLICIT, "1.2.840.10008.1.2.1", BIG_ENDIAN)
LONG_KINDS = (b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV")
UNDEFINED = 0xFFFFFFFF  # length of what ends with a mark
ITEM, ITEM_END, SEQUENCE_END = (0xFFFE, 0xE000), (0xFFFE, 0xE00D), (0xFFFE, 0xE0DD)
FIELDS = {
    (0x0002, 0x0002): "kind",
    (0x0002, 0x0010): "syntax",
    (0x0008, 0x0008): "image_type",
    (0x0008, 0x0016): "kind",
    (0x0008, 0x0060): "modality",
    (0x0010, 0x0020): "patient",
    (0x0020, 0x000E): "series",
    (0x0020, 0x0011): "number",
    (0x0020, 0x0032): "position",
    (0x0028, 0x0002): "samples",
    (0x0028, 0x0008): "frames",
    (0x0028, 0x0010): "rows",
    (0x0028, 0x0011): "columns",
    (0x0028, 0x0100): "bits",
}
NUMBERS = ("samples", "rows", "columns", "bits")  # stored in two bytes
LAST = (0x0028, 0x0100)
LONGEST_VALUE = 1024  # bytes of a field above; longer ones are damaged
MOST_ELEMENTS = 20_000  # that are looked at; headers have some hundred


class Header(NamedTuple):
    """What is read of a DICOM file; texts are empty and numbers 0 where it does not tell.

    Attributes:
        series: the series' own number in the world (UID).
        patient: number of the patient.
        number: of the series within its study.
        modality: such as "CT", "MR" or "SR" (a report).
        image_type: such as ORIGINAL\\PRIMARY\\AXIAL.
        kind: UID of the kind of object; "" if the file does not tell.
        position: of the first voxel, as text; empty in pictures without a place in space.
        rows, columns, samples, bits: of an image; rows is 0 in a file without one.
        frames: images in the file.
        syntax: UID of how it is stored.
    """

    series: str = ""
    patient: str = ""
    number: str = ""
    modality: str = ""
    image_type: str = ""
    kind: str = ""
    position: str = ""
    syntax: str = ""
    rows: int = 0
    columns: int = 0
    samples: int = 1
    bits: int = 16
    frames: int = 1

    @property
    def num_bytes(self) -> int:
        """Of all its images, uncompressed."""
        return self.rows * self.columns * self.samples * self.frames * max(1, self.bits // 8)


def read_dicom_header(path: Path) -> Header | None:
    """The header of a file; None if it is no DICOM file. Only its first bytes are read.

    Raises:
        ValueError: a DICOM file that is damaged or truncated before its end.
    """
    with path.open("rb") as file:
        start = file.read(PREAMBLE + 4)
        is_named = path.name.lower().endswith(DICOM_ENDINGS)
        if not start.endswith(b"DICM") or len(start) < PREAMBLE + 4:
            if not is_named:
                return None
            if start[:2] not in (b"\x08\0", b"\x02\0"):  # old files begin with their first element
                reason = "an empty file" if not start else "named like a DICOM file but not one"
                raise ValueError(f"{path}: {reason}; fetch it again, or rename it if it is something else")
            file.seek(0)
        try:
            return _header(_read_elements(file))
        except (EOFError, ValueError, struct.error) as error:
            raise ValueError(
                f"{path}: a damaged or truncated DICOM file ({error}); fetch it again"
            ) from error


def _header(values: dict[str, Any]) -> Header:
    frames = values.get("frames", "")
    return Header(**values | {"frames": max(1, int(frames)) if frames.isdecimal() else 1})


def _read_elements(file: BinaryIO) -> dict[str, Any]:
    """{name: value} of the elements in FIELDS that are there, outside of sequences."""
    values: dict[str, Any] = {}
    order, is_implicit = "<", False
    in_meta = True  # the elements of group 2 tell how those behind them are stored
    num_bytes = os.fstat(file.fileno()).st_size
    outside: list[bool] = []  # of each sequence that is open: whether what is around it is implicit
    for _ in range(MOST_ELEMENTS):
        if file.tell() == num_bytes and "series" in values and not outside:
            return values  # a document without an image ends here
        head = file.read(8)
        if len(head) < 8:
            raise EOFError("it ends within its header")
        tag = struct.unpack(order + "HH", head[:4])
        if in_meta and head[:2] != b"\x02\0":
            in_meta, syntax = False, values.get("syntax", "")
            if syntax == DEFLATED:
                raise ValueError("its header is compressed, which is not supported")
            order = ">" if syntax == BIG_ENDIAN else "<"
            is_implicit = not head[4:6].isalpha()
            tag = struct.unpack(order + "HH", head[:4])
        if not outside and tag > LAST:
            return values
        kind, length = _length(head, file, order, is_implicit or tag[0] == ITEM[0])
        if tag in (ITEM_END, SEQUENCE_END):
            is_implicit = outside.pop() if outside else is_implicit
        elif length == UNDEFINED:
            outside.append(is_implicit)
            is_implicit |= kind == b"UN"  # what is of unknown kind is stored implicitly
        elif tag in FIELDS and not outside:
            if length > LONGEST_VALUE:
                raise ValueError(f"{length} bytes for its {FIELDS[tag].replace('_', ' ')}")
            values[FIELDS[tag]] = _value(FIELDS[tag], file.read(length), order)
        else:
            file.seek(length, 1)
    raise ValueError(f"more than {MOST_ELEMENTS} elements in its header")


def _length(head: bytes, file: BinaryIO, order: str, is_implicit: bool) -> tuple[bytes, int]:
    """Kind and length of the value whose 8 bytes in front are `head`."""
    if is_implicit:
        return b"", struct.unpack(order + "I", head[4:])[0]
    if head[4:6] in LONG_KINDS:
        return head[4:6], struct.unpack(order + "I", file.read(4))[0]
    return head[4:6], struct.unpack(order + "H", head[6:])[0]


def _value(name: str, data: bytes, order: str) -> str | int:
    if name in NUMBERS:
        return struct.unpack(order + "H", data[:2])[0]
    text = data.decode("latin-1").strip("\0 ")
    if name != "patient" and not text.isprintable():  # names of patients may change the alphabet
        raise ValueError(f"its {name.replace('_', ' ')} is no text")
    return text
