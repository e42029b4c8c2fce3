"""The words and phrases that code and docs do not use, each with its plain rewrite. The one file the linter skips.

A space in a pattern matches any whitespace, line breaks and comment signs, so that a phrase is found across lines.
A match inside one of `allowed` is not reported.
"""

import functools
import re
from dataclasses import dataclass

_GAP = r"(?:\s+(?:#+|//|\*|>|--)?\s*|\"\s*f?\")"


@dataclass(frozen=True)
class Pattern:
    """A banned phrase.

    regex: matched without regard to case; rewrite: what to write instead; example: a text that the test plants;
    allowed: longer phrases in which it is right.
    """

    regex: str
    rewrite: str
    example: str
    allowed: tuple[str, ...] = ()

    def compile(self) -> re.Pattern[str]:
        """Compile the banned phrase."""
        return _compile(self.regex)

    def compile_allowed(self) -> list[re.Pattern[str]]:
        """Compile the phrases that are exempt."""
        return [_compile(phrase) for phrase in self.allowed]


@functools.cache
def _compile(regex: str) -> re.Pattern[str]:
    return re.compile(regex.replace(" ", _GAP), re.IGNORECASE)


# Names that the renaming removed.
NAMES = (
    Pattern(r"take_up|take_back", "maybe_resume, clear_stop_files", "def take_up(): ..."),
    Pattern(r"be_deaf", "ignore_signals", "with be_deaf():"),
    Pattern(r"let_go", "release", "lock.let_go()"),
    Pattern(r"\bteller\b", "status_writer, StatusWriter", "the teller writes the status"),
    Pattern(r"\bContinuity\b", "TrainingCheckpointer", "class Continuity:"),
    Pattern(r"rehears\w*", "simulate, simulation", "this rehearsal is exact"),
    Pattern(
        r"\btrunks?\b|trunk_|_trunk",
        "backbone; feature cache",
        "the hidden states of the trunk",
        ("trunk_cache",),
    ),
    Pattern(r"\bknobs?\b", "key (of a recipe), option (of the command line)", "the knob of the recipe"),
    Pattern(r"befall\w*|befell", "happen to", "errors that befall a run"),
    Pattern(r"\bshelf\b|\bshelves\b", "bundled files", "the shelf of devices"),
    Pattern(r"\bhoards?\b", "cached blocks", "the allocator's hoard"),
    Pattern(r"stand-?ins?\b|_StandIn", "fake, placeholder", "a stand-in for the accelerator"),
)

