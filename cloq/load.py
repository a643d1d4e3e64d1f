"""A finished run → a model ready to use or to train, through the real libraries: transformers for the base, PEFT for the adapter."""

from __future__ import annotations

from pathlib import Path

from cloq.errors import ExportError, MissingLibrary

_NEEDS = {
    "gptq": (("gptqmodel", "optimum"), "gptq"),
    "bitsandbytes": (("bitsandbytes",), "nf4"),
    "compressed-tensors": (("compressed_tensors",), "compressed-tensors"),
}


def load(out: str | Path, trainable: bool = False, *, base: str | Path | None = None, adapter: str | Path | None = None, **kwargs):
    """The base in `out/model` with the adapter in `out/adapter`, as a `peft.PeftModel`.

    trainable: the factors get gradients (and nothing else does). base, adapter: other folders than those of the run. Further arguments go
    to `AutoModelForCausalLM.from_pretrained` (`dtype`, `device_map`, …). Equal to the plain way,
    `PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter, is_trainable=...)`.

    Raises `ExportError` if a folder is missing, `MissingLibrary` with the pip command if the format needs one that is not there.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = Path(base or Path(out) / "model")
    adapter = Path(adapter or Path(out) / "adapter")
    for folder, file in ((base, "config.json"), (adapter, "adapter_config.json")):
        if not (folder / file).is_file():
            raise ExportError(f"{folder} has no {file}; is {out} the folder of a finished run? (cloq quantize writes it, cloq check explains it)")
    require_libraries(base)
    model = AutoModelForCausalLM.from_pretrained(base, **kwargs)
    return PeftModel.from_pretrained(model, adapter, is_trainable=trainable)


def require_libraries(base: Path) -> None:
    """Raises `MissingLibrary` if the base's format needs a library that is not installed."""
    import importlib.util
    import json

    method = json.loads((base / "config.json").read_text("utf8")).get("quantization_config", {}).get("quant_method")
    libraries, extra = _NEEDS.get(method, ((), None))
    for library in libraries:
        if importlib.util.find_spec(library) is None:
            raise MissingLibrary(library, f"loading the {method} base in {base}", extra)
