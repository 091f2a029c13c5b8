"""Drawn scenes: deterministic, hard in the ways asked for, and readable as plain VOC and COCO."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from weaksam.core import storage
from weaksam.data.drawn import are_scenes
from weaksam.demo.scene_cache import cache_scenes
from weaksam.demo.scene_drawing import CLASS_NAMES, FAMILIES, Scene, draw_scene, mask_box
from weaksam.demo.scene_shapes import DEMO_CLASSES, VARIED_KINDS
from weaksam.demo.scenes import COCO_IDS, draw_dataset_scene, with_border, write_scenes
from weaksam.errors import ConfigError, DamagedError

SIZE = (128, 160)


@pytest.fixture(scope="module")
def demo_scenes() -> list[Scene]:
    return [draw_scene(seed, family="demo", size=SIZE) for seed in range(60)]


def _content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_scene_is_a_function_of_its_seed():
    one, again, other = (draw_scene(seed, family="demo", size=SIZE) for seed in (5, 5, 6))
    assert np.array_equal(one.image, again.image)
    assert np.array_equal(one.part_map, again.part_map)
    assert not np.array_equal(one.image, other.image)


def test_families_share_neither_names_nor_drawings():
    assert not set(FAMILIES["demo"]) & set(FAMILIES["varied"])
    assert not set(DEMO_CLASSES.values()) & set(VARIED_KINDS.values())


def test_objects_are_what_is_visible(demo_scenes: list[Scene]):
    for scene in demo_scenes:
        assert scene.image.shape == (*SIZE, 3)
        assert scene.image.dtype == np.uint8
        for number, thing in enumerate(scene.objects, start=1):
            assert np.array_equal(thing.mask, scene.object_map == number)
            ys, xs = np.nonzero(thing.mask)
            assert thing.box.tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
            assert thing.box.dtype == np.float32
            assert 0 <= thing.class_id < len(CLASS_NAMES)
            assert (scene.part_map[thing.mask] > 0).all()


def test_mask_box_of_one_pixel():
    mask = np.zeros((4, 5), bool)
    mask[2, 3] = True
    assert mask_box(mask).tolist() == [3, 2, 4, 3]


def test_scenes_are_hard(demo_scenes: list[Scene]):
    things = [thing for scene in demo_scenes for thing in scene.objects]
    sides = np.array([max(t.box[2] - t.box[0], t.box[3] - t.box[1]) for t in things])
    assert sides.max() / sides.min() >= 8
    assert {thing.class_id for thing in things} == set(range(len(CLASS_NAMES)))
    counts = [len(scene.objects) for scene in demo_scenes]
    assert min(counts) <= 1
    assert max(counts) >= 5
    assert 0.02 < np.mean([thing.is_difficult for thing in things]) < 0.35
    # classes co-occur: a mill brings carts more often than chance (1 in 8 things) would
    beside_mill = [t.class_id for s in demo_scenes for t in s.objects if 0 in {u.class_id for u in s.objects}]
    assert np.mean(np.array(beside_mill) == CLASS_NAMES.index("cart")) > 0.15


def test_voc_devkit_is_plain_voc(tmp_path: Path):
    write_scenes(tmp_path / "a", images=9, seed=4, format="voc")
    root = tmp_path / "a" / "VOC2007"
    trainval, test = ((root / f"ImageSets/Main/{s}.txt").read_text().split() for s in ("trainval", "test"))
    assert len(trainval) == 6
    assert len(test) == 3
    assert not set(trainval) & set(test)
    for index, image_id in enumerate(sorted(trainval + test)):
        tree = ET.parse(root / f"Annotations/{image_id}.xml").getroot()
        image = Image.open(root / f"JPEGImages/{image_id}.jpg")
        labels = np.asarray(Image.open(root / f"SegmentationObject/{image_id}.png"))
        assert image.size == (int(tree.findtext("size/width")), int(tree.findtext("size/height")))
        scene, found = draw_dataset_scene(index, 4), tree.findall("object")
        assert len(found) == len(scene.objects)
        for number, (node, thing) in enumerate(zip(found, scene.objects, strict=True), start=1):
            corners = [int(node.findtext(f"bndbox/{k}")) for k in ("xmin", "ymin", "xmax", "ymax")]
            assert (np.array(corners) - [1, 1, 0, 0] == thing.box).all()  # 1-based, inclusive
            assert node.findtext("name") == CLASS_NAMES[thing.class_id]
            assert node.findtext("difficult") == str(int(thing.is_difficult))
            assert set(np.unique(labels[thing.mask])) <= {number, 255}
            assert (labels == number).any()
        assert not labels[scene.object_map == 0].any()


def test_coco_json_is_plain_coco(tmp_path: Path):
    write_scenes(tmp_path / "c", images=6, seed=4, format="coco")
    coco = COCO(str(tmp_path / "c/annotations/instances_train2017.json"))
    assert len(coco.imgs) == 4
    assert sorted(coco.cats) == list(COCO_IDS)
    assert np.diff(sorted(coco.cats)).min() > 1
    for annotation in coco.anns.values():
        mask = coco.annToMask(annotation)
        thing = draw_dataset_scene(annotation["image_id"] - 1, 4).objects[annotation["id"] % 100]
        assert np.array_equal(mask, thing.mask)
        assert annotation["area"] == mask.sum() == coco_mask.area(coco.annToRLE(annotation))
        left, top, width, height = annotation["bbox"]
        assert [left, top, left + width, top + height] == thing.box.tolist()
    image = coco.loadImgs([1])[0]
    assert Image.open(tmp_path / "c/train2017" / image["file_name"]).size == (image["width"], image["height"])


@pytest.mark.parametrize("form", ["voc", "coco"])
def test_the_same_call_gives_the_same_bytes(tmp_path: Path, form: str):
    write_scenes(tmp_path / "a", images=4, seed=1, format=form)
    write_scenes(tmp_path / "b", images=4, seed=1, format=form)
    assert _content(tmp_path / "a") == _content(tmp_path / "b")


def test_a_complete_folder_is_left_alone_and_another_is_refused(tmp_path: Path):
    write_scenes(tmp_path / "a", images=3, seed=1, format="voc")
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "a").rglob("*.jpg")}
    write_scenes(tmp_path / "a", images=3, seed=1, format="voc")
    assert times == {p: p.stat().st_mtime_ns for p in (tmp_path / "a").rglob("*.jpg")}
    with pytest.raises(ConfigError, match=r"holds other scenes \(seed 1\): choose another folder"):
        write_scenes(tmp_path / "a", images=3, seed=2, format="voc")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match="not empty and holds no scenes"):
        write_scenes(tmp_path / "b", images=3, seed=1, format="voc")
    with pytest.raises(ConfigError, match="at least 3 images"):
        write_scenes(tmp_path / "c", images=2, seed=1, format="voc")


def test_a_folder_of_scenes_is_recognised(tmp_path: Path):
    write_scenes(tmp_path / "scenes", images=3, seed=1)
    assert are_scenes(str(tmp_path / "scenes"))
    marker = tmp_path / "scenes" / "scenes.json"
    storage.write_bytes("memory://scenes/copied/scenes.json", marker.read_bytes())
    assert are_scenes("memory://scenes/copied")
    marker.rename(tmp_path / "scenes" / "scenes.partial.json")  # drawing was interrupted
    assert are_scenes(str(tmp_path / "scenes"))
    assert not are_scenes(str(tmp_path / "nowhere"))
    for content in ('[{"scene": "beach"}]', '{"images": []}'):  # a file of this name that means something else
        (tmp_path / "scenes.json").write_text(content)
        assert not are_scenes(str(tmp_path))
    (tmp_path / "scenes.json").write_text("{half")
    with pytest.raises(DamagedError, match="not valid JSON"):
        are_scenes(str(tmp_path))


def test_a_folder_cut_short_is_finished(tmp_path: Path):
    write_scenes(tmp_path / "whole", images=3, seed=1, format="voc")
    write_scenes(tmp_path / "cut", images=3, seed=1, format="voc")
    done = tmp_path / "cut" / "scenes.json"
    wanted = {key: json.loads(done.read_text())[key] for key in ("images", "seed", "format")}
    done.unlink()
    (tmp_path / "cut" / "scenes.partial.json").write_text(json.dumps(wanted))
    (tmp_path / "cut/VOC2007/JPEGImages/000002.jpg").unlink()
    write_scenes(tmp_path / "cut", images=3, seed=1, format="voc")
    assert _content(tmp_path / "cut") == _content(tmp_path / "whole")


def test_void_border_never_swallows_an_object():
    labels = np.zeros((9, 9), np.uint8)
    labels[1:8, 1:5] = 1
    labels[4, 7] = 2  # one pixel: all border
    out = with_border(labels)
    assert (out[2:7, 2:4] == 1).all()
    assert (out[1, 1:5] == 255).all()
    assert out[4, 7] == 2


def test_a_cache_holds_the_scenes_it_names(tmp_path: Path):
    folder = cache_scenes(tmp_path / "cache", images=2, seed=3, family="varied", size=64)
    scene = draw_scene(3_000_001, family="varied", size=(64, 64))
    for name, value in (("images", scene.image), ("objects", scene.object_map), ("parts", scene.part_map)):
        assert np.array_equal(np.load(folder / f"{name}.npy")[1], value)
    before = (folder / "images.npy").stat().st_mtime_ns
    cache_scenes(folder, images=2, seed=3, family="varied", size=64)
    assert (folder / "images.npy").stat().st_mtime_ns == before
