"""Volumes: NIfTI, MHA, NRRD and GIPL, by SimpleITK; NIfTI with sheared axes, which ITK refuses, by nibabel."""

from __future__ import annotations

import gzip
import math
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from autofed.data.images.geometry import PICTURE_SLICE_MM, Geometry, Header, Image, directions
from autofed.errors import ValidationErrors
from autofed.files import whole_file

NIFTI = (".nii.gz", ".nii")
ENDINGS = (*NIFTI, ".mha", ".nrrd", ".gipl")

_GIPL_HEADER_BYTES = 256
_NIFTI_HEADER_BYTES = 348


@cache
def _itk() -> Any:
    """SimpleITK, read when the first volume is: it takes 95 MB, which training on preprocessed data can do without.

    It prints a warning for every file with a harmless oddity; what matters is raised.
    """
    import SimpleITK as sitk

    itk: Any = sitk  # whose stubs leave out the arguments of most calls
    itk.ProcessObject.SetGlobalWarningDisplay(False)
    return itk


def _nibabel() -> Any:
    """nibabel, most of whose functions have no types."""
    import nibabel

    return nibabel


def header(path: Path) -> Header:
    """See `autofed.data.images.header`."""
    reader = _itk().ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        return _read_sheared_header(path, error)
    size = tuple(reversed(reader.GetSize()))
    signs = np.where(np.array(reader.GetSpacing()) < 0, -1.0, 1.0)  # as ITK does it: a spacing below 0 turns the axis
    axes = (np.reshape(reader.GetDirection(), (len(size), len(size))) * signs)[:3, :3]
    spacing = tuple(abs(v) for v in reversed(reader.GetSpacing()))
    return _header(size, reader.GetNumberOfComponents(), spacing, tuple(axes.ravel().tolist()))


def _header(size: tuple[int, ...], components: int, spacing: tuple[float, ...], direction: tuple[float, ...]) -> Header:
    """Size and spacing in (.., y, x) order, of 2, 3 or 4 axes; a fourth axis counts as channels."""
    z, y, x = (1, *size)[-3:]
    return Header((components * math.prod(size[:-3]), z, y, x), _three_axes(spacing), direction)


def _three_axes(spacing: tuple[float, ...]) -> tuple[float, float, float]:
    if len(spacing) == 2:
        return (float(max(spacing)) * PICTURE_SLICE_MM, float(spacing[0]), float(spacing[1]))
    z, y, x = spacing[-3:]
    return (float(z), float(y), float(x))


def read(path: Path) -> Image:
    """See `autofed.data.images.read`."""
    stored, is_scaled = _stored_voxels(path)
    reader = _itk().ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
        if not is_scaled and _needs_no_decoding(stored, reader):
            array = stored.reshape(1, *reversed(reader.GetSize())).astype(np.float32)
            return Image(
                array, Geometry(3, _three_axes(reader.GetSpacing()[::-1]), reader.GetOrigin(), reader.GetDirection())
            )
        image = reader.Execute()
    except RuntimeError as error:
        return _read_sheared(path, error)
    _refuse_unsupported(path, image.GetPixelIDTypeAsString(), image.GetDimension())
    array = _itk().GetArrayFromImage(image).astype(np.float32, copy=False)
    if image.GetNumberOfComponentsPerPixel() > 1:
        array = np.moveaxis(array, -1, 0)
    elif image.GetDimension() < 4:
        array = array[None]
    if array.ndim == 3:
        array = array[:, None]
    array = _with_nonfinite_voxels(np.ascontiguousarray(array), stored)
    if image.GetDimension() == 4:
        image = image[:, :, :, 0]
    geometry = Geometry(
        image.GetDimension(), _three_axes(tuple(reversed(image.GetSpacing()))), image.GetOrigin(), image.GetDirection()
    )
    return Image(array, geometry)


def _needs_no_decoding(stored: np.ndarray, reader: Any) -> bool:
    """Whether the numbers in the file need no decoding, so that ITK need not unpack it a second time."""
    plain = reader.GetDimension() == 3 and reader.GetNumberOfComponents() == 1 and min(reader.GetSpacing()) > 0
    return bool(plain) and stored.dtype.kind in "iuf" and stored.size == math.prod(reader.GetSize())


def write(path: Path, array: np.ndarray, geometry: Geometry) -> None:
    """See `autofed.data.images.write`. Keeps the dtype where the format has it; float64 becomes float32."""
    array = _storable(array, narrow=bool(geometry.affine) or path.name.lower().endswith(".gipl"))
    with whole_file(path) as part:
        if geometry.affine:
            affine = np.reshape(geometry.affine, (4, 4))
            _nibabel().save(_nibabel().Nifti1Image(np.transpose(array), affine), part)  # (Z, Y, X) -> (X, Y, Z)
            return
        image = _itk().GetImageFromArray(array[0] if geometry.dimension == 2 else array)
        image.SetSpacing(tuple(reversed(geometry.spacing_mm[-image.GetDimension() :])))
        if geometry.origin:
            image.SetOrigin(geometry.origin)
            image.SetDirection(geometry.direction)
        _itk().WriteImage(image, str(part), useCompression=not str(path).endswith(".nii"))


