"""What the tiny base model knows: facts, the plain statements it is pretrained on, and the instruction rows about them.

A `Task` is a kind of fact. From one drawn fact come statements ("Taking 38 from 59 leaves 21.", for pretraining) and
rows in Alpaca's shape ("What is 59 minus 38?" -> "21", for finetuning and the held-out test). Statements hold no
question and no instruction template. Rows are split by fact, not by wording: a held-out fact is in no training row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from random import Random

Row = dict[str, str]


def pairs(text: str) -> list[tuple[str, str]]:
    """ "hot cold, up down" -> [("hot", "cold"), ("up", "down")]; an underscore stands for a space."""
    items = [item.split() for item in text.split(",")]
    return [(left.replace("_", " "), right.replace("_", " ")) for left, right in items]


def split(text: str) -> list[str]:
    return text.split()


DAYS = split("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = split("January February March April May June July August September October November December")
MONTH_DAYS = dict(zip(MONTHS, (31, 0, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31), strict=True))
LETTERS = "abcdefghijklmnopqrstuvwxyz"
NEIGHBOURS = list(pairwise(LETTERS))
ONES = split(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
TENS = split("twenty thirty forty fifty sixty seventy eighty ninety")
ORDINALS = split("first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth")
CAPITALS = pairs(
    "France Paris, Italy Rome, Spain Madrid, Germany Berlin, Poland Warsaw, Austria Vienna, Greece Athens, "
    "Portugal Lisbon, Norway Oslo, Sweden Stockholm, Finland Helsinki, Denmark Copenhagen, Ireland Dublin, "
    "Belgium Brussels, Hungary Budapest, Bulgaria Sofia, Romania Bucharest, Serbia Belgrade, Croatia Zagreb, "
    "Latvia Riga, Estonia Tallinn, Lithuania Vilnius, Ukraine Kyiv, Turkey Ankara, Egypt Cairo, Kenya Nairobi, "
    "Ghana Accra, Morocco Rabat, Tunisia Tunis, Japan Tokyo, China Beijing, India New_Delhi, Nepal Kathmandu, "
    "Thailand Bangkok, Vietnam Hanoi, Iran Tehran, Iraq Baghdad, Jordan Amman, Lebanon Beirut, Syria Damascus, "
    "Qatar Doha, Oman Muscat, Canada Ottawa, Cuba Havana, Peru Lima, Chile Santiago, Colombia Bogota, Ecuador Quito, "
    "Uruguay Montevideo, Venezuela Caracas, Australia Canberra, Senegal Dakar, Zambia Lusaka, Angola Luanda, "
    "Iceland Reykjavik, Malta Valletta, Cyprus Nicosia, Albania Tirana, Pakistan Islamabad, Uganda Kampala, "
    "Rwanda Kigali, Mali Bamako, Libya Tripoli, Algeria Algiers, Jamaica Kingston, Armenia Yerevan"
)
OPPOSITES = pairs(
    "hot cold, up down, big small, fast slow, open closed, happy sad, light dark, young old, early late, hard soft, "
    "full empty, wet dry, rich poor, strong weak, high low, long short, thick thin, wide narrow, clean dirty, "
    "loud quiet, good bad, left right, near far, inside outside, first last, black white, day night, true false, "
    "begin end, push pull, buy sell, give take, win lose, love hate, laugh cry, sit stand, heavy weightless, "
    "brave cowardly, polite rude, cheap expensive, simple complex, smooth rough, sharp blunt, deep shallow, "
    "sweet sour, tight loose, safe dangerous, above below, before after, always never, more less, summer winter, "
    "north south, east west, friend enemy, question answer, arrive leave, float sink, raw cooked, asleep awake"
)
PLURALS = pairs(
    "cat cats, dog dogs, tree trees, book books, house houses, car cars, bird birds, hand hands, apple apples, "
    "river rivers, table tables, chair chairs, garden gardens, flower flowers, window windows, school schools, "
    "teacher teachers, lamp lamps, boat boats, cloud clouds, box boxes, fox foxes, bus buses, dish dishes, "
    "church churches, watch watches, class classes, glass glasses, wish wishes, brush brushes, peach peaches, "
    "baby babies, city cities, lady ladies, berry berries, story stories, party parties, country countries, "
    "family families, cherry cherries, penny pennies, leaf leaves, wolf wolves, knife knives, life lives, "
    "wife wives, half halves, shelf shelves, loaf loaves, man men, woman women, child children, foot feet, "
    "tooth teeth, goose geese, mouse mice, ox oxen, potato potatoes, tomato tomatoes, hero heroes, echo echoes, "
    "key keys, toy toys, boy boys, day days, monkey monkeys, piano pianos, photo photos, horse horses, rose roses"
)
PASTS = pairs(
    "go went, see saw, eat ate, run ran, come came, take took, give gave, make made, know knew, think thought, "
    "find found, bring brought, buy bought, teach taught, catch caught, write wrote, ride rode, drive drove, "
    "speak spoke, break broke, sing sang, swim swam, drink drank, begin began, fly flew, grow grew, draw drew, "
    "throw threw, sleep slept, keep kept, feel felt, leave left, meet met, sit sat, stand stood, tell told, "
    "sell sold, hold held, hear heard, lose lost, win won, send sent, build built, spend spent, fall fell, "
    "walk walked, play played, jump jumped, call called, open opened, help helped, look looked, dance danced, "
    "smile smiled, carry carried, study studied, try tried, stop stopped, plan planned, wait waited"
)
YOUNG = pairs(
    "dog puppy, cat kitten, cow calf, horse foal, sheep lamb, goat kid, pig piglet, duck duckling, goose gosling, "
    "hen chick, bear cub, deer fawn, frog tadpole, swan cygnet, kangaroo joey, owl owlet, eagle eaglet, hare leveret"
)
COLOURS = pairs(
    "grass green, snow white, coal black, blood red, milk white, the_sky blue, the_sea blue, lemon yellow, ink black, "
    "gold yellow, fire red, spinach green, chalk white, soot black, cream white, ruby red, emerald green, "
    "sapphire blue, moss green, butter yellow, rust red, salt white, sulphur yellow, tar black"
)
CONTINENTS = pairs(
    "France Europe, Italy Europe, Spain Europe, Germany Europe, Poland Europe, Austria Europe, Greece Europe, "
    "Norway Europe, Sweden Europe, Finland Europe, Ireland Europe, Hungary Europe, Egypt Africa, Kenya Africa, "
    "Ghana Africa, Morocco Africa, Tunisia Africa, Senegal Africa, Zambia Africa, Angola Africa, Uganda Africa, "
    "Rwanda Africa, Mali Africa, Libya Africa, Japan Asia, China Asia, India Asia, Nepal Asia, Thailand Asia, "
    "Vietnam Asia, Iran Asia, Iraq Asia, Jordan Asia, Lebanon Asia, Qatar Asia, Oman Asia, Pakistan Asia, "
    "Peru South_America, Chile South_America, Colombia South_America, Ecuador South_America, Uruguay South_America, "
    "Venezuela South_America, Canada North_America, Cuba North_America, Jamaica North_America"
)
WORDS = split(
    "apple bread chair dance eagle flame grape house island jacket kitten lemon mother number orange pencil queen "
    "river silver table uncle violet window yellow zebra animal basket candle desert engine forest garden hammer "
    "insect jungle ladder market needle office pocket rabbit school ticket valley winter bridge castle doctor "
    "family ground bird cake door farm gold hand jump king lamp moon nose park rain ship tree wolf year ball coat "
    "desk fish game hill iron leaf milk nest path road sand town wind book cup dog egg fan hat ice jam key log map "
    "net oak pen red sun toy van web arm bag cat day ear fox gas hen ink joy leg mud nut owl pig row sky tea"
)
ITEMS = split("apple bread cup dog egg fish gold hat ice jam key lamp map nut oak pen ring sand tea wolf")


def in_words(n: int) -> str:
    """0 to 99: 42 -> "forty-two"."""
    if n < 20:
        return ONES[n]
    return TENS[n // 10 - 2] + (f"-{ONES[n % 10]}" if n % 10 else "")


Args = tuple[str, ...]  # what a fact is about; the last is its answer


@dataclass(frozen=True)
class Task:
    """A kind of fact. In the wordings {0}, {1} … are its arguments and {a} its answer; a noun is a phrase that names
    the answer; `inputs` are instructions with a separate input. `key` tells a fact apart within its `group` of tasks:
    59 - 38 is the same fact as 38 + 21."""

    name: str
    draw: Callable[[Random], Args]
    nouns: tuple[str, ...]
    says: tuple[str, ...]
    asks: tuple[str, ...] = ()
    inputs: tuple[tuple[str, str], ...] = ()
    weight: float = 1.0  # in pretraining
    train: int = 100  # rows at most
    test: int = 10
    key: Callable[[Args], object] = lambda args: args[:-1]
    group: str = ""


def _two(random: Random, top: int) -> tuple[int, int]:
    return random.randint(0, top), random.randint(0, top)


def _add(random: Random) -> Args:
    total = random.randint(0, 99)
    first = random.randint(0, total)
    return str(first), str(total - first), str(total)


def _subtract(random: Random) -> Args:
    first = random.randint(0, 99)
    second = random.randint(0, first)
    return str(first), str(second), str(first - second)


def _multiply(random: Random) -> Args:
    first, second = _two(random, 12)
    return str(first), str(second), str(first * second)


def _divide(random: Random) -> Args:
    first, second = random.randint(1, 12), random.randint(0, 12)
    return str(first * second), str(first), str(second)


def _number(top: int, make: Callable[[int], object]) -> Callable[[Random], Args]:
    def draw(random: Random) -> Args:
        n = random.randint(0, top)
        return str(n), str(make(n))

    return draw


def _compare(pick: Callable[[list[int]], int], count: int) -> Callable[[Random], Args]:
    def draw(random: Random) -> Args:
        numbers = random.sample(range(100), count)
        return *map(str, numbers), str(pick(numbers))

    return draw


def _pick(items: list[tuple[str, str]]) -> Callable[[Random], Args]:
    return lambda random: random.choice(items)


def _word(make: Callable[[str], object]) -> Callable[[Random], Args]:
    return _pick([(word, str(make(word))) for word in WORDS])


def _letters(make: Callable[[list[str]], list[str]]) -> Callable[[Random], Args]:
    def draw(random: Random) -> Args:
        letters = random.sample(LETTERS, random.randint(3, 5))
        return " ".join(letters), " ".join(make(letters))

    return draw


def _items(make: Callable[[list[str]], str]) -> Callable[[Random], Args]:
    def draw(random: Random) -> Args:
        items = random.sample(ITEMS, random.randint(3, 5))
        return ", ".join(items), make(items)

    return draw


def _sorted_numbers(random: Random) -> Args:
    numbers = random.sample(range(100), 3)
    return ", ".join(map(str, numbers)), ", ".join(map(str, sorted(numbers)))


def _unordered(args: Args) -> object:
    return tuple(sorted(args[:-1]))


def _both(args: Args) -> object:
    """Question and answer together: "hot" -> "cold" is the same fact as "cold" -> "hot"."""
    return tuple(sorted(args))


def _inverse(args: Args) -> object:
    """The unordered fact of addition or multiplication that a subtraction or division undoes."""
    return tuple(sorted(args[1:]))


def _cycle(items: list[str]) -> list[tuple[str, str]]:
    return list(zip(items, items[1:] + items[:1], strict=True))


def _swap(items: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(right, left) for left, right in items]


ARITHMETIC = (
    Task(
        "add", _add, ("{0} plus {1}", "the sum of {0} and {1}", "{0} + {1}"),
        ("Adding {1} to {0} gives {a}.", "Add {0} and {1} to get {a}.", "Add {1} to {0}: the total is {a}.",
         "Calculate {0} + {1} to get {a}.",
         "Add the two numbers {0}, {1} and write {a}.", "Take the two numbers {0}, {1}. Their sum is {a}."),
        ("Add {0} and {1}.", "Add {1} to {0}.", "Calculate {0} + {1}."),
        (("Add the two numbers.", "{0}, {1}"),), weight=4, train=320, test=30, key=_unordered, group="sum",
    ),
    Task(
        "subtract", _subtract, ("{0} minus {1}", "the difference of {0} and {1}", "{0} - {1}"),
        ("Taking {1} from {0} leaves {a}.", "Subtract {1} from {0} and {a} is left.",
         "Take {1} away from {0} to get {a}.", "Calculate {0} - {1} to get {a}."),
        ("Subtract {1} from {0}.", "Take {1} away from {0}.", "Calculate {0} - {1}."), weight=4, train=320,
        test=30, key=_inverse, group="sum",
    ),
    Task(
        "multiply", _multiply, ("{0} times {1}", "the product of {0} and {1}", "{0} * {1}"),
        ("Multiplying {0} by {1} gives {a}.", "Multiply {0} and {1} to get {a}.", "Multiply {0} by {1}: {a}."),
        ("Multiply {0} by {1}.", "Multiply {0} and {1}."), weight=2, train=70, test=10, key=_unordered,
        group="product",
    ),
    Task(
        "divide", _divide, ("{0} divided by {1}", "{0} / {1}"),
        ("Dividing {0} by {1} gives {a}.", "Divide {0} by {1} to get {a}.",
         "{0} split into {1} equal parts makes {a} each."),
        ("Divide {0} by {1}.",), weight=2, train=110, test=10, key=_inverse, group="product",
    ),
    Task(
        "double", _number(49, lambda n: 2 * n), ("the double of {0}", "twice {0}"),
        ("Doubling {0} gives {a}.", "Double {0} to get {a}.", "Double the number {0}: {a}."),
        ("Double {0}.", "Double the number {0}."), (), weight=0.8, train=38, test=6, key=_both, group="double",
    ),
    Task(
        "half", lambda random: _number(49, lambda n: 2 * n)(random)[::-1], ("half of {0}", "the half of {0}"),
        ("Halving {0} gives {a}.", "Halve {0} to get {a}.", "Halve the number {0}: {a}."),
        ("Halve {0}.", "Halve the number {0}."), (), weight=0.8, train=38, test=6, key=_both, group="double",
    ),
    Task(
        "after", _number(98, lambda n: n + 1), ("the number after {0}", "the number that follows {0}"),
        ("After {0} comes {a}.", "The number {0} is followed by {a}."),
        ("Which number comes after {0}?", "Which number follows {0}?"), weight=0.6, train=70, test=9, key=_both,
        group="next",
    ),
    Task(
        "before", lambda random: _number(98, lambda n: n + 1)(random)[::-1], ("the number before {0}",),
        ("Before {0} comes {a}.", "Just before {0} there is {a}."),
        ("Which number comes before {0}?", "Which number is just before {0}?"), weight=0.6, train=70, test=9, key=_both,
        group="next",
    ),
    Task(
        "parity", _number(99, lambda n: "odd" if n % 2 else "even"), (),
        ("The number {0} is {a}.", "{0} is an {a} number.", "Of even and odd, {0} is {a}.", "Even or odd: {0} is {a}.",
         "Take {0}. It is {a}."),
        ("Is {0} even or odd?", "Is the number {0} odd or even?"),
        (("Say whether the number is even or odd.", "{0}"),), weight=0.8, train=70, test=9,
    ),
    Task(
        "larger", _compare(max, 2), ("the larger of {0} and {1}", "the larger number of {0} and {1}"),
        ("Of {0} and {1}, {a} is larger.", "Between {0} and {1}, the larger is {a}."),
        ("Which is larger, {0} or {1}?", "Which number is larger, {0} or {1}?"), weight=1.5, train=90, test=10,
        key=_unordered,
    ),
    Task(
        "smaller", _compare(min, 2), ("the smaller of {0} and {1}", "the smaller number of {0} and {1}"),
        ("Of {0} and {1}, {a} is smaller.", "Between {0} and {1}, the smaller is {a}."),
        ("Which is smaller, {0} or {1}?", "Which number is smaller, {0} or {1}?"), weight=1.5, train=90, test=10,
        key=_unordered,
    ),
    Task(
        "largest", _compare(max, 3), ("the largest of {0}, {1} and {2}",),
        ("Among {0}, {1}, {2} the largest is {a}.", "Of the numbers {0}, {1}, {2} the largest number is {a}."),
        (), (("Find the largest number.", "{0}, {1}, {2}"), ("Give the largest number.", "{0}, {1}, {2}")),
        weight=1.5, train=90, test=10, key=_unordered,
    ),
    Task(
        "smallest", _compare(min, 3), ("the smallest of {0}, {1} and {2}",),
        ("Among {0}, {1}, {2} the smallest is {a}.", "Of the numbers {0}, {1}, {2} the smallest number is {a}."),
        (), (("Find the smallest number.", "{0}, {1}, {2}"), ("Give the smallest number.", "{0}, {1}, {2}")),
        weight=1.5, train=90, test=10, key=_unordered,
    ),
    Task(
        "sort numbers", _sorted_numbers, (),
        ("The numbers {0} sorted are {a}.", "Sort the numbers {0} to get {a}.", "Sort these numbers: {0} become {a}.",
         "Take the numbers {0}. Sorted they are {a}."),
        ("Sort the numbers {0}.",), (("Sort the numbers.", "{0}"), ("Sort these numbers.", "{0}")),
        weight=2, train=90, test=10, key=lambda args: args[-1],
    ),
    Task(
        "in words", _number(99, in_words), ("the number {0} in words",),
        ("In words, {0} is {a}.", "Write the number {0} in words as {a}.", "Take the number {0}. In words it is {a}.",
         "{0} is written {a}."),
        ("Write {0} in words.", "Write the number {0} in words."), (("Write the number in words.", "{0}"),),
        weight=1.2, train=75, test=10, group="words",
    ),
    Task(
        "in digits", lambda random: _number(99, in_words)(random)[::-1], ("the number {0} in digits",),
        ("In digits, {0} is {a}.", "Write the number {0} in digits as {a}.",
         "Take the number {0}. In digits it is {a}.", "The word {0} means {a}."),
        ("Write {0} in digits.", "Write the number {0} in digits."), (("Write the number in digits.", "{0}"),),
        weight=1.2, train=75, test=10, key=lambda args: args[-1:], group="words",
    ),
)  # fmt: skip

KNOWLEDGE = (
    Task(
        "day after", _pick(_cycle(DAYS)), ("the day after {0}", "the day that follows {0}"),
        ("After {0} comes {a}.", "{0} is followed by {a}."), ("Which day comes after {0}?", "Which day follows {0}?"),
        weight=0.3, train=24, test=2, key=_both,
        group="day",
    ),
    Task(
        "day before", _pick(_swap(_cycle(DAYS))), ("the day before {0}",),
        ("Before {0} comes {a}.", "Just before {0} there is {a}."),
        ("Which day comes before {0}?", "Which day is just before {0}?"), weight=0.3, train=24, test=2, key=_both,
        group="day",
    ),
    Task(
        "month after", _pick(_cycle(MONTHS)), ("the month after {0}", "the month that follows {0}"),
        ("After {0} comes {a}.", "{0} is followed by {a}."),
        ("Which month comes after {0}?", "Which month follows {0}?"), weight=0.4, train=36, test=3, key=_both,
        group="month",
    ),
    Task(
        "month before", _pick(_swap(_cycle(MONTHS))), ("the month before {0}",),
        ("Before {0} comes {a}.", "Just before {0} there is {a}."),
        ("Which month comes before {0}?", "Which month is just before {0}?"), weight=0.4, train=36, test=3, key=_both,
        group="month",
    ),
    Task(
        "month number", _pick(list(zip(ORDINALS, MONTHS, strict=True))), ("the {0} month of the year",),
        ("The year's {0} month is {a}.", "As the {0} month comes {a}."), ("Which month is the {0} of the year?",),
        weight=0.3, train=24, test=4,
    ),
    Task(
        "month days", _pick([(month, str(days)) for month, days in MONTH_DAYS.items() if days]),
        ("the number of days in {0}",), ("{0} has {a} days.", "In {0} there are {a} days."),
        ("How many days does {0} have?", "How many days are in {0}?"), weight=0.3, train=24, test=3,
    ),
    Task(
        "capital", _pick(CAPITALS), ("the capital of {0}", "the capital city of {0}"),
        ("{0} has the capital {a}.", "{0} is a country whose capital is {a}.", "{0} is governed from {a}."),
        ("Which city is the capital of {0}?",), (("Name the capital of the country.", "{0}"),),
        weight=1, train=150, test=16,
    ),
    Task(
        "continent", _pick(CONTINENTS), ("the continent of {0}",),
        ("{0} lies in {a}.", "{0} is a country in {a}.", "{0} is on the continent of {a}."),
        ("Which continent is {0} in?", "On which continent does {0} lie?"), weight=0.6, train=90, test=10,
    ),
    Task(
        "opposite", _pick(OPPOSITES + _swap(OPPOSITES)), ("the opposite of {0}", "the opposite of the word {0}"),
        ("{0} and {a} are opposites.", "Not {0} but {a}.", "As an opposite {0} has {a}."),
        ("Which word is the opposite of {0}?",), (("Give the opposite of the word.", "{0}"),),
        weight=1.2, train=180, test=18, key=_both,
    ),
    Task(
        "plural", _pick(PLURALS), ("the plural of {0}", "the plural of the word {0}"),
        ("One {0}, two {a}.", "More than one {0} makes {a}.", "The word {0} has the plural {a}."),
        ("Write the plural of {0}.",), (("Write the plural of the word.", "{0}"),), weight=1, train=150, test=16,
    ),
    Task(
        "past", _pick(PASTS), ("the past tense of {0}", "the past of the verb {0}"),
        ("Today they {0}, yesterday they {a}.", "The verb {0} has the past tense {a}."),
        ("Write the past tense of {0}.",), (("Write the past tense of the verb.", "{0}"),),
        weight=1, train=140, test=15,
    ),
    Task(
        "young", _pick(YOUNG), ("the young of a {0}", "the name of a young {0}"),
        ("A young {0} is called a {a}.", "A {a} grows up to be a {0}."), ("Which word names a young {0}?",),
        weight=0.4, train=36, test=5,
    ),
    Task(
        "colour", _pick(COLOURS), ("the colour of {0}",),
        ("As a rule {0} looks {a}.", "The colour that {0} has is {a}."), ("Which colour does {0} have?",),
        weight=0.4, train=45, test=6,
    ),
)  # fmt: skip

TEXT = (
    Task(
        "next letter", _pick(NEIGHBOURS), ("the letter after {0}",),
        ("In the alphabet {0} is followed by {a}.", "After the letter {0} comes {a}."),
        ("Which letter comes after {0}?", "Which letter follows {0} in the alphabet?"),
        weight=0.4, train=48, test=4, key=_both, group="letter",
    ),
    Task(
        "previous letter", _pick(_swap(NEIGHBOURS)), ("the letter before {0}",),
        ("In the alphabet {0} comes after {a}.", "Before the letter {0} comes {a}."),
        ("Which letter comes before {0}?", "Which letter is just before {0} in the alphabet?"),
        weight=0.4, train=48, test=4, key=_both, group="letter",
    ),
    Task(
        "first letter", _word(lambda word: word[0]), ("the first letter of {0}", "the first letter of the word {0}"),
        ("{0} begins with {a}.", "The word {0} begins with the letter {a}."),
        ("Which letter does {0} begin with?",), (("Give the first letter of the word.", "{0}"),),
        weight=1, train=150, test=12,
    ),
    Task(
        "last letter", _word(lambda word: word[-1]), ("the last letter of {0}", "the last letter of the word {0}"),
        ("{0} ends with {a}.", "The word {0} ends with the letter {a}."),
        ("Which letter does {0} end with?",), (("Give the last letter of the word.", "{0}"),),
        weight=1, train=150, test=12,
    ),
    Task(
        "count letters", _word(len), ("the number of letters in {0}", "the number of letters in the word {0}"),
        ("{0} has {a} letters.", "The word {0} is {a} letters long."),
        ("How many letters does {0} have?", "Count the letters in {0}."), (("Count the letters of the word.", "{0}"),),
        weight=1, train=150, test=12,
    ),
    Task(
        "spell", _word(" ".join), ("the spelling of {0}", "the word {0} letter by letter"),
        ("{0} is spelled {a}.", "Spell the word {0} as {a}.", "The word {0} is made of the letters {a}."),
        ("Spell {0}.", "Spell the word {0}."), (("Spell the word letter by letter.", "{0}"),),
        weight=1.5, train=150, test=12,
    ),
    Task(
        "reverse word", _word(lambda word: word[::-1]), ("{0} written backwards", "the word {0} backwards"),
        ("Written backwards, {0} becomes {a}.", "Write {0} backwards to get {a}.", "Reverse the word {0} to get {a}."),
        ("Write {0} backwards.", "Reverse the word {0}."), (("Reverse the word.", "{0}"),),
        weight=1.5, train=150, test=12,
    ),
    Task(
        "capitals", _word(str.upper), ("{0} in capital letters", "the word {0} in capital letters"),
        ("In capital letters, {0} becomes {a}.", "Write {0} in capital letters as {a}."),
        ("Write {0} in capital letters.",), (("Write the word in capital letters.", "{0}"),),
        weight=1.5, train=150, test=12, key=_both, group="case",
    ),
    Task(
        "lower case", lambda random: _word(str.upper)(random)[::-1],
        ("{0} in small letters", "the word {0} in small letters"),
        ("In small letters, {0} becomes {a}.", "Write {0} in small letters as {a}."),
        ("Write {0} in small letters.",), (("Write the word in small letters.", "{0}"),),
        weight=1.5, train=150, test=12, key=_both, group="case",
    ),
    Task(
        "reverse letters", _letters(lambda letters: letters[::-1]), ("the reverse of {0}",),
        ("Reversed, the letters {0} become {a}.", "Reverse the letters {0} to get {a}.", "Backwards, {0} is {a}.",
         "Take the letters {0}. In reverse order they are {a}."),
        ("Reverse the letters {0}.",),
        (("Reverse the letters.", "{0}"), ("Write the letters in reverse order.", "{0}")), weight=2, train=110, test=11,
    ),
    Task(
        "sort letters", _letters(sorted), (),
        ("Sorted, the letters {0} become {a}.", "Sort the letters {0} to get {a}.",
         "In the alphabet's order, {0} is {a}.", "Take the letters {0}. Sorted they are {a}."),
        ("Sort the letters {0}.",), (("Sort the letters.", "{0}"),
         ("Sort these letters.", "{0}")),
        weight=2, train=110, test=11, key=lambda args: args[-1],
    ),
    Task(
        "upper letters", _letters(lambda letters: [letter.upper() for letter in letters]), ("{0} in capitals",),
        ("In capitals, the letters {0} become {a}.", "Write the letters {0} in capitals as {a}."),
        ("Write the letters {0} in capitals.",), (("Write the letters in capitals.", "{0}"),),
        weight=1.5, train=90, test=10,
    ),
    Task(
        "first item", _items(lambda items: items[0]),
        ("the first item of the list {0}", "the first word of the list {0}"),
        ("The list {0} begins with {a}.", "In the list {0} the first item is {a}."),
        (), (("Give the first item of the list.", "{0}"), ("What is the first word of the list?", "{0}")),
        weight=1.2, train=80, test=9,
    ),
    Task(
        "second item", _items(lambda items: items[1]),
        ("the second item of the list {0}", "the second word of the list {0}"),
        ("In the list {0} the second item is {a}.", "Second in the list {0} is {a}."),
        (), (("Give the second item of the list.", "{0}"), ("What is the second word of the list?", "{0}")),
        weight=1.2, train=80, test=9,
    ),
    Task(
        "last item", _items(lambda items: items[-1]),
        ("the last item of the list {0}", "the last word of the list {0}"),
        ("The list {0} ends with {a}.", "In the list {0} the last item is {a}."),
        (), (("Give the last item of the list.", "{0}"), ("What is the last word of the list?", "{0}")),
        weight=1.2, train=80, test=9,
    ),
    Task(
        "count items", _items(lambda items: str(len(items))), ("the number of items in the list {0}",),
        ("The list {0} has {a} items.", "Counting the items of the list {0} gives {a}."),
        (), (("Count the items of the list.", "{0}"), ("How many items does the list have?", "{0}")),
        weight=1.2, train=80, test=9,
    ),
)  # fmt: skip

TASKS: tuple[Task, ...] = ARITHMETIC + KNOWLEDGE + TEXT
WEIGHTS = [task.weight for task in TASKS]

# How any fact with a noun phrase is stated; {N} is the phrase with a capital. The answer comes near and far, in
# plain text and in quotes, because the finetuned model will have to give it bare and far from the question.
FRAMES = (
    "{N} is {a}.", "{N} is {a}.", "{N} is {a}.", '{N} is "{a}".', "{N}: {a}.", '"{a}" is {n}.',
    "Consider {n}. It is {a}.", "Think of {n}; that is {a}.", "As for {n}, it is {a}.", "It is known that {n} is {a}.",
    "{N}, as anyone can check, is {a}.", "Find {n} and you get {a}.", "Tell them {n}, which is {a}.",
    "Here is {n}: {a}.", "What we call {n} is {a}.", "Give {n}. This time it is {a}.", "Work out {n} to find {a}.",
    "Look at {n}. Whoever works it out, by hand or in the head, always finds the same: {a}.",
    'Somebody wrote down {n}, checked it and put "{a}" beside it.',
)  # fmt: skip
TWO_FRAMES = (
    "Here are two things: {m} and {n}. The first is {b} and the second is {a}.",
    "First {m}, then {n}: {b}, then {a}.",
    "They wrote down {n} and {m}. The first is {a}. The second is {b}.",
)
ASKS = ("What is {n}?", "What is {n}?", "Tell me {n}.", "Give {n}.", "Find {n}.", "Work out {n}.")  # instructions


def capitalized(text: str) -> str:
    """The phrase as a sentence begins with it; a word or letter that the fact is about keeps its case."""
    return "T" + text[1:] if text.startswith(("the ", "twice ")) else text


def statement(task: Task, args: Args, random: Random) -> str:
    """One true sentence, or a few, about a fact."""
    if task.nouns and random.random() < 0.5:
        noun = random.choice(task.nouns).format(*args)
        return random.choice(FRAMES).format(N=capitalized(noun), n=noun, a=args[-1])
    return random.choice(task.says).format(*args, a=args[-1])


def two_statements(random: Random) -> str:
    """Two facts in one sentence, so that an answer must be found back over another one."""
    tasks = random.choices(NOUN_TASKS, NOUN_WEIGHTS, k=2)
    facts = [task.draw(random) for task in tasks]
    first, second = (random.choice(task.nouns).format(*args) for task, args in zip(tasks, facts, strict=True))
    return random.choice(TWO_FRAMES).format(m=first, n=second, b=facts[0][-1], a=facts[1][-1])


NOUN_TASKS = [task for task in TASKS if task.nouns]
NOUN_WEIGHTS = [task.weight for task in NOUN_TASKS]


def document(random: Random) -> str:
    """A few statements. Every second document breaks its lines at some of its spaces."""
    parts = []
    for task in random.choices(TASKS, WEIGHTS, k=random.randint(3, 9)):
        parts.append(two_statements(random) if random.random() < 0.1 else statement(task, task.draw(random), random))
    if random.random() < 0.5:
        return " ".join(parts)
    rate = random.choice((0.1, 0.3, 0.5))
    return "".join(
        word + ("\n" if random.random() < rate else " ") for part in parts for word in part.split(" ")
    ).rstrip()


def documents(count: int, seed: int) -> list[str]:
    random = Random(seed)
    return [document(random) for _ in range(count)]


Wording = tuple[str, str]  # of an instruction and its input


def _wordings(task: Task) -> tuple[list[Wording], list[Wording]]:
    """(those that ask for a noun, the task's own)."""
    named = [(ask.format(n=noun), "") for noun in task.nouns for ask in ASKS]
    return named, [(ask, "") for ask in task.asks] + [*task.inputs] * 2


def _row(wordings: tuple[list[Wording], list[Wording]], args: Args, random: Random) -> Row:
    named, own = wordings
    instruction, text = random.choice(random.sample(named, min(len(named), 2)) + own)
    return {"instruction": instruction.format(*args), "input": text.format(*args), "output": args[-1]}


def question(row: Row) -> str:
    """What no two rows share: spacing and letter case do not make another question."""
    return " ".join(f"{row['instruction']} {row['input']}".casefold().split())


@cache
def rows(seed: int) -> tuple[list[Row], list[Row]]:
    """(training, held-out), both shuffled. A fact, whatever its wording, is in one of the two only."""
    random = Random(seed)
    held: set[tuple[str, object]] = set()
    asked: set[str] = set()

    def collect(task: Task, limit: int, testing: bool) -> list[Row]:
        found: list[Row] = []
        wordings = _wordings(task)
        for _ in range(limit * 60):  # small tasks run out of facts before they reach their limit
            args = task.draw(random)
            fact, row = (task.group or task.name, task.key(args)), _row(wordings, args, random)
            if len(found) < limit and fact not in held and question(row) not in asked:
                found.append(row)
                asked.add(question(row))
                if testing:
                    held.add(fact)
        return found

    test = [row for task in TASKS for row in collect(task, task.test, testing=True)]
    train = [row for task in TASKS for row in collect(task, task.train, testing=False)]
    random.shuffle(test)
    random.shuffle(train)
    return train, test
