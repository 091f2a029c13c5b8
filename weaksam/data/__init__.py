"""Images and annotations: decoding, augmentation and views; one module per format in `readers` and `writers`."""
