"""Damaged and odd files of every format that is read: {name of the file: its bytes}, the same for each seed.

Each function makes the files of one kind; KINDS at the end lists them. Nothing here is run or opened.
"""

import gzip
import io
import json
import os
import random
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import cv2
import h5py
import nibabel
import numpy as np
import torch
from safetensors.torch import save as save_safetensors

SHAPE = (18, 20, 16)  # z y x of the scans
VOXEL_MM = 4.0
# A file by its name: its bytes, or a function that puts something else than a file at the path.
Files = dict[str, bytes | Callable[[Path], None]]

# ---- whole files, which the damage is done to ----


def scan_voxels(seed: int = 0) -> np.ndarray:
    """(z, y, x) int16: a body of 40 to 44 in air of -1000, with two bright boxes left and right."""
    voxels = np.full(SHAPE, -1000, np.int16)
    voxels[1:-1, 2:-2, 1:-1] = np.random.default_rng(seed).integers(40, 45, (16, 16, 14))
    voxels[6:10, 8:12, 3:6] = voxels[6:10, 8:12, 10:13] = 200
    return voxels


def label_voxels(*numbers: int) -> np.ndarray:
    """(z, y, x) uint8: the left box has the first number, the right one the last."""
    labels = np.zeros(SHAPE, np.uint8)
    labels[6:10, 8:12, 3:6], labels[6:10, 8:12, 10:13] = numbers[0], numbers[-1]
    return labels


def nifti(voxels: np.ndarray, voxel_mm: float = VOXEL_MM) -> bytes:
    image = nibabel.Nifti1Image(voxels.transpose(2, 1, 0), np.diag([voxel_mm] * 3 + [1.0]))
    image.header.set_xyzt_units("mm")
    image.set_qform(image.affine, 1)
    return image.to_bytes()


def mgh(voxels: np.ndarray) -> bytes:
    return nibabel.MGHImage(voxels.transpose(2, 1, 0), np.diag([VOXEL_MM] * 3 + [1.0])).to_bytes()


def nrrd(voxels: np.ndarray, **fields: str) -> bytes:
    kind = {"int16": "short", "uint8": "uchar"}[voxels.dtype.name]
    x, y, z = voxels.shape[::-1]
    header = {
        "type": kind,
        "dimension": "3",
        "space": "left-posterior-superior",
        "sizes": f"{x} {y} {z}",
        "space directions": f"({VOXEL_MM},0,0) (0,{VOXEL_MM},0) (0,0,{VOXEL_MM})",
        "endian": "little",
        "encoding": "raw",
        "space origin": "(0,0,0)",
    } | fields
    lines = [f"{key}: {value}" for key, value in header.items() if value != "left out"]
    return "\n".join(["NRRD0004", *lines, "", ""]).encode("latin1") + voxels.tobytes()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def packed_up(content: bytes) -> bytes:
    return gzip.compress(content, 1, mtime=0)


# ---- damage to any file ----


def streams(ending: str, whole: bytes, seed: int) -> Files:
    """Truncated, with flipped bits, with more behind it, or something else altogether under that name."""
    rng, files = random.Random(seed), {}
    for share in (0.1, 0.5, 0.9):
        files[f"cut_{share}{ending}"] = whole[: int(len(whole) * share)]
    files[f"last_byte_missing{ending}"] = whole[:-1]
    for number in range(3):
        damaged = bytearray(whole)
        for place in rng.sample(range(len(whole)), 1 if number == 0 else 20):
            damaged[place] ^= 1 << rng.randrange(8)
        files[f"flipped_{number}{ending}"] = bytes(damaged)
    start = bytearray(whole)
    for place in rng.sample(range(min(300, len(whole))), 8):
        start[place] ^= 0xFF
    files[f"flipped_start{ending}"] = bytes(start)
    files[f"more_behind{ending}"] = whole + b"more" * 100
    files[f"empty{ending}"] = b""
    files[f"one_byte{ending}"] = b"\x1f"
    files[f"zeros{ending}"] = bytes(1000)
    files[f"page{ending}"] = b"<!DOCTYPE html><html><title>404</title></html>"
    files[f"pointer{ending}"] = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    return files | no_files(ending)


