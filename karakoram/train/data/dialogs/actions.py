"""Things to do rather than to compute: weather, messages, reminders, orders, lights: free text, times and booleans as
arguments."""

from collections.abc import Callable
from random import Random
from typing import Any

from karakoram.train.data.dialogs.capability import Capability, Role
from karakoram.train.data.dialogs.phrases import Phrases
from karakoram.train.data.dialogs.task import Task, Use
from karakoram.train.data.names import Split, english, person, place, syllables, thing

# Each action: description, roles (key, kind, description), questions, thought, answer, and a maker of the result.
# `{result}` in the answer is what the tool returned; slots are p (person), c, d (places), x (thing), n (number), t (time), m (text).
_Result = Callable[[Random, Split], str]


def _done(*words: str) -> _Result:
    return lambda rng, split: words[int(rng.random() * len(words))]


def _weather(rng: Random, split: Split) -> str:
    return f"{int(rng.random() * 35)} degrees, {rng.choice(('sunny', 'cloudy', 'rainy', 'windy', 'snowy', 'foggy'))}"


def _ticket(rng: Random, split: Split) -> str:
    return f"{syllables(rng, split, 1).upper()[:3]}-{100 + int(rng.random() * 900)}"


def _word(rng: Random, split: Split) -> str:
    return syllables(rng, split)


class _Action:
    """One kind of action in all its phrasings."""

    def __init__(
        self, key: str, about: tuple[str, str], roles: tuple[tuple[str, str, str, str], ...], asks: tuple[str, str],
        thought: str, answer: str, expected: str, result: _Result,
    ) -> None:  # fmt: skip
        self.key, self.thought, self.answer, self.expected, self.result = key, thought, answer, expected, result
        self.about = Phrases(f"actions.{key}.about", *about)
        self.roles = tuple(
            Role(role, kind, Phrases(f"actions.{key}.{role}", train, evaluation), said=_SAID[role])
            for role, kind, train, evaluation in roles
        )
        self.ask = Phrases(f"actions.{key}.ask", *asks)

    def task(self, rng: Random, split: Split) -> Task:
        """A question for this action; the tool returns the same result for any arguments."""
        slots: dict[str, Any] = {
            "p": person(rng, split), "c": place(rng, split), "d": place(rng, split), "x": thing(rng, split),
            "n": 2 + int(rng.random() * 58), "t": f"{int(rng.random() * 24):02d}:{int(rng.random() * 12) * 5:02d}",
            "m": _text(rng, split), "l": rng.choice(_LANGUAGES), "on": rng.random() < 0.5,
        }  # fmt: skip
        slots["switch"] = "on" if slots["on"] else "off"
        result = self.result(rng, split)
        capability = Capability(self.key, self.about, self.roles, lambda values: result, plain=False)
        values = {role.key: slots[role.key] for role in self.roles}
        answer = self.answer.format_map(slots | {"result": result})
        use = Use(capability, values, self.thought)
        expected = self.expected.format_map(slots | {"result": result})
        verbatim = any(role.key in "mx" for role in self.roles)
        return Task("actions", self.ask.pick(rng, split, **slots), [[use]], answer, (expected,), verbatim=verbatim)


_SAID = {
    "p": "person", "c": "from", "d": "to", "x": "what", "n": "count", "t": "time", "m": "text", "l": "language", "on": "on",
}  # fmt: skip
_LANGUAGES = ("French", "German", "Spanish", "Italian", "Dutch", "Polish", "Chinese", "Japanese", "Greek", "Latin")
_TEXTS = (
    "the {a} is ready",
    "I like the {a}",
    "we need {n} {a}s",
    "see you at the {a}",
    "the {a} is late",
    "hello",
    "come to the {a}",
    "I lost my {a}",
    "bring the {a}",
    "the {a} costs {n}",
    "good luck",
)


def _text(rng: Random, split: Split) -> str:
    noun = english(rng, split, "noun") if rng.random() < 0.6 else syllables(rng, split)
    return _TEXTS[int(rng.random() * len(_TEXTS))].format(a=noun, n=2 + int(rng.random() * 90))


