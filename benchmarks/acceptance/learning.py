"""Learning end to end: recorded scores of nine models replayed behind a live gateway.

    python -m benchmarks.acceptance.learning --data ../shared/data [--seed 0] [--replays 10] [--json FILE]

`llmrouter` holds the score of nine models on every prompt, and their prices. A provider on loopback answers as they
did: a gateway sends it a prompt and a model, and this script knows the recorded score of what came back.

Set aside first: 200 prompts, on which the priors are measured (all nine models, three classes). The rest is cut in
two halves by lot. Prompts that stand in both of the source's files count once.

- First half. 70 % of the requests name a model, as apps do that were not changed: half of them one of the dearest
  models, half one of the cheaper. The other 30 % are a pilot app's, which says `auto` under a policy with
  `confidence: 95%`: its reference answers, as nothing is proven yet, and `learn.shadow: 100%` asks a cheaper model as
  well, off the answer path; a judge labels both. The reference is the first of the two dearest models, halfway the
  other one. 15 % of all requests get feedback on the model that served them.
- Models that another model which costs no more beats by more than .10 in every class's prior are not allowed.
- The pilot ends; `farthing learn`; the gateway picks the heads up. `min_quality`, one for all classes, is chosen by a
  rule that looks at the first half alone: the highest at which its prompts without a label would have cost, with all
  that was spent on learning, 73 % of always using the reference.
- Second half, all `auto`: once through that gateway, once through one that has only the priors, same `min_quality`.

The judge is simulated: it reads the recorded truth, at the price of gpt-5-nano for the tokens it was sent. Every
answer has 200 output tokens (the data records none), a prompt a token for four characters. What learning cost is
added to the learned arm. `--replays` repeats all that for other halves without servers: the same heads, choices and
rule in numpy.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import json
import re
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import sqlalchemy as sa
import uvicorn
from numpy.typing import NDArray

from benchmarks.acceptance.common import Verdict, ask, folder, run, session
from classifiers import prompt_features
from classifiers.classifier import Classifier
from classifiers.encoder import DATA_DIRECTORY, StaticEncoder
from classifiers.head import CLASSES
from classifiers.own_traffic import Examples, fit
from classifiers.success import SuccessHeads
from classifiers.success_features import PromptFeatures
from router.adapters.sql import artefacts
from router.adapters.sql.schema import labels as label_rows
from tests.e2e.gateway import Gateway, providers_yaml, until

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Flags = NDArray[np.bool_]

PRIOR_ROWS = 200
PRIOR_WORTH = 10.0
FEEDBACK = 0.15
NAMED = 0.70
BEATEN_BY = 0.10
COST_SHARE = 0.73
MARGIN = 0.02
SAVING = 0.25
OUTPUT_TOKENS = 200
CHARACTERS_A_TOKEN = 4
JUDGE = "gpt-5-nano"
JUDGE_PRICE = ("0.05", "0.40")
# What a judge is sent beside the conversation, and says, in tokens: counted in the live run, assumed in a replay.
JUDGE_TOKENS = (640, 14)
AT_ONCE = 8
DRAWS = 2000
_ANSWER = re.compile(r"\[answer (\d+)\]")
_FILLER = "and so the reasoning goes on for as long as recorded answers are taken to be "


# ---- the data ----


@dataclass(frozen=True)
class World:
    """Recorded answers of one split. By prompt and model (n, m): `score` 0..1 and `cost` in USD. `priors`: (m,
    classes). `allowed`, `cheap`: columns; `reference` and `second`: the dearest models, the better prior first.
    """

    models: tuple[str, ...]
    texts: Sequence[str]
    score: Floats
    cost: Floats
    price: Floats
    classes: Integers
    features: Sequence[PromptFeatures]
    priors: Floats
    first: Integers
    second_half: Integers
    allowed: Integers
    reference: int
    second: int

    @property
    def cheap(self) -> Integers:
        found: Integers = self.allowed[self.price[self.allowed] < self.price[self.reference]]
        return found

    def prior_table(self, rows: Integers) -> Floats:
        return self.priors[:, self.classes[rows]].T


@dataclass(frozen=True)
class Recorded:
    models: tuple[str, ...]
    texts: Sequence[str]
    score: Floats
    price: Floats
    classes: Integers
    features: Sequence[PromptFeatures]
    rows: int


def recorded(data: Path) -> Recorded:
    """Each prompt once, with features as a gateway stores them."""
    base = data / "llmrouter"
    prices = json.loads((base / "prices.json").read_text(encoding="utf-8"))
    if any(price["input"] != price["output"] for price in prices.values()):
        raise ValueError("prices.json: this run expects one price for input and output")
    models = tuple(sorted(prices))
    found: dict[str, list[float]] = {}
    count = 0
    for name in ("train", "test"):
        with gzip.open(base / f"{name}.json.gz", "rt", encoding="utf-8") as file:
            for row in json.load(file):
                count += 1
                found.setdefault(row["question"], [row["scores"][model] for model in models])
    texts = tuple(found)
    classifier = Classifier.load()
    packed = [prompt_features.pack(prompt_features.read(text, classifier.static)) for text in texts]
    return Recorded(
        models=models,
        texts=texts,
        score=np.array(list(found.values())),
        price=np.array([prices[model]["input"] for model in models]),
        classes=np.array([CLASSES.index(classifier.classify(text).prompt_class) for text in texts]),
        features=[prompt_features.unpack(value) for value in packed],
        rows=count,
    )


def tokens(text: str) -> int:
    return max(1, round(len(text) / CHARACTERS_A_TOKEN))


def world(data: Recorded, seed: int) -> World:
    order = np.random.default_rng(seed).permutation(len(data.texts))
    aside, rest = order[:PRIOR_ROWS], order[PRIOR_ROWS:]
    mean = data.score[aside].mean(axis=0)
    priors = np.empty((len(data.models), len(CLASSES)))
    for number in range(len(CLASSES)):
        mine = data.score[aside][data.classes[aside] == number]
        priors[:, number] = (mine.sum(axis=0) + PRIOR_WORTH * mean) / (len(mine) + PRIOR_WORTH)
    np.clip(priors, 0.02, 0.98, out=priors).round(3, out=priors)
    allowed = [
        m
        for m in range(len(data.models))
        if not any(
            data.price[other] <= data.price[m] and bool((priors[other] - priors[m] > BEATEN_BY).all())
            for other in range(len(data.models))
        )
    ]
    dearest = [m for m in allowed if data.price[m] == data.price[allowed].max()]
    dearest.sort(key=lambda m: -mean[m])
    sizes = np.array([tokens(text) + OUTPUT_TOKENS for text in data.texts])
    return World(
        models=data.models,
        texts=data.texts,
        score=data.score,
        cost=sizes[:, None] * data.price / 1e6,
        price=data.price,
        classes=data.classes,
        features=data.features,
        priors=priors,
        first=rest[: len(rest) // 2],
        second_half=rest[len(rest) // 2 :],
        allowed=np.array(allowed),
        reference=dearest[0],
        second=dearest[-1],
    )


@dataclass(frozen=True)
class FirstHalf:
    """By request, in the order of `World.first`: `named` column of the model it names, -1 for the pilot's `auto`;
    `reference`, the pilot's at that time; `feedback`, whether a score comes back.
    """

    named: Integers
    reference: Integers
    feedback: Flags


def first_half(given: World, seed: int) -> FirstHalf:
    draws = np.random.default_rng((seed, 1))
    n = len(given.first)
    dear = np.array([m for m in given.allowed if m not in given.cheap])
    named = np.where(draws.random(n) < 0.5, draws.choice(dear, n), draws.choice(given.cheap, n))
    reference = np.where(np.arange(n) < n // 2, given.reference, given.second)
    return FirstHalf(
        named=np.where(draws.random(n) < NAMED, named, -1),
        reference=reference,
        feedback=draws.random(n) < FEEDBACK,
    )


# ---- choosing ----


def routed(table: Floats, given: World, rows: Integers, minimum: float) -> Integers:
    """What `decide` takes: the cheapest allowed model predicted at `minimum` at least, else the best."""
    allowed, cost = given.allowed, given.cost[rows][:, given.allowed]
    predicted = np.round(table[:, allowed], 4)
    order = np.where(predicted >= minimum, cost - 1e-12 * predicted, np.inf)
    best = (predicted - 1e-6 * cost).argmax(axis=1)
    found: Integers = allowed[np.where(np.isfinite(order).any(axis=1), order.argmin(axis=1), best)]
    return found


def success_table(heads: SuccessHeads, given: World, rows: Integers) -> Floats:
    """(rows, models): the heads, and the prior where they know nothing of a model."""
    table = given.prior_table(rows)
    found = heads.predict_many(
        [given.features[i] for i in rows], [CLASSES[given.classes[i]] for i in rows]
    ).probability
    for column, name in enumerate(heads.models):
        table[:, given.models.index(name)] = found[:, column]
    return table


def chosen_minimum(heads: SuccessHeads, given: World, unlabelled: Integers, spent: float) -> float:
    """The rule above. `spent`: USD on learning, as a share of the reference's cost of the first half."""
    table = success_table(heads, given, unlabelled)
    whole = given.cost[unlabelled, given.reference].sum()
    budget = COST_SHARE - spent / given.cost[given.first, given.reference].sum()
    minimum = 0.0
    for step in range(0, 1001, 5):
        choice = routed(table, given, unlabelled, step / 1000)
        if given.cost[unlabelled, choice].sum() / whole <= budget:
            minimum = step / 1000
    return minimum


