"""The trials of a model: one as it is meant to run, and one with all that is seldom and goes wrong.

The first has ordinary sizes, batches and prompts; where sequences are split, its own does not divide by the ranks. In
the second no width of a feed-forward layer divides evenly, so few tokens come that experts, and a rank's experts all
together, get none, the prompt is one token, and the weights are saved and loaded again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from parallel_plans.collectives import Call
from parallel_plans.errors import Finding, PlanError
from parallel_plans.model_spec import ModelSpec, describe
from parallel_plans.plan import Plan
from parallel_plans.resolve import resolve
from parallel_plans.table import Table
from parallel_plans.verify.batches import ROWS, example_batch
from parallel_plans.verify.compare import RIGHT, reached
from parallel_plans.verify.encoder_states import states, taken_states
from parallel_plans.verify.numerics import ModelFailed, Outcome, Trial, check_numerics, run_trial, truths_of
from parallel_plans.verify.observed import Inputs
from parallel_plans.verify.own import OwnModel
from parallel_plans.verify.shrink import CannotShrink, Shrunken, shrunken
from parallel_plans.verify.shrinking.kinds import on_meta
from parallel_plans.verify.shrinking.roles import role_of
from parallel_plans.verify.shrinking.tree import config_from, each_number, fields_of
from parallel_plans.verify.weights import in_float64, random_model
from parallel_plans.views import EXPERT_AXIS, Views

TWO = Views(world=2, tp=2, etp=2)
ODD_ROLES = ("width", "expert width")
MORE = 4  # times as many heads
MOST_SHARING = 6  # ranks of a trial in which some share units; small models have no more than 4 key/value heads
SEEDS, FEW = 12, 2  # short batches to choose from, and their tokens, where no more ranks split a sequence


class CannotTry(Exception):
    """Numerics cannot be run; `finding` says why."""

    def __init__(self, why: str, fix: str | None = None) -> None:
        super().__init__(why)
        message = f"numerics could not be run: {why}"
        self.finding = Finding(code="PP407", severity="warning", level="numerics", message=message, fix=fix)


def trial_views(views: Views) -> Views:
    """The fewest ranks on which everything that these views do is done: 2 for each kind of split.

    >>> trial_views(Views(world=64, tp=8, ep=64, etp=1)).sizes
    {'tp': 2, 'ep': 4, 'etp': 1, 'ep_etp': 4}
    """
    tp, ep, etp = (min(size, 2) for size in (views.tp, views.ep, views.etp))
    if views.ep == 1:
        return Views(world=tp, tp=tp, etp=min(tp, etp))
    if views.shares_batch:
        tp = ep * etp  # the experts' ranks are those of the dense layers
    elif tp > etp:
        ep = 2 * tp // etp  # tokens leave their tp group
    return Views(world=max(tp, ep * etp), tp=tp, ep=ep, etp=etp)


def sharing_views(small: Views, resolved: Callable[[Views], Table | None]) -> Views | None:
    """The fewest ranks from these on upwards on which some ranks share units; None where there are none."""
    for tp in range(small.tp, MOST_SHARING + 1):
        etp = tp if small.ep == 1 else small.etp
        views = replace(small, world=max(tp, small.ep * etp), tp=tp, etp=etp)
        table = resolved(views) if views.fits else None
        if table is not None and table.shares_units:
            return views
    return None


def _proportions(plan: Plan, ranks: int) -> Plan:
    """The plan, with proportions for so many ranks that are as unlike as its own."""
    given = plan.proportions
    return plan if given is None else replace(plan, proportions=(max(given), *[min(given)] * (ranks - 1)))


def _views_for(plan: Plan, table: Table, views: Views, spec: ModelSpec, dispatch: bool) -> Views | None:
    """The ranks of the trials of a model; None where no few ranks do what the plan does on those that are asked for."""
    small = trial_views(views)

    def resolved(ranks: Views) -> Table | None:
        try:
            return resolve(_proportions(plan, ranks.tp), spec, ranks.sizes, dispatch=dispatch)
        except PlanError:
            return None

    return sharing_views(small, resolved) if table.shares_units else small


def tried(plan: Plan, table: Table, subject: Any, views: Views, dispatch: bool) -> Outcome:
    """What the trials of a model find; the collectives are those of the first.

    Args:
        plan: the plan.
        table: the plan resolved for the model at its own size.
        subject: the config of a causal language model of transformers, or an `OwnModel`.
        views: the ranks asked for.
        dispatch: whether tokens are sent to their experts in any case.

    Raises:
        CannotTry: there is nothing that can be run.
    """
    trials = _of_own if isinstance(subject, OwnModel) else _of_config
    calls: list[Call] | None = None
    first: Trial | None = None
    name = table.spec.model_type or "the model"
    try:
        for trial, even in trials(plan, table, subject, views, dispatch):
            _check_fits(trial)
            first = first or trial
            outcome = check_numerics(trial)
            calls = outcome.calls if calls is None else calls
            if outcome.findings:
                return Outcome(findings=_weighed(outcome.findings, even, table), calls=calls, trial=first)
    except ModelFailed as error:
        raise CannotTry(f"{name} does not run by itself, in one process: {error}") from None
    return Outcome(findings=[], calls=calls or [], trial=first)


def _check_fits(trial: Trial) -> None:
    try:
        resolve(trial.plan, describe(trial.model), trial.views.sizes, dispatch=trial.dispatch)
    except PlanError as error:
        raise CannotTry(f"the plan fits the model and not the small one that stands for it: {error}") from None


Trials = Iterator[tuple[Trial, Trial | None]]  # each with the same in even sizes, where its own are odd


def _of_config(plan: Plan, table: Table, config: Any, views: Views, dispatch: bool) -> Trials:
    try:
        small_one, small = _small_one(plan, table, config, views, dispatch)
    except CannotShrink as error:
        raise CannotTry(str(error)) from None
    tiny = small_one.config
    model = random_model(tiny)
    more = _states_for(model)
    texts = [_text({**example_batch(tiny, seed=index), **more}) for index in range(small.world // small.tp)]
    usual = Trial(
        plan=_proportions(plan, small.tp),
        views=small,
        model=model,
        batches=texts,
        dispatch=dispatch,
        layers=small_one.layers,
        fits=_fitting(table.spec, views, dispatch),
    )
    yield usual, None
    yield _seldom(usual, tiny, table)


def _small_one(plan: Plan, table: Table, config: Any, views: Views, dispatch: bool) -> tuple[Shrunken, Views]:
    """The model made small, and the ranks of its trials; with more heads where these do for what the plan does."""
    usual = trial_views(views)

    def made(ranks: Mapping[str, int]) -> tuple[Shrunken, Views | None, bool]:
        small = shrunken(config, ranks)
        spec = _described(small.config)
        return small, _views_for(plan, table, views, spec, dispatch), _fitting(spec, usual, dispatch)(plan)

    few, on, fits = made(usual.sizes)
    if fits and on is not None:
        return few, on
    dealt = ("tp",) if usual.ep > 1 else usual.sizes  # experts may be as many as there are ranks
    more, there, fits = made({name: ranks * (MORE if name in dealt else 1) for name, ranks in usual.sizes.items()})
    return (more, there) if fits and there is not None else (few, on or usual)


def _described(config: Any) -> ModelSpec:
    """What a plan is resolved against, of the model of a config."""
    return describe(on_meta(config))


def _fitting(spec: ModelSpec, views: Views, dispatch: bool) -> Callable[[Plan], bool]:
    """Whether a plan would fit the model at its own size, on the ranks that are asked for."""

    def fits(plan: Plan) -> bool:
        try:
            resolve(plan, spec, views.sizes, dispatch=dispatch)
        except PlanError:
            return False
        return True

    return fits


def _of_own(plan: Plan, table: Table, own: OwnModel, views: Views, dispatch: bool) -> Trials:
    try:
        model, inputs = own.made_real()
    except ValueError as error:
        raise CannotTry(str(error)) from None
    small = _views_for(plan, table, views, describe(model), dispatch) or trial_views(views)
    yield (
        Trial(
            plan=_proportions(plan, small.tp),
            views=small,
            model=model,
            batches=[inputs] * (small.world // small.tp),
            dispatch=dispatch,
            fits=_fitting(table.spec, views, dispatch),
        ),
        None,
    )


def _states_for(model: Any) -> dict[str, Any]:
    """The states of an encoder, for a model of which more runs with them."""
    batch = example_batch(model.config)
    with in_float64():
        name = taken_states(model, {**batch, "use_cache": False})
    return {} if name is None else states(name, model, batch)


def _text(batch: Mapping[str, Any], prompt: int | None = None) -> Inputs:
    return Inputs(kwargs=batch, prompt=batch["input_ids"][:, :prompt])


def _seldom(usual: Trial, config: Any, table: Table) -> tuple[Trial, Trial | None]:
    """The second trial, as much of it as the model allows, and the same in even sizes."""
    even, uneven = usual, Views(world=3, tp=3, etp=3)  # what was made small for 2 ranks is dealt unevenly over 3
    if usual.views.sizes == TWO.sizes and _is_uneven("", table) and _resolves(usual, usual.model, uneven):
        usual = replace(usual, views=uneven, plan=_proportions(usual.plan, uneven.tp))
    odd = _odd_model(usual, config)
    trial = replace(usual, saves=True, model=usual.model if odd is None else odd)
    few = _few_tokens(trial)
    if few is not None:
        trial = replace(trial, batches=[few] * len(usual.batches))
    if odd is None and usual is even:
        return trial, None
    return trial, replace(trial, model=even.model, views=even.views)


def _odd_model(usual: Trial, config: Any) -> Any:
    """The model with every width of a feed-forward layer an odd number; None where there is none, or it refuses."""
    fields = fields_of(config)
    changed = {
        place: each_number(value, lambda number: number + 1 if number > 1 and number % 2 == 0 else number)
        if role_of(place) in ODD_ROLES
        else value
        for place, value in fields.items()
    }
    if changed == fields:
        return None
    try:
        model = random_model(config_from(type(config), changed), seed=1)
        truths_of(replace(usual, model=model, batches=usual.batches[:1]))
    except Exception:  # of the model's own code, which may not allow such sizes
        return None
    return model if _resolves(usual, model, usual.views) else None


def _resolves(trial: Trial, model: Any, views: Views) -> bool:
    """Whether the plan fits a model on these ranks."""
    return _fitting(describe(model), views, trial.dispatch)(trial.plan)


def _few_tokens(trial: Trial) -> Inputs | None:
    """A batch of few tokens of which most experts get none, and if there is such a one, all experts of some rank."""
    table = resolve(trial.plan, describe(trial.model), trial.views.sizes, dispatch=trial.dispatch)
    experts = {
        name: entry.layout
        for name, entry in table.parameters.items()
        if any(use.style.role == "weight" or use.style.stacked for use in entry.uses)
    }
    best: tuple[int, Inputs] | None = None
    for seed in range(SEEDS if experts else 1):
        few = max(FEW, trial.views.tp) if trial.plan.splits_sequence else FEW
        batch = {**trial.batches[0].kwargs, **example_batch(trial.model.config, seed=seed)}
        inputs = _text({name: _cut(value, few) for name, value in batch.items()}, prompt=1)
        try:
            truth = truths_of(replace(trial, batches=[replace(inputs, prompt=None)]))[0]
        except ModelFailed:
            return None  # it cannot do with so few
        idle = sum(
            not split.take(truth.gradients[name], rank).any()
            for name, layout in experts.items()
            for split in layout.splits
            if split.axis == EXPERT_AXIS and name in truth.gradients
            for rank in range(trial.views.ep)
        )
        if best is None or idle > best[0]:
            best = idle, inputs
        if idle or trial.views.ep == 1:
            break
    return None if best is None else best[1]


def _cut(value: Any, few: int) -> Any:
    """So many tokens of one row, of a tensor or of each of several; an image is left as it is."""
    if isinstance(value, tuple):
        return tuple(_cut(each, few) for each in value)
    rows = len(value) // ROWS  # one of the batch, which some models take as several
    return value[:rows, :few] if value.dim() < 4 else value[:rows]


def _weighed(findings: Sequence[Finding], even: Trial | None, table: Table) -> list[Finding]:
    """The findings of a trial; warnings where it is right with even sizes, and the model's own are even."""
    if even is None or reached(run_trial(even, truths_of(even)))[0] != RIGHT:
        return list(findings)
    return [
        each
        if each.name and _is_uneven(each.name, table)
        else replace(each, severity="warning", message=f"with sizes that do not divide evenly, {each.message}")
        for each in findings
    ]


def _is_uneven(name: str, table: Table) -> bool:
    """Whether what stands beside a module or parameter is split into unequal parts at the model's own size."""
    around = name.rpartition(".")[0]
    beside = (entry for own, entry in table.parameters.items() if own.startswith(around))
    return any(len(set(split.local_sizes)) > 1 for entry in beside for split in entry.layout.splits)
