"""Images of every kind: converted as they should be, or refused with the reason."""

import io
import struct
import zlib

import numpy as np
import pytest
from photographs import chunk, encoded, photographs, png_of_16_bits
from PIL import Image

from ncfm_engine.sources.decode import Decoder, Refused

PHOTOGRAPH = photographs(1, side=48)[0][0]


def png_that_declares(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(1 + 3 * 100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_pixels_come_out_channels_first_and_unchanged():
    np.testing.assert_array_equal(Decoder()(encoded(PHOTOGRAPH)), PHOTOGRAPH.transpose(2, 0, 1))
    np.testing.assert_array_equal(Decoder()(PHOTOGRAPH), PHOTOGRAPH.transpose(2, 0, 1))
    np.testing.assert_array_equal(Decoder()(PHOTOGRAPH[..., 0]), PHOTOGRAPH[None, ..., 0])


@pytest.mark.filterwarnings("default")  # as users have it
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"no picture", "no image of a known format"),
        (encoded(PHOTOGRAPH)[:-300], "truncated"),
        (encoded(PHOTOGRAPH, "jpg")[:-300], "Truncated|truncated"),
        (encoded(PHOTOGRAPH, "webp")[:-300], "."),
        (encoded(PHOTOGRAPH, "tiff"), "no image of a known format"),
        (png_that_declares(50_000, 50_000), "decompression bomb"),
        (png_that_declares(10_000, 9_000), "decompression bomb"),  # of which Pillow only warns
        (encoded(Image.fromarray(np.full((4, 4), 40_000, np.uint16))), "16 bits"),
        (png_of_16_bits(2), "16 bits"),
        (png_of_16_bits(6), "16 bits"),
        (b"P6 2 1 65535 " + bytes(12), "16 bits"),
        (encoded(Image.new("F", (4, 4)), "tiff"), "no image of a known format"),
        (b"Pf 2 1 -1.0\n" + bytes(8), "pixels of Pillow's mode 'F' cannot become 8-bit"),
        (encoded(Image.new("RGBA", (4, 4), (1, 2, 3, 128))), "transparent pixels"),
        (encoded(Image.new("LA", (4, 4), (1, 128))), "transparent pixels"),
    ],
)
def test_what_cannot_be_used_is_refused_with_the_reason(content, reason):
    with pytest.raises(Refused, match=reason):
        Decoder()(content)


def test_the_content_tells_the_format_and_not_the_name():
    assert (
        Decoder()(encoded(PHOTOGRAPH, "webp", lossless=True)).tobytes()
        == Decoder()(encoded(PHOTOGRAPH)).tobytes()
    )


@pytest.mark.parametrize(
    ("ink", "colour"),
    [
        ((0, 0, 0, 0), (255, 255, 255)),
        ((255, 0, 0, 0), (0, 255, 255)),
        ((0, 255, 0, 0), (255, 0, 255)),
        ((0, 0, 255, 0), (255, 255, 0)),
        ((0, 0, 0, 255), (0, 0, 0)),
    ],
)
def test_cmyk_of_a_printing_house_becomes_the_colour_that_its_inks_make(ink, colour):
    content = encoded(Image.new("CMYK", (16, 16), ink), "jpg", quality=100)
    found = Decoder()(content)[:, 8, 8].astype(int)
    assert np.abs(found - colour).max() <= 2


def test_a_palette_an_opaque_alpha_channel_and_grey_are_converted():
    palette = Image.fromarray(PHOTOGRAPH).quantize(16)
    np.testing.assert_array_equal(
        Decoder()(encoded(palette)), np.asarray(palette.convert("RGB")).transpose(2, 0, 1)
    )
    opaque = Image.fromarray(PHOTOGRAPH).convert("RGBA")
    np.testing.assert_array_equal(Decoder()(encoded(opaque)), PHOTOGRAPH.transpose(2, 0, 1))
    bilevel = Image.fromarray(PHOTOGRAPH).convert("1")
    assert set(np.unique(Decoder()(encoded(bilevel)))) == {0, 255}


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    content = encoded(frames[0], "gif", save_all=True, append_images=frames[1:])
    assert Decoder()(content)[:, 4, 4].tolist() == [255, 0, 0]