ACTIONS = (
    _Action(
        "weather",
        ("Get the weather of a city.\nReturns the weather of a place.\nTells the weather in a city.\nWeather report.\n[Find|Show|Shows|Gives] [the weather|how warm it is|sun or rain] [in|for] [a|some|any] [city|place|town].", "Returns the weather for a city.\nThe weather of a place."),
        (("c", "string", "The city\nName of the city\nWhere\nCity\n[Which|What] [town|place|city]\n[Town|Place|City] [to check|to look up]", "City name\nThe place"),),
        (
            "What is the weather in {c}?\nHow is the weather in {c}?\nWeather in {c}?\nTell me the weather in {c}.\nI am going to {c}. How is the weather there?\nIs it warm in {c}?\nWill it rain in {c}?",
            "Please tell me about the weather in {c}.\nHow warm is it in {c}?",
        ),
        "Need the weather in the city.", "In {c} it is {result}.", "{result}", _weather,
    ),
    _Action(
        "message",
        ("Send a message to a person.\nSends a text to someone.\nWrite to a person.\nText a person.\n[Gives|Brings|Passes] [a message|a text|words] to [a person|someone|somebody].", "Sends someone a message.\nSend a text message."),
        (("p", "string", "Who gets it\nThe person\nName of the person\nTo\n[Who|Person] [to write to|to tell|to send it to]\n[Sent|Goes] to", "Who it is for\nPerson who gets it"), ("m", "string", "The text\nText of the message\nWhat to say\nMessage\n[What|The words|Text] to [send|write|tell]\nWords of the message", "What the message says\nThe message text")),
        (
            "Send {p} the message: {m}\nTell {p}: {m}\nWrite to {p}: {m}\nText {p}: {m}\nSend a message to {p} that says {m}\nLet {p} know: {m}\nMessage {p}: {m}",
            "Please send {p} this message: {m}\nPlease write {p}: {m}",
        ),
        "Send the message.", "The message was sent to {p}.", "{p}", _done("sent", "ok", "done"),
    ),
    _Action(
        "reminder",
        ("Set a reminder.\nReminds the user at a time.\nMake a reminder for a time.\nCreate a reminder.\n[Remembers|Notes] [something|a thing] [for later|until a time].", "Sets a reminder at a time.\nReminder for later."),
        (("m", "string", "What to remember\nText of the reminder\nThe text\nNote\n[What|The thing] to [think of|do|say then]\nWords of the note", "What it is about\nThe note"), ("t", "string", "Time, HH:MM\nWhen\nThe time\nAt what time\n[Hour and minute|Time as HH:MM|Clock time]\nWhen to [remind|ring|tell]", "Time of day, HH:MM\nWhen it is due")),
        (
            "Remind me at {t}: {m}\nAt {t} remind me: {m}\nSet a reminder for {t}: {m}\nReminder at {t}: {m}\nI must not forget at {t}: {m}",
            "Please remind me at {t}: {m}\nMake a note for {t}: {m}",
        ),
        "Set the reminder.", "The reminder is set for {t}.", "{t}", _done("ok", "done", "set"),
    ),
    _Action(
        "song",
        ("Play a song.\nPlays music.\nStart a song.\nMusic player.\n[Play|Plays|Puts on] [some music|a title|a track].", "Plays a song by title.\nStart to play music."),
        (("x", "string", "Title\nThe song\nName of the song\nWhat to play\n[Which|What] [song|music|title]\nMusic to [play|hear]", "Title of the song\nSong to play"),),
        ("Play {x}.\nPlay the song {x}.\nI want to hear {x}.\nPut on {x}.\nStart the song {x}.\nplay {x}", "Please play the song {x}.\nI would like to hear {x}."),
        "Play the song.", "Playing {x}.", "{x}", _done("playing", "ok", "started"),
    ),
    _Action(
        "flight",
        ("Book a flight.\nBooks a flight between two cities.\nReserve a flight.\nFlight booking.\n[Gets|Buys|Finds] [a flight|a seat on a plane] [between places|from one city to another].", "Books a plane ticket.\nReserve a flight from city to city."),
        (("c", "string", "City to start from\nFrom\nWhere it starts\nFirst city\n[City|Town|Place] [of the start|to leave|to fly from]\n[Leave|Leaves|Comes] from", "Start city\nFrom which city"), ("d", "string", "City to fly to\nTo\nWhere it goes\nLast city\n[City|Town|Place] [of the end|to reach|to arrive in]\n[Go|Goes|Arrives] [to|in]", "Goal city\nTo which city")),
        (
            "Book a flight from {c} to {d}.\nI want to fly from {c} to {d}.\nI need a flight to {d} from {c}.\nFind me a flight from {c} to {d}.\nGet me from {c} to {d} by plane.",
            "Please book me a flight from {c} to {d}.\nI have to fly to {d} from {c}.",
        ),
        "Book the flight.", "Your flight is booked: {result}.", "{result}", _ticket,
    ),
    _Action(
        "translate",
        ("Translate a text.\nTranslates into another language.\nTranslate words.\nTranslator.\n[Puts|Brings|Says] [a text|words|a word] [in|into] another language.", "Translates a text into a language.\nTranslate to a language."),
        (("x", "string", "The text\nText to translate\nWhat to translate\nWords\n[Text|Words|A word] [in the first language|to say|to put into it]", "Text that is translated\nWords to change"), ("l", "string", "Language\nTarget language\nThe language\nInto which language\n[Which|What] language\nLanguage [to use|of the result|to speak]", "Language wanted\nTo this language")),
        (
            "Translate {x} into {l}.\nHow do you say {x} in {l}?\nWhat is {x} in {l}?\nTranslate {x} to {l}\nI need {x} in {l}.\nSay {x} in {l}.",
            "Please translate {x} into {l}.\nTell me how to say {x} in {l}.",
        ),
        "Translate it.", "In {l} it is {result}.", "{result}", _word,
    ),
    _Action(
        "order",
        ("Order a thing.\nOrders things from the shop.\nPlace an order.\nBuy things.\n[Buys|Orders|Gets] [something|goods|articles] [in a shop|in some number|for the user].", "Places an order for a thing.\nOrder from the shop."),
        (("x", "string", "The thing\nWhat to order\nName of the thing\nItem\n[What|Which thing] to [buy|get]\n[Article|Goods] wanted", "Thing to order\nThe item"), ("n", "integer", "How many\nNumber of things\nQuantity\nCount\nHow many [to buy|to get|to order|pieces]\n[Number of|Count of] pieces", "How many of them\nThe quantity")),
        (
            "Order {n} of the {x}.\nOrder {n} pieces of {x}.\nI want to order {x}, {n} pieces.\nBuy {n} pieces of {x}.\nPlace an order for {n} pieces of {x}.",
            "Please order {n} pieces of {x}.\nI would like {n} pieces of {x}.",
        ),
        "Place the order.", "Your order is {result}.", "{result}", _ticket,
    ),
    _Action(
        "light",
        ("Turn a light on or off.\nSwitches a lamp.\nSwitch the light of a room.\nLight switch.\n[Makes|Controls] [a lamp|a light] [bright or dark|go on or off].", "Turns the light in a room on or off.\nSwitch a light."),
        (("x", "string", "Which light\nThe light\nName of the light\nWhere\n[Which|What] [lamp|room]\n[Light|Lamp] to [change|turn|use]", "Name of the lamp\nLight to switch"), ("on", "boolean", "True for on\nOn or off\nWhether it is on\nTrue turns it on\n[True|False] if it [goes|turns|should be] [on|off]\nTrue: on, false: off", "True to turn it on\nOn is true")),
        (
            "Turn {switch} the {x} light.\nTurn the {x} light {switch}.\nSwitch {switch} the {x} light.\nSwitch the {x} light {switch}.\nLight in the {x} {switch}\nPut {switch} the {x} light",
            "Please turn {switch} the {x} light.\nI want the {x} light {switch}.",
        ),
        "Switch the light.", "The {x} light is {switch}.", "{switch}", _done("ok", "done"),
    ),
    _Action(
        "timer",
        ("Start a timer.\nSets a timer in minutes.\nTimer for some minutes.\nSet an alarm after some minutes.\n[Rings|Wakes] [after a time|in some minutes|when the minutes are over].", "Starts a timer for minutes.\nAlarm after minutes."),
        (("n", "integer", "Minutes\nHow many minutes\nNumber of minutes\nHow long, in minutes\nMinutes to [wait|go|count]\n[Length|Wait] in minutes", "Time in minutes\nThe minutes"),),
        (
            "Set a timer for {n} minutes.\nStart a timer of {n} minutes.\nWake me in {n} minutes.\nTimer: {n} minutes\nSet an alarm for {n} minutes.\nTell me when {n} minutes are over.",
            "Please start a timer for {n} minutes.\nI need an alarm in {n} minutes.",
        ),
        "Start the timer.", "The timer is set for {n} minutes.", "{n}", _done("ok", "started", "set"),
    ),
    _Action(
        "search",
        ("Search the web.\nLooks up words on the web.\nWeb search.\nFind pages about something.\n[Search|Searches|Finds] [pages|sites] [on the web|with these words|about a subject].", "Searches the web for words.\nLook for pages."),
        (("x", "string", "Search words\nWhat to search\nThe query\nWords\nWords [to find|to use]\n[What|Which words] to [find|search for]", "What to look for\nWords to search"),),
        (
            "Search the web for {x}.\nSearch for {x}.\nLook up {x} on the web.\nFind a page about {x}.\nWhat does the web say about {x}?\nGoogle {x}",
            "Please search for {x}.\nFind me a web page about {x}.",
        ),
        "Search for it.", "I found {result}.", "{result}", lambda rng, split: f"{syllables(rng, split)}.{rng.choice(('com', 'org', 'net'))}",
    ),
)  # fmt: skip


def action(rng: Random, split: Split) -> Task:
    """One of the actions."""
    return ACTIONS[int(rng.random() * len(ACTIONS))].task(rng, split)
