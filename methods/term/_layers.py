"""Which layer of the student is compared with which of the teacher, and how different widths meet.

Layers are numbered as in ``hidden_states``: 0 is the embedding's output, l that of block l, and of the last block that
of the final norm. Nothing is loaded here: student and teacher are compared by their ``config.json``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from methods.stage import AssayError, Term, Terms
from methods.term import Weighted

if TYPE_CHECKING:
    from torch import Tensor, nn

    from methods.term import Setting, View

Pairs = tuple[tuple[int, int], ...]
# GPT-2's own words in a config.json, by the usual ones.
OTHERWISE = {"num_hidden_layers": "n_layer", "hidden_size": "n_embd", "num_attention_heads": "n_head"}


@dataclass(frozen=True, kw_only=True)
class Matched(Weighted):
    """Options of a term that compares hidden states layer by layer."""

    # "same": each with the equal number (1..L, of equally deep models); "uniform": evenly spread, student layer l with
    # teacher layer round(l * L_teacher / L_student); "last": only the last ones; or pairs [[student, teacher], ...]
    layers: Literal["same", "uniform", "last"] | tuple[tuple[int, int], ...] = "same"
    # compare W h with the teacher's state, W trained with the student and thrown away (needed for different widths)
    project: bool = False

    def __post_init__(self) -> None:
        """Pairs that no model could have are refused while planning."""
        if not isinstance(self.layers, str):
            _refuse_impossible(self.layers, _name(self))


# --- layers ---------------------------------------------------------------------------------------------------


def pairs(config: Matched, student: int, teacher: int, name: str) -> Pairs:
    """(student layer, teacher layer) of what is compared, where the models have so many layers.

    Raises:
        AssayError: different depths and no rule for them, or a layer that is not there.
    """
    if config.layers == "same":
        _refuse_different_depths(student, teacher, name)
        return tuple((layer, layer) for layer in range(1, student + 1))
    if config.layers == "uniform":
        return uniform(student, teacher)
    if config.layers == "last":
        return ((student, teacher),)
    _refuse_absent(config.layers, student, teacher, name)
    return config.layers


def uniform(student: int, teacher: int) -> Pairs:
    """The layers of the shallower model, each with the nearest of the deeper one: 4 into 2 gives (1, 2), (2, 4)."""
    steps = min(student, teacher)

    def place(step: int, layers: int) -> int:
        return (2 * step * layers + steps) // (2 * steps)  # round(step * layers / steps), halves upwards

    return tuple((place(step, student), place(step, teacher)) for step in range(1, steps + 1))


def _refuse_different_depths(student: int, teacher: int, name: str) -> None:
    if student != teacher:
        raise AssayError(
            f"{name}: the student has {student} layers and the teacher {teacher}, and nothing says which are compared: "
            f'write among the terms of distill.mix {name}(layers="uniform") for student layer l with teacher layer '
            f'l * {teacher} / {student}, layers="last" for the last ones alone, or pairs such as '
            f"layers=[[{student}, {teacher}]]."
        )


def _refuse_absent(chosen: Pairs, student: int, teacher: int, name: str) -> None:
    for mine, its in chosen:
        if not (0 <= mine <= student and 0 <= its <= teacher):
            raise AssayError(
                f"{name}: layers has the pair [{mine}, {its}], but the student's layers are 0 to {student} and the "
                f"teacher's 0 to {teacher} (0: the embedding's output)."
            )


def _refuse_impossible(chosen: Pairs, name: str) -> None:
    if not chosen or len({mine for mine, _ in chosen}) < len(chosen):
        raise AssayError(f"{name}: layers needs one pair or more, and each layer of the student only once.")


# --- config.json ----------------------------------------------------------------------------------------------


def check(config: Matched, student: Mapping[str, Any], teacher: Mapping[str, Any]) -> None:
    """Whether these two models have the layers and the widths that the options ask for.

    Args:
        student, teacher: their ``config.json``.
    Raises:
        AssayError: they have not.
    """
    name = _name(config)
    pairs(config, entry(student, "num_hidden_layers"), entry(teacher, "num_hidden_layers"), name)
    check_widths(config.project, student, teacher, name)


def _name(config: Matched) -> str:
    """The term whose options these are, by the name of its file."""
    return type(config).__module__.rpartition(".")[2]


def check_widths(project: bool, student: Mapping[str, Any], teacher: Mapping[str, Any], name: str) -> None:
    """AssayError for states of different widths without a projection."""
    mine, its = entry(student, "hidden_size"), entry(teacher, "hidden_size")
    if mine != its and not project:
        raise AssayError(
            f"{name}: the student's hidden states are {mine} wide and the teacher's {its}: write among the terms of "
            f"distill.mix {name}(project=True) for a linear map between them that is trained with the student, or "
            f"take a teacher of the same width."
        )


def entry(config: Mapping[str, Any], name: str) -> Any:
    """An entry of a ``config.json``, whatever the model's family calls it."""
    found = config.get(name, config.get(OTHERWISE.get(name, name)))
    if found is None:
        raise AssayError(f"config.json has no entry {name}, which a loss on hidden states needs: add it.")
    return found


