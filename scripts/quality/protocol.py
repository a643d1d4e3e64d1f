"""What all cells of a comparison have in common, and the settings that a sweep changes one at a time."""

from __future__ import annotations

import dataclasses
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Changes = tuple[tuple[str, Any], ...]
"""Settings of a protocol → values that a point of a sweep has instead."""


OPEN = ("rounds", "fisher")
"""Settings of cloq's runs that sweeps alone change, of methods that have no effort of their own."""


@dataclass(frozen=True)
class Protocol:
    """Everything that decides a cell's result but for its width, method, learning rate and seed.

    calib: calibration text; the training text if not given. group_size: 0 is one group per output channel. propagate: of the runs that fit
    factors to data, `None` for `adapter`; the base that all share is always calibrated through its own compressed prefix. precision: of the
    products in training, `fp32` or `bf16` (autocast; factors, their optimizer and evaluation are float32 in both). tasks: answered before
    and after training, on `task_rows` rows of each out of `task_data`. calib_seed: of the choice of calibration sequences. rounds,
    fisher: of methods that leave them open, `None` for the default. exact_base: train on what the factors leave of the 16-bit weights,
    `W − B A`, instead of on the quantized ones: a start without any error, of the same factors.
    """

    model: str
    train: str
    valid: str
    test: str
    calib: str | None = None
    steps: int = 60
    batch: int = 2
    seq_len: int = 256
    eval_len: int = 512
    eval_every: int = 20
    valid_samples: int = 4
    test_samples: int = 16
    dropout: float = 0.0
    weight_decay: float = 0.0
    rank: int = 64
    group_size: int = 64
    calib_samples: int = 32
    calib_len: int = 512
    calib_seed: int = 0
    propagate: str | None = None
    sequential: bool = True
    rounds: int | None = None
    fisher: float | None = None
    exact_base: bool = False
    precision: str = "fp32"
    tasks: tuple[str, ...] = ()
    task_data: str | None = None
    task_rows: int = 200

    @property
    def calibration_text(self) -> str:
        return self.calib or self.train

    def record(self) -> dict[str, Any]:
        """As it stands in a cell's file. Settings that came later appear where they say something, so that older files stay good."""
        values = dataclasses.asdict(self) | {"tasks": list(self.tasks)}
        silent = [] if self.tasks else ["tasks", "task_data", "task_rows"]
        silent += ["propagate"] if self.propagate is None else []
        silent += ["sequential"] if self.sequential else []
        silent += set(OPEN) - self.opened.keys()
        silent += ["exact_base"] if not self.exact_base else []
        silent += ["calib_seed"] if self.calib_seed == 0 else []
        silent += ["precision"] if self.precision == "fp32" else []
        return {name: value for name, value in values.items() if name not in silent}

    def changed(self, changes: Changes) -> Protocol:
        return dataclasses.replace(self, **dict(changes))

    def value(self, setting: str) -> Any:
        """What the setting amounts to, defaults resolved, for comparison with a sweep's values."""
        from cloq.specs import RunSpec

        default = RunSpec()
        resolved = {"calib": self.calibration_text, "propagate": self.propagate or "adapter"}
        resolved |= {"rounds": default.lora.rounds, "fisher": default.fisher} | self.opened
        return resolved.get(setting, getattr(self, setting))

    @property
    def opened(self) -> dict[str, Any]:
        """Settings of cloq's runs that have another value than the default."""
        return {name: getattr(self, name) for name in OPEN if getattr(self, name) is not None}


def _whether(text: str) -> bool:
    if text not in ("yes", "no"):
        raise ArgumentTypeError(f"{text!r}; allowed: yes, no")
    return text == "yes"


def _propagate(text: str) -> str:
    from cloq.specs import PROPAGATE

    if text not in PROPAGATE:
        raise ArgumentTypeError(f"{text!r}; allowed: {', '.join(PROPAGATE)}")
    return text


