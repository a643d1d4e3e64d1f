"""GPTQ bases with several widths through the real libraries: transformers' own `from_pretrained`, with each layer made for its width.

optimum makes the packed layers that transformers fills, all of one width and group size, those of config.json; it does not look at
`dynamic`, by which GPTQModel and servers tell layers of others apart. Here its one function that makes layers is called once for each
width, with the layers of that width. GPTQModel's layers themselves each have a width of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from cloq.export.gptq import GptqReader
from cloq.export.read import read_config, reader_of


@contextmanager
def each_its_width(base: Path) -> Iterator[None]:
    """Inside, `from_pretrained(base)` makes layers as `dynamic` has them. Of a base without it nothing changes."""
    quantization = read_config(base).get("quantization_config")
    reader = reader_of(quantization) if quantization else None
    if not (isinstance(reader, GptqReader) and reader.dynamic):
        yield
        return
    from optimum.gptq import GPTQQuantizer

    plain = GPTQQuantizer._replace_by_quant_layers
    GPTQQuantizer._replace_by_quant_layers = _by_width(plain, reader)
    try:
        yield
    finally:
        GPTQQuantizer._replace_by_quant_layers = plain


def _by_width(plain: Callable[..., None], reader: GptqReader) -> Callable[..., None]:
    def replace(self: Any, module: nn.Module, names: Any, name: str = "") -> None:
        if name:  # its own recursion
            return plain(self, module, names, name)
        common = self.bits, self.group_size
        grids = {layer: reader.grid(layer) for layer in names}
        for bits, group_size in dict.fromkeys(grids.values()):
            self.bits, self.group_size = bits, -1 if group_size is None else group_size
            plain(self, module, [layer for layer in names if grids[layer] == (bits, group_size)])
        self.bits, self.group_size = common

    return replace
