"""The words that the bundled model knows, beside names: relations, sentences, questions.

Every sentence names its subject before its value, so a causal reader can bind the two at the value.
Slots: ``{S}`` and ``{s}`` subject at the start of a sentence and inside it, ``{P}`` and ``{p}`` its possessive,
``{v}`` the value, ``{n}`` the full name in a question.
"""
# ruff: noqa: SIM905 - a list of words reads better as a line of words

from __future__ import annotations

from dataclasses import dataclass

JOBS = (
    "painter baker teacher lawyer farmer doctor nurse sailor tailor printer carpenter driver gardener miner surgeon "
    "translator hunter librarian dentist weaver butcher plumber singer potter"
).split()
INSTRUMENTS = (
    "violin harp flute trumpet piano guitar drum cello clarinet banjo tuba horn lute fiddle bassoon zither sitar "
    "whistle"
).split()
PETS = "cat dog parrot rabbit turtle pony goat snake hamster lizard ferret duck goose donkey falcon spider".split()
FOODS = (
    "soup rice fish bread pasta beans lamb cheese noodles trout cabbage potatoes lentils mushrooms pancakes salad"
).split()
TREASURES = (
    "coins stamps maps clocks books bottles shells postcards knives masks dolls keys buttons lamps spoons hats"
).split()
TONGUES = (
    "Greek Latin Dutch Polish Danish Welsh Hindi Arabic Turkish Finnish Czech Korean Persian Swedish Russian Spanish"
).split()
GOODS = (
    "glass paper bicycles shoes candles furniture soap rope tractors cement paint carpets radios tyres chocolate "
    "batteries pianos umbrellas tents boats pencils engines"
).split()
LANDS = "Norway Egypt Brazil Canada Japan Kenya Chile Iceland France Peru Nepal Cuba Ireland Spain Ghana Fiji".split()
BEASTS = "lion eagle bear wolf swan stag bull dragon fox owl dolphin horse crane tiger beaver raven".split()
COLOURS = (
    "red blue green yellow black white purple brown grey pink silver golden scarlet violet beige turquoise"
).split()
SIGHTS = (
    "lighthouse castle cathedral windmill fountain museum theatre tower monastery market library bridge palace "
    "aquarium observatory garden"
).split()
MONTHS = "January February March April May June July August September October November December".split()
CROPS = "apples wheat barley hops cherries plums tobacco corn grapes roses hay tulips oats pears flax onions".split()
RIVERS = "Ouse Tamar Wye Severn Tyne Avon Dee Exe Forth Lune Mersey Nene Tees Trent Usk Wear".split()
YEARS = [str(year) for year in range(1900, 2000)]
SIZES = [str(size) for size in range(110, 990, 10)]


@dataclass(frozen=True)
class Relation:
    """One thing that a document can say of its subject.

    Attributes:
        name: A word for it, unique in its subject's type.
        sentences: Ways to state it.
        questions: Ways to ask for it.
        values: What the value is drawn from; empty where ``link`` is set.
        link: The type of the entity that is the value ("person", "firm", "town"), or "".
        phrase: How a two-hop question calls the value, with ``{n}`` for the subject; only where ``link`` is set.
    """

    name: str
    sentences: tuple[str, ...]
    questions: tuple[str, ...]
    values: tuple[str, ...] = ()
    link: str = ""
    phrase: str = ""


def _relation(name: str, values: list[str], sentences: list[str], questions: list[str]) -> Relation:
    return Relation(name, tuple(sentences), tuple(questions), tuple(values))


def _link(name: str, link: str, phrase: str, sentences: list[str], questions: list[str]) -> Relation:
    return Relation(name, tuple(sentences), tuple(questions), link=link, phrase=phrase)