# ---- figures ----


@dataclass(frozen=True)
class Arm:
    """Success and cost in USD by request of the second half; `extra`: USD spent beside."""

    success: Floats
    cost: Floats
    extra: float = 0.0


def arms(given: World, learned: Arm, prior: Arm) -> dict[str, Arm]:
    rows = given.second_half
    score, cost = given.score[rows], given.cost[rows]
    best = int(given.score[given.first].mean(axis=0).argmax())
    oracle = np.where(score >= score.max(axis=1, keepdims=True), cost, np.inf).argmin(axis=1)
    at = np.arange(len(rows))
    return {
        "learned": learned,
        "prior_only": prior,
        "best_single": Arm(score[:, best], cost[:, best]),
        "random": Arm(score.mean(axis=1), cost.mean(axis=1)),
        "oracle": Arm(score[at, oracle], cost[at, oracle]),
    }


def interval(values: Floats, seed: int = 0) -> tuple[float, float]:
    """A 95 % bootstrap interval of the mean."""
    draws = np.random.default_rng(seed)
    means = [values[draws.integers(0, len(values), len(values))].mean() for _ in range(DRAWS)]
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def figures(found: Mapping[str, Arm]) -> dict[str, Any]:
    """By arm: success, cost of 1,000 requests and as a share of the best single model's; paired differences."""
    best = found["best_single"].cost.sum()
    result: dict[str, Any] = {
        name: {
            "success": round(float(arm.success.mean()), 4),
            "usd_per_1000": round(float(1000 * (arm.cost.sum() + arm.extra) / len(arm.cost)), 5),
            "cost_share": round(float((arm.cost.sum() + arm.extra) / best), 4),
            "extra_share": round(arm.extra / float(best), 4),
        }
        for name, arm in found.items()
    }
    for other in ("best_single", "prior_only"):
        difference = found["learned"].success - found[other].success
        low, high = interval(difference)
        result[f"beyond_{other}"] = {
            "success": round(float(difference.mean()), 4),
            "low": round(low, 4),
            "high": round(high, 4),
        }
    return result


