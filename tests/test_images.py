from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image as Pillow

from autofed.data import images
from autofed.data.images import PICTURE_SLICE_MM, Geometry, Header, Image
from autofed.data.images.volumes import ENDINGS as VOLUMES
from autofed.errors import ValidationErrors

TURNED = (0.8, -0.6, 0.0, 0.6, 0.8, 0.0, 0.0, 0.0, 1.0)
SHEARED = np.array([[1, 0.4, 0, 3], [0, 1.3, 0, -4], [0, 0.2, 2, 5], [0, 0, 0, 1.0]])
UPRIGHT = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
PICTURE = Geometry(2, (PICTURE_SLICE_MM, 1.0, 1.0))
STACK = Geometry(3, (3.0, 0.75, 1.25), (0.0, 0.0, 0.0), UPRIGHT)


def geometry(ending: str = ".nii.gz") -> Geometry:
    """An oblique one, where the format has directions."""
    direction = np.eye(3).ravel() if ending == ".gipl" else TURNED
    return Geometry(3, (3.0, 0.75, 1.25), (1.25, -20.5, 7.0), tuple(map(float, direction)))


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def labels(rng):
    return rng.integers(0, 5, (4, 6, 7)).astype(np.int32)


def assert_same_head(head: Header, image: Image) -> None:
    """What the header says is what is read with the voxels."""
    read = image.geometry.header(image.array.shape)
    assert (head.shape, head.spacing_mm) == (read.shape, read.spacing_mm)
    np.testing.assert_allclose(head.direction, read.direction, atol=1e-6)


def close(a: Geometry, b: Geometry) -> bool:
    parts = [(a.spacing_mm, b.spacing_mm), (a.origin, b.origin), (a.direction, b.direction), (a.affine, b.affine)]
    return a.dimension == b.dimension and all(len(p) == len(q) and np.allclose(p, q, atol=1e-6) for p, q in parts)


# Volumes


@pytest.mark.parametrize("ending", VOLUMES)
@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", "int64", "float32", "float64", "bool"])
def test_a_volume_goes_both_ways(tmp_path, labels, ending, dtype):
    path = tmp_path / f"a{ending}"
    array = labels.astype(dtype)
    images.write(path, array, geometry(ending))
    image = images.read(path)
    assert image.array.dtype == np.float32
    assert image.array.shape == (1, 4, 6, 7)
    assert np.array_equal(image.array[0], array)
    assert close(image.geometry, geometry(ending))
    assert_same_head(images.header(path), image)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("ending", VOLUMES)
def test_writing_in_a_read_geometry_moves_nothing(tmp_path, labels, ending):
    first, second = tmp_path / f"a{ending}", tmp_path / f"b{ending}"
    images.write(first, labels, geometry(ending))
    _, read = images.read_labels(first)
    images.write(second, labels, read)
    again, read_again = images.read_labels(second)
    assert np.array_equal(again, labels)
    assert again.dtype == np.int32
    assert read_again.spacing_mm == read.spacing_mm
    assert read_again.origin == read.origin
    np.testing.assert_allclose(read_again.direction, read.direction, atol=1e-15)


def test_axes_come_as_z_y_x(tmp_path):
    array = np.zeros((7, 6, 4), np.float32)  # nibabel's order: x, y, z
    array[5, 2, 1] = 9
    nibabel.save(nibabel.Nifti1Image(array, np.diag([2.0, 3.0, 4.0, 1.0])), tmp_path / "a.nii")
    image = images.read(tmp_path / "a.nii")
    assert image.array[0, 1, 2, 5] == 9
    assert image.geometry.spacing_mm == (4.0, 3.0, 2.0)
    assert image.geometry.in_millimetres
    assert image.geometry.voxel_mm3 == 24.0


def test_stored_slope_and_intercept_count(tmp_path, labels):
    volume = nibabel.Nifti1Image(labels.astype(np.int16), np.eye(4))
    volume.header.set_slope_inter(0.5, 3)
    nibabel.save(volume, tmp_path / "a.nii.gz")
    assert np.array_equal(images.read(tmp_path / "a.nii.gz").array[0], labels.T * 0.5 + 3)


