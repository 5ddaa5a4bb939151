"""Words that tell what a task demands, by group.

Collected from what the labelling guide (docs/classifiers.md) names for each class and from general vocabulary.
Groups may overlap: a word counts in each of its groups.
"""

from __future__ import annotations

import re
from typing import Final


def _words(text: str) -> set[str]:
    return set(text.split())


def _inflected(verbs: str) -> set[str]:
    """Return English verbs with their regular forms; a form that no one writes does no harm."""
    forms: set[str] = set()
    for verb in verbs.split():
        stem = verb[:-1] if verb.endswith("e") else verb
        forms |= {verb, verb + "s", stem + "ed", stem + "ing"}
        if verb.endswith("y"):
            forms |= {verb[:-1] + "ies", verb[:-1] + "ied"}
    return forms


GROUPS: Final[dict[str, frozenset[str]]] = {
    name: frozenset(words)
    for name, words in {
        # One fact is asked for.
        "facts": _words(
            "who when where whose whom which called name count opposite synonym antonym plural capital "
            "abbreviation acronym symbol definition syntax shortcut command spell stand stands meaning mean "
            "means currency code population temperature height distance date year flag keyword port formula "
            "born founded invented discovered named call painted wrote tallest largest smallest fastest "
            "biggest highest boiling melting wer wann wo qui quand où quién cuándo dónde chi quando onde "
            "quel quelle cuál qual что кто где когда сколько"
        ),
        # The answer is a line or less.
        "small": _words(
            "tldr quick quickly short shorter shortest tiny brief briefly single simply just only word "
            "words sentence headline title caption slogan yes no true false line one-line one-liner "
            "oneliner haiku joke riddle pun name names rhyme label tag round uppercase lowercase sort emoji"
        ),
        # What stands there is changed, found or copied.
        "transform": _inflected(
            "translate convert rewrite rephrase shorten correct fix extract list sort label classify count "
            "spell reformat remove copy turn change replace put pull return find pick choose give show get "
            "capitalise capitalize decode encode rename paste swap reverse underline print repeat "
            "transcribe add set"
        )
        | _words(
            "translation synonym synonyms antonym opposite plural singular spelling title headline caption "
            "slogan uppercase lowercase alphabetical alphabetically übersetze traduce traduis traduire "
            "traduci traduza vertaal"
        ),
        # Something of several steps is made by a known recipe.
        "produce": _inflected(
            "write draft create make compose implement build plan prepare organise organize describe "
            "summarise summarize outline suggest compare explain refactor improve polish edit refine adapt "
            "generate develop invent sketch script simplify calculate compute solve integrate differentiate "
            "teach schedule group tabulate restructure condense"
        )
        | _words(
            "function class component endpoint query script template table letter email e-mail poem story "
            "song lyrics speech blog post essay article dialogue agenda checklist recipe budget workshop "
            "itinerary presentation tests test examples example bullet bullets pros cons advice tips steps "
            "difference differences advantages disadvantages overview summary reminder reply regex api "
            "schema dockerfile makefile workflow lesson worksheet report review introduction paragraph "
            "routine programme timeline schreibe erkläre vergleiche écris écrivez rédige explique explica "
            "explícame escribe compara planea resume resuma riassumi spiega scrivi escreva напиши составь "
            "объясни сравни napisz wyjaśnij schrijf leg"
        ),
        # The answer has to be found, weighed or shown to be right.
        "hard": _inflected(
            "prove derive design architect analyse analyze assess evaluate critique criticise criticize "
            "weigh reconcile diagnose reconstruct formulate justify defend argue demonstrate refute "
            "disprove devise redesign synthesise synthesize investigate dissect examine trace quantify "
            "model adjudicate formalise formalize generalise generalize establish determine distinguish "
            "attribute infer identify discriminate characterise characterize bound corner triage "
            "restructure structure interpret negotiate disentangle predict rank settle recommend advise "
            "reason"
        )
        | _words(
            "proof proofs derivation analysis critically rigorous rigorously rigour argument arguments "
            "assessment synthesis reconstruction strategy beweise beweis beweist analysiere entwirf bewerte "
            "untersuche begründe démontrez démontrer démontre prouve concevez conçois analysez évaluez "
            "demuestra prueba diseña analiza evalúa evalúe proyecte demonstre valuta dimostra progetta "
            "analizza докажи докажите проанализируй оцените постройте обоснуй спроектируй udowodnij bewijs"
        ),
        # What makes an answer hard to check.
        "demands": _words(
            "trade-off trade-offs tradeoff tradeoffs compromis compromisos assumption assumptions "
            "hypothesis hypotheses counterexample counterexamples counter-example counterargument "
            "counter-argument counterarguments counterfactual invariant invariants root cause causes causal "
            "causality causation failure failures modes sensitivity scenario scenarios uncertainty evidence "
            "objection objections premise premises valid validity robust robustness limits limitations "
            "interact interacts interaction interactions conflicting conflict conflicts contradiction "
            "contradictions contradict incentive incentives risk risks exposure implications consequences "
            "mechanism mechanisms competing alternative alternatives theory theories debate debates "
            "guarantee guarantees guaranteed correctness correct necessary sufficient converge converges "
            "convergence asymptotic asymptotically optimal optimality optimisation optimization optimum "
            "impossible impossibility equivalence equivalent consistency consistent inconsistency "
            "identification confounding confounded bias biases discrepancy discrepancies priorities "
            "strongest rival rivals sceptical skeptical hostile defensible attack attacker game gamed "
            "collusion edge ambiguity ambiguous unambiguous subtle flaw flaws fallacy fallacies pitfalls "
            "contingencies rollback reversible irreversible falsifiable plausible opponent opponents "
            "externalities constraint constraints simultaneously provably provable literature scholarship "
            "jurisdiction jurisdictions precedent negotiation negotiating stakeholders liability"
        ),
        # Matters in which most tasks are hard.
        "technical": _words(
            "concurrency concurrent distributed deadlock deadlocks lock-free wait-free race races "
            "thread-safe consensus exactly-once replication partition partitions partitioned sharding shard "
            "sharded quorum crash crash-safe crashes multi-tenant tenant downtime zero-downtime migration "
            "migrate linearizability linearizable serializable snapshot isolation leak leaks heisenbug "
            "intermittent intermittently compiler interpreter parser garbage collector allocator scheduler "
            "engine optimiser optimizer kernel latency throughput p99 failover byzantine undefined protocol "
            "memory theorem lemma conjecture manifold topology topological galois eigenvalue eigenvalues "
            "stochastic martingale likelihood estimator estimators covenant covenants indemnity arbitration "
            "derivative derivatives convertible swaption valuation regulator regulatory statute doctrine "
            "enforceable metaphysics ontology epistemology historiography historiographical fourier laplace "
            "hilbert banach lagrangian hamiltonian bayesian regression endogeneity instruments monoid "
            "functor axiom axioms cardinality measurable pde ode simd jit type-checker paxos raft crdt "
            "merkle zero-knowledge homomorphic encryption end-to-end bitemporal"
        ),
        "scale": _words(
            "million millions billion billions tb pb petabytes terabytes qps global globally worldwide "
            "region regions tenants thousand thousands hundred microservices nationwide national decade "
            "decades years legacy enterprise merger acquisition multi"
        ),
        # Conditions put on the answer.
        "details": _words(
            "each every including include includes with using keep without must exactly between under at so "
            "such then also plus both all table columns format"
        ),
        "reasons": _words(
            "why because how whether should could would what explain warum wieso pourquoi perché почему как "
            "wie comment cómo"
        ),
        "chat": _words(
            "hi hello hey thanks thank bye lol ok okay good morning night haha cool please sorry great love "
            "bored hola ciao bonjour merci danke hallo salut gracias obrigado"
        ),
        "people": _words(
            "friend friends boyfriend girlfriend husband wife partner mother father mum mom dad son "
            "daughter sister brother siblings boss colleague flatmate roommate landlord neighbour neighbor "
            "wedding funeral feelings afraid nervous worried sad angry advice"
        ),
        "persons": _words("i i'm my me mine we our ours us you your i've we've i'd we're we'd"),
    }.items()
}