def passes(result: Mapping[str, Any]) -> bool:
    return bool(
        result["learned"]["cost_share"] <= 1 - SAVING
        and result["beyond_best_single"]["low"] >= -MARGIN
        and result["beyond_prior_only"]["low"] >= -MARGIN
    )


# ---- without servers ----


def replay(data: Recorded, seed: int) -> dict[str, Any]:
    """The same experiment in numpy: heads by `own_traffic.fit`, choices as `decide` makes them."""
    given, half = world(data, seed), first_half(world(data, seed), seed)
    draws = np.random.default_rng((seed, 2))
    pilot = half.named < 0
    served = np.where(pilot, half.reference, half.named)
    other = draws.choice(given.cheap, len(served))
    rated = np.flatnonzero(half.feedback & ~pilot)
    paired = np.flatnonzero(pilot)
    prompt = np.concatenate((rated, paired, paired))
    model = np.concatenate((served[rated], served[paired], other[paired]))
    rows = given.first[prompt]
    judge_price = [float(price) for price in JUDGE_PRICE]
    judged = sum(
        (tokens(given.texts[given.first[i]]) + JUDGE_TOKENS[0]) * judge_price[0]
        + JUDGE_TOKENS[1] * judge_price[1]
        for i in paired
    )
    spent = float(given.cost[given.first[paired], other[paired]].sum() + judged / 1e6)
    known = sorted(set(model.tolist()))
    names = tuple(given.models[m] for m in known)
    used, place = np.unique(prompt, return_inverse=True)
    examples = Examples(
        models=names,
        prompts=[given.features[given.first[i]] for i in used],
        classes=[CLASSES[given.classes[given.first[i]]] for i in used],
        costs=given.cost[given.first[used]][:, known],
        prompt=place,
        model=np.array([known.index(m) for m in model]),
        score=given.score[rows, model],
        weight=np.ones(len(prompt)),
        at=prompt.astype(float),
        strong=np.ones(len(prompt), dtype=bool),
        key=np.array([""] * len(prompt)),
    )
    priors = {
        given.models[m]: {name: float(given.priors[m, at]) for at, name in enumerate(CLASSES)} for m in known
    }
    heads = fit(examples, priors, StaticEncoder.load(DATA_DIRECTORY).id, 0)
    unlabelled = np.setdiff1d(given.first, rows)
    minimum = chosen_minimum(heads, given, unlabelled, spent)
    after = given.second_half
    at = np.arange(len(after))
    learned = routed(success_table(heads, given, after), given, after, minimum)
    prior = routed(given.prior_table(after), given, after, minimum)
    found = arms(
        given,
        Arm(given.score[after][at, learned], given.cost[after][at, learned], spent),
        Arm(given.score[after][at, prior], given.cost[after][at, prior]),
    )
    return {"seed": seed, "labels": len(prompt), "min_quality": minimum, **figures(found)}