def no_files(ending: str) -> Files:
    """Links that lead nowhere, to themselves or to a device, a folder and a pipe under the name of a file."""
    targets = {"nowhere": "nothing.here", "device": "/dev/zero", "null": "/dev/null", "parent": ".."}
    links = {f"link_{k}{ending}": partial(os.symlink, target) for k, target in targets.items()}
    links[f"link_to_itself{ending}"] = lambda path: path.symlink_to(path.name)
    return links | {f"folder{ending}": Path.mkdir, f"pipe{ending}": os.mkfifo}


# ---- NIfTI ----

NAN, INF = float("nan"), float("inf")
# Field of the header: (place, how it is packed, values that a careless or hostile writer puts there).
NIFTI_FIELDS: dict[str, tuple[int, str, list]] = {
    "sizeof_hdr": (0, "<i", [0, -1, 349, 540, 2**31 - 1, 1543569408]),
    "dim0": (40, "<h", [-1, 0, 1, 2, 4, 5, 8, 768]),
    "dim1": (42, "<h", [-1, 0, 1, 15, 17, 32767]),
    "dim2": (44, "<h", [-20, 0, 32767]),
    "dim3": (46, "<h", [-1, 0, 1, 9, 19, 32767]),
    "datatype": (70, "<h", [0, 1, 2, 8, 16, 32, 64, 128, 256, 768, 1024, 1536, 2048, 2304, -4, 999]),
    "bitpix": (72, "<h", [0, 1, 64, -16]),
    "pixdim0": (76, "<f", [NAN, 0.0, 5.0]),
    "pixdim1": (80, "<f", [0.0, -10.0, NAN, INF, 1e-30, 1e6]),
    "pixdim3": (88, "<f", [0.0, NAN, 1e30]),
    "vox_offset": (108, "<f", [0.0, 1.0, 351.5, 353.0, -352.0, NAN, INF, 1e9, 1e30]),
    "scl_slope": (112, "<f", [0.0, NAN, INF, -1.0, 1e30, 1e-30]),
    "scl_inter": (116, "<f", [NAN, INF, 1e30, 0.5]),
    "xyzt_units": (123, "<B", [0, 1, 3, 5, 7, 255]),
    "cal_max": (124, "<f", [NAN, INF]),
    "descrip": (148, "<4s", [b"\xff\xfe\0\xe9"]),
    "qform_code": (252, "<h", [-1, 0, 6, 32767]),
    "sform_code": (254, "<h", [-1, 0, 6, 32767]),
    "quatern_b": (256, "<f", [NAN, 2.0, 1e30]),
    "qoffset_x": (268, "<f", [NAN, INF, 1e30]),
    "srow_x": (280, "<f", [NAN, INF, 0.0, 1e-30, 1e30, 9.999]),
    "srow_shift": (292, "<f", [NAN, 1e30]),
    "magic": (344, "<4s", [b"ni1\0", b"n+2\0", b"\0\0\0\0", b"n+1 "]),
}
NO_FORMS = [(252, "<h", 0), (254, "<h", 0)]
NIFTI_PAIRS = {
    "no_forms": NO_FORMS,
    "no_forms_no_size": [*NO_FORMS, (80, "<f", 0.0)],
    "no_forms_nan_size": [*NO_FORMS, (80, "<f", NAN)],
    "no_forms_tiny": [*NO_FORMS, (80, "<f", 1e-30), (84, "<f", 1e-30), (88, "<f", 1e-30)],
    "no_forms_1000_km": [*NO_FORMS, (84, "<f", 1e9)],
    "sform_of_zeros": [(280 + 4 * k, "<f", 0.0) for k in range(12)],
    "sform_of_zeros_no_qform": [(252, "<h", 0)] + [(280 + 4 * k, "<f", 0.0) for k in range(12)],
    "quaternion_beyond_1": [(254, "<h", 0), (256, "<f", 0.9), (260, "<f", 0.9)],
    "4d": [(40, "<h", 4), (46, "<h", 9), (48, "<h", 2)],
    "4d_of_one": [(40, "<h", 4), (48, "<h", 1)],
    "7d": [(40, "<h", 7)] + [(48 + 2 * k, "<h", 1) for k in range(4)],
    "flat": [(40, "<h", 2)],
    "huge": [(42, "<h", 30000), (44, "<h", 30000), (46, "<h", 30000)],
    "float_voxels": [(70, "<h", 16), (72, "<h", 32), (46, "<h", 9)],
    "extension_of_2_gib": [(348, "<i", 1), (352, "<i", 2**31 - 16)],
    "extension_of_nothing": [(348, "<i", 1), (352, "<i", 0)],
    "long_extension": [(348, "<i", 1), (352, "<i", 33)],
    "negative_extension": [(348, "<i", 1), (352, "<i", -16)],
}


