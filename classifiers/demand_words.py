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

# What a task asks for, in words and in phrases of up to three words, wherever they stand in it. A prompt told anew
# uses other words of the same group, or of a group of the same level (LEVELS), more often than the same words.
PHRASES: Final[dict[str, frozenset[str]]] = {
    name: frozenset(phrases.split("|"))
    for name, phrases in {
        "meaning": (
            "what is|what's|whats|what are|what was|define|definition|meaning|mean|means|stand for|"
            "stands for|short for|abbreviation|what does|what do|in other words|the word for|word for|"
            "term for|called|what that is|what is that|was ist|was heißt|was bedeutet|qu'est|c'est quoi|"
            "qué es|qué significa|cos'è|o que é|что такое"
        ),
        "fact": (
            "what part|which part|odd one|how come the|what day|which day|what temperature|wie heißt|"
            "find out who|who is|who|whom|whose|who's|which year|what year|when was|when is|when did|"
            "when's|where is|where was|which city|which country|what city|by whom|how many|how much|"
            "how tall|how far|how old|how long|how fast|how big|how high|how deep|how late|how hot|"
            "number of|what number|what time|what date|which date|what colour|what color|what language|"
            "which language|which word|which one|what port|which port|what currency|which organ|"
            "what organ|how is|height|distance|capital|author|inventor|painter|spelled|spelling|spell|"
            "equals|equal to|what kind|what gas|which gas|wer|wann|wie viele|wie spät|welche uhrzeit|"
            "combien|qui a|quand|où|cuántos|cuándo|dónde|quién|quanti|chi|quando|где|кто|когда|сколько|"
            "чему равно"
        ),
        "item": (
            "name|give one|give me one|example of|an example|list the|state|one of|which of|pick|choose|"
            "count|say|repeat|tell me the|what's the name|i only need|just the|only the|give me the|"
            "syntax|command|shortcut|keyword|flag|one-liner|line"
        ),
        "yes_no": (
            "do you think|does that|am i|have you|should it|do they|is it|is there|are there|is this|"
            "is that|does it|do i|does this|do you|are you|can i|could it|true or|yes or|yes or no|"
            "or not|or false|allowed|okay|is the|are the|does a|does the|is a|do the"
        ),
        "why": (
            "for the reason|cause of|reason for|why is|why are|why do|why does|arise|why|why's|how come|"
            "what makes|what made|what causes|what caused|what cause|the reason|reasons|reason|what led|"
            "causes|cause|because|due to|account for|behind it|behind|where does|explain why|say why|"
            "warum|wieso|weshalb|pourquoi|por qué|perché|почему"
        ),
        "workings": (
            "come about|comes about|how are|happen|happens|functions|operate|operates|under the hood|"
            "inside|how does|how do|how did|how it|how they|how one|how a|how an|how the|work|works|"
            "working|mechanism|principle|principles|the way|what happens|going on|what goes|takes place|"
            "in what way|process|wie funktioniert|funktioniert|arbeitet|comment fonctionne|fonctionne|"
            "cómo funciona|funciona|come funziona|как работает"
        ),
        "how_to": (
            "one step|after the|step after|one does|one read|does one|can one|how one|sequence of steps|"
            "walkthrough|how do i|how do you|how can i|how to|how should|how would|how could|how can|"
            "how does one|the way to|way to|a way|ways|steps|step|step by|the steps|go about|what do i|"
            "what should|what must|what can|do i have|procedure|instructions|guide|method"
        ),
        "explanation": (
            "explain|explains|describe|tell me|tell us|illustrate|teach|walk me|walk us|take me|"
            "go through|help me|understand|understands|simple terms|simple words|plain language|"
            "plain words|in words|clarify|overview|introduction to|basics|explained|erkläre|erklär|"
            "erläutere|explique|expliquez|explica|explícame|spiega|объясни|расскажи|describe how|"
            "talk about|outline"
        ),
        "making": (
            "i need|i'd like|i want|we need|we'd like|we want|i'm looking|can you|could you|would you|"
            "please|make me|give me|write|draft|compose|create|make|produce|generate|prepare|"
            "put together|draw up|come up|build|set up|implement|code|program|sketch|invent|develop|"
            "schreibe|formuliere|écris|rédige|escribe|necesito|scrivi|escreva|напиши|составь|распиши"
        ),
        "artefact": (
            "function|script|class|component|endpoint|query|dockerfile|makefile|schema|spec|test|tests|"
            "table|chart|letter|email|e-mail|mail|poem|story|song|lyrics|speech|post|essay|article|"
            "dialogue|agenda|checklist|plan|recipe|budget|workshop|itinerary|presentation|schedule|"
            "timetable|calendar|programme|routine|worksheet|lesson|report|review|paragraph|timeline|"
            "summary|message|notice|announcement|description|profile|cv|template|module|library|package|"
            "middleware|hook|decorator|api|pipeline|model|app|website|page|newsletter|invitation|toast|"
            "abstract|bullets|points|questions|exercises|examples|tips|ideas|reasons|workflow|rota|guide|"
            "faq|funktion|fonction|función|carta|funzione|функцию|план"
        ),
        "comparison": (
            "compare|comparison|contrast|difference|differences|differ|differs|different|versus|vs|"
            "side by|side|set against|against|pros|cons|advantages|advantage|disadvantages|strengths|"
            "weaknesses|benefits|drawbacks|speaks for|good and|for and|better|which is|cheaper|either|"
            "both|or|vergleiche|unterschied|vorteile|nachteile|comparez|différence|compara|diferencia|"
            "diferencias|confronta|сравни"
        ),
        "proof": (
            "show why|can't ever|one-to-one|onto|unique|uniqueness|holds|no matter|exists|existence|"
            "impossible|impossibility|infeasible|infeasibility|prove|proves|proved|proving|proof|proofs|"
            "show that|demonstrate|demonstrates|show by|show with|refute|disprove|provably|rigorous|"
            "rigorously|provable|verify that|equivalence|equivalent|correctness|is correct|guarantee|"
            "guarantees|must be|can't be|cannot be|beweise|beweis|zeige|démontrez|démontre|prouve|"
            "demuestra|dimostra|докажи|докажите|invariant|counterexample|counter-example"
        ),
        "school_proof": (
            "pythagoras|am-gm|inequality|harmonic|tree|vertices|angles|sum of|square root|equal|primes|"
            "prime|by induction|induction|contradiction|odd|even|divisible|irrational|rational|fraction|"
            "divides|truth table|triangle|rectangle|integer|integers|bijection|consecutive|multiple"
        ),
        "derivation": (
            "isomorphism|isometry|every group|groups of|structure of|conditions|compute the|"
            "generating function|classify all|functions satisfy|satisfy|radicals|necessary and|"
            "sufficient|derive|derives|derivation|arrive at|arrives at|follows from|deduce|work out|"
            "determine|characterise|characterize|find all|all of them|for which|under which|under what|"
            "bound|bounds|asymptotic|asymptotically|converge|converges|limit|general|distribution|"
            "solution set|up to|solutions|recurrence|closed form|exact|exactly|infinite|infinitely|"
            "estimate|estimator|estimand|optimal|minimise|maximise"
        ),
        "weighing": (
            "merits|verdict|persuasive|reply to|refute|contradict|contradicts|tell apart|both be|fair|"
            "fairly|honestly|ethics|conflict|conflicts|conflicting|interests|lose|stands to|options|"
            "weigh|weighs|assess|assesses|assessment|evaluate|evaluates|judge|critically|critical|"
            "critique|argue|argues|argument|arguments|defend|defends|defensible|justify|justifies|"
            "justified|justification|make the|the case|deserves|trust|to what|what extent|how far|"
            "persuade|convince|convincing|evidence|objection|objections|strongest|balance|reliable|"
            "robust|robustness|claim|claims|sceptical|skeptical|debate|interpretation|reading|valid|"
            "validity|sound|reasons for|every side|both sides|sides|trade-off|trade-offs|tradeoffs|"
            "implications|consequences|limits|limitations|assumptions|premises|bias|confounding|"
            "analysiere|diskutiere|bewerte|analysez|discutez|argumentez|analiza|valuta|discuta|оцените|"
            "проанализируй"
        ),
        "diagnosis": (
            "root cause|find out|diagnose|diagnosis|track down|trace|reconstruct|rule out|ruling out|"
            "hypotheses|hypothesis|discriminate|discriminates|tell apart|isolate|investigate|establish|"
            "detect|identify|leak|leaks|deadlock|deadlocks|race|races|intermittent|intermittently|flaky|"
            "crash|crashes|heisenbug|corrupt|under load|in production|anomaly|latency|"
            "undefined behaviour|memory"
        ),
        "design": (
            "how should we|anew|from scratch|come up with the|go about|paxos|raft|consensus|scheduler|"
            "garbage collector|regex engine|compiler|interpreter|parser|jit|allocator|engine|lock-free|"
            "wait-free|thread-safe|crdt|simd|crash safe|crash-safe|exactly once|exactly-once|"
            "zero-downtime|zero-copy|work stealing|work-stealing|write-ahead|b-tree|kernel|solver|"
            "protocol|encryption|concurrent|concurrency|design|designs|architect|architecture|redesign|"
            "would you|construct|devise|structure|develop|strategy|strategies|roadmap|migrate|migration|"
            "formulate|specify|specification|system|systems|distributed|scalable|consistency|consistent|"
            "availability|failure|failures|faults|partition|regions|region|replication|recovery|rollback|"
            "downtime|multi-tenant|real time|real-time|entwirf|entwerfe|concevez|proposez|diseña|"
            "proponga|proyecte|progetta|спроектируй|turnaround|restructure|scheme|policy|incentives|"
            "governance"
        ),
        "advice": (
            "recommend|suggest|suggests|advise|advice|tips|should i|should we|would suit|ideas|"
            "what would|good way|best way|idea|propose|help|which should|choose|your choice|pick"
        ),
        "translation": (
            "translate|translation|translates|how do you say|do you say|you say|in french|in german|"
            "in spanish|in italian|in english|in dutch|in swedish|in polish|in japanese|in korean|"
            "in danish|in finnish|in portuguese|in greek|into french|into german|into spanish|"
            "into italian|into english|into dutch|into polish|into japanese|to french|to german|"
            "to spanish|to italian|to english|übersetze|auf englisch|traduis|traduce|traduci|"
            "english word|french word|german word"
        ),
        "change": (
            "rewrite|rephrase|reword|shorten|correct|fix|convert|turn|change|reformat|remove|delete|"
            "replace|reverse|sort|order|put|format|capitals|uppercase|lowercase|upper case|title case|"
            "capital letters|past tense|plural|synonym|synonyms|opposite|antonym|grammar|active voice|"
            "other word|decimal|json|csv|markdown|list|bullet|alphabetical|round|decode|encode|copy|"
            "paste|rename"
        ),
        "reading": (
            "extract|appear|appears|mentioned|occur|occurs|contain|contains|in this|in the|from this|"
            "from the|here|below|above|following|this text|the text|this sentence|attended|present"
        ),
        "brevity": (
            "tldr|tl|in one|one sentence|a sentence|one line|a line|in a|two sentences|in two|in short|"
            "short|shortly|brief|briefly|headline|title|caption|slogan|in five|few words|one word|sum up|"
            "main point|gist|about"
        ),
        "summary": (
            "summarise|summarize|summary|sum|condense|takeaways|lessons|key points|main points|main|plot|"
            "act by|chapter|abstract|fasse|résume|resuma|resume|riassumi"
        ),
        "calculation": (
            "calculate|compute|solve|add|plus|minus|times|percent|sum of|square root|sqrt|derivative|"
            "integral|integrate|probability|likely|chance|interest|price|cost|factorial|equation|matrix|"
            "eigenvalues|area|mean|median|average"
        ),
        "small_talk": (
            "hi|hello|hey|thanks|thank|bye|lol|ok|okay|morning|night|haha|cool|sorry|you're|your name|"
            "are you|do you|guess what|yay|joke|riddle|hola|ciao|bonjour|merci|danke|hallo|спасибо|"
            "привет|gracias|obrigado|how are"
        ),
        "scale": (
            "million|millions|billion|billions|tb|thousands|hundreds|global|globally|worldwide|national|"
            "nationwide|decades|years|centuries|enterprise|legacy"
        ),
        "theory": (
            "quantum mechanics|entropy|general relativity|arbitration|gdpr|transfer pricing|fiduciary|"
            "theorem|lemma|conjecture|group|groups|ring|field|fields|manifold|topology|space|spaces|"
            "operator|operators|quantum|relativity|hypothesis|theory|theories|philosophy|realism|"
            "metaphysics|kant|hegel|causal|causation|causality|stochastic|convex|galois|hilbert|markets|"
            "doctrine|jurisdiction|liability|statute|court|tribunal|clause|covenant|covenants|literature|"
            "historiography|metre|sonnet|narrator"
        ),
        "tool": (
            "excel|sheets|git|bash|curl|sql|postgres|postgresql|pandas|python|javascript|js|css|html|"
            "docker|vim|regex|vs code|linux|npm|rust|go|java|c#|kotlin|word|powerpoint|photoshop|windows|"
            "mac|iphone|android|gmail|outlook|zoom|chrome|browser|terminal|ssh|kubectl|json|numpy|react|"
            "haskell|column|row|array|string|dictionary|dict|div|loop"
        ),
        "strict_form": (
            "sonnet|sestina|villanelle|iambic|palindrome|acrostic|libretto|unreliable narrator|"
            "blank verse|refrain|metre|meter|backwards|every clue|clues|consistent|contradiction|"
            "contradictions|voice|syntax of|rhyme scheme|novel|trilogy"
        ),
    }.items()
}

# What of it an expert, an ordinary answer or a glance is enough for.
LEVELS: Final[dict[str, tuple[str, ...]]] = {
    "expert": ("weighing", "derivation", "design", "diagnosis", "proof", "theory", "scale", "strict_form"),
    "ordinary": (
        "explanation",
        "workings",
        "how_to",
        "comparison",
        "artefact",
        "advice",
        "summary",
        "calculation",
        "school_proof",
        "why",
        "making",
    ),
    "plain": (
        "meaning",
        "fact",
        "item",
        "yes_no",
        "brevity",
        "change",
        "small_talk",
        "translation",
        "reading",
    ),
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
