"""All that knows transformers and model folders: where a model is, its tensors, and its blocks."""

from cloq.linears import is_conv1d, is_linear, linear_shape, set_weight
from cloq.models.checkpoint import Checkpoint, TensorSource
from cloq.models.decoder import Batch, Decoder
from cloq.models.forwards import Forwards, Room
from cloq.models.gradients import followed, given_bytes, squared_gradients
from cloq.models.kinds import Kind, Kinds
from cloq.models.locate import cache_folder, locate
from cloq.models.quiet import quiet_libraries
from cloq.models.reference import Reference, hooks_on
from cloq.models.sample import sample_text
from cloq.models.skeleton import load_config, load_tokenizer, max_positions
from cloq.models.waiting import InHostMemory, OnDisk, Waiting

__all__ = [
    "Batch",
    "Checkpoint",
    "Decoder",
    "Forwards",
    "InHostMemory",
    "Kind",
    "Kinds",
    "OnDisk",
    "Reference",
    "Room",
    "TensorSource",
    "Waiting",
    "cache_folder",
    "followed",
    "given_bytes",
    "hooks_on",
    "is_conv1d",
    "is_linear",
    "linear_shape",
    "load_config",
    "load_tokenizer",
    "locate",
    "max_positions",
    "quiet_libraries",
    "sample_text",
    "set_weight",
    "squared_gradients",
]