def test_a_flat_nifti_is_one_slice(tmp_path, rng):
    array = rng.normal(size=(7, 6)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(array, np.diag([2.0, 3.0, 1.0, 1.0])), tmp_path / "a.nii.gz")
    image, head = images.read(tmp_path / "a.nii.gz"), images.header(tmp_path / "a.nii.gz")
    assert np.array_equal(image.array, array.T[None, None])
    assert image.geometry.spacing_mm == head.spacing_mm == (3 * PICTURE_SLICE_MM, 3.0, 2.0)
    assert image.geometry.voxel_mm3 == 6.0
    assert head.shape == (1, 1, 6, 7)
    images.write(tmp_path / "b.nii.gz", image.array[0], image.geometry)
    assert images.read(tmp_path / "b.nii.gz").geometry == image.geometry
    assert nibabel.load(tmp_path / "b.nii.gz").shape == (7, 6)


@pytest.mark.parametrize("affine", [np.diag([2.0, 3.0, 4.0, 1.0]), SHEARED], ids=["straight", "sheared"])
def test_a_fourth_axis_counts_as_channels(tmp_path, rng, affine):
    array = rng.normal(size=(7, 6, 5, 3)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(array, affine), tmp_path / "a.nii.gz")
    image, head = images.read(tmp_path / "a.nii.gz"), images.header(tmp_path / "a.nii.gz")
    assert np.array_equal(image.array, np.transpose(array))
    assert image.array.shape == (3, 5, 6, 7)
    assert_same_head(head, image)
    images.write(tmp_path / "b.nii.gz", image.array[0], image.geometry)
    assert images.read(tmp_path / "b.nii.gz").array.shape == (1, 5, 6, 7)
    assert close(images.read(tmp_path / "b.nii.gz").geometry, image.geometry)


@pytest.mark.parametrize("size", [(4, 6, 7, 3), (6, 7, 3)], ids=["3d", "2d"])
def test_vector_volumes_are_channels(tmp_path, rng, size):
    array = rng.integers(0, 255, size).astype(np.uint8)
    sitk.WriteImage(sitk.GetImageFromArray(array, isVector=True), str(tmp_path / "a.mha"))
    image = images.read(tmp_path / "a.mha").array
    assert image.shape == images.header(tmp_path / "a.mha").shape == (3, *(1, *size)[-4:-1])
    assert np.array_equal(image[1].squeeze(), array[..., 1])


@pytest.mark.parametrize("dtype", ["uint8", "int32", "int64", "float32", "float64", "bool"])
def test_sheared_axes_go_both_ways(tmp_path, rng, dtype):
    array = rng.integers(0, 2, (7, 6, 5)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(array, SHEARED), tmp_path / "a.nii.gz")
    with pytest.raises(RuntimeError):  # or this test tests nothing
        sitk.ReadImage(str(tmp_path / "a.nii.gz"))
    image = images.read(tmp_path / "a.nii.gz")
    assert np.array_equal(image.array[0], array.T)
    assert_same_head(images.header(tmp_path / "a.nii.gz"), image)
    np.testing.assert_allclose(np.reshape(image.geometry.affine, (4, 4)), SHEARED, atol=1e-6)
    np.testing.assert_allclose(image.geometry.spacing_mm, np.linalg.norm(SHEARED[:3, :3], axis=0)[::-1], rtol=1e-6)
    assert image.geometry.in_millimetres
    images.write(tmp_path / "b.nii.gz", image.array[0].astype(dtype), image.geometry)
    again = images.read(tmp_path / "b.nii.gz")
    assert np.array_equal(again.array, image.array)
    assert again.geometry == image.geometry


def test_the_direction_of_sheared_axes_is_that_which_itk_gives_to_straight_ones(tmp_path, labels):
    images.write(tmp_path / "a.nii.gz", labels, geometry())
    straight = nibabel.load(tmp_path / "a.nii.gz")
    affine = tuple(np.asarray(straight.affine).ravel())
    np.testing.assert_allclose(
        Geometry(3, STACK.spacing_mm, affine=affine).header((4, 6, 7)).direction, TURNED, atol=1e-6
    )


def test_a_spacing_below_zero_turns_the_axis(tmp_path, labels):
    images.write(tmp_path / "a.mha", labels, STACK)
    content = (tmp_path / "a.mha").read_bytes()
    (tmp_path / "a.mha").write_bytes(content.replace(b"ElementSpacing = 1.25", b"ElementSpacing = -1.25"))
    head = images.header(tmp_path / "a.mha")
    assert (head.spacing_mm, head.direction) == (STACK.spacing_mm, (-1.0, *UPRIGHT[1:]))
    assert_same_head(head, images.read(tmp_path / "a.mha"))


