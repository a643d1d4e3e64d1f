"""The pictures of the quality benchmark: what their lines go through."""

from __future__ import annotations

import math

import pytest
from quality import figures
from quality.cells import Cell
from quality.summary import summarize


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws, and returns the lines of the only panel by name: places across, values up."""

    def draw(figure, rows):
        saved = []
        monkeypatch.setattr(figures, "_save", lambda picture, path: saved.append(picture))
        figure(rows, tmp_path / "figure.png")
        [axis] = saved[0].axes
        return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines}, axis

    return draw


def result(after: float) -> dict:
    losses = {"valid": after, "test": after}
    return {"before": losses, "after": losses, "during": {}, "losses": [0.0] * 4, "seconds": 4.0}


def test_perplexity_by_width_from_wide_to_narrow(drawn):
    rows = summarize(
        {
            Cell(2, "cloq", 1e-3, 0): result(math.log(8)),
            Cell(2, "cloq", 1e-3, 0, (("rank", 4),)): result(9.0),
            Cell(4, "cloq", 1e-3, 0): result(math.log(3)),
            Cell(2.25, "zero", 1e-3, 0): result(math.log(7)),
            Cell(4, "peft-loftq", 1e-3, 0): result(math.log(4)),
            Cell(16, "lora-16", 1e-3, 0): result(math.log(2)),
        },
        steps=4,
    )
    lines, axis = drawn(figures.width_figure, rows)
    assert [label.get_text() for label in axis.get_xticklabels()] == ["4", "2.25", "2"]
    assert {name: (places, pytest.approx(values)) for name, (places, values) in lines.items()} == {
        "cloq": ([0, 2], [3, 8]),
        "zero": ([1], [7]),
        "peft-loftq": ([0], [4]),
        "lora-16": ([0, 1, 2], [2, 2, 2]),
    }
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["cloq", "zero", "peft-loftq", "lora-16"]