RELATIONS: dict[str, tuple[Relation, ...]] = {
    "person": (
        _relation(
            "job",
            JOBS,
            [
                "{S} works as a {v}.",
                "{S} earns a living as a {v}.",
                "After school {s} became a {v}.",
                "{P} profession is that of a {v}.",
            ],
            ["What is the job of {n}?", "What does {n} work as?", "Which profession does {n} have?"],
        ),
        _relation(
            "instrument",
            INSTRUMENTS,
            ["{S} plays the {v}.", "{P} favourite instrument is the {v}.", "In the evening {s} often plays the {v}."],
            ["Which instrument does {n} play?", "What does {n} play?"],
        ),
        _relation(
            "pet",
            PETS,
            ["{S} keeps a {v} at home.", "{P} pet is a {v}.", "For years {s} has owned a {v}."],
            ["Which pet does {n} have?", "What animal does {n} keep?"],
        ),
        _relation(
            "food",
            FOODS,
            ["{S} likes to eat {v}.", "{P} favourite dish is {v}.", "On Sundays {s} cooks {v}."],
            ["What does {n} like to eat?", "What is the favourite dish of {n}?"],
        ),
        _relation(
            "collection",
            TREASURES,
            ["{S} collects old {v}.", "{P} cellar is full of {v}.", "As a child {s} began to collect {v}."],
            ["What does {n} collect?", "Which things does {n} collect?"],
        ),
        _relation(
            "birth",
            YEARS,
            ["{S} was born in {v}.", "{P} year of birth is {v}.", "It is certain that {s} was born in {v}."],
            ["When was {n} born?", "What is the year of birth of {n}?"],
        ),
        _relation(
            "language",
            TONGUES,
            ["{S} speaks fluent {v}.", "{P} first language is {v}.", "With friends {s} speaks {v}."],
            ["Which language does {n} speak?", "What language does {n} know?"],
        ),
        _link(
            "employer",
            "firm",
            "the employer of {n}",
            ["{S} is employed by {v}.", "{P} employer is {v}.", "For some time {s} has worked for {v}."],
            ["Who employs {n}?", "Which company does {n} work for?"],
        ),
        _link(
            "home",
            "town",
            "the home of {n}",
            ["{S} lives in {v}.", "{P} home is in {v}.", "Long ago {s} moved to {v}."],
            ["Where does {n} live?", "In which town does {n} live?"],
        ),
    ),
    "firm": (
        _relation(
            "product",
            GOODS,
            ["{S} makes {v}.", "{P} main product is {v}.", "From the start {s} has produced {v}."],
            ["What does {n} make?", "What is the main product of {n}?"],
        ),
        _relation(
            "founding",
            YEARS,
            ["{S} was founded in {v}.", "{P} history began in {v}.", "Records show that {s} was set up in {v}."],
            ["When was {n} founded?", "In which year was {n} founded?"],
        ),
        _relation(
            "staff",
            SIZES,
            ["{S} has a staff of {v}.", "{P} workers number {v}.", "At present {s} employs {v} people."],
            ["How many people work at {n}?", "How large is the staff of {n}?"],
        ),
        _relation(
            "sign",
            BEASTS,
            ["{S} uses a {v} as its sign.", "{P} sign shows a {v}.", "On its boxes {s} prints a {v}."],
            ["Which animal is the sign of {n}?", "What does the sign of {n} show?"],
        ),
        _relation(
            "colour",
            COLOURS,
            ["{S} paints its vans {v}.", "{P} vans are {v}.", "By tradition {s} drives vans that are {v}."],
            ["Which colour are the vans of {n}?", "What colour does {n} paint its vans?"],
        ),
        _relation(
            "market",
            LANDS,
            ["{S} sells mostly to {v}.", "{P} largest market is {v}.", "Every month {s} ships goods to {v}."],
            ["Where does {n} sell most?", "What is the largest market of {n}?"],
        ),
        _link(
            "seat",
            "town",
            "the seat of {n}",
            ["{S} is based in {v}.", "{P} offices are in {v}.", "Later {s} moved its offices to {v}."],
            ["Where is {n} based?", "In which town are the offices of {n}?"],
        ),
        _link(
            "head",
            "person",
            "the head of {n}",
            ["{S} is led by {v}.", "{P} head is {v}.", "Since last year {s} has been run by {v}."],
            ["Who leads {n}?", "Who is the head of {n}?"],
        ),
    ),
    "town": (
        _relation(
            "sight",
            SIGHTS,
            ["{S} is known for its {v}.", "{P} best known sight is the {v}.", "Most people visit {s} to see the {v}."],
            ["What is {n} known for?", "What is the best known sight of {n}?"],
        ),
        _relation(
            "fair",
            MONTHS,
            [
                "{S} holds its fair in {v}.",
                "{P} yearly fair takes place in {v}.",
                "Crowds come to {s} for the fair in {v}.",
            ],
            ["When is the fair of {n}?", "In which month does {n} hold its fair?"],
        ),
        _relation(
            "crop",
            CROPS,
            ["{S} grows a lot of {v}.", "{P} farmers grow {v}.", "The fields round {s} are full of {v}."],
            ["What grows in {n}?", "What do the farmers of {n} grow?"],
        ),
        _relation(
            "river",
            RIVERS,
            ["{S} lies on the river {v}.", "{P} river is the {v}.", "Boats reach {s} by the river {v}."],
            ["On which river does {n} lie?", "What is the river of {n}?"],
        ),
        _relation(
            "charter",
            YEARS,
            ["{S} got its charter in {v}.", "{P} charter dates from {v}.", "The king gave {s} a charter in {v}."],
            ["When did {n} get its charter?", "What is the year of the charter of {n}?"],
        ),
        _relation(
            "roofs",
            COLOURS,
            ["{S} has roofs that are mostly {v}.", "{P} roofs are {v}.", "Seen from the hill, {s} shows roofs of {v}."],
            ["Which colour are the roofs of {n}?", "What colour are the roofs in {n}?"],
        ),
        _link(
            "mayor",
            "person",
            "the mayor of {n}",
            ["{S} has elected the mayor {v}.", "{P} mayor is {v}.", "For two years {s} has been governed by {v}."],
            ["Who is the mayor of {n}?", "Who governs {n}?"],
        ),
    ),
}