# Scripts without spaces or Latin letters: parts of words.
PARTS: Final[dict[str, re.Pattern[str]]] = {
    "parts_facts": re.compile(
        "多少|几|什么|谁|哪|今天|谢谢|你好|何と|いくつ|どこ|だれ|誰|いつ|ありがとう|어디|무엇|누구|몇|언제|क्या|कौन|कहाँ|कितन|"
        "ما هي|ما هو|من هو|كم|متى|أين|сколько|где|когда|кто|какой|какая|спасибо|привет|до свидания|столица"
    ),
    "parts_produce": re.compile(
        "写|解释|说明|比较|总结|计划|步骤|如何|怎么|函数|要約|説明|書い|比較し|まとめ|方法|설명|작성|비교|요약|व्याख्या|समझा|लिख|"
        "اشرح|اكتب|قارن|لخص|خطوة|напиш|объясн|сравн|состав|опиши|как работает|почему|план"
    ),
    "parts_hard": re.compile(
        "证明|设计|分析|论证|推导|权衡|评估|一致性|分布式|批判|証明|設計|論じ|戦略|導出|증명|설계|분석|논증|सिद्ध|विश्लेषण|डिज़ाइन|"
        "أثبت|برهن|صمم|حلل|قيّم|докаж|доказ|проанализ|оцени|спроект|выведи|обоснуй|контрпример|теорем|компромисс"
    ),
}
