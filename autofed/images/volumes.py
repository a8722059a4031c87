"""Volumes: NIfTI, MHA, NRRD and GIPL, by SimpleITK; NIfTI with sheared axes, which ITK refuses, by nibabel."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import SimpleITK as sitk

from autofed.files import whole_file
from autofed.images.geometry import PICTURE_SLICE_MM, Geometry, Header, Image
from autofed.problems import Problems

NIFTI = (".nii.gz", ".nii")
ENDINGS = (*NIFTI, ".mha", ".nrrd", ".gipl")

# ITK prints a warning for every file with a harmless oddity; what matters is raised.
sitk.ProcessObject.SetGlobalWarningDisplay(False)


def header(path: Path) -> Header:
    """See `autofed.images.header`."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        return _sheared_header(path, error)
    size = tuple(reversed(reader.GetSize()))
    return _header(size, reader.GetNumberOfComponents(), tuple(reversed(reader.GetSpacing())))


def _header(size: tuple[int, ...], components: int, spacing: tuple[float, ...]) -> Header:
    """Size and spacing in (.., y, x) order, of 2, 3 or 4 axes; a fourth axis counts as channels."""
    channels = components * (size[0] if len(size) == 4 else 1)
    shape = (1, *size)[-3:] if len(size) < 4 else size[1:]
    return Header((channels, *shape), _three(spacing))


def _three(spacing: tuple[float, ...]) -> tuple[float, float, float]:
    if len(spacing) == 2:
        return (max(spacing) * PICTURE_SLICE_MM, float(spacing[0]), float(spacing[1]))
    z, y, x = spacing[-3:]
    return (float(z), float(y), float(x))


def read(path: Path) -> Image:
    """See `autofed.images.read`."""
    try:
        image = sitk.ReadImage(str(path))
    except RuntimeError as error:
        return _read_sheared(path, error)
    array = sitk.GetArrayFromImage(image).astype(np.float32, copy=False)
    if image.GetNumberOfComponentsPerPixel() > 1:
        array = np.moveaxis(array, -1, 0)
    elif image.GetDimension() < 4:
        array = array[None]
    if array.ndim == 3:
        array = array[:, None]
    if image.GetDimension() == 4:
        image = image[:, :, :, 0]
    geometry = Geometry(
        image.GetDimension(), _three(tuple(reversed(image.GetSpacing()))), image.GetOrigin(), image.GetDirection()
    )
    return Image(np.ascontiguousarray(array), geometry)


def write(path: Path, array: np.ndarray, geometry: Geometry) -> None:
    """See `autofed.images.write`. Keeps the dtype; float64 becomes float32."""
    if array.dtype == np.float64:
        array = array.astype(np.float32)
    with whole_file(path) as part:
        if geometry.affine:
            affine = np.reshape(geometry.affine, (4, 4))
            nibabel.save(nibabel.Nifti1Image(np.transpose(array), affine), part)  # (Z, Y, X) -> (X, Y, Z)
            return
        image = sitk.GetImageFromArray(array[0] if geometry.dimension == 2 else array)
        image.SetSpacing(tuple(reversed(geometry.spacing_mm[-image.GetDimension() :])))
        if geometry.origin:
            image.SetOrigin(geometry.origin)
            image.SetDirection(geometry.direction)
        sitk.WriteImage(image, str(part), useCompression=not str(path).endswith(".nii"))


def _sheared(path: Path, error: RuntimeError) -> nibabel.Nifti1Image:
    if path.name.lower().endswith(NIFTI):
        try:
            return nibabel.load(path)  # type: ignore[return-value]
        except Exception as reason:  # nibabel raises a different class for each kind of damage
            error = RuntimeError(str(reason))
    raise Problems(str(path), [f"the volume cannot be read ({_last_line(error)}); copy it again from its source"])


def _sheared_header(path: Path, error: RuntimeError) -> Header:
    volume = _sheared(path, error)
    return _header(tuple(reversed(volume.shape)), 1, tuple(reversed(volume.header.get_zooms())))


def _read_sheared(path: Path, error: RuntimeError) -> Image:
    volume = _sheared(path, error)
    try:
        array = np.asarray(volume.dataobj, dtype=np.float32)
    except Exception as reason:  # a truncated stream: EOFError, OSError, zlib.error or ValueError
        raise Problems(str(path), [f"the volume is not whole ({reason}); copy it again from its source"]) from None
    if array.ndim == 2:
        array = array[..., None]
    array = np.transpose(array)[None] if array.ndim == 3 else np.transpose(array)
    z, y, x = reversed([float(v) for v in volume.header.get_zooms()[:3]])
    affine = tuple(float(v) for v in np.asarray(volume.affine).ravel())
    return Image(np.ascontiguousarray(array), Geometry(3, (z, y, x), affine=affine))


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