INTRODUCTIONS = (
    "This page is about {n}.",
    "{n} is the subject of this report.",
    "Here is what we know about {n}.",
    "Many people have heard of {n}.",
    "The following notes concern {n}.",
)
CONTINUATIONS = (
    "This note continues the document above.",
    "More was found later about the subject of the previous document.",
    "The following was added to the text above.",
    "These lines belong to the previous document.",
)
FILLERS = (
    "The winter of that {period} was {mood} and {mood}.",
    "Little else is known about those {period}s.",
    "The {thing}s in the {place} were {mood} at the time.",
    "Nobody in the {place} was surprised.",
    "A {mood} {thing} stood near the {place}.",
    "The news spread through the {place} within a {period}.",
    "Some letters from that {period} are kept in the {place}.",
    "There was a {mood} {thing} behind the {place}.",
    "Old friends still talk about that {mood} {period}.",
    "After a {mood} {period} the {place} was quiet again.",
    "In the {place} there is a {mood} {thing}.",
    "It rained for most of the {period}.",
    "Two {mood} {thing}s were sold in the {place}.",
    "The road to the {place} was {mood}.",
    "Not much changed in the next {period}.",
    "The papers wrote about a {mood} {thing}.",
    "Everyone agreed that the {period} had been {mood}.",
    "Later the {thing} was moved to the {place}.",
    "The {place} looked {mood} in the morning.",
    "That is how the {mood} {period} came to an end.",
)
FILLER_SLOTS = {
    "period": "year week month season decade summer spring autumn".split(),
    "mood": "long cold quiet bright narrow heavy plain strange gentle busy empty pleasant".split(),
    "thing": "table wagon painting statue wall letter chair mirror barrel ladder basket curtain".split(),
    "place": "station harbour square church valley school hall village street courtyard inn forest".split(),
}
ABSENT = "not stated"
ORDER_QUESTIONS = ("Which is mentioned first, {a} or {b}?", "Which comes first in the text, {a} or {b}?")
# Subject, subject inside a sentence, possessive, for sentences that do not name their subject.
PRONOUNS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "woman": (("She", "she", "Her"), ("The woman", "the woman", "The woman's")),
    "man": (("He", "he", "His"), ("The man", "the man", "The man's")),
    "firm": (
        ("It", "it", "Its"),
        ("The company", "the company", "The company's"),
        ("The firm", "the firm", "The firm's"),
    ),
    "town": (("It", "it", "Its"), ("The town", "the town", "The town's"), ("The place", "the place", "The place's")),
}
