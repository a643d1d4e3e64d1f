"""README.md of a run: a model card in the Hugging Face manner, with the measured numbers and nothing that was not measured."""

from __future__ import annotations

import yaml

from cloq.report import wording
from cloq.report.record import STORED_ADAPTER_BITS, Report, is_hub_id
from cloq.report.tables import by_text, from_dense, uncertainty
from cloq.report.wording import error, percent, perplexity, size

_NEEDS = {
    "gptq": "cloq[gptq]",
    "container": "cloq[gptq]",
    "nf4": "cloq[nf4]",
    "compressed-tensors": "cloq[compressed-tensors]",
}
"""What a base of each format needs to be loaded; formats that are not here need transformers and PEFT alone."""


def model_card(report: Report) -> str:
    """The card as Markdown with YAML front matter."""
    parts = [_front_matter(report), _what(report), _load(report), _numbers(report), _settings(report), _repeat()]
    return "\n".join(parts)


def _front_matter(report: Report) -> str:
    name = report.model_name()
    values: dict = {"library_name": "peft", "pipeline_tag": "text-generation"}
    if is_hub_id(report.spec.model):
        values |= {"base_model": name, "base_model_relation": "quantized"}
    ours = [] if report.form is None else [report.spec.quant.quantizer]
    values["tags"] = list(dict.fromkeys(["cloq", "lora", "quantized", f"{report.bits():g}-bit", *ours, report.spec.lora.init]))
    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}---\n"


def _what(report: Report) -> str:
    base = "a base that was quantized before" if report.form is None else f"a base quantized with {report.describe_base()}"
    return f"""# {_text(report.model_name())}, {report.bits():g} bits with {report.spec.lora.init} factors

{_text(report.model_name())} as {_text(base)}, and {_text(report.describe_adapter())} as a LoRA adapter.
{_start(report)}
Calibrated on {_text(report.describe_calibration())}. Made with cloq, an implementation of [CLoQ](https://arxiv.org/abs/2501.18475).
"""


def _start(report: Report) -> str:
    if report.spec.lora.init == "cloq":
        return "The adapter starts where it undoes the most of the quantization error: fine-tuning starts near the original model."
    if report.spec.lora.init == "zero":
        return "The adapter starts at zero, as in QLoRA: before fine-tuning the model is the quantized one."
    return "The adapter starts as a correction of the quantization error."


def _load(report: Report) -> str:
    needs = _NEEDS.get(report.form or "", "cloq")
    given = report.form is None
    base = "BASE" if given else "model"
    note = "\n`BASE` is the folder of the quantized model that the factors were fitted to.\n" if given else ""
    argument = ', base="BASE"' if given else ""
    tokenizer = '"BASE"' if given else '"model"'
    if _experts(report):
        return _load_through_cloq(needs, argument, note, _EXPERTS)
    if report.form == "gptq" and len(report.grids()) > 1:
        return _load_through_cloq(needs, argument, note, _SEVERAL_WIDTHS)
    return f"""## Load it

`pip install "{needs}"` brings the libraries. In this folder, with transformers and PEFT alone:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({tokenizer})
base = AutoModelForCausalLM.from_pretrained("{base}", device_map="auto")
model = PeftModel.from_pretrained(base, "adapter", is_trainable=True)  # without is_trainable nothing would be trained
```

The same through cloq: `model = cloq.load("."{argument}, trainable=True)`.
{note}
The adapter belongs to this base and its initialization is part of the result: do not reinitialize it, and keep `r` and
`lora_alpha` as they are.
"""


def _experts(report: Report) -> bool:
    from cloq.use.experts_apart import names_experts

    return names_experts(report.layers)


_EXPERTS = """\
Single experts are quantized and have factors. Plain transformers fuses experts into one parameter: it would fill in random ones where these
are packed, with no more than a warning, and PEFT has fused factors for some families only. `cloq.load` loads the same model through both
libraries with its experts as layers of their own; `cloq merge` writes base and adapter as one dense model that plain transformers loads."""

_SEVERAL_WIDTHS = """\
Layers have several widths (`dynamic` in config.json). GPTQModel and servers that read its table know them; plain transformers expects one
and stops with an error. `cloq.load` loads the same model through transformers and PEFT, every layer made for its width; `cloq export`
writes the base in a format with one (`container` holds 2 and 3 bits, and 4 where they are symmetric)."""