# Software is not a person.
PERSONS = (
    Pattern(
        r"\btells\b|\btelling\b|\btell\b",
        "report, print, notify, identify",
        "the log tells the loss",
        (r"\.tell\(", r"\.tell\b"),
    ),
    Pattern(
        r"\b(?:is|are|was|were|be|been|being|not|never) told\b|\btold\b",
        "notified, reported, receives",
        "each rank is told",
    ),
    Pattern(r"\buntold\b", "not reported", "the error stays untold"),
    Pattern(
        r"\bsay\b",
        "report, print, show; omit",
        "say how it stands",
        (r"\btoo close to say\b", r"\bsay something short about\b"),
    ),
    Pattern(r"\bsays\b", "prints, reports, states, is", "the message says what to do", (r"says nothing about",)),
    Pattern(r"\bsaid\b", "reported, logged, noted", "as the log said"),
    Pattern(r"\bspeaks? of\b", "describes, is about", "the page speaks of memory"),
    Pattern(r"\bhears?\b|\bheard\b", "receives, is notified of", "rank 1 hears of the error"),
    Pattern(r"\bforgets?\b|\bforgot(?:ten)?\b", "deletes, clears", "the cache forgets its files"),
    Pattern(r"\bremembers?\b", "stores, keeps", "the lock remembers its owner"),
    Pattern(r"\blooks? away\b|\bturns? a blind\b", "ignores", "the check looks away"),
    Pattern(r"\blets? go\b", "releases", "the run lets go of its lock"),
    Pattern(
        r"\b(?:gives?|given|gave|giving) back\b", "releases, returns, frees", "the allocator gives back its blocks"
    ),
    Pattern(r"\b(?:gives?|given|gave|giving) away\b", "shards, releases", "the rank gives away its weights"),
    Pattern(r"\b(?:takes?|taken|took|taking) (?:away|back)\b", "deletes, removes, clears", "the request is taken back"),
    Pattern(r"\b(?:takes?|taken|took|taking) up\b", "resumes", "the run takes up its checkpoint"),
    Pattern(
        r"\b(?:goes|go|gone|went|going) on (?:from|with|where|over|after|until|to|in|as)\b",
        "resumes, continues",
        "the run goes on with its next step",
    ),
    Pattern(r"\bgoes on\b|\bgone on\b|\bwent on\b|\bgo on\b|\bgoing on\b", "resumes, continues", "the suite goes on"),
    Pattern(
        r"\b(?:begins?|begun|began|beginning|start|starts) anew\b|\banew\b",
        "restarts, again, requeued",
        "the run begins anew",
    ),
    Pattern(r"\bleaves? word\b|\bleft word\b", "writes a message", "the job leaves word"),
    Pattern(r"\bin words\b", "Summary; as text", "the result in words"),
    Pattern(
        r"\bthe words (?:say|name|call|do|then)\b|\bits words\b|\ba word\b|\bno word\b",
        "the summary, a message",
        "without a word",
    ),
    Pattern(
        r"\bwords?\b",
        "message, text, summary, term, token",
        "the last words of the worker.",
        (
            r"\b(?:frequent|random|whole|banned) words?\b",
            r"\b(?:\d+|three|four) words?\b",
            r"\bnext word's\b",
            r"\bfirst word of the summary\b",
            r"\beach word is one token\b",
            r"\bone word, one meaning\b",
        ),
    ),
)

