"""Names of topics and titles of items: plain words, so that a title tells its topic to whoever reads it."""

TOPICS: dict[str, tuple[str, ...]] = {
    "astronomy": ("star", "comet", "telescope", "galaxy", "moon", "planet"),
    "baking": ("bread", "pastry", "sourdough", "cake", "oven", "biscuit"),
    "birds": ("heron", "owl", "swallow", "nest", "kingfisher", "feather"),
    "chess": ("gambit", "endgame", "bishop", "opening", "checkmate", "rook"),
    "cinema": ("film", "director", "screenplay", "camera", "western", "matinee"),
    "cycling": ("bicycle", "peloton", "gear", "velodrome", "saddle", "climb"),
    "detectives": ("murder", "inspector", "alibi", "clue", "suspect", "verdict"),
    "fashion": ("fabric", "tailor", "runway", "sewing", "silk", "wardrobe"),
    "football": ("goal", "striker", "league", "keeper", "penalty", "stadium"),
    "gardening": ("garden", "rose", "orchard", "seed", "compost", "greenhouse"),
    "history": ("empire", "dynasty", "castle", "treaty", "archive", "crusade"),
    "jazz": ("saxophone", "trumpet", "swing", "quartet", "blues", "ballad"),
    "mountains": ("summit", "glacier", "ridge", "rope", "avalanche", "valley"),
    "painting": ("canvas", "portrait", "fresco", "palette", "sketch", "gallery"),
    "programming": ("compiler", "algorithm", "software", "debugger", "kernel", "recursion"),
    "romance": ("love", "wedding", "kiss", "letter", "heart", "promise"),
    "sailing": ("harbour", "anchor", "regatta", "mast", "tide", "lighthouse"),
    "space operas": ("starship", "android", "nebula", "colony", "wormhole", "alien"),
    "trains": ("railway", "locomotive", "station", "tunnel", "signal", "express"),
    "wine": ("vineyard", "cellar", "vintage", "grape", "cork", "tasting"),
}
ADJECTIVES = (
    *("Quiet", "Golden", "Hidden", "Last", "Complete", "Modern", "Secret", "Northern", "Little", "Endless"),
    *("Forgotten", "Practical", "Winter", "Perfect", "Old", "Brave", "Midnight", "Simple", "Wild", "Second"),
)
FORMS = ("Handbook", "Story", "Companion", "Collection", "Diary", "Guide", "Anthology", "Mystery", "Atlas")


def topic_name(topic: int) -> str:
    """A name for any topic number; the words of a topic serve again, numbered, when there are more."""
    name = list(TOPICS)[topic % len(TOPICS)]
    return name if topic < len(TOPICS) else f"{name} {topic // len(TOPICS) + 1}"


def title(topic: int, place: int) -> str:
    """The title of item number `place` of a topic; titles of a topic differ."""
    words = list(TOPICS.values())[topic % len(TOPICS)]
    volume, rest = divmod(place, len(words) * len(ADJECTIVES) * len(FORMS))
    # Coprime strides visit every combination once, and neighbours differ in each word.
    word = words[rest % len(words)]
    adjective = ADJECTIVES[(rest // len(words) + 7 * (rest % len(words)) + topic) % len(ADJECTIVES)]
    form = FORMS[(rest // (len(words) * len(ADJECTIVES)) + rest + topic) % len(FORMS)]
    name = f"The {adjective} {word.capitalize()} {form}"
    edition = volume + 1
    suffix = topic // len(TOPICS)
    return name + (f" {suffix + 1}" if suffix else "") + (f" (volume {edition})" if volume else "")
