"""The words and phrases that code and docs do not use, each with its plain rewrite. The one file the linter skips.

A space in a pattern matches any whitespace, line breaks and comment signs, so that a phrase is found across lines.
A match inside one of `allowed` is not reported.
"""

import re
from dataclasses import dataclass

_GAP = r"(?:\s+(?:#+|//|\*|>|--)?\s*|\"\s*f?\")"


@dataclass(frozen=True)
class Pattern:
    """A banned phrase.

    regex: matched without regard to case; rewrite: what to write instead; allowed: longer phrases in which it is right.
    """

    regex: str
    rewrite: str
    allowed: tuple[str, ...] = ()

    def compile(self) -> re.Pattern[str]:
        """Compile the banned phrase."""
        return _compile(self.regex)

    def compile_allowed(self) -> list[re.Pattern[str]]:
        """Compile the phrases that are exempt."""
        return [_compile(phrase) for phrase in self.allowed]


def _compile(regex: str) -> re.Pattern[str]:
    return re.compile(regex.replace(" ", _GAP), re.IGNORECASE)


# Names that the renaming removed.
NAMES = (
    Pattern(r"take_up|take_back", "maybe_resume, clear_stop_files"),
    Pattern(r"be_deaf", "ignore_signals"),
    Pattern(r"let_go", "release"),
    Pattern(r"\bteller\b", "status_writer, StatusWriter"),
    Pattern(r"\bContinuity\b", "TrainingCheckpointer"),
    Pattern(r"rehears\w*", "simulate, simulation"),
    Pattern(r"\btrunks?\b|trunk_|_trunk", "backbone; feature cache", ("trunk_cache", r"PEFTBENCH_CACHE/trunk/")),
    Pattern(r"\bknobs?\b", "key (of a recipe), option (of the command line)"),
    Pattern(r"befall\w*|befell", "happen to"),
    Pattern(r"\bshelf\b|\bshelves\b", "bundled files"),
    Pattern(r"\bhoards?\b", "cached blocks"),
    Pattern(r"stand-?ins?\b|_StandIn", "fake, placeholder"),
)

# Software is not a person.
PERSONS = (
    Pattern(r"\btells\b|\btelling\b|\btell\b", "report, print, notify, identify", (r"\.tell\(", r"\.tell\b")),
    Pattern(r"\b(?:is|are|was|were|be|been|being|not|never) told\b|\btold\b", "notified, reported, receives"),
    Pattern(r"\buntold\b", "not reported"),
    Pattern(r"\bsays\b", "prints, reports, states, is", (r"says nothing about",)),
    Pattern(r"\bsaid\b", "reported, logged, noted"),
    Pattern(r"\bspeaks? of\b", "describes, is about"),
    Pattern(r"\bhears?\b|\bheard\b", "receives, is notified of"),
    Pattern(r"\bforgets?\b|\bforgot(?:ten)?\b", "deletes, clears"),
    Pattern(r"\bremembers?\b", "stores, keeps"),
    Pattern(r"\blooks? away\b|\bturns? a blind\b", "ignores"),
    Pattern(r"\blets? go\b", "releases"),
    Pattern(r"\b(?:gives?|given|gave|giving) back\b", "releases, returns, frees"),
    Pattern(r"\b(?:gives?|given|gave|giving) away\b", "shards, releases"),
    Pattern(r"\b(?:takes?|taken|took|taking) (?:away|back)\b", "deletes, removes, clears"),
    Pattern(r"\b(?:takes?|taken|took|taking) up\b", "resumes"),
    Pattern(r"\b(?:goes|go|gone|went|going) on (?:from|with|where|over|after|until|to|in|as)\b", "resumes, continues"),
    Pattern(r"\bgoes on\b|\bgone on\b|\bwent on\b|\bgo on\b|\bgoing on\b", "resumes, continues"),
    Pattern(r"\b(?:begins?|begun|began|beginning|start|starts) anew\b|\banew\b", "restarts, again, requeued"),
    Pattern(r"\bleaves? word\b|\bleft word\b", "writes a message"),
    Pattern(r"\bin words\b", "Summary; as text"),
    Pattern(r"\bthe words (?:say|name|call|do|then)\b|\bits words\b|\ba word\b|\bno word\b", "the summary, a message"),
    Pattern(
        r"\bwords?\b",
        "message, text, summary, term, token",
        (
            r"\bin other words\b",
            r"\b(?:frequent|common|first|last|next|whole|many|few|random|plain) words?\b",
            r"\b(?:new|one|two|three|four|stop|same) words?\b",
            r"\b(?:\d[\d,]*|single|number of|list of|split into|ambiguous|banned|reserved|of its|per|each) words?\b",
            r"\bword(?:-| )(?:level|piece|s?ize|boundar\w+|list)\b",
            r"words\[|words\.|\bwords (?:in|of)\b|\bfor words?\b|\bwords? =",
            r"\(words?\b|\bwords?[,)]|\"words?\"|_words?\b",
            r"\bone word, one meaning\b",
        ),
    ),
)

