"""A finished run → an ordinary model folder and an ordinary PEFT adapter. One format per file."""

from cloq.export.compressed_tensors import CompressedTensors
from cloq.export.container import Container
from cloq.export.dense import Dense
from cloq.export.folder import check_format, write_model
from cloq.export.format import Contents, Format
from cloq.export.gptq import Gptq
from cloq.export.nf4 import Nf4
from cloq.export.peft import write_adapter, write_one_rank

FORMATS: dict[str, type[Format]] = {form.name: form for form in (Gptq, Container, CompressedTensors, Nf4, Dense)}
"""The formats that `cloq export` can name."""

__all__ = [
    "FORMATS",
    "CompressedTensors",
    "Container",
    "Contents",
    "Dense",
    "Format",
    "Gptq",
    "Nf4",
    "check_format",
    "write_adapter",
    "write_model",
    "write_one_rank",
]
