"""From files to batches: where images come from, how they are decoded and cropped, and in which order they arrive.

    sources    what a source of images offers: tars.py (and tar_walk.py), folders.py, photos.py
    shards     open_images: every form of `--images` as one ordered ImageSet
    transforms the only conversions between bytes, uint8 pixels and floats
    framing    the crops that evaluation protocols name
    batches    OrderedBatches (in order) and TrainingStream (endless, shuffled, resumable from one integer)
    workers    work done by loader processes
    encoding   what a prepared data set stores
    shard_writing  images to shards of features or tokens: decoding, encoding and writing at the same time
    tokens     what a token shard holds
    latent_set  what a latent shard holds, and latents read row by row
    stopwatch  where the time of that goes
    manifests  what the files in data_manifests/ say; layouts.py opens a local copy as they say

Nothing is imported here: `vqpipe.data.shards` does not load torch's data loader, `vqpipe.data.batches` does.
"""
