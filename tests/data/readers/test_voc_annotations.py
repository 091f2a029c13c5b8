"""An image's annotation in VOC's form: boxes, outlines, flags, masks, and what is wrong with them."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from tests.data.readers.voc_files import index_png, picture, thing, xml
from weaksam.data.annotation_checks import fit_boxes
from weaksam.data.readers.voc_annotations import with_masks
from weaksam.data.readers.voc_xml import parse_voc_xml
from weaksam.errors import DataError


def test_an_annotation_without_objects() -> None:
    annotation = parse_voc_xml(xml(), "a.xml")
    assert annotation.boxes.shape == (0, 4)
    assert annotation.boxes.dtype == np.float32
    assert (annotation.height, annotation.width, annotation.names) == (80, 100, [])


def test_boxes_become_0_based_and_exclusive() -> None:
    annotation = parse_voc_xml(xml(thing("dog", 1, 1, 100, 80), thing("cat", 10, 20, 10, 20)), "a.xml")
    assert annotation.boxes.tolist() == [[0, 0, 100, 80], [9, 19, 10, 20]]  # the whole image, one pixel
    assert annotation.has_area.all()
    assert not annotation.is_outside.any()


def test_decimals_parts_and_odd_flags_are_understood() -> None:
    part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
    objects = [
        thing(" dog ", 1.5, 2, "3.25", " 4 ", difficult=" 1 "),
        thing("man", 1, 1, 2, 2, difficult="", more=part),
        thing("cat", 1, 1, 2, 2, difficult="True"),
        thing("cow", 1, 1, 2, 2, difficult="Unspecified"),
    ]
    annotation = parse_voc_xml(xml(*objects), "a.xml")
    assert annotation.names == ["dog", "man", "cat", "cow"]
    assert annotation.boxes[0].tolist() == [0.5, 1, 3.25, 4]
    assert annotation.difficult == [True, False, True, False]


@pytest.mark.parametrize("size", [{"width": 0}, {"height": ""}, {"width": -1, "height": -1}])
def test_a_missing_size_is_no_size_and_cuts_nothing(size: dict) -> None:
    annotation = parse_voc_xml(xml(thing("dog", 1, 1, 5000, 80), **size), "a.xml")
    assert (annotation.height, annotation.width) == (None, None)
    assert annotation.boxes.tolist() == [[0, 0, 5000, 80]]
    assert parse_voc_xml(b"<annotation/>", "a.xml").height is None


def test_boxes_are_cut_at_the_border_and_told_apart() -> None:
    objects = [
        thing("dog", 0, 0, 101, 80),  # 0-based export: one pixel over, no reason to speak of it
        thing("dog", 50, 50, 300, 60),  # far outside
        thing("dog", 200, 10, 300, 60),  # nothing is left
        thing("dog", 30, 30, 20, 40),  # corners swapped
    ]
    annotation = parse_voc_xml(xml(*objects), "a.xml")
    assert annotation.boxes[:2].tolist() == [[0, 0, 100, 80], [49, 49, 100, 60]]
    assert annotation.has_area.tolist() == [True, True, False, False]
    assert annotation.is_outside.tolist() == [False, True, True, False]


def test_fit_boxes_of_nothing() -> None:
    boxes, has_area, is_outside = fit_boxes(np.zeros((0, 4)), (5, 5))
    assert (boxes.shape, boxes.dtype, has_area.shape, is_outside.shape) == ((0, 4), np.float32, (0,), (0,))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"a\.xml, line 1: not well-formed XML"),
        (b"<annotation>\n<object>\n</annotation>", r"a\.xml, line 3: not well-formed XML"),
        (b"<annotations/>", r"a\.xml: .*<annotation> was expected, got <annotations>"),
        (xml("<object><bndbox/></object>"), r"a\.xml: object 1 has no <name>"),
        (xml(thing("a", 1, 1, 2, 2), thing("dog", 1, "x", 3, 4)), r"object 2 \(dog\): <bndbox/ymin> is 'x'"),
        (xml(thing("dog", 1, "nan", 3, 4)), "<bndbox/ymin> is 'nan': a number was expected"),
        (xml("<object><name>dog</name><bndbox/></object>"), r"object 1 \(dog\): <bndbox/xmin> is ''"),
        (xml("<object><name>dog</name><robndbox><cx>1</cx></robndbox></object>"), r"\(dog\): <robndbox/cy> is ''"),
        (xml("<object><name>dog</name><polygon><x1>a</x1></polygon></object>"), r"\(dog\): <polygon/x1> is 'a'"),
        (xml(width="wide"), "a.xml: its width must be a whole number of pixels up to 1000000, got 'wide'"),
        (b'<?xml version="1.0" encoding="no-such"?><annotation/>', r"a\.xml"),
    ],
)
def test_a_bad_file_is_named_with_line_or_object(data: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_voc_xml(data, "a.xml")


def test_each_bndbox_of_an_object_is_an_object() -> None:
    box = "<bndbox><xmin>20</xmin><ymin>5</ymin><xmax>30</xmax><ymax>20</ymax></bndbox>"
    annotation = parse_voc_xml(xml(thing("cat", 1, 1, 4, 4), thing("car", 2, 5, 12, 20, more=box)), "a.xml")
    assert annotation.names == ["cat", "car", "car"]
    assert annotation.boxes.tolist() == [[0, 0, 4, 4], [19, 4, 30, 20], [1, 4, 12, 20]]
    assert annotation.places == [1, 2, 2]
    values = np.zeros((80, 100))
    values[0, 0], values[10, 20] = 1, 2
    read = with_masks(annotation, index_png(values), "a.png")
    assert [mask is None for mask in read.masks] == [False, True, True]  # a mask is of all boxes of its object
    assert not read.has_more_masks


def test_the_box_of_an_object_without_bndbox_is_that_around_its_outline() -> None:
    turned = "<robndbox><cx>20</cx><cy>30</cy><w>10</w><h>4</h><angle>1.5707963267948966</angle></robndbox>"
    points = "<pt><x>3</x><y>9</y></pt><pt><x>7</x><y>5</y></pt><username>x</username>"
    numbered = "<x1>3</x1><y1>9</y1><x2>7</x2><y2>5</y2>"
    objects = [turned, f"<polygon>{points}</polygon>", f"<polygon>{numbered}</polygon>", "<polygon/>", ""]
    annotation = parse_voc_xml(xml(*(f"<object><name>dog</name>{one}</object>" for one in objects)), "a.xml")
    assert np.round(annotation.boxes, 4).tolist() == [[18, 25, 22, 35], *[[2, 4, 7, 9]] * 2, *[[0, 0, 0, 0]] * 2]
    assert annotation.has_area.tolist() == [True] * 3 + [False] * 2
    values = np.zeros((80, 100))
    values[10:20, 30:45] = 5
    read = with_masks(annotation, index_png(values), "a.png")
    assert read.boxes[4].tolist() == [30, 10, 45, 20]
    assert read.has_area.tolist() == [True] * 3 + [False, True]


def test_masks_belong_to_objects_by_index() -> None:
    annotation = parse_voc_xml(xml(*[thing("dog", 1, 1, 4, 4)] * 3, width=6, height=5), "a.xml")
    values = np.zeros((5, 6))
    values[1:3, 1:4], values[4, 5], values[0, 0], values[3, 0] = 1, 3, 255, 9  # 255 void; object 9 does not exist
    read = with_masks(annotation, index_png(values), "a.png")
    assert read.has_more_masks
    assert not with_masks(annotation, index_png(values * (values != 9)), "a.png").has_more_masks
    masks = read.masks
    assert masks[1] is None
    for number in (1, 3):
        decoded = coco_mask.decode({"size": [5, 6], "counts": masks[number - 1]})
        np.testing.assert_array_equal(decoded, values == number)
    nothing = with_masks(parse_voc_xml(xml(width=6, height=5), "a.xml"), index_png(values), "a.png")
    assert (nothing.masks, nothing.has_more_masks) == ([], True)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (index_png(np.zeros((4, 4))), r"a\.png: is 4 x 4, a\.xml says 5 x 6"),
        (picture(5, 6), r"a\.png: not a readable PNG"),
        (index_png(np.zeros((5, 6)))[:60], r"a\.png: not a readable PNG"),
    ],
)
def test_a_bad_mask_file_is_named(data: bytes, message: str) -> None:
    annotation = parse_voc_xml(xml(width=6, height=5), "a.xml")
    with pytest.raises(DataError, match=message):
        with_masks(annotation, data, "a.png")


def png_header(height: int, width: int) -> bytes:
    """An index PNG without pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    for chunk in (header, b"IDAT"):
        data += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return data


