"""Category ids in COCO json files: the dataset's own, else COCO's if the classes are COCO's, else 1, 2 ...

The ids of a dataset in COCO format are kept in the metadata of its tables (`schemas.category_ids_of`), so results are
read and written with them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

_NAMES = """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, handbag,
tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard,
tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot,
hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, mouse, remote, keyboard,
cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear, hair drier,
toothbrush
"""
_SKIPPED = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}  # unused ids in COCO's range 1..90

COCO_IDS: tuple[int, ...] = tuple(k for k in range(1, 91) if k not in _SKIPPED)
COCO_NAMES: tuple[str, ...] = tuple(" ".join(_NAMES.split()).split(", "))


def default_category_ids(class_names: Sequence[str]) -> list[int]:
    """Returns ids for a dataset without its own: COCO's if its classes are COCO's 80 by name, else 1, 2, ..."""
    of_name = dict(zip(COCO_NAMES, COCO_IDS, strict=True))
    if set(class_names) == set(of_name):
        return [of_name[name] for name in class_names]
    return list(range(1, len(class_names) + 1))


def complete_category_ids(known: Sequence[int | None], taken: Collection[int]) -> list[int]:
    """Fills the missing ids in `known` with the next ids after the largest in `taken`."""
    following = max(taken, default=0) + 1
    ids = []
    for number in known:
        ids.append(following if number is None else number)
        following += number is None
    return ids
