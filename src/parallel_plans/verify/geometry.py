"""Geometry: cuts that do not match, and cuts that only kernels or quantized weights mind, told as warnings."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from parallel_plans.accounting import Report
from parallel_plans.errors import Finding
from parallel_plans.experts.alignment import ALIGNMENT
from parallel_plans.layouts import Split
from parallel_plans.pieces import Piece, is_cut_at
from parallel_plans.table import Table
from parallel_plans.together import in_order, wrong_cuts
from parallel_plans.verify.fused_heads import check_fused_heads


def check_geometry(table: Table) -> list[Finding]:
    """What shapes show of a plan whose rules each fit: errors first, then warnings, in the order of the file."""
    report = Report(table.plan)
    for piece in _pieces(table):
        check_fused_heads(report, piece)
        _check_blocks(report, piece)
        _check_alignment(report, piece)
    found = [*wrong_cuts(table), *in_order(report)]
    return sorted(found, key=lambda finding: finding.severity != "error")


def _pieces(table: Table) -> Iterator[Piece]:
    """The weights that a rule of `tp_plan` splits."""
    tried: dict[tuple[object, ...], str] = {}
    for name, entry in table.parameters.items():
        if entry.uses[0].letter == "S" and len(entry.info.shape) > 1:
            ranks = table.sizes[entry.uses[0].axis]
            yield Piece(
                name=name,
                entry=entry,
                spec=table.spec,
                ranks=ranks,
                tried=tried,
                proportions=table.plan.proportions,
            )


def _block(piece: Piece, dim: int) -> int:
    """How many elements along a dim share a scale, as the config says of quantized weights; 1 where each stands alone.

    Blocks as in DeepSeek-V3's (`weight_block_size`: rows, columns), or groups of input features (`group_size`).
    """
    given, from_end = piece.spec.quantization, dim - len(piece.entry.info.shape)
    kept = given.get("modules_to_not_convert") or ()
    owner = piece.spec.modules[piece.name.rpartition(".")[0]]
    is_kept = any(each in piece.name for each in (*kept, "lm_head"))
    if is_kept or owner.kind not in ("linear", "other") or from_end not in (-2, -1):
        return 1
    block = given.get("weight_block_size")
    if isinstance(block, (list, tuple)) and len(block) == 2:
        return max(1, int(block[from_end]))
    size = given.get("group_size")
    return size if isinstance(size, int) and size > 0 and from_end == -1 else 1


def _check_blocks(report: Report, piece: Piece) -> None:
    """Warns of a cut through a block of which one scale is known: both ranks would need the whole block."""
    split = piece.split
    if split is None or (block := _block(piece, split.dim)) == 1 or is_cut_at(split, block):
        return
    _warn(
        report,
        piece,
        "PP207",
        f"{piece.use.rule.style} cuts through a block of {block} quantized elements that share a scale",
        expected=f"cuts at multiples of {block}: {split.size} elements, {split.axis} = {piece.ranks}",
        fix=_fix(piece, lambda each: is_cut_at(each, block), block),
    )


def _runs_grouped(piece: Piece) -> bool:
    """Whether its module holds both stacked weights of experts, which then transformers can run as grouped products."""
    module = piece.spec.modules[piece.name.rpartition(".")[0]]
    shapes = [piece.spec.parameters[name].shape for name in module.parameters]
    return module.kind == "other" and sum(len(shape) == 3 for shape in shapes) > 1


def _check_alignment(report: Report, piece: Piece) -> None:
    """Warns where a rank's part of stacked experts is no longer a width that `grouped_mm` takes."""
    split, info = piece.split, piece.entry.info
    if split is None or len(info.shape) != 3 or not _runs_grouped(piece):
        return

    def is_aligned(size: int) -> bool:
        return size * info.itemsize % ALIGNMENT == 0

    if not is_aligned(split.size) or all(map(is_aligned, split.local_sizes)):
        return
    _warn(
        report,
        piece,
        "PP208",
        "a rank's part of the experts is of a width that grouped products do not take, so that experts run one by one",
        expected=f"a multiple of {ALIGNMENT // info.itemsize} of dim {split.dim} on every rank, not "
        f"{', '.join(map(str, sorted(set(split.local_sizes))))}",
        fix=_fix(piece, lambda each: all(map(is_aligned, each.local_sizes)), "width"),
    )


def _fix(piece: Piece, suits: Callable[[Split], bool], what: object) -> str:
    def holds(ranks: int) -> bool:
        split = piece.at(ranks)
        return split is not None and suits(split)

    return piece.sizes(holds, what)


def _warn(report: Report, piece: Piece, code: str, message: str, *, expected: str, fix: str) -> None:
    report.add(
        code,
        message,
        piece.use.rule,
        severity="warning",
        level="geometry",
        name=piece.name,
        found=str(piece.entry.layout),
        expected=expected,
        fix=fix,
    )
