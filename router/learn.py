"""`farthing learn`: heads from this installation's own labels, their model card, and which version is in force."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime, timedelta
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np

from classifiers import own_traffic, prompt_features
from classifiers.encoder import DATA_DIRECTORY, ArtefactError, StaticEncoder
from classifiers.floor import Comparisons
from classifiers.own_traffic import Examples, Judgement
from classifiers.success import SuccessHeads
from router.adapters.sql import artefacts
from router.adapters.sql.artefacts import StoredArtefact
from router.adapters.sql.labels import LabelledRow, LabelledTraffic, labelled_traffic
from router.core.errors import ConfigurationError
from router.core.learning import DRAWN, DRAWN_JUDGED, DRAWN_SAME, DRAWN_SOURCES, Label
from router.core.ports import Snapshot
from router.core.pricing import price_usage, total
from router.core.types import NANO_PER_USD, PROMPT_CLASSES, Usage

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine

JUDGED = frozenset({"feedback", "shadow", "judge", *DRAWN_SOURCES})
"""Sources of which somebody, or a model asked to, looked at the answer; the others are automatic signals."""
GATEWAY = JUDGED - {"feedback"}
"""Sources a caller cannot write to."""
CERTIFIES_FOR = timedelta(days=90)
"""What certificates rest on is no older, so that it is drawn from traffic like that to come."""
UNKNOWN_CLASS = "medium"
UNKNOWN_PRIOR = 0.5
SEED = 0
PRIORS = "priors"


@dataclass(frozen=True, slots=True)
class Learned:
    """What a run found. `heads` is None where there were too few labels to fit any."""

    card: dict[str, Any]
    heads: SuccessHeads | None
    refusal: str | None


def learn(
    engine: Engine,
    snapshot: Snapshot,
    at: datetime,
    *,
    seed: int = SEED,
    trusted: frozenset[str] = frozenset(),
    trees: int | None = None,
) -> Learned:
    """Fits heads on what SQL holds and judges them on held-out rows; stores nothing.

    Raises UnavailableError where SQL does not answer, ConfigurationError where scikit-learn is missing or a trusted
    key gave no label.
    """
    encoder_id = StaticEncoder.load(DATA_DIRECTORY).id
    traffic = labelled_traffic(engine, encoder_id)
    examples, comparisons, skipped = examples_of(traffic, snapshot, at, seed)
    if unknown := sorted(trusted - {row.label.key_id for row in traffic.rows}):
        raise ConfigurationError(
            f"--trust: no label is of key {unknown[0]}. 'farthing keys list' shows their ids."
        )
    priors = priors_of(snapshot, examples.models)
    card: dict[str, Any] = {
        "labels": len(examples.score),
        "prompts": examples.labelled_prompts,
        "without_features": traffic.without_features,
        "of_unknown_models": skipped,
        "by_source": _counted(row.label.source for row in traffic.rows),
        "by_model": _by_model(examples),
        "keys": len(set(examples.key.tolist())),
        "compared": {"requests": len(comparisons.sure), "unsure": int((~comparisons.sure).sum())},
        "encoder": encoder_id,
        "seed": seed,
        "fitted_on": "labels not held out",
        "doubts": [],
    }
    missing = own_traffic.MIN_PROMPTS - examples.labelled_prompts
    if missing > 0:
        return Learned(card, None, f"too few labels: {missing} more judged answers are missing")
    try:
        examples = own_traffic.limit_signals(examples, traffic.served)
        gateway = examples.key == ""
        examples, doubts = own_traffic.limit_keys(examples, priors, encoder_id, seed, trusted, gateway)
        card["doubts"] = [
            {"key": d.key, "labels": d.labels, "error": round(d.error, 4), "left_out": d.left_out}
            for d in doubts
        ]
        if (missing := own_traffic.MIN_PROMPTS - examples.labelled_prompts) > 0:
            return Learned(card, None, f"too few labels: {missing} more judged answers are missing")
        rows, held = own_traffic.split(examples, seed, comparisons)
        heads = own_traffic.fit(rows, priors, encoder_id, seed, trees)
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"learning needs {error.name}, which the runtime leaves out for its size: pip install 'farthing[train]'"
        ) from None
    unseen = own_traffic.held_out(examples, seed, comparisons)[comparisons.prompt]
    held_pairs = comparisons.rows(unseen)
    card["compared"]["held_out"] = len(held_pairs.sure)
    heads.arrays.update(calibration(heads, examples, held_pairs))
    before, before_at = _in_force(engine, encoder_id)
    wanted: dict[str, float] = {name: _min_quality(snapshot, name, at) for name in PROMPT_CLASSES}
    judgement: Judgement = own_traffic.judge(heads, held, priors, wanted, before, before_at)
    card |= judgement.card
    card |= _belief(heads)
    if (thin := _no_better(heads, held, priors)) is not None:
        return Learned(card, heads, judgement.refusal or thin)
    if snapshot.learn is not None and snapshot.learn.certifies:
        return Learned(card, heads, judgement.refusal)
    # Nobody asks for a proof from held-out labels, so the heads that will be used may know them as well. Those in
    # force may know every label of their time: they are compared with heads that do so too.
    refusal = own_traffic.judge(heads, held, priors, wanted, None, 0.0).refusal
    if refusal is None and before is not None:
        older = held.rows(held.at <= before_at)
        known = own_traffic.fit(_together(rows, older), priors, encoder_id, seed, trees)
        refusal = _worse(known, before, held.rows(held.strong & (held.at > before_at)), priors, card)
    if refusal is None:
        heads = own_traffic.fit(examples, priors, encoder_id, seed, trees)
        nothing = comparisons.rows(np.zeros(len(unseen), dtype=bool))
        heads.arrays.update(calibration(heads, examples, nothing))
        card["fitted_on"] = "all labels"
        card |= _belief(heads)
    return Learned(card, heads, refusal)


def _belief(heads: SuccessHeads) -> dict[str, float]:
    """How far kinds of prompts come and go, and how far differences between models are believed for it."""
    return {name: round(float(heads.metadata[name]), 3) for name in ("moved", "carry")}


def calibration(heads: SuccessHeads, examples: Examples, held: Comparisons) -> Mapping[str, Any]:
    """The arrays from which a running gateway computes certificates."""
    return own_traffic.calibration(heads, examples.prompts, examples.classes, held).arrays()


def _together(left: Examples, right: Examples) -> Examples:
    """The rows of both; they share their prompts."""
    names = [field.name for field in fields(Examples)]
    by_row = [name for name in names if name not in ("models", "prompts", "classes", "costs")]
    rows: dict[str, Any] = {
        name: np.concatenate((getattr(left, name), getattr(right, name))) for name in by_row
    }
    return replace(left, **rows)


def _no_better(heads: SuccessHeads, held: Examples, priors: Mapping[str, Mapping[str, float]]) -> str | None:
    """Why heads are not to be believed: the held-out labels leave it open whether they say more than the priors."""
    judged = held.rows(held.strong)
    prior = own_traffic.prior_table(judged, priors)
    at = (judged.prompt, judged.model)
    table = own_traffic.known_or(own_traffic.success_table(heads, judged), prior)
    loss, spread = own_traffic.excess_loss(table[at], prior[at], judged.score, judged.weight)
    if loss < -spread:
        return None
    return (
        "it is no better than the priors on held-out labels by more than a standard error (squared error "
        f"{loss:+.4f}, standard error {spread:.4f}): more labels may show it"
    )


def _worse(
    heads: SuccessHeads,
    before: SuccessHeads,
    newer: Examples,
    priors: Mapping[str, Mapping[str, float]],
    card: dict[str, Any],
) -> str | None:
    """Why heads that know every label but `newer` are worse there than those in force, which know none of these."""
    if len(newer.score) < own_traffic.MIN_NEWER:
        return None
    prior = own_traffic.prior_table(newer, priors)
    at = (newer.prompt, newer.model)
    mine, theirs = (
        own_traffic.known_or(own_traffic.success_table(found, newer), prior)[at] for found in (heads, before)
    )
    loss, spread = own_traffic.excess_loss(mine, theirs, newer.score, newer.weight)
    card["squared_error_beyond_active"] = loss
    if loss <= spread:
        return None
    return (
        f"it is worse than the active one on {len(newer.score)} newer labels (squared error {loss:+.4f}, standard "
        f"error {spread:.4f})"
    )


def examples_of(
    traffic: LabelledTraffic, snapshot: Snapshot, at: datetime, seed: int = SEED
) -> tuple[Examples, Comparisons, int]:
    """The labels of models the configuration knows, the requests compared for a quality floor, and how many labels
    are of other models.

    Where somebody judged an answer, its automatic signals are left out: the judgement holds them; where a judge
    compared two answers, so is their agreement. Labels of the gateway itself have the key ''.
    """
    models = tuple(sorted({row.label.model for row in traffic.rows} & set(snapshot.models)))
    column = {name: index for index, name in enumerate(models)}
    rows = [row for row in traffic.rows if row.label.model in column]
    judged = {
        (row.prompt_id, row.label.model)
        for row in rows
        if row.label.source in JUDGED and row.label.weight > 0
    }
    pairs = _pairs(rows)
    place: dict[str, int] = {}
    prompts, classes, usages = [], [], []
    kept = []
    for row in rows:
        strong = row.label.source in JUDGED
        if not strong and (row.prompt_id, row.label.model) in judged:
            continue
        if row.label.source in (DRAWN, DRAWN_SAME) and pairs[row.label.request_id].source == DRAWN_JUDGED:
            continue
        if row.prompt_id not in place:
            try:
                prompts.append(prompt_features.unpack(row.features))
            except ValueError:
                continue  # kept by a version that read other features
            place[row.prompt_id] = len(place)
            known = row.prompt_class if row.prompt_class in PROMPT_CLASSES else UNKNOWN_CLASS
            classes.append(str(known))
            usages.append(row.usage)
        if row.label.weight > 0:
            kept.append((row, strong))
    labels = [row.label for row, _ in kept]
    found = Examples(
        models=models,
        prompts=prompts,
        classes=classes,
        costs=_costs(snapshot, models, usages, at),
        prompt=np.array([place[row.prompt_id] for row, _ in kept], dtype=np.int64),
        model=np.array([column[label.model] for label in labels], dtype=np.int64),
        score=np.array([label.score for label in labels], dtype=np.float64),
        weight=np.array([label.weight for label in labels], dtype=np.float64),
        at=np.array([label.at.timestamp() for label in labels], dtype=np.float64),
        strong=np.array([strong for _, strong in kept], dtype=bool),
        key=np.array(["" if label.source in GATEWAY else label.key_id for label in labels], dtype=np.str_),
    )
    recent = [
        (request, pair)
        for request, pair in pairs.items()
        if len(pair.labels) == 2 and pair.prompt_id in place and at - pair.labels[0].at <= CERTIFIES_FOR
    ]
    both = [pair.labels for _, pair in recent]
    comparisons = Comparisons(
        prompt=np.array([place[pair.prompt_id] for _, pair in recent], dtype=np.int64),
        models=np.array([[column[x.model] for x in pair] for pair in both], dtype=np.int64).reshape(-1, 2),
        scores=np.array([[x.score for x in pair] for pair in both], dtype=np.float64).reshape(-1, 2),
        sure=np.array([x.source != DRAWN for x, _ in both], dtype=bool),
        propensity=np.array([x.propensity for x, _ in both], dtype=np.float64),
        lot=np.array([_lot(seed, request) for request, _ in recent], dtype=np.float64),
    )
    return found, comparisons, len(traffic.rows) - len(rows)


def _lot(seed: int, request_id: str) -> float:
    return int.from_bytes(blake2b(f"{seed} {request_id}".encode(), digest_size=6).digest()) / 2**48


@dataclass(slots=True)
class _Compared:
    """A request compared for a quality floor, and the labels that count: a judge's, else those of agreement."""

    prompt_id: str
    source: str
    labels: list[Label]