def test_a_mask_file_of_another_size_is_not_decoded() -> None:
    for stated, message in (((5, 6), r"a\.png: is 60000 x 70000, a\.xml says 5 x 6"), ((0, 0), "more than 100000000")):
        annotation = parse_voc_xml(xml(height=stated[0], width=stated[1]), "a.xml")
        with pytest.raises(DataError, match=message):
            with_masks(annotation, png_header(60_000, 70_000), "a.png")


def test_corners_of_a_polygon_are_pairs() -> None:
    drawn = "<object><name>cat</name><polygon><x1>3</x1><y1>4</y1><x2>9</x2></polygon></object>"
    with pytest.raises(DataError, match=r"a\.xml: object 1 \(cat\): its <polygon> has 2 x and 1 y: one is missing"):
        parse_voc_xml(xml(drawn), "a.xml")


@pytest.mark.parametrize(
    ("flag", "is_difficult"),
    [("1", True), ("1.0", True), ("True", True), ("0", False), ("0.0", False), ("Unspecified", False), ("", False)],
)
def test_difficult_is_0_or_1(flag: str, is_difficult: bool) -> None:
    assert parse_voc_xml(xml(thing("cat", 1, 1, 9, 9, difficult=flag)), "a.xml").difficult == [is_difficult]


@pytest.mark.parametrize("flag", ["yes", "2", "nan"])
def test_another_flag_of_difficult_is_an_error(flag: str) -> None:
    with pytest.raises(DataError, match=rf"a\.xml: object 1 \(cat\): <difficult> is '{flag}': 0 or 1 was expected"):
        parse_voc_xml(xml(thing("cat", 1, 1, 9, 9, difficult=flag)), "a.xml")
