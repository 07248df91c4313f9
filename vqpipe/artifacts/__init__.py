"""Artifacts: finished directories, which one stage passes to the next.

A stage writes into `<out>.partial/`, file by file, each hashed, flushed to disk and renamed. Publishing writes
`manifest.json` last and renames the whole directory to `<out>`. So a directory without the suffix is complete; it is
never overwritten; and an interrupted run resumes at its first missing file when the same command is given again.

    <out>.partial/  request.json   kind, config and inputs  .records/    one JSON per finished file
                    .lock          held by the one writer   status.json  the error of the last run, if it failed
                    ...            the files themselves
    <out>/          manifest.json  ...

`request` is the digest of what was requested (schema, kind, config, inputs); `content` is the digest of the result
(file names, sizes, hashes). Only the largest share of unusable images may differ between the runs of a draft: it
decides whether a run stops, and not what is written.
"""

from vqpipe.artifacts.artifact import Artifact, Input, Manifest, is_artifact, open_artifact
from vqpipe.artifacts.draft import Draft, start

__all__ = ["Artifact", "Draft", "Input", "Manifest", "is_artifact", "open_artifact", "start"]