def _pairs(rows: Sequence[LabelledRow]) -> dict[str, _Compared]:
    """By request, in the order of `rows`."""
    found: dict[str, _Compared] = {}
    for row in rows:
        label = row.label
        if label.source not in DRAWN_SOURCES:
            continue
        pair = found.setdefault(label.request_id, _Compared(row.prompt_id, label.source, []))
        if label.source == DRAWN_JUDGED != pair.source:
            pair.source, pair.labels = label.source, []
        if label.source == pair.source:
            pair.labels.append(label)
    return found


def priors_of(snapshot: Snapshot, models: Sequence[str]) -> dict[str, dict[str, float]]:
    """By model and class, in the order of `models`; a model without priors begins in the middle."""
    found: dict[str, dict[str, float]] = {}
    for name in models:
        quality = snapshot.models[name].quality
        found[name] = {
            prompt_class: UNKNOWN_PRIOR if quality is None else float(quality[prompt_class])
            for prompt_class in PROMPT_CLASSES
        }
    return found


def _costs(snapshot: Snapshot, models: Sequence[str], usages: Sequence[Usage], at: datetime) -> Any:
    prices = [snapshot.price(name, at) for name in models]
    return np.array(
        [
            [np.nan if price is None else total(price_usage(usage, price)) / NANO_PER_USD for price in prices]
            for usage in usages
        ],
        dtype=np.float64,
    ).reshape(len(usages), len(models))


