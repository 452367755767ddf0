"""Real-text prompts by seed: questions, coding tasks, documents to summarise, texts to edit.

Everything is written here or put together from parts written here, so a workload needs no download and two runs with
one seed send the same bytes. Lengths are asked for in words; English runs at about 1.3 tokens a word.
Prompts of one kind differ from their first words on, so a prefix cache finds little to share unless it is meant to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

PromptMaker = Callable[[np.random.Generator, int], str]

_QUESTION_OPENERS = (
    "I am planning {thing} with {people}. ",
    "Yesterday {people} asked me about {thing}. ",
    "For a short talk about {thing} I need some help. ",
    "My neighbour and {people} disagree about {thing}. ",
    "We have two weeks left before {thing}. ",
    "I have never organised {thing} before. ",
    "Last year {thing} went badly for {people}. ",
    "There is {thing} near our town this spring. ",
)
_QUESTIONS = (
    "What should I think of first, and what can wait?",
    "Which mistakes do beginners make most often?",
    "How would you explain it to a ten-year-old?",
    "What would it cost roughly, and where could I save?",
    "Can you give me three good arguments for it and one against?",
    "How do I keep everyone interested until the end?",
    "Which tools or materials do I really need?",
    "How can I tell early that it is going wrong?",
)
_QUESTION_DETAILS = (
    "We are {count} people and meet every {day}.",
    "The room is small, and it gets cold after {hour}.",
    "Some of us can only come on {day}, the others only in the evening.",
    "Our budget is {money} euros, of which half is already spent.",
    "Two of {people} want to record everything and share it afterwards.",
    "Please keep in mind that {count} of the guests are children.",
    "There is no car, so all of it has to fit on bicycles and one small trailer.",
    "Last time we ran out of {food} after an hour, which nobody had expected.",
    "I would like to write down who does what before {day}.",
    "The weather report speaks of wind and some rain towards {day}.",
)
_THINGS = (
    "a repair workshop for bicycles", "a night walk with telescopes", "a seed exchange", "a chess evening",
    "a choir rehearsal in the park", "a small bread oven", "a visit to the harbour museum", "a book swap",
    "a kite festival", "a vegetable garden on the roof", "a first-aid course", "a radio play",
    "a map of old footpaths", "a quiz about rivers", "a puppet theatre", "a beehive behind the school",
)  # fmt: skip
_PEOPLE = (
    "my sister", "two colleagues", "the parents' council", "our choir", "a retired engineer", "some students",
    "the village library", "my running group", "a friend from Porto", "the night shift", "our landlord",
)  # fmt: skip
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_FOODS = ("soup", "bread", "coffee", "apples", "lemonade", "pancakes")

_DOCUMENT_SUBJECTS = (
    "The harbour office", "The northern depot", "The evening school", "A team of surveyors", "The water board",
    "The bakery on Mill Street", "The regional archive", "The ferry company", "The allotment society",
    "The weather station", "The timber yard", "The district hospital",
)  # fmt: skip
_DOCUMENT_ACTIONS = (
    "reported {count} more visits than in the same month of the year before",
    "closed its eastern gate for {count} days so that the cables could be replaced",
    "moved the weekly meeting to {day} because too few members had been able to attend",
    "bought {count} used sensors and found that one in six needed a new battery",
    "asked for {money} euros to repair the roof before winter",
    "counted {count} complaints, most of them about noise before {hour}",
    "tried a new timetable on three lines and kept it on two of them",
    "trained {count} volunteers, of whom more than half are still active",
    "measured the level of the canal every hour and published the figures on {day}",
    "lost two weeks when a delivery of pumps arrived without their fittings",
    "agreed with the neighbouring town to share a crane and its operator",
    "found that the old drawings did not show {count} of the pipes",
)
_DOCUMENT_LINKS = (
    "As a result,", "In the same period,", "Despite this,", "According to the minutes,", "A month later,",
    "For the first time,", "At the request of the treasurer,", "Meanwhile,", "Once the permit had arrived,",
    "After a long discussion,",
)  # fmt: skip
_DOCUMENT_CLOSERS = (
    "The members took note of it without a vote.",
    "Nobody could say whether this will happen again.",
    "The costs were lower than the estimate of {money} euros.",
    "A second report is expected on {day}.",
    "The reason is still being looked into.",
    "Those affected were told by letter.",
)
_SUMMARY_TASKS = (
    "Summarise the report above in three sentences.",
    "What are the main points of this report? Answer briefly.",
    "Write a short summary of the text for someone who missed the meeting.",
)

_CODE_TASKS = (
    ("merge_intervals", "list[tuple[int, int]]", "Join intervals that touch or overlap and return them sorted."),
    ("longest_run", "str", "Return the length of the longest run of one repeated character."),
    ("moving_average", "list[float]", "Return the mean of every window of five neighbouring values."),
    ("parse_duration", "str", "Turn a text such as '2h 5m 30s' into seconds; raise ValueError on anything else."),
    ("group_anagrams", "list[str]", "Group words that consist of the same letters, in order of first appearance."),
    ("rotate_matrix", "list[list[int]]", "Rotate a square matrix by ninety degrees in place."),
    ("roman_to_int", "str", "Convert a Roman numeral to a number and reject malformed ones."),
    ("top_words", "str", "Return the ten most frequent words with their counts, ignoring case."),
    ("flatten", "dict[str, object]", "Flatten a nested dictionary; join the keys with dots."),
    ("next_prime", "int", "Return the smallest prime that is larger than the argument."),
    ("balanced", "str", "Say whether round, square and curly brackets are balanced."),
    ("split_bill", "dict[str, int]", "Return the fewest payments, in cents, that settle what friends owe each other."),
)
_CODE_CONTEXT = (
    """def load_{name}(path: str) -> {kind}:
    with open(path, encoding="utf-8") as file:
        return json.load(file)