def test_a_flat_sheared_nifti_is_read(tmp_path, rng):
    nibabel.save(nibabel.Nifti1Image(rng.normal(size=(7, 6)).astype(np.float32), SHEARED), tmp_path / "a.nii.gz")
    image = images.read(tmp_path / "a.nii.gz")
    assert image.array.shape == images.header(tmp_path / "a.nii.gz").shape == (1, 1, 6, 7)
    assert image.geometry.spacing_mm == images.header(tmp_path / "a.nii.gz").spacing_mm


@pytest.mark.parametrize("share", [0.02, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("ending", VOLUMES)
def test_a_truncated_volume_is_refused(tmp_path, rng, ending, share):
    path = tmp_path / f"a{ending}"
    images.write(path, rng.normal(size=(16, 16, 16)).astype(np.float32), geometry(ending))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(ValidationErrors, match="copy it again"):
        images.read(path)


@pytest.mark.parametrize("affine", [np.eye(4), SHEARED], ids=["straight", "sheared"])
def test_a_nifti_with_a_damaged_stretch_is_refused(tmp_path, rng, affine):
    path = tmp_path / "a.nii.gz"
    nibabel.save(nibabel.Nifti1Image(rng.normal(size=(16, 16, 16)).astype(np.float32), affine), path)
    damaged = bytearray(path.read_bytes())
    damaged[5000:5010] = bytes(255 - b for b in damaged[5000:5010])
    path.write_bytes(damaged)
    with pytest.raises(ValidationErrors, match=r"not whole.*copy it again"):
        images.read(path)


def test_what_is_no_volume_is_refused(tmp_path):
    for ending in VOLUMES:
        path = tmp_path / f"a{ending}"
        path.write_bytes(b"this is a letter, not a scan" * 20)
        for verb in (images.read, images.header):
            with pytest.raises(ValidationErrors) as caught:
                verb(path)
            assert caught.value.about == str(path)


@pytest.mark.parametrize("size", [(7, 6), (7, 6, 5), (7, 6, 5, 2), (7, 6, 5, 1, 2)], ids=len)
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_what_is_not_finite_in_a_nifti_is_seen(tmp_path, rng, ending, size):
    array = rng.normal(size=size).astype(np.float32)
    array[(2, 3, 4, 0, 1)[: len(size)]] = np.nan
    array[(1, 0, 2, 0, 0)[: len(size)]] = -np.inf
    volume = nibabel.Nifti1Image(array, np.eye(4))
    volume.header.set_intent("vector" if len(size) == 5 else "none")
    nibabel.save(volume, tmp_path / f"a{ending}")
    read = images.read(tmp_path / f"a{ending}").array
    np.testing.assert_array_equal(read.ravel(), array.T.ravel())


@pytest.mark.parametrize("size", [(7, 6, 5, 2, 2), (7, 6, 5, 2, 2, 2)])
def test_more_than_four_axes_are_refused(tmp_path, size):
    nibabel.save(nibabel.Nifti1Image(np.zeros(size, np.float32), np.eye(4)), tmp_path / "a.nii.gz")
    with pytest.raises(ValidationErrors, match=f"with {len(size)} axes"):
        images.read(tmp_path / "a.nii.gz")


@pytest.mark.parametrize("affine", [np.eye(4), SHEARED], ids=["straight", "sheared"])
def test_complex_numbers_are_refused(tmp_path, affine):
    nibabel.save(nibabel.Nifti1Image(np.ones((4, 4, 4), np.complex64), affine), tmp_path / "a.nii.gz")
    with pytest.raises(ValidationErrors, match="complex"):
        images.read(tmp_path / "a.nii.gz")


# Pictures


@pytest.mark.parametrize("ending", [".png", ".bmp", ".tif", ".tiff"])
@pytest.mark.parametrize("dtype", ["uint8", "int32", "bool"])
def test_a_label_picture_goes_both_ways(tmp_path, rng, ending, dtype):
    label = rng.integers(0, 2, (1, 9, 11)).astype(dtype)
    images.write(tmp_path / f"a{ending}", label, PICTURE)
    read, where = images.read_labels(tmp_path / f"a{ending}")
    assert np.array_equal(read, label)
    assert where == PICTURE
    assert not where.in_millimetres
    assert where.voxel_mm3 == 1.0


@pytest.mark.parametrize("ending", [".png", ".bmp", ".tif", ".jpg", ".jpeg"])
def test_colours_are_three_channels(tmp_path, rng, ending):
    pixels = np.repeat(np.repeat(rng.integers(0, 255, (3, 4, 3)), 8, 0), 8, 1).astype(np.uint8)
    Pillow.fromarray(pixels).save(tmp_path / f"a{ending}", **({"quality": 100} if ending.startswith(".j") else {}))
    image = images.read(tmp_path / f"a{ending}").array
    assert image.shape == images.header(tmp_path / f"a{ending}").shape == (3, 1, 24, 32)
    loss = np.abs(image[:, 0] - np.moveaxis(pixels, -1, 0)).mean()
    assert loss <= (12 if ending.startswith(".j") else 0)


@pytest.mark.parametrize("ending", [".png", ".tif"])
def test_16_bit_pictures_keep_their_values(tmp_path, rng, ending):
    pixels = rng.integers(0, 65535, (1, 9, 11))
    images.write(tmp_path / f"a{ending}", pixels, PICTURE)
    assert np.array_equal(images.read(tmp_path / f"a{ending}").array[0], pixels)


def test_shares_are_stored_in_8_bits(tmp_path):
    images.write(tmp_path / "a.png", np.array([[[0.0, 0.5, 1.0, 1.2]]]), PICTURE)
    assert images.read(tmp_path / "a.png").array.ravel().tolist() == [0, 128, 255, 255]


def test_a_palette_is_read_as_its_numbers_but_in_a_bmp_as_colours(tmp_path, rng):
    numbers = rng.integers(0, 3, (9, 11)).astype(np.uint8)
    picture = Pillow.fromarray(numbers).convert("P")
    picture.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200])
    for ending in ("png", "tif", "bmp"):
        picture.save(tmp_path / f"a.{ending}")
    assert np.array_equal(images.read_labels(tmp_path / "a.png")[0][0], numbers)
    assert np.array_equal(images.read_labels(tmp_path / "a.tif")[0][0], numbers)
    assert images.read(tmp_path / "a.bmp").array.shape == (3, 1, 9, 11)
    assert images.read(tmp_path / "a.bmp").array[:, 0, 0, 0].max() == 200