def _min_quality(snapshot: Snapshot, prompt_class: str, at: datetime) -> float:
    classes = snapshot.resolve("default", None, {}, at).classes
    return float(classes[prompt_class].min_quality) if prompt_class in classes else 0.0


def _counted(names: Any) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    return dict(sorted(counts.items()))


def _by_model(examples: Examples) -> dict[str, dict[str, Any]]:
    found = {}
    for index, name in enumerate(examples.models):
        mine = (examples.model == index) & examples.strong
        if mine.any():
            found[name] = {
                "labels": int(mine.sum()),
                "mean_score": round(float(examples.score[mine].mean()), 4),
            }
    return found


def _in_force(engine: Engine, encoder_id: str) -> tuple[SuccessHeads | None, float]:
    """The heads in use and when they were made; none where they could not be used anyway."""
    row = artefacts.active(engine)
    if row is None:
        return None, 0.0
    try:
        found = artefacts.opened(
            artefacts.content(engine, row.id), sha256=row.sha256, id=row.id, encoder_id=encoder_id
        )
    except ArtefactError:
        return None, 0.0
    return found.heads, row.created_at.timestamp()


# ---- the command ----


def run(
    engine: Engine,
    snapshot: Snapshot,
    *,
    dry_run: bool = False,
    json_form: bool = False,
    seed: int = SEED,
    trusted: frozenset[str] = frozenset(),
    now: datetime | None = None,
    trees: int | None = None,
) -> tuple[int, str]:
    """(exit status, text): 0 where the heads were activated (or would be), 1 where they were refused."""
    at = now or datetime.now(UTC)
    found = learn(engine, snapshot, at, seed=seed, trusted=trusted, trees=trees)
    card = {**found.card, "refused": found.refusal}
    if found.heads is not None and found.refusal is None:
        id, content = artefacts.packed(found.heads)
        card["artefact"] = id
        if not dry_run:
            artefacts.store(engine, artefacts.SUCCESS, id, found.heads.encoder_id, content, card, at)
            artefacts.activate(engine, id, found.heads.encoder_id, at)
        card["activated"] = not dry_run
    text = json.dumps(card, indent=2) if json_form else card_text(card)
    return (0 if found.refusal is None else 1), text


