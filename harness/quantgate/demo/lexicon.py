"""Words and phrasings of the order-desk language.

Every phrasing table has a `seen` part, which training draws from, and a `heldout` part, which only
the validation and golden splits may use.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Phrasings:
    """Interchangeable ways to say one thing; `heldout` never reaches the training stream."""

    seen: tuple[str, ...]
    heldout: tuple[str, ...]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ADJECTIVES = _words(
    """
    blue red green black white grey steel oak pine brass copper rubber glass cotton wool
    small large heavy soft plain round flat short long narrow wide spare
    """
)
NOUNS = _words(
    """
    lamps ropes chairs tables shelves hooks boards panels nails screws bolts hinges cables
    pumps valves hoses filters brushes towels sheets candles mugs plates bowls gloves
    helmets ladders buckets baskets frames mirrors clocks locks tiles
    """
)
UNITS = ("boxes", "crates", "pairs", "rolls", "sets", "bags", "packs", "cases")
FIRST_NAMES = _words(
    """
    Lena Omar Ruth Ivan Mona Karl Dora Hugo Nina Paul Vera Amir Elsa Boris Clara David Freya
    Goran Helen Igor Julia Kofi Laura Marco Nadia Oscar Petra Rosa Simon Tara Viktor Wanda
    Yusuf Zoe Anton Bella Cyril Diana
    """
)
LAST_NAMES = _words(
    """
    Ortiz Haas Brandt Novak Silva Moreau Larsen Costa Weber Popov Tanaka Okafor Murphy
    Jensen Rossi Keller Dubois Lopez Meyer Singh Walsh Young Carter Bauer Fischer Garcia
    Hughes Iqbal Khan Lindgren Marsh Nielsen Peters Quinn Reyes Stone Turner Vogel Wolf
    Zimmer
    """
)
MONTHS = _words(
    """
    January February March April May June July August September October November December
    """
)
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
NUMBER_WORDS = {
    "two": 2,
    "three": 3,
    "four": 4,
    "five": 5,
    "six": 6,
    "eight": 8,
    "ten": 10,
    "a dozen": 12,
    "twenty": 20,
    "two dozen": 24,
    "thirty": 30,
    "fifty": 50,
}

GREETINGS = Phrasings(
    ("", "", "", "hi ,", "hello ,", "good morning ,", "dear team ,", "hey there ,"),
    ("", "good day ,", "hello again ,"),
)
CLOSINGS = Phrasings(
    ("", "", "", "thanks .", "thank you .", "best wishes .", "many thanks ."),
    ("", "thanks for the help .", "with best wishes ."),
)
ASIDES = Phrasings(
    (
        "the weather is awful today .",
        "our van is back on {w} .",
        "tell {f} I said hello .",
        "last time we got {n} by mistake .",
        "the {a} ones were very good .",
        "we are busy until {w} .",
        "room {n} is open all day .",
        "{f} will be at the door .",
    ),
    (
        "{f} was very happy last time .",
        "the door of room {n} is open .",
        "we got the {a} ones on {w} .",
    ),
)

QUANTITY_CLAUSES = Phrasings(
    (
        "please send {q} {u} of {i}",
        "we need {q} {u} of {i}",
        "I would like to order {q} {u} of {i}",
        "can you ship {q} {u} of {i}",
        "put me down for {q} {u} of {i}",
        "{i} , {q} {u}",
        "order : {q} {u} of {i}",
        "add {q} {u} of the {i}",
        "{q} {u} of {i} please",
        "the item is {i} and the quantity is {q} {u}",
        "{i} again , {q} {u} this time",
        "we are out of {i} , send {q} {u}",
        "{q} {u} of {i} would be fine",
        "the shop wants {q} {u} of {i}",
        "we ran low on {i} : {q} {u}",
        "another {q} {u} of {i}",
        "reserve {q} {u} of the {i}",
        "of the {i} we take {q} {u}",
    ),
    (
        "our list says {i} : {q} {u}",
        "could we have the {i} , {q} {u}",
        "it is time to order {i} again , {q} {u} please",
        "I need the {i} , that is {q} {u}",
        "ship us {q} {u} of the {i}",
        "we take {q} {u} of {i} again",
        "reserve the {i} , {q} {u}",
        "please put down {q} {u} of {i}",
        "what we need is {i} , {q} {u}",
        "{q} {u} of the {i} this time",
        "for the shop we want {i} , {q} {u}",
        "{q} {u} is the quantity , {i} is the item",
        "the order is {q} {u} of {i}",
        "there are no {i} left , please send {q} {u}",
        "can I get {q} {u} of {i}",
        "{i} are sold out here , so add {q} {u}",
        "a new order , {i} , {q} {u}",
        "I am looking for {q} {u} of {i}",
        "{q} {u} , all of them {i}",
        "note {q} {u} of the {i} on my order",
    ),
)
DUE_CLAUSES = Phrasings(
    (
        "by {d}",
        "it has to arrive by {d}",
        "we need it on {d}",
        "due {d}",
        "deliver on {d}",
        "no later than {d}",
        "the date is {d}",
        "ready for {d}",
    ),
    (
        "it has to be here on {d}",
        "delivery by {d} please",
        "the last day is {d}",
        "send it no later than {d}",
    ),
)
CUSTOMER_CLAUSES = Phrasings(
    (
        "for {c}",
        "this is {c}",
        "customer {c}",
        "{c} here",
        "my name is {c}",
        "bill it to {c}",
        "from {c}",
        "the order is for {c}",
        "yours , {c}",
        "on the account of {c}",
        "we are {c}",
        "regards from {c}",
    ),
    (
        "the name is {c}",
        "the customer is {c}",
        "it is for {c}",
        "put it down for {c}",
        "bill this to {c}",
        "we order for {c}",
        "the account is {c}",
        "order of {c}",
        "{c} is the customer",
        "send the bill to {c}",
        "best wishes from {c}",
        "you can charge {c}",
        "I call for {c}",
        "{c} will pay the invoice",
        "on my card it says {c}",
        "the order came from {c}",
    ),
)

TOTAL_LINES = Phrasings(
    (
        "{i} {a}",
        "{a} for the {i}",
        "{i} at {a}",
        "{i} : {a}",
        "the {i} cost {a}",
        "{a} , {i}",
        "{i} costs {a}",
        "{i} = {a}",
        "{a} is for the {i}",
        "{i} came to {a}",
        "the {i} : {a}",
        "the {i} , {a}",
        "{a} to pay for {i}",
        "{a} : {i}",
        "{i} priced at {a}",
        "we paid {a} for the {i}",
        "{a} for {i}",
        "{a} {i}",
        "the price of the {i} is {a}",
        "{i} , that is {a}",
    ),
    ("the {i} at {a}", "{i} for {a}", "{a} : the {i}"),
)
TOTAL_HEADS = Phrasings(
    (
        "Invoice :",
        "Invoice number {n} :",
        "Bill for {f} :",
        "Receipt {n} , {w} :",
        "{f} bought",
        "On {w} we sold",
        "Bill :",
        "Receipt :",
        "{f} paid on {w} :",
        "Bill number {n} :",
        "Receipt of {f} :",
        "Sale {n} to {f} :",
        "On {w} {f} bought",
    ),
    ("Bill number {n} for {f} :", "{f} bought on {w} :", "We sold on {w} , receipt {n} :"),
)
TOTAL_QUESTIONS = Phrasings(
    (
        "What is the total ?",
        "Total ?",
        "Add it up .",
        "How much is that ?",
        "Sum please .",
        "What is the sum ?",
        "How much in total ?",
        "Please give the total .",
        "Add these up .",
    ),
    ("How much is the total ?", "Please add it up ."),
)

LOOKUP_KEYS = _words(
    """
    shade width brand grade floor aisle shelf depth weight colour height owner model batch
    serial maker origin market region branch office vendor agent buyer seller driver truck
    route depot harbor port vessel train lane gate dock bay bin rack drawer label cover
    lining handle wheel motor engine switch fuse cord plug socket bulb lens screen panel
    frame leg seat back arm base lid spout nozzle gauge meter dial knob lever spring gear
    chain belt pulley shaft bearing bolt nut washer pin clip strap buckle zip button pocket
    collar sleeve cuff hem seam thread yarn fabric dye ink paint primer glue tape foam felt
    cork wax oil grease solvent cleaner polish soap deposit rent tax fee toll bonus credit
    debit rate margin budget quota ration share month week season shift break lunch opening
    closing holiday audit survey review roof wall window ceiling stairs cellar garden yard
    fence lobby kitchen printer scanner router server keyboard camera phone laptop tablet
    speaker charger pallet carton barrel drum tank crane lift trolley forklift ramp scale
    stamp seal pen pencil paper folder binder stapler ruler marker desk bench stool couch
    """
)
LOOKUP_VALUES = _words(
    """
    amber ivory coral olive maroon navy teal violet silver golden bronze crimson indigo
    paris oslo rome cairo lima delhi tokyo quito dublin vienna athens berlin lisbon tiger
    eagle otter falcon badger heron raven lynx bison camel gecko koala panda maple cedar
    birch willow aspen walnut cherry poplar linden hazel laurel rowan low high open shut
    full empty early late north south east west left right upper lower alpha beta gamma
    delta sigma omega kappa theta zeta lambda granite marble slate basalt quartz topaz opal
    pearl onyx jade ruby garnet
    """
)
# The keys that are asked for: each has values of its own kind, which the orders speak of too.
LOOKUP_FACTS: dict[str, tuple[str, ...]] = {
    "pallet": NOUNS,
    "cover": ADJECTIVES,
    "opening": WEEKDAYS,
    "carton": UNITS,
    "brand": _words(
        "tiger eagle otter falcon badger heron raven lynx bison camel gecko koala panda"
    ),
}
LOOKUP_HEADS = Phrasings(
    ("Record :", "Stock card :", "File {n} :", "Sheet of {f} :"),
    ("Record {n} of {f} :", "Card {n} :"),
)
LOOKUP_QUESTIONS = Phrasings(
    (
        'What is "{k}"?',
        'Give the value of "{k}".',
        'Read out "{k}".',
        'Tell me "{k}" please.',
        'Look up "{k}".',
        'And "{k}"?',
    ),
    (
        'What is the value of "{k}"?',
        'Please look up the value "{k}".',
        'I need "{k}" please.',
    ),
)