# ---- with servers ----


@dataclass
class Provider:
    """The nine models and the judge on loopback. `spent`: its own sum of what it was asked, USD by model."""

    world: World
    row: dict[str, int]
    scores: list[float] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)
    spent: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        raw = b""
        while True:
            message = await receive()
            raw += message.get("body", b"")
            if not message.get("more_body"):
                break
        body = json.loads(raw)
        text, used = self.answer(body["model"], body["messages"])
        reply = json.dumps(
            {
                "id": "replayed",
                "object": "chat.completion",
                "created": 1,
                "model": body["model"],
                "choices": [
                    {
                        "index": 0,
                        "message": {"role": "assistant", "content": text},
                        "finish_reason": "stop",
                    }
                ],
                "usage": {
                    "prompt_tokens": used[0],
                    "completion_tokens": used[1],
                    "total_tokens": sum(used),
                },
            }
        ).encode()
        await send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [
                    (b"content-type", b"application/json"),
                    (b"content-length", str(len(reply)).encode()),
                ],
            }
        )
        await send({"type": "http.response.body", "body": reply})

    def answer(self, model: str, messages: Sequence[Mapping[str, Any]]) -> tuple[str, tuple[int, int]]:
        self.calls[model] += 1
        asked = messages[-1]["content"]
        if model == JUDGE:
            a, b = (self.scores[int(number)] for number in _ANSWER.findall(asked)[-2:])
            better = "a" if a > b else "b" if b > a else "tie"
            text = json.dumps({"better": better, "a_good": a, "b_good": b})
            used = (tokens("".join(message["content"] for message in messages)), tokens(text))
            self.spent[model] += (used[0] * float(JUDGE_PRICE[0]) + used[1] * float(JUDGE_PRICE[1])) / 1e6
            return text, used
        column = self.world.models.index(model)
        row = self.row[asked]
        self.scores.append(float(self.world.score[row, column]))
        text = f"[answer {len(self.scores) - 1}] "
        text += (_FILLER * 20)[: OUTPUT_TOKENS * CHARACTERS_A_TOKEN - len(text)]
        used = (tokens(asked), OUTPUT_TOKENS)
        self.spent[model] += sum(used) * float(self.world.price[column]) / 1e6
        return text, used


