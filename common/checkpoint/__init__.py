"""Checkpoints: all that training needs to go on, in any framework, on any number of stages.

    step-00000100/
        manifest.json              specification, position, what to expect of each file and tensor
        shard-00000.safetensors    weights by canonical name, moments as "first_moment/<name>" and
                                   "second_moment/<name>"
        shard-00001.safetensors    ... one file for every process that trained
        tokenizer.json             what the tokens mean; missing for bytes

Nothing in it depends on framework, partition, schedule or device. It is written to a temporary
folder beside its place, every file flushed to the disk, the manifest last, and then renamed: a
folder of this name is a whole checkpoint.

What is read may come from anywhere. So names, types, shapes and sizes are checked against the
specification before memory is taken for any tensor, digests before a tensor is used, and nothing is
ever unpickled. Every error is a `CheckpointError` of one line: what is wrong, where, and what is
expected.
"""

from common.checkpoint.depot import fetch, open_depot
from common.checkpoint.directory import (
    checkpoints_in,
    locked,
    newest,
    prune,
    remove_leftovers,
    set_aside,
)
from common.checkpoint.header import HeaderEntry, opened, read_header
from common.checkpoint.manifest import (
    TOKENIZER,
    Arrays,
    CheckpointError,
    DataPosition,
    Manifest,
    differences,
    moments_of,
)
from common.checkpoint.read import Checkpoint, load, read_manifest, read_tokenizer, verify
from common.checkpoint.write import CheckpointWriter, write_weights

__all__ = [
    "TOKENIZER",
    "Arrays",
    "Checkpoint",
    "CheckpointError",
    "CheckpointWriter",
    "DataPosition",
    "HeaderEntry",
    "Manifest",
    "checkpoints_in",
    "differences",
    "fetch",
    "load",
    "locked",
    "moments_of",
    "newest",
    "open_depot",
    "opened",
    "prune",
    "read_header",
    "read_manifest",
    "read_tokenizer",
    "remove_leftovers",
    "set_aside",
    "verify",
    "write_weights",
]