def _storable(array: np.ndarray, narrow: bool) -> np.ndarray:
    """`narrow`: GIPL has no signed 32 bit and nibabel writes no 64 bit integers, so take the smallest that will do."""
    if array.dtype.kind == "f":
        return array.astype(np.float32, copy=False)
    if array.dtype.kind == "b":
        return array.astype(np.uint8)
    if narrow:
        low, high = int(array.min(initial=0)), int(array.max(initial=0))
        return array.astype(np.promote_types(np.min_scalar_type(low), np.min_scalar_type(high)))
    return array


def _stored_voxels(path: Path) -> tuple[np.ndarray, bool]:
    """The numbers as they stand in a NIfTI or GIPL file, and whether a scale makes voxels of them; else none.

    ITK does not say when such a file ends too early or is damaged: it makes up the rest. So `ValidationErrors` here.
    """
    name = path.name.lower()
    if not name.endswith((*NIFTI, ".gipl")):
        return np.empty(0), False
    try:
        content = gzip.decompress(path.read_bytes()) if name.endswith(".gz") else path.read_bytes()
    except (EOFError, OSError, zlib.error) as error:
        raise _incomplete_error(path, error) from None
    try:
        dtype, count, offset, is_scaled = _nifti_layout(content) if name.endswith(NIFTI) else _gipl_layout(path)
    except Exception:  # a kind that is not known here, or damage: the reader will say it better
        return np.empty(0), False
    expected_bytes = offset + count * dtype.itemsize
    if len(content) < expected_bytes:
        raise _incomplete_error(path, f"its header says {expected_bytes} bytes, found {len(content)}")
    return np.frombuffer(content, dtype, count, offset), is_scaled


def _nifti_layout(content: bytes) -> tuple[np.dtype, int, int, bool]:
    """Kind, number and place of the voxels of a NIfTI-1 file, and whether they are scaled."""
    header = _nibabel().Nifti1Header(content[:_NIFTI_HEADER_BYTES])
    slope, intercept = header.get_slope_inter()
    is_scaled = slope not in (None, 1) or intercept not in (None, 0)
    return header.get_data_dtype(), math.prod(header.get_data_shape()), int(header.get_data_offset()), is_scaled


def _gipl_layout(path: Path) -> tuple[np.dtype, int, int, bool]:
    reader = _itk().ImageFileReader()
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    voxel = _itk().GetArrayFromImage(_itk().Image([1, 1, 1], reader.GetPixelID()))
    return np.dtype((np.void, voxel.itemsize)), math.prod(reader.GetSize()), _GIPL_HEADER_BYTES, False


def _with_nonfinite_voxels(array: np.ndarray, stored: np.ndarray) -> np.ndarray:
    """ITK reads NaN and infinity in a NIfTI file as 0; put them back, in place, for the checks to find."""
    if stored.dtype.kind == "f" and stored.size == array.size:
        is_not_finite = ~np.isfinite(stored)
        array.reshape(-1)[is_not_finite] = stored[is_not_finite]
    return array


def _refuse_unsupported(path: Path, kind: str, axes: int) -> None:
    if axes > 4 or "complex" in kind:
        content = f"found {kind} with {axes} axes"
        raise ValidationErrors(
            str(path), [f"{content}; expected real numbers with 2 or 3 axes, or a fourth for the channels"]
        )


def _incomplete_error(path: Path, reason: object) -> ValidationErrors:
    return ValidationErrors(str(path), [f"the volume is not whole ({reason}); copy it again from its source"])


def _load_sheared(path: Path, error: RuntimeError) -> Any:
    if path.name.lower().endswith(NIFTI):
        try:
            return _nibabel().load(path)
        except Exception as reason:  # nibabel raises a different class for each kind of damage
            error = RuntimeError(str(reason))
    raise ValidationErrors(
        str(path), [f"the volume cannot be read ({_last_line(error)}); copy it again from its source"]
    )


def _read_sheared_header(path: Path, error: RuntimeError) -> Header:
    volume = _load_sheared(path, error)
    size, spacing = tuple(reversed(volume.shape)), tuple(reversed(volume.header.get_zooms()))
    return _header(size, 1, spacing, directions(volume.affine))


def _read_sheared(path: Path, error: RuntimeError) -> Image:
    volume = _load_sheared(path, error)
    _refuse_unsupported(path, str(volume.get_data_dtype()), len(volume.shape))
    try:
        array = np.asarray(volume.dataobj, dtype=np.float32)
    except Exception as reason:  # a truncated stream: EOFError, OSError, zlib.error or ValueError
        raise _incomplete_error(path, reason) from None
    if array.ndim == 2:
        array = array[..., None]
    array = np.transpose(array)[None] if array.ndim == 3 else np.transpose(array)
    spacing = _three_axes(tuple(reversed(volume.header.get_zooms()[:3])))
    affine = tuple(float(v) for v in np.asarray(volume.affine).ravel())
    return Image(np.ascontiguousarray(array), Geometry(3, spacing, affine=affine))


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