def test_a_photograph_taken_sideways_is_turned_upright():
    sideways, exif = Image.fromarray(PHOTOGRAPH[:, :32]), Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    upright = np.asarray(sideways.transpose(Image.Transpose.ROTATE_270))
    np.testing.assert_array_equal(Decoder()(encoded(sideways, exif=exif)), upright.transpose(2, 0, 1))


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_channels_makes_all_images_grey_or_coloured(channels, mode):
    for image in (PHOTOGRAPH, PHOTOGRAPH[..., 0]):
        expected = np.asarray(Image.fromarray(image).convert(mode)).reshape(48, 48, -1).transpose(2, 0, 1)
        np.testing.assert_array_equal(Decoder(channels=channels)(image), expected)


def test_crop_keeps_the_middle_and_squash_keeps_everything():
    image = np.zeros((10, 30, 3), np.uint8)
    image[:, :10], image[:, 20:] = (255, 0, 0), (0, 0, 255)
    for lying in (image, image.transpose(1, 0, 2)):
        assert Decoder(10, "crop")(lying).max() == 0
    squashed = Decoder(10, "squash")(image)
    assert squashed[:, 5, 1].tolist() == [255, 0, 0]
    assert squashed[:, 5, 8].tolist() == [0, 0, 255]


def test_shrinking_averages_instead_of_picking_pixels():
    checked = np.indices((32, 32)).sum(0) % 2 * 255
    found = Decoder(8)(checked.astype(np.uint8))
    assert np.abs(found.astype(int) - 128).max() <= 2


def test_a_large_jpeg_decoded_at_a_fraction_looks_the_same():
    from sklearn.datasets import load_sample_images

    content = encoded(load_sample_images().images[0][:400, :400], "jpg", quality=95)
    exact = Decoder(40)(np.asarray(Image.open(io.BytesIO(content)))).astype(int)
    assert np.abs(Decoder(40)(content) - exact).mean() < 1.5
    assert not np.array_equal(Decoder(40)(content), exact)  # it was


@pytest.mark.parametrize("suffix", ["png", "webp", "jpg"])
def test_a_picture_whose_facts_cannot_be_read_is_taken_as_it_lies(suffix):
    plain = Image.fromarray(PHOTOGRAPH)
    strange = Decoder()(encoded(plain, suffix, exif=b"Exif\0\0garbagegarbage"))
    np.testing.assert_array_equal(strange, Decoder()(encoded(plain, suffix)))


def test_five_bits_per_channel_are_not_sixteen():
    row = struct.pack("<2H", 0b11111_000000_00000, 0b00000_000000_11111)  # red, blue
    header = struct.pack("<IiiHHIIiiII", 40, 2, 1, 1, 16, 3, 4, 0, 0, 0, 0)
    masks = struct.pack("<3I", 0xF800, 0x07E0, 0x001F)
    start = 14 + len(header) + len(masks)
    content = b"BM" + struct.pack("<IHHI", start + 4, 0, 0, start) + header + masks + row
    assert Decoder()(content).tolist() == [[[255, 0]], [[0, 0]], [[0, 255]]]


def test_neither_long_rows_nor_plain_text_are_taken_for_sixteen_bits():
    wide = np.tile(PHOTOGRAPH, (1, 6, 1))  # a .bmp says how many bytes a row has
    np.testing.assert_array_equal(Decoder()(encoded(wide, "bmp")), wide.transpose(2, 0, 1))
    assert Decoder()(b"P3 2 1 255 1 2 3 4 5 6").tolist() == [[[1, 4]], [[2, 5]], [[3, 6]]]
