"""All that knows transformers and model folders: where a model is, its tensors, and its blocks."""

from cloq.models.checkpoint import Checkpoint
from cloq.models.decoder import Batch, Decoder, is_conv1d, is_linear, load_config, load_tokenizer, set_weight
from cloq.models.locate import cache_folder, locate

__all__ = ["Batch", "Checkpoint", "Decoder", "cache_folder", "is_conv1d", "is_linear", "load_config", "load_tokenizer", "locate", "set_weight"]
