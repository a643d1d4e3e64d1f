"""A finished run → a model ready to use or to train, through the real libraries: transformers for the base, PEFT for the
adapter."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cloq.errors import ExportError, MissingLibrary

_NEEDS = {
    "gptq": (("gptqmodel", "optimum"), "gptq"),
    "bitsandbytes": (("bitsandbytes",), "nf4"),
    "compressed-tensors": (("compressed_tensors",), "compressed-tensors"),
}


def load(out: str | Path, trainable: bool = False, *, base: str | Path | None = None, adapter: str | Path | None = None, **kwargs):
    """The base in `out/model` with the adapter in `out/adapter`, as a `peft.PeftModel`.

    trainable: the factors get gradients (and nothing else does). base, adapter: other folders than those of the run; where there
    is no `out/model`, the base is the one that the adapter names. Further arguments go to `AutoModelForCausalLM.from_pretrained`
    (`dtype`, `device_map`, …). Equal to the plain way, which is

        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter, is_trainable=...)

    but for six things: the base is checked first, because a missing tensor would abort the process; without a `dtype`, a
    float16 base on a machine without a GPU is loaded as float32 (a CPU multiplies float16 some twenty times slower); a
    compressed-tensors base with several widths is decoded at once, because PEFT cannot wrap what is still packed; the layers of a GPTQ
    base with several widths each get their own (see `cloq.use.several_widths`), of which plain transformers knows nothing; quantized
    experts are layers of their own (see `cloq.use.experts_apart`), because plain transformers cannot load packed ones; and where
    trainable, packed layers keep no decoded weight for the backward pass (see `cloq.use.frozen`).

    Raises `ExportError` if a folder is missing or damaged, if the adapter has other layers or shapes than the base, or says that it
    belongs to another one (which you decide where you name a `base`); `MissingLibrary` with the pip command if the format needs one that
    is not there.
    """
    from cloq.export.peft import AdapterFolder
    from cloq.export.read import read_config
    from cloq.use.frozen import decode_again
    from cloq.use.pairing import base_folder, refuse_unfit

    trust, of_run = bool(kwargs.get("trust_remote_code")), None if base else Path(out)
    adapter = AdapterFolder(adapter or Path(out) / "adapter")
    base = Path(base) if base else base_folder(Path(out), adapter)
    config = read_config(base)
    quantization = config.get("quantization_config") or {}
    require_libraries(base)
    _check(base, quantization, trust)
    refuse_unfit(adapter, base, of_run, trust)
    if "dtype" not in kwargs and "torch_dtype" not in kwargs:
        kwargs["dtype"] = default_dtype(config)

    from peft import PeftModel

    model = load_base(base, adapter.names, **kwargs)
    if _still_packed(quantization):
        model.hf_quantizer.compressor.decompress_model(model)
    if trainable:
        decode_again(model)
    return PeftModel.from_pretrained(model, adapter.folder, is_trainable=trainable)


def load_base(base: Path, adapted: Iterable[str] = (), **kwargs):
    """`AutoModelForCausalLM.from_pretrained(base, **kwargs)`, with experts taken apart where single ones are packed or among the layers
    that are to get factors, and every packed layer of its own width."""
    from transformers import AutoModelForCausalLM

    from cloq.export.read import QuantizedFolder
    from cloq.use.experts_apart import load_experts_apart, names_experts
    from cloq.use.several_widths import each_its_width

    load_plainly = AutoModelForCausalLM.from_pretrained
    with each_its_width(base):
        return (load_experts_apart if names_experts([*adapted, *QuantizedFolder(base).names]) else load_plainly)(base, **kwargs)


def _check(base: Path, quantization: dict[str, Any], trust_remote_code: bool) -> None:
    from cloq.use.check import check_base

    failed = [finding.what for finding in check_base(base, trust_remote_code) if not finding.ok]
    if failed:
        raise ExportError(f"{base} cannot be loaded as it is: {failed[0]} (cloq check says more)")
    groups = quantization.get("config_groups", {}).values()
    if _still_packed(quantization) and not all(group["weights"].get("symmetric", True) for group in groups):
        raise ExportError(
            f"{base} has asymmetric compressed-tensors layers of several widths, which servers read but transformers cannot; "
            "write another base with cloq export --format container or dense"
        )


def _still_packed(quantization: dict[str, Any]) -> bool:
    return quantization.get("quant_method") == "compressed-tensors" and not quantization.get("dequantize")


def default_dtype(config: dict[str, Any]):
    """What `from_pretrained` is given where nobody asked for a `dtype`: the stored one, but not float16 on a CPU."""
    import torch

    stated = config.get("dtype") or config.get("torch_dtype")
    return torch.float32 if stated == "float16" and not torch.cuda.is_available() else "auto"


def require_libraries(base: Path) -> None:
    """Raises `MissingLibrary` if the base's format needs a library that is not installed, `ExportError` if none puts adapters on it."""
    from cloq.export.read import read_config

    method = (read_config(base).get("quantization_config") or {}).get("quant_method")
    if method == "auto-round":
        raise ExportError(
            f"{base} is in AutoRound's own format, and PEFT has no adapters for its layers. Write the same codes as GPTQ, from the folder "
            "of the run that fitted factors to them: cloq export RUN --format gptq, then name the base RUN/model-gptq"
        )
    libraries, extra = _NEEDS.get(method, ((), None))
    for library in libraries:
        if importlib.util.find_spec(library) is None:
            raise MissingLibrary(library, f"loading the {method} base in {base}", extra)