def providers_file(given: World, url: str) -> str:
    models = {}
    for m, name in enumerate(given.models):
        quality = ", ".join(f'{kind}: "{given.priors[m, at]:.3f}"' for at, kind in enumerate(CLASSES))
        models[name] = (
            f"{{ provider: recorded, name: {name}, context: 128000, max_output: 4096, "
            f'price: {{ input: "{given.price[m]:g}", output: "{given.price[m]:g}" }}, quality: {{ {quality} }} }}'
        )
    models[JUDGE] = (
        f"{{ provider: recorded, name: {JUDGE}, context: 400000, max_output: 4096, "
        f'price: {{ input: "{JUDGE_PRICE[0]}", output: "{JUDGE_PRICE[1]}" }} }}'
    )
    return providers_yaml(models, {"recorded": f'{{ wire: openai, base_url: "{url}/v1" }}'})


def learning_policy(given: World, reference: int) -> str:
    """Apps name models; the pilot's requests are answered by the reference and, in the shadow, by a cheaper model."""
    pilot = [given.models[m] for m in (reference, *given.cheap)]
    sure = "{ min_quality: 0.95, confidence: 95% }"
    return f"""\
apiVersion: farthing/v1
baseline: {given.models[reference]}
classes: {{ simple: {{ min_quality: 0.95 }}, medium: {{ min_quality: 0.95 }}, complex: {{ min_quality: 0.95 }} }}
defaults: {{ allow: [{", ".join((*given.models, JUDGE))}], cache: {{ exact: false }} }}
learn: {{ shadow: 100%, budget: {{ month: 100 }}, judge: {JUDGE} }}
teams:
  company:
    apps:
      pilot:
        allow: [{", ".join((*pilot, JUDGE))}]
        classes: {{ simple: {sure}, medium: {sure}, complex: {sure} }}
"""


def routing_policy(given: World, minimum: float, *, learn: bool) -> str:
    asked = f"{{ min_quality: {minimum:.3f} }}"
    return f"""\
apiVersion: farthing/v1
baseline: {given.models[given.reference]}
classes: {{ simple: {asked}, medium: {asked}, complex: {asked} }}
defaults: {{ allow: [{", ".join(given.models[m] for m in given.allowed)}], cache: {{ exact: false }} }}
{"learn: {}" if learn else ""}
"""


async def serve(app: Provider) -> tuple[uvicorn.Server, asyncio.Task[None], str]:
    server = uvicorn.Server(
        uvicorn.Config(app, port=0, log_level="warning", lifespan="off", access_log=False)
    )
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    task = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    return server, task, f"http://127.0.0.1:{port}"