def choose(engine: Engine, id: str, *, rollback: bool, now: datetime | None = None) -> str:
    """Makes a stored version the one in force; `priors`: none. With `rollback` only one that was in force before.

    Raises ConfigurationError, UnavailableError.
    """
    encoder_id = StaticEncoder.load(DATA_DIRECTORY).id
    at = now or datetime.now(UTC)
    if id == PRIORS:
        artefacts.activate(engine, None, encoder_id, at)
        return "The priors decide again; running gateways follow within 5 seconds."
    if rollback:
        row = next((row for row in artefacts.listed(engine) if row.id == id), None)
        if row is not None and row.activated_at is None:
            raise ConfigurationError(f"{id} was never in force: `farthing learn --activate {id}` makes it so")
    try:
        artefacts.activate(engine, id, encoder_id, at)
    except ArtefactError as error:
        raise ConfigurationError(str(error)) from None
    return f"{id} is in force; running gateways follow within 5 seconds."


def listing(engine: Engine, json_form: bool) -> str:
    """Every stored version, the newest first."""
    rows = artefacts.listed(engine)
    if json_form:
        return json.dumps([_row(row) for row in rows], indent=2)
    if not rows:
        return "Nothing has been learned yet: the priors decide."
    lines = []
    for row in rows:
        state = "active" if row.active else "was active" if row.activated_at else "stored"
        auroc = row.card.get("auroc")
        figures = f"{row.card.get('labels', 0)} labels" + (
            f", AUROC {auroc:.3f}" if auroc is not None else ""
        )
        lines.append(f"{row.id}  {state:10}  {row.created_at:%Y-%m-%d %H:%M}  {figures}")
    return "\n".join(lines)