def _load_through_cloq(needs: str, argument: str, note: str, why: str) -> str:
    """Where plain transformers would not load the model, or not all of it."""
    return f"""## Load it

`pip install "{needs}"` brings the libraries. In this folder:

```python
import cloq

model = cloq.load("."{argument}, trainable=True)  # a peft.PeftModel, for Trainer, TRL or a loop of your own
```

{why}
{note}
The adapter belongs to this base and its initialization is part of the result: do not reinitialize it, and keep `r` and
`lora_alpha` as they are.
"""


def _numbers(report: Report) -> str:
    mean = report.mean
    lines = ["## Measured", ""]
    for (text, protocol), rows in by_text(report.quality).items():
        lines += [
            f"Perplexity on {_text(text)} (protocol `{protocol}`, {rows[0].tokens:,} tokens), before any fine-tuning:",
            "",
        ]
        lines += _table(["model", "perplexity"], [[row.model, perplexity(row.perplexity) + uncertainty(row)] for row in rows])
        distance = from_dense(rows)
        lines += [f"With the adapter it is {distance}.", ""] if distance is not None else []
    kinds = [("calibration text", "error", False)] + ([("held-out text", "heldout", True)] if mean("heldout_corrected") is not None else [])
    rows = [
        [f"{what}", error(mean(f"{key}_quantized")), error(mean(f"{key}_corrected")), percent(report.repaired(h))] for what, key, h in kinds
    ]
    lines += [f"Relative squared output error of a layer, mean over {wording.plural(len(report.layers), 'layer')}:", ""]
    lines += _table(["on", "quantized", "with the adapter", "repaired"], rows)
    bits = [["without the adapter", f"{report.bits_per_weight():.2f}"]]
    bits += [
        [
            f"with the adapter in {width} bits{' (as stored)' if width == STORED_ADAPTER_BITS else ''}",
            f"{report.bits_per_weight(width):.2f}",
        ]
        for width in (16, 32)
    ]
    lines += [
        f"Bits per weight of the quantized layers ({wording.short_count(report.parameters())} weights):",
        "",
        *_table(["", "bits"], bits),
    ]
    if report.sizes:
        lines += ["Weights on disk:", "", *_table(["", "size"], [[name, size(value)] for name, value in report.sizes.items()])]
    memory = ", ".join(f"{size(value)} on the {name}" for name, value in report.peak_memory.items())
    memory = f" with a peak memory of {memory}" if memory else ""
    lines += [
        f"Made in {wording.duration(report.seconds)}{memory}. `report.html` shows every layer.",
        "",
    ]
    return "\n".join(lines)


def _settings(report: Report) -> str:
    spec = report.spec
    rows = [["base", report.describe_base()], ["adapter", f"{report.describe_adapter()}, split {spec.lora.split}"]]
    rows += [
        [
            "calibration",
            f"{report.describe_calibration()}, {spec.calib.samples} sequences of {spec.calib.seq_len}, seed {spec.calib.seed}",
        ]
    ]
    order = "layer after layer" if spec.sequential else "block after block"
    rows += [["order", f"{order}; later ones calibrated on the outputs of the {_PROPAGATED[spec.propagate]}"]]
    rows += [["left as they are", ", ".join(spec.skip) or "all but " + ", ".join(spec.only)]] if spec.skip or spec.only else []
    rows += [["versions", ", ".join(f"{name} {version}" for name, version in report.versions.items())]]
    changed = len({name for names in report.layer_notes().values() for name in names})
    notes = f"The code changed course in {wording.plural(changed, 'layer')}; `report.html` says where.\n\n" if changed else ""
    return "\n".join(["## Settings", "", *_table(["", ""], rows), notes]).rstrip("\n") + "\n"


_PROPAGATED = {
    "adapter": "quantized layers with their factors",
    "quantized": "quantized layers alone",
    "dense": "original layers",
}


def _repeat() -> str:
    return """## Repeat it

```bash
cloq quantize --config run.yaml --out ANOTHER_FOLDER
```
"""


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(cell if at == 1 else _text(cell) for cell in row) + " |" for at, row in enumerate(lines)] + [""]


def _text(value: str) -> str:
    """A value from outside as plain text in Markdown: no table cell, tag, or link can come out of it."""
    for character in "\\|<>[]`*_$":
        value = value.replace(character, "\\" + character)
    return " ".join(value.split())