# --- states ---------------------------------------------------------------------------------------------------


def averaged(config: Matched, view: View, distances: Callable[[Tensor, Tensor], Tensor]) -> Terms:
    """One term for each layer of the student that is compared, under its number; their weights add up to 1.

    Args:
        distances: of states [n,H] of the student from those of the teacher [n].
    """
    layers = list(compared(config, view))
    return {
        str(layer): Term(distances(state, target).sum(), view.part.attended, 1 / len(layers))
        for layer, state, target in layers
    }


def compared(config: Matched, view: View, padding: bool = False) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For every pair the student's layer and both states [n,H] at the n positions that are not padding.

    In float32 or wider, the student's projected where the term has projections; ``padding``: at all positions.
    """
    from methods.terms import widen

    assert view.teacher is not None
    ours, theirs = view.student.hidden_states, view.teacher.hidden_states
    assert ours is not None and theirs is not None
    looked = view.part.attention_mask.bool() | padding
    projected: Any = view.companion
    for mine, its in pairs(config, len(ours) - 1, len(theirs) - 1, _name(config)):
        state = widen(ours[mine][looked])
        if projected is not None:
            state = widen(projected[str(mine)](state))
        yield mine, state, widen(theirs[its][looked])


def projections(config: Matched, setting: Setting) -> nn.ModuleDict | None:
    """A projection for each layer of the student that is compared, under its number; None where none is asked for."""
    if not config.project:
        return None
    from torch.nn import ModuleDict

    name, (student, teacher) = _name(config), configurations(setting)
    chosen = pairs(config, entry(student, "num_hidden_layers"), entry(teacher, "num_hidden_layers"), name)
    widths = entry(student, "hidden_size"), entry(teacher, "hidden_size")
    return ModuleDict({str(mine): projection(*widths, setting.seed, f"{name}.{mine}") for mine, _ in chosen})


def projection(inputs: int, outputs: int, seed: int, name: str) -> nn.Linear:
    """A linear map [outputs,inputs] with orthonormal rows or columns: the identity where both are as wide.

    The same seed and name give the same map, and the global generator is left as it was.
    """
    import torch
    from torch import nn

    from methods.progress import derive_seed

    draw = torch.Generator().manual_seed(derive_seed(seed, "projection", name))
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=False)
    with torch.no_grad():
        if inputs == outputs:
            layer.weight.copy_(torch.eye(inputs))
        else:
            nn.init.orthogonal_(layer.weight, generator=draw)
    return layer


def configurations(setting: Setting) -> tuple[dict[str, Any], dict[str, Any]]:
    """The ``config.json`` of student and teacher."""
    from methods.distill import text_config

    assert setting.teacher_folder is not None  # only a live teacher shows its states
    return text_config(setting.student_folder), text_config(setting.teacher_folder)