""",
    """class {title}Cache:
    def __init__(self, limit: int = {count}) -> None:
        self.limit = limit
        self.entries: dict[str, {kind}] = {{}}

    def get(self, key: str) -> {kind} | None:
        return self.entries.get(key)
""",
    """def show_{name}(value: {kind}, width: int = {count}) -> None:
    line = repr(value)
    print(line if len(line) <= width else line[: width - 3] + "...")
""",
    """@dataclass(frozen=True)
class {title}Result:
    value: {kind}
    seconds: float
    attempts: int = {count}
""",
    """def retry_{name}(call: Callable[[], {kind}], attempts: int = {count}) -> {kind}:
    for attempt in range(attempts):
        try:
            return call()
        except OSError:
            time.sleep(0.1 * 2**attempt)
    raise RuntimeError("gave up")
""",
)

_EDIT_TASKS = (
    "Rewrite the text above in the past tense and change nothing else.",
    "Repeat the text above and replace every weekday by 'tomorrow'.",
    "Correct the spelling in the text above and return all of it.",
)


def chat_question(rng: np.random.Generator, words: int) -> str:
    """A question with about ``words`` words of circumstances."""
    parts = [_filled(rng, _QUESTION_OPENERS)]
    parts += _sentences_until(words - 22, lambda: _filled(rng, _QUESTION_DETAILS))
    return "".join(parts[:1]) + " ".join([*parts[1:], _one(rng, _QUESTIONS)])


def coding_task(rng: np.random.Generator, words: int) -> str:
    """A function to write, after about ``words`` words of the module it belongs to."""
    name, kind, purpose = _CODE_TASKS[int(rng.integers(len(_CODE_TASKS)))]
    title = name.title().replace("_", "")
    fields = {"name": name, "kind": kind, "title": title, "count": int(rng.integers(3, 90))}
    context = _sentences_until(words - 30, lambda: _one(rng, _CODE_CONTEXT).format_map(fields))
    module = "\n\n".join(context)
    ticket = f"# {title}, ticket {rng.integers(1000, 99999)}"
    return (
        f"{ticket}\n{module}\n\nWrite the Python function `{name}(value: {kind})` for this module. {purpose} "
        "Show only the code and a short docstring."
    )


def document_to_summarise(rng: np.random.Generator, words: int) -> str:
    """A report of about ``words`` words and the wish for a summary."""
    sentences = _sentences_until(words - 12, lambda: _report_sentence(rng))
    paragraphs = [" ".join(sentences[at : at + 5]) for at in range(0, len(sentences), 5)]
    return "\n\n".join([f"Report no. {rng.integers(100, 9999)}", *paragraphs, _one(rng, _SUMMARY_TASKS)])


def text_to_edit(rng: np.random.Generator, words: int) -> str:
    """A text that the answer repeats with small changes (where draft-by-lookup speculation does well)."""
    text = " ".join(_sentences_until(words - 12, lambda: _report_sentence(rng)))
    return f"{text}\n\n{_one(rng, _EDIT_TASKS)}"


def plain_text(rng: np.random.Generator, words: int) -> str:
    """Exactly ``words`` words of running text, for prompts of a given length."""
    text: list[str] = []
    while len(text) < words:
        text += _report_sentence(rng).split()
    return " ".join(text[:words])


def _report_sentence(rng: np.random.Generator) -> str:
    subject = _one(rng, _DOCUMENT_SUBJECTS)
    if rng.random() < 0.4:
        subject = f"{_one(rng, _DOCUMENT_LINKS)} {subject[0].lower()}{subject[1:]}"
    sentence = f"{subject} {_filled(rng, _DOCUMENT_ACTIONS)}."
    return f"{sentence} {_filled(rng, _DOCUMENT_CLOSERS)}" if rng.random() < 0.3 else sentence


def _one(rng: np.random.Generator, texts: Sequence[str]) -> str:
    return texts[int(rng.integers(len(texts)))]


def _filled(rng: np.random.Generator, templates: Sequence[str]) -> str:
    return _one(rng, templates).format(
        thing=_one(rng, _THINGS),
        people=_one(rng, _PEOPLE),
        day=_one(rng, _DAYS),
        food=_one(rng, _FOODS),
        hour=f"{rng.integers(5, 12)} o'clock",
        count=rng.integers(7, 60),
        money=rng.integers(3, 90) * 50,
    )


def _sentences_until(words: int, make: Callable[[], str]) -> list[str]:
    """Sentences from ``make`` until they hold ``words`` words together."""
    made: list[str] = []
    count = 0
    while count < words:
        made.append(make())
        count += len(made[-1].split())
    return made