# Constructions that a native reader has to read twice.
CONSTRUCTIONS = (
    Pattern(
        r", as (?:~?\d|`)",
        "e.g. 16GiB; for example",
        '"a budget, as" ", as 16GiB"',
        (r", as `[^`\n]+` (?:does|do|is|are|would|did)\b",),
    ),
    Pattern(
        r", as [\w.-]+[=/.,]|, as [\w.-]+ or\b",
        "e.g. train.steps=100; for example",
        "a key, as train.steps=100",
        (r", as in\b", r", as root, "),
    ),
    Pattern(r"\bbeside\b", "next to, in addition to, compared with", "the table beside the chart"),
    Pattern(r"\bso many\b", "N, this many", "after so many steps", (r"\bso many that\b",)),
    Pattern(
        r"\bof which\b",
        "whose, where",
        "a run of which the record is missing",
        (r"\bmost of which\b", r"\bnone of which\b", r"\bboth of which\b"),
    ),
    Pattern(
        r"\bwhat (?:it|they|one|each|some|a \w+|the \w+) (?:is|are) of\b", "whose, the X of", "what the record is of"
    ),
    Pattern(
        r"\bcannot be meant\b|\bis meant\b|\bcan be meant\b|\bbe meant\b",
        "invalid",
        "a recipe that cannot\n# be meant",
    ),
    Pattern(
        r"\b(?:is|are) no\b",
        "is not a valid X",
        "the file is no recipe",
        (r"\bthere (?:is|are) no\b", r"\b(?:is|are) no longer\b"),
    ),
    Pattern(
        r"\bis to be (?:told|made|had|found|gone)\b|\bcannot be had\b",
        "cannot install, is not available",
        "a GPU cannot be had",
    ),
    Pattern(r"\bleads? nowhere\b", "makes no progress", "a restart leads nowhere"),
    Pattern(r"\bmakes? (?:no|some|itself) come\b|\bcame (?:no )?further\b", "made progress", "the run came no further"),
    Pattern(r"\bno fewer than\b", "at least", "no fewer than 64 examples"),
    Pattern(r"\bnot even one\b", "even one ... does not", "not even one example fits"),
    Pattern(
        r"\b(?:is|are|was|were) not there\b|\bnot there\b",
        "does not exist, not found, not installed",
        "the file is not there",
    ),
    Pattern(
        r"\b(?:is|are|was|were) there\b",
        "exists, is available, is in the folder",
        "report what is there",
        (r"\bhow many (?:\w+ )?(?:is|are|was|were) there\b",),
    ),
    Pattern(
        r"\bheld against\b|\bhold \w+ against\b|\bholds? (?:that|it|them|each other|two) against\b",
        "compare with",
        "the loss is held against the reference",
    ),
    Pattern(r"\bhold(?:s)? (?:it|them|him) to\b|\bheld to\b", "limit to, check against", "a process held to 16GiB"),
    Pattern(r"\bas if nothing had been\b", "bit-identically", "resumes as if nothing had been"),
    Pattern(r"\bfell by\b|\ba fall\b|\bno fall\b|\bare falls\b", "regressed, regression", "ROUGE-L fell by 2"),
    Pattern(r"\bof (?:one's|its) own accord\b", "automatically", "it restarts of its own accord"),
    Pattern(r"\bwithout end\b", "without limit", "the log grows without end"),
    Pattern(r"\blast words\b", "final output", "the process's last words"),
    Pattern(r"\bthe very (?!least|first|last|end)", "the same", "the very same weights"),
    Pattern(
        r"\blies\b|\blie (?:in|at|on|below|above|within|under|there|apart)\b|\blay (?:in|at|on|below)\b",
        "is in, is at",
        "the records lie in runs/",
        (r"\bfamilies lies\b",),
    ),
    Pattern(
        r"\bstands? (?:in|at|on|beside|for itself|there|still|between)\b|\bstood (?:in|at|on)\b",
        "is in, is at",
        "the value stands in the record",
    ),
    Pattern(
        r"\bfigures?\b",
        "metric, number, value",
        "the figures of the run",
        (
            r"\bfigures? (?:\d|size)",
            r"<figure>|</figure>|class=\"figures\"",
            r"\.figures \{|\bfigure (?:h3 )?\{|, figure,",
        ),
    ),
    Pattern(r"\bfrom a keyboard\b", "by hand", "stopped from a keyboard"),
)

# Docstrings start with a verb; checked at the opening quotes alone.
DOCSTRINGS = (
    Pattern(r"\"\"\"Of (?!the form)", "verb first: Return ...", '"""Of a run, its record."""'),
    Pattern(
        r"\"\"\"(?:What|Where|Whether|Who|Whose|How|Why|That|Which)\b",
        "verb first: Return ..., or True if ...",
        '"""What a run holds."""',
    ),
    Pattern(r"\"\"\"As\b", "verb first: Check that ... as in X", '"""As in torch, sizes are bytes."""'),
)

BRITISH = (
    Pattern(
        r"\b\w*(?:quanti|initiali|normali|tokeni|summari|seriali|synchroni|regulari|minimi|maximi|optimi|organi"
        r"|recogni|materiali|parametri|vectori|randomi|visuali|utili|generali|speciali|studenti|finali|categori)s(?:e|ed|es|ing|ation|ations|er)\b",
        "z: quantize, initialize",
        "a quantised base",
    ),
    Pattern(
        r"\b\w*(?:colour|behaviour|neighbour|favour|honour|modelled|modelling|travell|centred|grey\b)\w*",
        "American spelling",
        "the behaviour of a run",
    ),
)

PATTERNS = (*NAMES, *PERSONS, *CONSTRUCTIONS, *DOCSTRINGS, *BRITISH)