def patched(whole: bytes, changes: list[tuple]) -> bytes:
    damaged = bytearray(whole)
    for place, kind, value in changes:
        struct.pack_into(kind, damaged, place, value)
    return bytes(damaged)


def nifti_headers(voxels: np.ndarray) -> Files:
    """One field of the header after the other with each of its bad values; every third file is packed."""
    changes = {
        f"{field}_{value!r}": [(place, kind, value)]
        for field, (place, kind, values) in NIFTI_FIELDS.items()
        for value in values
    }
    files, whole = {}, nifti(voxels)
    for number, (name, change) in enumerate((changes | NIFTI_PAIRS).items()):
        name = "".join(c if c.isalnum() or c in "-+._" else "" for c in name)
        content = patched(whole, change)
        packed = number % 3 == 0
        files[f"{name}.nii{'.gz' if packed else ''}"] = packed_up(content) if packed else content
    return files


def nifti_odd(voxels: np.ndarray, seed: int = 1) -> Files:
    """Voxels and streams that no header tells of."""
    whole = nifti(voxels)
    packed = bytearray(packed_up(whole))
    files = streams(".nii", whole, seed) | streams(".nii.gz", bytes(packed), seed + 1)
    files["wrong_checksum.nii.gz"] = bytes(packed[:-8]) + bytes(4) + bytes(packed[-4:])
    files["bomb.nii.gz"] = packed_up(whole + bytes(2**27))
    files["two_streams.nii.gz"] = packed_up(whole[:3000]) + packed_up(whole[3000:])
    files["not_packed.nii.gz"], files["packed.nii"] = whole, bytes(packed)
    big = nibabel.Nifti1Image.from_bytes(whole)
    swapped = nibabel.Nifti1Image(big.dataobj, big.affine, big.header.as_byteswapped(">"))
    files["big_endian.nii"] = swapped.to_bytes()
    files["nifti2.nii"] = nibabel.Nifti2Image(np.asarray(big.dataobj), big.affine).to_bytes()
    shades = np.asarray(big.dataobj).astype(np.float32)
    arrays = {
        "all_nan": np.full_like(shades, np.nan),
        "some_nan": np.where(shades > 100, np.nan, shades),
        "infinite": np.where(shades > 100, np.inf, shades),
        "huge_values": shades * 1e35,
        "constant": np.full_like(shades, 7),
        "fractions": shades / 7,
        "doubles": shades.astype(np.float64) * 1e300,
        "one_voxel": shades[:1, :1, :1],
        "one_row": shades[:, :1, :1],
        "one_slice": shades[:, :, :1],
        "long": np.tile(shades[:2, :2], (1, 1, 40)),
        "int64": shades.astype(np.int64) * 2**50,
        "uint32": np.full(shades.shape, 2**32 - 1, np.uint32),
        "complex": shades.astype(np.complex64),
    }
    for name, array in arrays.items():
        files[f"{name}.nii"] = nibabel.Nifti1Image(array, big.affine, dtype=array.dtype).to_bytes()
    return files


# ---- NRRD and FreeSurfer ----

