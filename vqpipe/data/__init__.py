"""From files to batches: where images come from, how they are decoded and cropped, and in which order they arrive.

    sources    what a source of images offers: tars.py (and tar_walk.py), folders.py, photos.py
    shards     open_images: every form of `--images` as one ordered ImageSet
    transforms the only conversions between bytes, uint8 pixels and floats
    batches    OrderedBatches (in order) and TrainingStream (endless, shuffled, resumable from one integer)
    workers    work done by loader processes
    encoding   what a prepared data set stores
    manifests  the files in data_manifests/

Nothing is imported here: `vqpipe.data.shards` does not load torch's data loader, `vqpipe.data.batches` does.
"""
