"""A finished run → an ordinary model folder and an ordinary PEFT adapter. One format per file."""

from cloq.export.folder import Format, write_model
from cloq.export.gptq import Gptq
from cloq.export.peft import write_adapter

FORMATS = {"gptq": Gptq}
"""The formats that `cloq export` can name."""

__all__ = ["FORMATS", "Format", "Gptq", "write_adapter", "write_model"]
