"""Silence for the command line: what libraries print of their own accord while cloq works. Nothing here runs on `import cloq`."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import os
import warnings

_CHATTER = (
    "huggingface_hub.repocard",  # an adapter's README without metadata, which PEFT writes
    "torchao",  # "Failed to load …so": its CUDA kernels, on a machine that has none
    "bitsandbytes",  # a faster CPU kernel that it would fetch from the hub
    "torch.utils._pytree",  # deprecations between torch and torchao, at import
    "transformers",  # advice about configurations and generation flags that cloq does not use
)


def quiet_libraries() -> None:
    """Errors of these libraries stay; their warnings, and transformers' loading bars, go. Bars of hub downloads stay: people want
    to watch those. Changes global state, so the command line calls it and the library never does.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read when transformers is imported
    for name in _CHATTER:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # of PEFT's calls into it
    _quiet_gptqmodel()
    from transformers.utils import logging as theirs

    theirs.set_tqdm_hook(lambda factory, args, kwargs: factory(*args, **(kwargs | {"disable": True})))


def _quiet_gptqmodel() -> None:
    """It logs to standard output, a banner first, through a logger of its own that sets its level when it is first asked for."""
    if importlib.util.find_spec("logbar") is None:
        return
    with contextlib.redirect_stdout(io.StringIO()):  # importing it prints an empty line
        from logbar import LogBar

        LogBar.shared().setLevel(logging.ERROR)
