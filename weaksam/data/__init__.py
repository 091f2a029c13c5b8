"""Images and annotations: decoding, augmentation, views of an image; `readers` and `writers` have a format a file."""
