"""Finished directories: what one stage hands to the next.

A stage writes into `<out>.partial/`, file by file, each hashed, flushed to disk and renamed. Publishing writes
`manifest.json` last and renames the whole directory to `<out>`. So a directory without the suffix is whole, it is never
overwritten, and a run that was cut short resumes at its first missing file when the same command is given again.

    <out>.partial/  request.json   what was asked          .records/  one JSON per finished file
                    .lock          held by the one writer   ...        the files themselves
    <out>/          manifest.json  ...

`request` digests what was asked (schema, kind, config, inputs); `content` digests what came out (names, sizes, hashes).
"""

from vqpipe.artifacts.draft import Draft, start
from vqpipe.artifacts.published import Artifact, Input, Manifest, open_artifact

__all__ = ["Artifact", "Draft", "Input", "Manifest", "open_artifact", "start"]