# Constructions that a native reader has to read twice.
CONSTRUCTIONS = (
    Pattern(r", as (?:~?\d|`)", "e.g. 16GiB; for example", (r", as `[^`\n]+` (?:does|do|is|are|would|did)\b",)),
    Pattern(r"\bbeside\b", "next to, in addition to, compared with"),
    Pattern(r"\bso many\b", "N, this many", (r"\bso many that\b",)),
    Pattern(r"\bof which\b", "whose, where", (r"\bmost of which\b", r"\bnone of which\b", r"\bboth of which\b")),
    Pattern(r"\bwhat (?:it|they|one|each|some|a \w+|the \w+) (?:is|are) of\b", "whose, the X of"),
    Pattern(r"\bcannot be meant\b|\bis meant\b|\bcan be meant\b|\bbe meant\b", "invalid"),
    Pattern(r"\bis to be (?:told|made|had|found|gone)\b|\bcannot be had\b", "cannot install, is not available"),
    Pattern(r"\bleads? nowhere\b", "makes no progress"),
    Pattern(r"\bmakes? (?:no|some|itself) come\b|\bcame (?:no )?further\b", "made progress"),
    Pattern(r"\bno fewer than\b", "at least"),
    Pattern(r"\bnot even one\b", "even one ... does not"),
    Pattern(r"\b(?:is|are|was|were) not there\b|\bnot there\b", "does not exist, not found, not installed"),
    Pattern(r"\b(?:is|are) there (?:on|already|anyway)\b", "exists, is available"),
    Pattern(
        r"\bheld against\b|\bhold \w+ against\b|\bholds? (?:that|it|them|each other|two) against\b", "compare with"
    ),
    Pattern(r"\bhold(?:s)? (?:it|them|him) to\b|\bheld to\b", "limit to, check against"),
    Pattern(r"\bas if nothing had been\b", "bit-identically"),
    Pattern(r"\bfell by\b|\ba fall\b|\bno fall\b|\bare falls\b", "regressed, regression"),
    Pattern(r"\bof (?:one's|its) own accord\b", "automatically"),
    Pattern(r"\bwithout end\b", "without limit"),
    Pattern(r"\blast words\b", "final output"),
    Pattern(r"\bthe very (?!least|first|last|end)", "the same"),
    Pattern(
        r"\blies\b|\blie (?:in|at|on|below|above|within|under|there|apart)\b|\blay (?:in|at|on|below)\b",
        "is in, is at",
        (r"\bfamilies lies\b",),
    ),
    Pattern(r"\bstands? (?:in|at|on|beside|for itself|there|still|between)\b|\bstood (?:in|at|on)\b", "is in, is at"),
    Pattern(
        r"\bfigures?\b", "metric, number, value", (r"\bfigures? (?:\d|size)", r"figsize", r"<figure|</figure|figure>")
    ),
    Pattern(r"\bfrom a keyboard\b", "by hand"),
)

# Docstrings start with a verb; checked at the opening quotes alone.
DOCSTRINGS = (
    Pattern(r"\"\"\"Of (?!the form)", "verb first: Return ..."),
    Pattern(r"\"\"\"(?:What|Where|Whether|Who|Whose|How|Why|That)\b", "verb first: Return ..., or True if ..."),
)

BRITISH = (
    Pattern(
        r"\b\w*(?:quanti|initiali|normali|tokeni|summari|seriali|synchroni|regulari|minimi|maximi|optimi|organi"
        r"|recogni|materiali|parametri|vectori|randomi|visuali|utili|generali|speciali|studenti|finali|categori)s(?:e|ed|es|ing|ation|ations|er)\b",
        "z: quantize, initialize",
    ),
    Pattern(
        r"\b\w*(?:colour|behaviour|neighbour|favour|honour|modelled|modelling|travell|centred|grey\b)\w*",
        "American spelling",
    ),
)

PATTERNS = (*NAMES, *PERSONS, *CONSTRUCTIONS, *DOCSTRINGS, *BRITISH)
