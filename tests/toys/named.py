"""A folder of images whose names begin with their label: cat_1.png."""

from weaksam.core import storage
from weaksam.data.datasets import ImageRecord, make_dataset
from weaksam.data.readers.format import DatasetFormat, look_by_reading


def _read(source):
    files = [file for file in storage.list_files(source.root) if file.path.endswith(".png")]
    labels = [file.path.split("_")[0] for file in files]
    records = [
        ImageRecord(file.path, file.uri, "train", file.size, [label], file.uri)
        for file, label in zip(files, labels, strict=True)
    ]
    return make_dataset(records, source.classes or sorted(set(labels)))


def _look(source):
    return look_by_reading(_read, source, "the names")


FORMAT = DatasetFormat("named", "images whose names begin with their label", _read, _look)