async def live(verdict: Verdict, data: Recorded, seed: int, where: Path) -> dict[str, Any]:
    given = world(data, seed)
    half = first_half(given, seed)
    provider = Provider(given, {text: row for row, text in enumerate(given.texts)})
    server, task, url = await serve(provider)
    try:
        with Gateway(
            where / "learned", providers_file(given, url), learning_policy(given, given.reference)
        ) as gateway:
            served = await first_requests(verdict, gateway, given, half)
            # The pilot is over: no class asks for confidence, so the heads may learn from all labels.
            gateway.write(policy=routing_policy(given, 0.95, learn=True))
            heads, card = await asyncio.to_thread(learn, verdict, gateway)
            spent = await asyncio.to_thread(learning_cost, verdict, gateway, provider)
            labelled = set(served["labelled"])
            unlabelled = np.array([row for row in given.first if row not in labelled])
            minimum = chosen_minimum(heads, given, unlabelled, spent)
            gateway.write(policy=routing_policy(given, minimum, learn=True))
            gateway.reload()
            await picked_up(verdict, gateway, given, heads, minimum)
            after = given.second_half
            expected = routed(success_table(heads, given, after), given, after, minimum)
            learned = await second_requests(verdict, gateway, given, "learned", expected, spent)
        with Gateway(
            where / "priors",
            providers_file(given, url),
            routing_policy(given, minimum, learn=False),
        ) as gateway:
            expected = routed(given.prior_table(after), given, after, minimum)
            prior = await second_requests(verdict, gateway, given, "prior only", expected, 0.0)
    finally:
        server.should_exit = True
        await task
    return {
        "seed": seed,
        "labels": card["labels"],
        "min_quality": minimum,
        "card": card,
        **figures(arms(given, learned, prior)),
    }