NRRD_FIELDS = {
    "type": ["float", "block", "", "nonsense", "longlong"],
    "dimension": ["0", "2", "-3", "99", "three", "3.0"],
    "sizes": ["16 20", "16 20 -18", "0 20 18", "99999 99999 99999", "16 20 x", ""],
    "space": ["scanner-xyz", "RAS", "left out", "\xff\xfe"],
    "space directions": ["none none none", "(nan,0,0) (0,1,0) (0,0,1)", "(0,0,0) (0,0,0) (0,0,0)", "(1,0)"],
    "endian": ["middle", "big", "left out"],
    "encoding": ["ascii", "bzip2", "gzip", "secret", "left out"],
    "space origin": ["(nan,0,0)", "(1e30,0,0)", "(0,0)", "0"],
    "data file": ["../../secret.raw", "/etc/passwd", "LIST"],
    "line skip": ["3", "-1"],
    "byte skip": ["-1", "1000000"],
    "space units": ['"km" "km" "km"', '"', "mm"],
    "kinds": ["domain domain vector", "x"],
}


def nrrd_files(voxels: np.ndarray, seed: int = 3) -> Files:
    files = streams(".nrrd", nrrd(voxels), seed)
    for field, values in NRRD_FIELDS.items():
        for number, value in enumerate(values):
            files[f"{field.replace(' ', '_')}_{number}.nrrd"] = nrrd(voxels, **{field: value})
    files["no_end_of_header.nrrd"] = nrrd(voxels)[:150]
    files["long_line.nrrd"] = b"NRRD0004\n" + b"#" * 2**20 + b"\n\n"
    return files


MGH_FIELDS = {
    "version": (0, ">i", [0, 2, -1]),
    "width": (4, ">i", [0, -1, 2**31 - 1, 17]),
    "frames": (16, ">i", [0, -1, 2, 2**30]),
    "type": (20, ">i", [-1, 0, 1, 2, 3, 99]),
    "good_place": (28, ">h", [0, 2]),
    "size_x": (30, ">f", [0.0, NAN, -1.0, 1e30]),
    "direction": (42, ">f", [NAN, 0.0]),
    "centre": (78, ">f", [NAN, 1e30]),
}


def freesurfer_files(voxels: np.ndarray, seed: int = 4) -> Files:
    whole = mgh(voxels)
    files = streams(".mgz", packed_up(whole), seed)
    for field, (place, kind, values) in MGH_FIELDS.items():
        for value in values:
            name = f"{field}_{value}".replace("-", "minus")
            files[f"{name}.mgz"] = packed_up(patched(whole, [(place, kind, value)]))
    return files