def _row(row: StoredArtefact) -> dict[str, Any]:
    return {
        "id": row.id,
        "created_at": row.created_at.isoformat(),
        "encoder": row.encoder_id,
        "sha256": row.sha256,
        "active": row.active,
        "activated_at": row.activated_at.isoformat() if row.activated_at is not None else None,
        "card": row.card,
    }


def card_text(card: Mapping[str, Any]) -> str:
    """The model card for people."""
    lines = [
        f"Labels   {card['labels']} on {card['prompts']} judged prompts from {card['keys']} keys "
        f"({_listed(card['by_source'])})"
    ]
    if card["without_features"]:
        lines.append(f"         {card['without_features']} more of requests nothing else was kept of")
    for name, figures in card["by_model"].items():
        lines.append(f"         {name}: {figures['labels']} labels, mean score {figures['mean_score']:.2f}")
    if (compared := card["compared"])["requests"]:
        lines.append(
            f"Compared {compared['requests']} requests for quality floors, {compared['unsure']} of them without a "
            f"clear verdict: these count as failures of the cheaper model"
        )
    for doubt in card["doubts"]:
        done = (
            f"left out: they contradict all others (believe them with --trust {doubt['key']})"
            if doubt["left_out"]
            else "counted for as much as all others together"
        )
        lines.append(f"Doubt    {doubt['labels']} labels of key {doubt['key']} {done}")
    if "held_out_labels" in card:
        lines.append(
            f"Held out {card['held_out_labels']} labels: AUROC {_figure(card['auroc'])} (priors "
            f"{_figure(card['auroc_prior'])}), ECE {card['ece']:.3f} (priors {card['ece_prior']:.3f})"
        )
        if (routing := card["routing"]) is not None:
            lines.append(f"Cost     USD per 1,000 requests at the same success ({routing['success']:.3f}):")
            for name, cost in routing["usd_per_1000_at_this_success"].items():
                if name == "version_before" and "newer_than_active" not in card:
                    continue
                shown = "not reached" if cost is None else f"{cost:.4f}"
                lines.append(f"         {name.replace('_', ' '):15} {shown}")
        if card["carry"] < 1.0:
            lines.append(
                f"Caution  {card['moved']:.0%} of the prompts are of kinds that other times lack: differences "
                f"between models count {card['carry']:.0%}"
            )
        if card["fitted_on"] == "all labels":
            lines.append("Fitted   once more with the held-out labels, as no class asks for confidence")
    if card["refused"]:
        lines.append(f"Refused: {card['refused']}.")
    elif card.get("activated"):
        lines.append(f"{card['artefact']} is in force; running gateways follow within 5 seconds.")
    else:
        lines.append(f"{card['artefact']} would be activated (dry run: nothing was stored).")
    return "\n".join(lines)


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "none"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