async def first_requests(
    verdict: Verdict, gateway: Gateway, given: World, half: FirstHalf
) -> dict[str, list[int]]:
    """Sends the first half in two parts, with the policy of each, and its feedback."""
    labelled: list[int] = []
    wrong: Counter[str] = Counter()
    gate = asyncio.Semaphore(AT_ONCE)
    keys = {m: gateway.key("company", f"app-{m}") for m in given.allowed.tolist()} | {
        -1: gateway.key("company", "pilot")
    }
    ids: dict[str, int] = {}

    async def one(http: Any, at: int) -> None:
        row, named = int(given.first[at]), int(half.named[at])
        body = {
            "model": given.models[named] if named >= 0 else "auto",
            "messages": [{"role": "user", "content": given.texts[row]}],
        }
        async with gate:
            answer = await ask(http, gateway.url, keys[named], body)
            model = answer.headers.get("x-farthing-model", "")
            expected = given.models[named if named >= 0 else half.reference[at]]
            if answer.status != 200 or model != expected:
                wrong[f"{answer.status} {model} for {expected}"] += 1
                return
            ids[answer.id] = row
            if half.feedback[at]:
                score = float(given.score[row, given.models.index(model)])
                async with http.post(
                    f"{gateway.url}/v1/feedback",
                    json={"request_id": answer.id, "score": score},
                    headers={"authorization": f"Bearer {keys[named]}"},
                ) as said:
                    if said.status != 200:
                        wrong[f"feedback {said.status}"] += 1
                        return
                labelled.append(row)

    n = len(given.first)
    async with session() as http:
        await asyncio.gather(*(one(http, at) for at in range(n // 2)))
        await idle(gateway)
        policy_hash = await hash_of(http, gateway, given)
        gateway.write(policy=learning_policy(given, given.second))
        gateway.reload()
        while await hash_of(http, gateway, given) == policy_hash:  # noqa: ASYNC110
            await asyncio.sleep(0.2)
        await asyncio.gather(*(one(http, at) for at in range(n // 2, n)))
        await idle(gateway)
    verdict.check(not wrong, f"first half: {n} requests and {len(labelled)} scores {dict(wrong) or ''}")
    with gateway.engine.connect() as connection:
        rows = connection.execute(sa.select(label_rows.c.request_id, label_rows.c.source)).all()
    labelled += [ids[request_id] for request_id, _ in rows if request_id in ids]
    verdict.say(f"labels by source {dict(Counter(source for _, source in rows))}")
    return {"labelled": labelled}


async def hash_of(http: Any, gateway: Gateway, given: World) -> str:
    """The policy in force, asked by a request that belongs to no half (and is not learned from: it names a model)."""
    body = {
        "model": given.models[int(given.cheap[0])],
        "messages": [{"role": "user", "content": given.texts[int(given.first[0])]}],
    }
    answer = await ask(http, gateway.url, gateway.key("company", "watch"), body)
    return answer.headers["x-farthing-policy"]


async def idle(gateway: Gateway) -> None:
    """Until shadows and judges have ended: their rows stop growing."""
    before = -1
    while (count := await asyncio.to_thread(lambda: len(gateway.rows()))) != before:
        before = count
        await asyncio.sleep(1.5)


def learn(verdict: Verdict, gateway: Gateway) -> tuple[SuccessHeads, dict[str, Any]]:
    gateway.settled()
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "router.cli", "learn", "--json"],
        env={**gateway.environment, "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    card: dict[str, Any] = json.loads(done.stdout) if done.returncode in (0, 1) else {}
    verdict.check(
        done.returncode == 0,
        f"farthing learn: {card.get('labels')} labels on {card.get('prompts')} prompts in "
        f"{time.monotonic() - began:.1f} s, AUROC {card.get('auroc')} (priors {card.get('auroc_prior')}), "
        f"ECE {card.get('ece')}, refused: {card.get('refused', done.stderr[-300:])}",
    )
    row = artefacts.active(gateway.engine)
    assert row is not None, "no heads are in force"
    content = artefacts.content(gateway.engine, row.id)
    found = artefacts.opened(content, sha256=row.sha256, id=row.id, encoder_id=row.encoder_id)
    return found.heads, card


def learning_cost(verdict: Verdict, gateway: Gateway, provider: Provider) -> float:
    """USD of every row of learning's own, and the whole ledger against the provider's own sum."""
    rows = gateway.rows()
    spent = float(sum(row["cost"] for row in rows if row["endpoint"].startswith("learn.")) / 1e9)
    whole = sum(row["cost"] for row in rows) / 1e9
    theirs = sum(provider.spent.values())
    counts = Counter(row["endpoint"] for row in rows)
    verdict.check(
        abs(whole - theirs) < 1e-6,
        f"ledger {whole:.6f} USD = provider's log {theirs:.6f}; rows {dict(counts)}, learning {spent:.6f} USD",
    )
    return spent


async def picked_up(
    verdict: Verdict, gateway: Gateway, given: World, heads: SuccessHeads, minimum: float
) -> None:
    """Waits until the learned heads decide, without a restart: prompts that the priors would send elsewhere."""
    rows = given.first
    wanted = routed(success_table(heads, given, rows), given, rows, minimum)
    changed = np.flatnonzero(wanted != routed(given.prior_table(rows), given, rows, minimum))[:20]
    began, key = time.monotonic(), gateway.key("company", "watch")

    async def served(http: Any, at: int) -> str:
        text = given.texts[int(rows[at])]
        answer = await ask(
            http, gateway.url, key, {"model": "auto", "messages": [{"role": "user", "content": text}]}
        )
        return answer.headers.get("x-farthing-model", "")

    async with session() as http:
        while True:
            same = [await served(http, at) == given.models[wanted[at]] for at in changed]
            if sum(same) > 0.8 * len(same) or time.monotonic() - began > 20:
                break
    verdict.check(
        sum(same) > 0.8 * len(same),
        f"the running gateway decides by what was learned after {time.monotonic() - began:.1f} s: "
        f"{sum(same)} of {len(same)} prompts that the priors would have sent elsewhere",
    )


async def second_requests(
    verdict: Verdict, gateway: Gateway, given: World, name: str, expected: Integers, extra: float
) -> Arm:
    """Sends the second half, all `auto`; success by the recorded score of what served, cost by the ledger.
    `expected`: what a replay would have chosen.
    """
    gate, key = asyncio.Semaphore(AT_ONCE), gateway.key("company", "everything")
    served: dict[str, tuple[int, int]] = {}
    failed: Counter[int] = Counter()

    async def one(http: Any, at: int) -> None:
        text = given.texts[int(given.second_half[at])]
        async with gate:
            answer = await ask(
                http,
                gateway.url,
                key,
                {"model": "auto", "messages": [{"role": "user", "content": text}]},
            )
        if answer.status == 200:
            served[answer.id] = (at, given.models.index(answer.headers["x-farthing-model"]))
        else:
            failed[answer.status] += 1

    n = len(given.second_half)
    async with session() as http:
        await asyncio.gather(*(one(http, at) for at in range(n)))

    def booked() -> dict[str, Any]:
        rows = {row["id"]: row for row in gateway.rows()}
        return rows if served.keys() <= rows.keys() else {}

    rows = await asyncio.to_thread(until, booked, "every row is written")
    success, cost = np.zeros(n), np.zeros(n)
    for request_id, (at, model) in served.items():
        success[at] = given.score[given.second_half[at], model]
        cost[at] = rows[request_id]["cost"] / 1e9
    shares = Counter(given.models[model] for _, model in served.values())
    verdict.check(not failed, f"second half, {name}: {len(served)} of {n} answered, by {dict(shares)}")
    agreed = sum(expected[at] == model for at, model in served.values())
    verdict.say(f"{agreed / max(len(served), 1):.1%} of the choices are those of a replay")
    checked = await asyncio.to_thread(gateway.cli, "ledger", "verify")
    verdict.check(checked.returncode == 0, f"ledger verify: {checked.stdout.strip()[-120:]}")
    return Arm(success, cost, extra)


# ---- the run ----


def told(verdict: Verdict, result: Mapping[str, Any]) -> None:
    verdict.say(
        f"seed {result['seed']}: {result['labels']} labels, min_quality {result['min_quality']:.3f} by the rule"
    )
    for name in ("learned", "prior_only", "best_single", "random", "oracle"):
        arm = result[name]
        beside = f", {arm['extra_share']:.1%} of it for learning" if arm["extra_share"] else ""
        verdict.say(
            f"  {name:11} success {arm['success']:.4f}, {arm['usd_per_1000']:.4f} USD per 1,000, "
            f"{arm['cost_share']:.1%} of the best single model{beside}"
        )
    for other in ("best_single", "prior_only"):
        row = result[f"beyond_{other}"]
        verdict.say(
            f"  learned - {other}: {row['success']:+.4f}, 95 % interval {row['low']:+.4f} to {row['high']:+.4f}"
        )


async def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds llmrouter/")
    parser.add_argument("--seed", type=int, default=0, help="of the split of the live run")
    parser.add_argument("--replays", type=int, default=0, help="further splits, without servers")
    parser.add_argument("--no-live", action="store_true")
    parser.add_argument("--json", type=Path, help="file for all figures")
    options = parser.parse_args()
    verdict = Verdict("learning")
    data = recorded(options.data)
    verdict.say(f"{data.rows} recorded rows, {len(data.texts)} different prompts, {len(data.models)} models")
    result: dict[str, Any] = {"rows": data.rows, "prompts": len(data.texts)}
    if options.replays:
        result["replays"] = [replay(data, options.seed + number) for number in range(options.replays)]
        for one in result["replays"]:
            told(verdict, one)
        verdict.say(
            f"replays: {sum(map(passes, result['replays']))} of {options.replays} pass; mean cost share "
            f"{np.mean([one['learned']['cost_share'] for one in result['replays']]):.3f}, mean success beyond the "
            f"best single model {np.mean([one['beyond_best_single']['success'] for one in result['replays']]):+.4f}"
        )
    if not options.no_live:
        with folder() as where:
            result["live"] = one = await live(verdict, data, options.seed, where)
        told(verdict, one)
        verdict.check(
            one["learned"]["cost_share"] <= 1 - SAVING,
            f"cost {1 - one['learned']['cost_share']:.1%} below the best single model, learning counted",
        )
        for other in ("best_single", "prior_only"):
            verdict.check(
                one[f"beyond_{other}"]["low"] >= -MARGIN,
                f"success no lower than {other}: at least {one[f'beyond_{other}']['low']:+.4f}",
            )
    if options.json:
        options.json.write_text(json.dumps(result, indent=1), encoding="utf-8")
    return verdict.finish()


if __name__ == "__main__":
    run(main)