# ---- pictures and arrays ----


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of_size(width: int, height: int, depth: int = 8, colour: int = 0) -> bytes:
    """A PNG whose header announces a size, with hardly any pixels behind it."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    pixels = png_chunk(b"IDAT", zlib.compress(bytes(100)))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + pixels + png_chunk(b"IEND", b"")


def pictures(seed: int = 5) -> Files:
    grey = np.tile(np.arange(48, dtype=np.uint8) * 5, (40, 1))

    def encoded(ending: str, array: np.ndarray) -> bytes:
        return cv2.imencode(ending, array)[1].tobytes()

    files = streams(".png", encoded(".png", grey), seed) | streams(".jpg", encoded(".jpg", grey), seed + 1)
    for width, height in ((0, 0), (2**31 - 1, 2**31 - 1), (60_000, 60_000), (1, 10**6)):
        files[f"size_{width}_{height}.png"] = png_of_size(width, height)
    files["depth_3.png"] = png_of_size(4, 4, depth=3)
    files["colour_7.png"] = png_of_size(4, 4, colour=7)
    files["deep.png"] = encoded(".png", grey.astype(np.uint16) * 257)
    files["clear.png"] = encoded(".png", np.dstack([grey] * 4))
    files["float.tif"] = encoded(".tif", grey.astype(np.float32) / 7)
    files["one_pixel.png"] = encoded(".png", grey[:1, :1])
    files["jpg_as.png"] = encoded(".jpg", grey)
    files["thin.png"] = encoded(".png", grey[:, :1])
    files["wide.png"] = encoded(".png", np.tile(grey[:1], (1, 100)))
    return files


NPY_HEADERS = {
    "object": "{'descr': '|O', 'fortran_order': False, 'shape': (48, 48), }",
    "huge": "{'descr': '|u1', 'fortran_order': False, 'shape': (99999999999, 48), }",
    "negative": "{'descr': '|u1', 'fortran_order': False, 'shape': (-48, -48), }",
    "text_shape": "{'descr': '|u1', 'fortran_order': False, 'shape': 'all', }",
    "no_shape": "{'descr': '|u1', 'fortran_order': False, }",
    "code": "__import__('os').system('touch hostile')",
    "deep": "(" * 5000,
    "no_type": "{'descr': 'zz', 'fortran_order': False, 'shape': (48, 48), }",
    "fields": "{'descr': [('a', '<i2'), ('b', '|u1')], 'fortran_order': False, 'shape': (16, 48), }",
    "none": "{'descr': '|u1', 'fortran_order': None, 'shape': (48, 48), }",
    "empty": "{'descr': '|u1', 'fortran_order': False, 'shape': (0, 48), }",
    "date": "{'descr': '<M8[s]', 'fortran_order': False, 'shape': (12, 24), }",
}


def arrays(seed: int = 7) -> Files:
    grey = np.tile(np.arange(48, dtype=np.uint8) * 5, (48, 1))
    files = streams(".npy", npy(grey), seed)
    for name, text in NPY_HEADERS.items():
        header = text.encode() + b"\n"
        files[f"{name}.npy"] = b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + grey.tobytes()
    odd = {
        "nan": grey * np.nan,
        "float": grey / 255,
        "negative_values": grey.astype(np.int16) - 300,
        "one_dimension": grey[0],
        "five_dimensions": grey[None, None, None],
        "many_channels": np.dstack([grey] * 7),
        "one_pixel": grey[:1, :1],
        "text": np.array([["a", "b"]]),
        "bool": grey > 100,
        "complex": grey * 1j,
        "large_numbers": grey.astype(np.uint64) * 2**55,
    }
    archive = io.BytesIO()
    np.savez(archive, grey=grey)
    files["archive.npy"] = archive.getvalue()
    files["version_9.npy"] = b"\x93NUMPY\x09\0" + npy(grey)[8:]
    return files | {f"values_{name}.npy": npy(array) for name, array in odd.items()}


# ---- HDF5 ----


def hdf5_files(whole: bytes, seed: int = 8) -> Files:
    """Damage to a case that preprocessing wrote."""

    def changed(change) -> bytes:
        file = io.BytesIO(whole)
        with h5py.File(file, "r+") as case:
            change(case)
        return file.getvalue()

    def replaced(name: str, data) -> bytes:
        def change(case):
            del case[name]
            case[name] = data

        return changed(change)

    def without(*names: str) -> bytes:
        return changed(lambda case: [case.__delitem__(name) for name in names])

    def noted(**values) -> bytes:
        return changed(lambda case: case["attributes"].attrs.update(values))

    def linked(name: str, link) -> bytes:
        return replaced(name, link)

    shape = h5py.File(io.BytesIO(whole), "r")["image"].shape
    files = streams(".h5", whole, seed)
    for name in ("image", "label", "index", "attributes"):
        files[f"no_{name}.h5"] = without(name)
        files[f"{name}_elsewhere.h5"] = linked(name, h5py.ExternalLink("/etc/hostname", "/image"))
        files[f"{name}_nowhere.h5"] = linked(name, h5py.SoftLink("/nothing"))
        files[f"{name}_of_text.h5"] = replaced(name, "text")
    files["image_of_group.h5"] = changed(lambda case: (case.__delitem__("image"), case.create_group("image")))
    files["image_2d.h5"] = replaced("image", np.zeros(shape[-2:], np.int16))
    files["image_nan.h5"] = replaced("image", np.full(shape, np.nan, np.float32))
    files["image_empty.h5"] = replaced("image", np.zeros((0, 4, 4), np.int16))
    files["image_small.h5"] = replaced("image", np.zeros((4, 4, 4), np.int16))
    files["label_small.h5"] = replaced("label", np.zeros((4, 4, 4), np.uint8))
    files["label_255.h5"] = replaced("label", np.full(shape[-3:], 255, np.uint8))
    files["label_empty.h5"] = replaced("label", np.zeros(shape[-3:], np.uint8))
    for number, value in enumerate([np.zeros(3), "10", [1.0, 2.0], [NAN] * 3, [0.0] * 3, [-1.0] * 3]):
        files[f"spacing_{number}.h5"] = noted(spacing_mm=value)
    for number, value in enumerate(["json:" + "[" * 90_000, "json:{", b"\xff\xfe", 7, np.zeros((9, 9))]):
        files[f"name_{number}.h5"] = noted(name=value)
        files[f"labelled_{number}.h5"] = noted(labelled=value, voxels=value, centre=value, affine=value)
    files["no_notes.h5"] = changed(lambda case: case["attributes"].attrs.clear())
    files["version_99.h5"] = changed(lambda case: case.attrs.update(format_version=99))
    files["version_text.h5"] = changed(lambda case: case.attrs.update(format_version="new"))
    with h5py.File(io.BytesIO(whole), "r") as case:
        index = list(case["index"])
    for number, places in enumerate([np.full((2, 3), 60_000), np.zeros((2, 2)), np.array(["a"], "S1")]):
        for name in index[:2]:
            files[f"places_{name}_{number}.h5"] = replaced(f"index/{name}", places)
    return files


# ---- notes ----


def json_files(content: dict | list, seed: int = 9) -> Files:
    """Damage to a JSON file: each key left out or of another type, at the top and one level below."""
    files = streams(".json", json.dumps(content, indent=1).encode(), seed)
    files["deep.json"], files["nan.json"] = b"[" * 100_000, b"NaN"
    files["list.json"], files["text.json"], files["null.json"] = b"[]", b'"text"', b"null"
    files["nothing.json"] = b"{}"
    files["latin.json"] = b'{"\xe9": 1}'
    files["long_number.json"] = b'{"a": ' + b"9" * 6000 + b"}"
    wrong = [None, 7, "text", [], {}, [None], NAN, -1, [[1, "a"]], {"a": None}, 1e400, True]
    keys = list(content) if isinstance(content, dict) else []
    for place, key in enumerate(keys):
        files[f"no_{place}.json"] = json.dumps({k: v for k, v in content.items() if k != key}).encode()
        for number, value in enumerate(wrong):
            files[f"key_{place}_{number}.json"] = json.dumps(content | {key: value}).encode()
    for place, key in enumerate(keys):
        inside = content[key]
        if isinstance(inside, list) and inside and isinstance(inside[0], dict):
            for number, inner in enumerate(inside[0]):
                value = wrong[(number + place) % len(wrong)]
                changed = [inside[0] | {inner: value}, *inside[1:]]
                files[f"inner_{place}_{number}.json"] = json.dumps(content | {key: changed}).encode()
        if isinstance(inside, dict):
            for number, inner in enumerate(list(inside)[:12]):
                value = wrong[(number + place) % len(wrong)]
                changed = inside | {inner: value}
                files[f"inner_{place}_{number}.json"] = json.dumps(content | {key: changed}).encode()
    return files


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


def yaml_files(seed: int = 10) -> Files:
    files = streams(".yaml", b"batch_size: 2\nseed: 1\nworkers: 0\n", seed)
    texts = {
        "bomb": BOMB,
        "lr_bomb": f"{BOMB}lr: *i\n",
        "deep": "[" * 20_000,
        "code": "!!python/object/apply:os.system ['touch hostile']",
        "number": "7",
        "list": "- seed\n- 1",
        "unknown": "no_such_flag: 1",
        "twice": "seed: 1\nseed: 2",
        "nested": "seed: {a: 1}",
        "null": "seed: null",
        "nan": "seed: .nan",
        "infinite": "batch_size: .inf",
        "date": "device: 2020-01-01",
        "key_of_list": "? [a, b]\n: 1",
        "tab": "seed:\t1\n\tx: 2",
        "loop": "a: &a [*a]",
        "long_number": "seed: " + "9" * 6000,
        "config": "config: other.yaml",
        "binary": "seed: !!binary aGVsbG8=",
    }
    return files | {f"{name}.yaml": text.encode() for name, text in texts.items()}


def csv_files(text: str, seed: int = 11) -> Files:
    """Damage to a table."""
    files = streams(".csv", text.encode(), seed)
    head, *rows = text.splitlines()
    first = rows[0].split(",") if rows else [""]
    changed = {
        "only_head": head,
        "no_rows_but_blanks": f"{head}\n\n\n",
        "more_cells": f"{head}\n{rows[0]},a,b,c",
        "fewer_cells": f"{head}\n{first[0]}",
        "twice": "\n".join([head, *rows, *rows]),
        "columns_twice": f"{head},{head}\n{rows[0]},{rows[0]}",
        "long_cell": f"{head}\n{'a' * 200_000}",
        "open_quote": f'{head}\n"{rows[0]}',
        "words_for_numbers": "\n".join([head, *(",".join([r.split(",")[0]] + ["x"] * 9) for r in rows)]),
        "nan": "\n".join([head, *(",".join([r.split(",")[0], *["nan"] * (len(first) - 1)]) for r in rows)]),
        "infinite": "\n".join(
            [head, *(",".join([r.split(",")[0], *["inf"] * (len(first) - 1)]) for r in rows)]
        ),
        "semicolons": text.replace(",", ";"),
        "other_columns": text.replace(head, ",".join("abcdefghijkl"[: len(first)])),
    }
    files |= {f"{name}.csv": content.encode() for name, content in changed.items()}
    files["latin.csv"] = f"{head}\ncaf\xe9".encode("latin1")
    files["wide.csv"], files["nul.csv"] = text.encode("utf-16"), text.encode() + b"\0,\0"
    return files


# ---- weights ----


class Code:
    """What a pickle would run when it is read."""

    def __reduce__(self):
        return open, ("hostile", "w")


def checkpoints(state: dict, seed: int = 12) -> Files:
    """Damage to a checkpoint: parts left out or of another type, NaN weights, code."""

    def saved(content, **options) -> Callable[[Path], None]:
        return lambda path: torch.save(content, path, **options)  # when its turn comes: they may be large

    whole = io.BytesIO()
    torch.save(state, whole)
    files = streams(".pt", whole.getvalue(), seed)
    wrong = [None, 7, "text", [], {}, torch.zeros(2), [None], {"a": 1}, {1: 2}]
    for place, key in enumerate(state):
        files[f"no_{key}.pt"] = saved({k: v for k, v in state.items() if k != key})
        for number in range(3):
            files[f"{key}_{number}.pt"] = saved(state | {key: wrong[(place + 3 * number) % len(wrong)]})
    for part in ("config", "preprocessing", "position", "split", "flags", "scaler", "rng"):
        for number, key in enumerate(state.get(part) or {}):
            value = wrong[number % len(wrong)]
            files[f"{part}_{key}.pt"] = saved(state | {part: state[part] | {key: value}})
            if number % 2:
                rest = {k: v for k, v in state[part].items() if k != key}
                files[f"{part}_without_{key}.pt"] = saved(state | {part: rest})
    weights = state["model"]
    first = next(name for name, value in weights.items() if value.is_floating_point())
    for name, value in {
        "nan": torch.full_like(weights[first], torch.nan),
        "half": weights[first].half(),
        "integers": weights[first].int(),
        "other_shape": torch.zeros(3),
        "sparse": torch.zeros(3, 3).to_sparse(),
        "complex": weights[first] * 1j,
        "endless": torch.zeros(1).expand(10**9),
        "meta": torch.empty(2, device="meta"),
    }.items():
        files[f"weight_{name}.pt"] = saved(state | {"model": weights | {first: value}})
    files["code.pt"] = saved({"model": Code(), "config": {}})
    files["old_format.pt"] = saved(state, _use_new_zipfile_serialization=False)
    files["list.pt"], files["tensor.pt"] = saved([state]), saved(torch.zeros(3))
    files["only_weights.pt"] = saved(weights)
    files["wrapped.pt"] = saved(state | {"model": {f"module.{k}": v for k, v in weights.items()}})
    deep: list = []
    for _ in range(150):
        deep = [deep]
    files["deep.pt"] = saved(state | {"config": {"a": deep}})
    return files


def safetensors_files(weights: dict[str, torch.Tensor], seed: int = 13) -> Files:
    whole = save_safetensors(weights)
    files = streams(".safetensors", whole, seed)
    size = struct.unpack("<Q", whole[:8])[0]
    for number, length in enumerate([0, size - 1, size + 1, 2**63, 2**31]):
        files[f"header_{number}.safetensors"] = struct.pack("<Q", length) + whole[8:]
    for name, text in {
        "deep": "[" * 50_000,
        "offsets": '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 99999999]}}',
        "shape": '{"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}',
        "dtype": '{"a": {"dtype": "X9", "shape": [2], "data_offsets": [0, 8]}}',
        "nothing": "{}",
    }.items():
        header = text.encode()
        files[f"{name}.safetensors"] = struct.pack("<Q", len(header)) + header + bytes(8)
    files["other_names.safetensors"] = save_safetensors({"a": torch.zeros(2)})
    nan = {name: torch.full_like(value.float(), torch.nan) for name, value in weights.items()}
    files["nan.safetensors"] = save_safetensors(nan)
    return files


# ---- archives ----


def tar_of(*members: tuple[str, bytes], **fields) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for field, value in fields.items():
                setattr(info, field, value)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def tars(members: dict[str, bytes], seed: int = 14) -> Files:
    """Archives of a data set that lead outside, are damaged, or announce more than a disk holds."""
    inside = list(members.items())
    files = streams(".tar", tar_of(*inside), seed)
    for number, name in enumerate(["../escaped.txt", "/tmp/escaped.txt", "a/../../escaped.txt", "", "a\0b"]):
        files[f"outside_{number}.tar"] = tar_of(*inside, (name, b"x"))
    links = {"symlink": tarfile.SYMTYPE, "link": tarfile.LNKTYPE, "device": tarfile.CHRTYPE, "pipe": b"6"}
    for name, kind in links.items():
        link = tar_of(("Task06_Lung/imagesTr/x.nii.gz", b""), type=kind, linkname="../../../escaped.txt")
        files[f"{name}.tar"] = tar_of(*inside)[: -2 * 512] + link
    huge = bytearray(tar_of(("Task06_Lung/a.bin", b"x")))
    huge[124:136] = b"\x80" + (2**60).to_bytes(11, "big")
    files["huge.tar"] = bytes(huge)
    files["gz_as.tar"] = packed_up(tar_of(*inside))
    files["twice.tar"] = tar_of(*inside, *inside)
    files["file_and_folder.tar"] = tar_of(("Task06_Lung", b"x"), *inside)
    return files


def zips(members: dict[str, bytes], seed: int = 15) -> Files:
    def packed(*more: tuple[str | zipfile.ZipInfo, bytes]) -> bytes:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in (*members.items(), *more):
                info = name if isinstance(name, zipfile.ZipInfo) else zipfile.ZipInfo(name)  # of 1980
                archive.writestr(info, content, zipfile.ZIP_DEFLATED)
        return file.getvalue()

    files = streams(".zip", packed(), seed)
    for number, name in enumerate(["../escaped.txt", "/tmp/escaped.txt", "a/../../escaped.txt", "C:\\a"]):
        files[f"outside_{number}.zip"] = packed((name, b"x"))
    link = zipfile.ZipInfo("rawdata/link")
    link.external_attr = 0o120777 << 16
    files["link.zip"] = packed((link, b"../../../escaped.txt"))
    whole = packed(("rawdata/zeros", bytes(1000)))
    announced = bytearray(whole)
    entry = whole.rindex(b"PK\1\2")
    struct.pack_into("<I", announced, entry + 24, 2**32 - 2)
    files["announced.zip"] = bytes(announced)
    locked = bytearray(whole)
    struct.pack_into("<H", locked, entry + 8, 1)
    files["locked.zip"] = bytes(locked)
    other = bytearray(whole)
    struct.pack_into("<H", other, entry + 10, 99)
    files["unknown_method.zip"] = bytes(other)
    files["file_and_folder.zip"] = packed(("rawdata", b"x"))
    files["empty_name.zip"] = packed(("rawdata/\xff\ud7ff.txt", b"x"))
    return files