@pytest.mark.filterwarnings("ignore:Truncated File Read")
@pytest.mark.parametrize("ending", [".png", ".jpg", ".bmp", ".tif"])
def test_a_truncated_picture_is_refused(tmp_path, rng, ending):
    path = tmp_path / f"a{ending}"
    Pillow.fromarray(rng.integers(0, 255, (40, 50, 3)).astype(np.uint8)).save(path)
    whole = path.read_bytes()
    for share in (0.0, 0.01, 0.1, 0.5, 0.9):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(ValidationErrors, match="copy it again"):
            images.read(path)


def test_several_pages_of_a_png_are_refused(tmp_path):
    page = Pillow.new("L", (5, 4))
    page.save(tmp_path / "a.png", save_all=True, append_images=[Pillow.new("L", (5, 4), n) for n in (1, 2)])
    with pytest.raises(ValidationErrors, match="has one page, but this file has 3"):
        images.header(tmp_path / "a.png")


def test_a_picture_that_would_fill_the_memory_is_refused(tmp_path):
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    size = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 0, 0, 0, 0)
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IEND", b""))
    with pytest.raises(ValidationErrors, match="cannot be read"):
        images.read(tmp_path / "a.png")


# Pictures of several pages: TIFF volumes


def save_pages(path: Path, *pages: Pillow.Image, **options) -> Path:
    pages[0].save(path, save_all=True, append_images=pages[1:], **options)
    return path


