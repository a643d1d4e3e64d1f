"""The forwards of a block, round after round, with what `cloq.models.Forwards` keeps of them."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from cloq.plan.forward import BlockForward, Part
from cloq.plan.work import Work


def kept_bytes(parts: Collection[Part], original: bool) -> int:
    """Of one sequence, when the most is kept: outputs, and of the last part that is being compressed the input."""
    if not parts:
        return 0
    *others, last = sorted(parts, key=lambda part: part.left.products)
    return sum(part.kept[1] for part in others) + last.kept[1 if original else 0]


def forwards(
    forward: BlockForward, rounds: Sequence[Collection[str]], parts: Collection[Part], original: bool, to_sums: bool
) -> tuple[Work, Work]:
    """The work of one sequence: until the last round is captured, and of the forward to the next block.

    rounds: the layers, by their names in the block, whose inputs one forward is for. parts: that are kept. original: no layer changes, so
    all are final. to_sums: a forward goes on to where the outputs of its layers are added to something.
    """
    kept: dict[Part, bool] = {}  # whether its output is, not its input
    final: set[str] = set().union(*(part.layers for part in parts)) if original else set()

    def run(asked: Collection[str], until: Work) -> Work:
        work = until
        for part in parts:
            whole = part.left.products <= until.products
            if part in kept and not part.layers & set(asked) and whole:
                work -= part.left - part.entered
                if not kept[part]:
                    work += part.ending
                    kept[part] = part.last in final
            elif part not in kept and part.last in final and whole:
                kept[part] = True
            elif part not in kept and part.last in asked:
                kept[part] = False
        return work

    before = {name: group.before for group in forward.groups for name in group.names}
    captured = Work()
    for asked in rounds:
        ends, adding = [before[name] for name in asked], [part for part in forward.parts if part.last in asked and to_sums]
        captured += run(asked, max([*ends, *(part.left for part in adding)], key=lambda work: work.products))
        if len(adding) == 1 and not original and any(set(asked) <= set(group.names) for group in forward.groups):
            captured -= adding[0].ending  # the layer is muted
        final |= set(asked)
    return captured, run((), forward.whole)