SWEPT: dict[str, Callable[[str], Any]] = {
    "rank": int, "group_size": int, "calib": str, "calib_samples": int, "calib_len": int, "propagate": _propagate, "sequential": _whether,
    "rounds": int, "fisher": float,
}  # fmt: skip
"""Settings that can be swept → how a value is read."""


@dataclass(frozen=True)
class Sweep:
    """One setting at several values, everything else as the protocol has it."""

    setting: str
    values: tuple[Any, ...]

    @classmethod
    def parse(cls, words: list[str]) -> Sweep:
        """`["calib-samples", "8", "32"]`. Raises `SystemExit` with what is allowed."""
        setting, texts = words[0].replace("-", "_"), words[1:]
        if setting not in SWEPT:
            raise SystemExit(f"--sweep {words[0]}: allowed are {', '.join(name.replace('_', '-') for name in SWEPT)}")
        try:
            values = tuple(SWEPT[setting](text) for text in texts)
        except (ArgumentTypeError, ValueError) as error:
            raise SystemExit(f"--sweep {words[0]}: {error}") from error
        if len(values) < 2 or len({label(value) for value in values}) < len(values):
            raise SystemExit(f"--sweep {' '.join(words)}: give at least two values, of different names")
        return cls(setting, values)

    @property
    def name(self) -> str:
        return self.setting.replace("_", "-")

    def shown(self, value: Any) -> str:
        """A value for people."""
        return "channel" if self.setting == "group_size" and value == 0 else label(value)

    def changes(self, protocol: Protocol, value: Any) -> Changes:
        """What the value changes: nothing where it is the protocol's own, which is then the very same cell."""
        return () if value == protocol.value(self.setting) else ((self.setting, value),)


def label(value: Any) -> str:
    """A value in the name of a cell or a run: of a file its name without the ending."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return Path(value).stem if isinstance(value, str) else str(value)


def tag(changes: Changes) -> str:
    """The end of a cell's or a run's name."""
    return "".join(f"-{setting.replace('_', '-')}-{label(value)}" for setting, value in changes)


def add_arguments(parser: ArgumentParser) -> None:
    """One flag for each setting."""
    default = {field.name: field.default for field in dataclasses.fields(Protocol)}

    def add(flag: str, **options: Any) -> None:
        name = flag.removeprefix("--").replace("-", "_")
        parser.add_argument(flag, default=default[name], type=type(default[name]), **options)

    parser.add_argument("model")
    parser.add_argument("--train", required=True, help="text to fine-tune on")
    parser.add_argument("--valid", required=True, help="text that chooses the learning rate")
    parser.add_argument("--test", required=True, help="text of the table")
    parser.add_argument("--calib", help="calibration text; the training text if not given")
    for flag in ("--steps", "--batch", "--seq-len", "--eval-len", "--valid-samples", "--test-samples", "--dropout", "--weight-decay"):
        add(flag)
    add("--eval-every", help="steps between validations; 0 for none")
    add("--rank")
    add("--group-size", help="0 for one group per output channel")
    add("--calib-samples")
    add("--calib-len")
    parser.add_argument("--propagate", type=_propagate, help="what factors are calibrated on: adapter (default), quantized, dense")
    parser.add_argument("--no-sequential", dest="sequential", action="store_false", help="one forward per block instead of several")
    parser.add_argument("--exact-base", action="store_true", help="train on W - BA instead of the quantized weights: a start without error")
    add("--precision", choices=["fp32", "bf16"], help="of the products in training: bf16 is autocast, on factors in float32")
    parser.add_argument("--tasks", type=lambda text: tuple(text.split(",")), default=(), help="accuracy before and after: arc_easy,piqa")
    parser.add_argument("--task-data", help="folder with the tasks' files; the hub if not given")
    add("--task-rows", help="rows of each task")


def read_protocol(args: Namespace) -> Protocol:
    """`calib_seed` is a cell's and what is `OPEN` a sweep's, not the command's."""
    names = {field.name for field in dataclasses.fields(Protocol)} - {"calib_seed", *OPEN}
    return Protocol(**{name: getattr(args, name) for name in names})