@pytest.mark.filterwarnings("error::ResourceWarning")
@pytest.mark.parametrize("ending", [".tif", ".tiff"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", "int64", "float32", "float64", "bool"])
def test_a_tiff_of_several_pages_is_a_volume_that_goes_both_ways(tmp_path, labels, ending, dtype):
    path = tmp_path / f"a{ending}"
    array = (labels.astype(dtype) * (500 if dtype in ("uint16", "int64") else 1)) - (3 if dtype == "int32" else 0)
    array = array * 0.3 if dtype.startswith("float") else array
    images.write(path, array, STACK)
    image = images.read(path)
    assert image.array.dtype == np.float32
    assert np.array_equal(image.array[0], array.astype(np.float32))
    assert image.geometry == STACK
    assert image.geometry.in_millimetres
    assert_same_head(images.header(path), image)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", path.name]
    assert json.loads((tmp_path / "a.json").read_text()) == {"spacing": [3.0, 0.75, 1.25]}
    assert not images.is_picture(path)


def test_a_volume_without_a_spacing_is_known_as_such(tmp_path, labels):
    unknown = Geometry(3, (1.0, 1.0, 1.0))
    images.write(tmp_path / "a.tif", labels, unknown)
    (tmp_path / "b.json").write_text('{"spacing": [3, 1, 1]}')
    read, where = images.read_labels(tmp_path / "a.tif")
    assert np.array_equal(read, labels)
    assert where == unknown
    assert not where.in_millimetres
    assert images.header(tmp_path / "a.tif").direction == ()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tif", "b.json"]


@pytest.mark.parametrize(
    ("name", "beside"),
    [
        ("case_0000.tif", "case.json"),
        ("case_0001.tif", "case.json"),
        ("case.tif", "case.json"),
        ("scan_0001.tif", "scan_0001.json"),
        ("scan_0001_0000.tif", "scan_0001.json"),
        ("a.b_0000.TIF", "a.b.json"),
    ],
)
def test_the_spacing_stands_where_nnunet_looks_for_it(tmp_path, name, beside):
    page = Pillow.new("L", (5, 4))
    path = save_pages(tmp_path / name, page, page, format="TIFF")
    assert images.spacing_file(path) is None
    (tmp_path / beside).write_text('{"spacing": [3, 0.5, 0.25], "scanner": "one"}')
    assert images.header(path).spacing_mm == images.read(path).geometry.spacing_mm == (3.0, 0.5, 0.25)
    assert images.spacing_file(path) == tmp_path / beside
    assert images.spacing_file(path.with_suffix(".png")) is None


def test_what_else_is_known_beside_a_volume_stays(tmp_path, labels):
    (tmp_path / "a.json").write_text('{"scanner": "one", "spacing": [9, 9, 9]}')
    images.write(tmp_path / "a.tif", labels, STACK)
    assert json.loads((tmp_path / "a.json").read_text()) == {"scanner": "one", "spacing": [3.0, 0.75, 1.25]}


@pytest.mark.parametrize(
    "value", ["3", "[1, 1]", "[1, 0, 1]", "[1, -1, 1]", "[1, NaN, 1]", '["1", 1, 1]', "[true, 1, 1]"]
)
def test_a_spacing_that_is_none_is_refused(tmp_path, labels, value):
    images.write(tmp_path / "a.tif", labels, STACK)
    (tmp_path / "a.json").write_text(f'{{"spacing": {value}}}')
    for verb in (images.header, images.read):
        with pytest.raises(ValidationErrors, match="expected mm from voxel to voxel") as caught:
            verb(tmp_path / "a.tif")
        assert caught.value.about == str(tmp_path / "a.json")


@pytest.mark.filterwarnings("error::ResourceWarning")
@pytest.mark.parametrize("odd", [Pillow.new("L", (5, 3)), Pillow.new("RGB", (5, 4))], ids=["size", "channels"])
def test_pages_that_differ_are_refused(tmp_path, odd):
    page = Pillow.new("L", (5, 4))
    path = save_pages(tmp_path / "a.tif", page, page, odd)
    for verb in (images.header, images.read):
        with pytest.raises(ValidationErrors, match="page 0 is 4 x 5, page 2 is"):
            verb(path)


def test_pages_in_colours_are_a_volume_of_three_channels(tmp_path, rng):
    pixels = rng.integers(0, 255, (2, 4, 5, 3)).astype(np.uint8)
    image = images.read(save_pages(tmp_path / "a.tif", *map(Pillow.fromarray, pixels)))
    assert np.array_equal(image.array, np.moveaxis(pixels, -1, 0))


@pytest.mark.parametrize(
    ("pages", "description"),
    [
        (4, "ImageJ=1.53\nimages=4\nchannels=2\nslices=2\n"),
        (4, "ImageJ=1.53\nimages=4\nslices=2\nframes=2\n"),
        (1, "ImageJ=1.53\nimages=4\nslices=4\n"),  # more than 4 GB: one page, and all voxels behind it
        (4, '<OME><Pixels SizeC="2" SizeT="1" SizeZ="2"/></OME>'),
    ],
)
def test_pages_that_are_more_than_slices_are_refused(tmp_path, pages, description):
    page = Pillow.new("L", (5, 4))
    path = save_pages(tmp_path / "a.tif", *[page] * pages, description=description)
    with pytest.raises(ValidationErrors, match=f"found {pages} pages, while its description says"):
        images.header(path)


@pytest.mark.parametrize(
    "description", ["ImageJ=1.53\nimages=3\nslices=3\nunit=mm\n", '<OME><Pixels SizeC="1"/></OME>']
)
def test_pages_that_are_described_as_slices_are_read(tmp_path, description):
    page = Pillow.new("L", (5, 4))
    assert images.header(save_pages(tmp_path / "a.tif", *[page] * 3, description=description)).shape == (1, 3, 4, 5)


@pytest.mark.parametrize("compression", [None, "tiff_adobe_deflate", "tiff_lzw"])
def test_a_truncated_tiff_volume_is_refused(tmp_path, rng, compression):
    pages = rng.integers(0, 255, (7, 16, 18)).astype(np.uint8)
    path = save_pages(tmp_path / "a.tif", *map(Pillow.fromarray, pages), compression=compression)
    whole = path.read_bytes()
    for share in np.linspace(0, 0.99, 40):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(ValidationErrors, match="copy it again"):
            images.read(path)


def test_the_header_of_a_tiff_volume_is_read_without_its_voxels(tmp_path, labels, monkeypatch):
    images.write(tmp_path / "a.tif", labels, STACK)
    monkeypatch.setattr(Pillow.Image, "load", None)
    assert images.header(tmp_path / "a.tif").shape == (1, 4, 6, 7)
    with pytest.raises(ValidationErrors):  # or this test tests nothing
        images.read(tmp_path / "a.tif")


def test_pictures_are_told_from_volumes(tmp_path, labels):
    images.write(tmp_path / "flat.tif", labels[:1], PICTURE)
    images.write(tmp_path / "deep.tif", labels, STACK)
    images.write(tmp_path / "deep.nii.gz", labels, STACK)
    assert [images.is_picture(tmp_path / n) for n in ("flat.tif", "deep.tif", "deep.nii.gz")] == [True, False, False]
    assert [images.is_picture(ending) for ending in (".png", ".tif", ".nii.gz")] == [True, True, False]


# Both


@pytest.mark.parametrize(
    ("name", "ending"),
    [
        ("a.nii.gz", ".nii.gz"),
        ("A.NII.GZ", ".nii.gz"),
        ("a.b.nii", ".nii"),
        ("a.JPG", ".jpg"),
        ("a.txt", ""),
        ("nii", ""),
    ],
)
def test_endings_are_told_from_names(name, ending):
    assert images.ending_of(name) == ending


def test_lossy_pictures_have_png_labels():
    assert [images.label_ending(e) for e in (".jpg", ".jpeg", ".png", ".nii.gz")] == [".png", ".png", ".png", ".nii.gz"]


def test_an_unknown_kind_and_a_missing_file_are_told_apart(tmp_path):
    with pytest.raises(ValidationErrors, match="files of this kind are not read"):
        images.read(tmp_path / "a.txt")
    with pytest.raises(ValidationErrors, match="there is no such file"):
        images.read(tmp_path / "a.nii.gz")


@pytest.mark.parametrize("value", [0.5, np.nan, np.inf])
def test_labels_are_whole_numbers(tmp_path, value):
    images.write(tmp_path / "a.nii.gz", np.full((2, 3, 4), value, np.float32), geometry())
    with pytest.raises(ValidationErrors, match="whole numbers only"):
        images.read_labels(tmp_path / "a.nii.gz")


def test_labels_have_one_channel(tmp_path):
    Pillow.new("RGB", (5, 4)).save(tmp_path / "a.png")
    with pytest.raises(ValidationErrors, match="this file has 3"):
        images.read_labels(tmp_path / "a.png")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.nii.gz"
    images.write(path, np.ones((2, 3, 4), np.uint8), geometry())
    with pytest.raises(Exception):  # noqa: B017 (what ITK raises is its own affair)
        images.write(path, np.ones((2, 3, 4), np.complex64), Geometry(3, (1.0, 1.0, -1.0), (0.0,), (1.0,)))
    assert [p.name for p in tmp_path.iterdir()] == ["a.nii.gz"]
    assert images.read(path).array.sum() == 24
