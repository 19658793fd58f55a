"""Talk without calls: who the model is, small talk, facts from the conversation, and things that no declared tool can
do."""

from random import Random

from karakoram.train.data.dialogs.phrases import Phrases
from karakoram.train.data.dialogs.task import Task
from karakoram.train.data.names import Split, english, person, place, syllables, thing

# kind -> (questions, answers, what the answer must contain)
_SMALL_TALK: tuple[tuple[Phrases, tuple[str, ...], tuple[str, ...], str], ...] = (
    (
        Phrases(
            "talk.who",
            """Who are you?
            who are you
            What is your name?
            What's your name?
            What are you?
            Are you a person?
            Who am I talking to?
            Tell me about yourself.
            Introduce yourself.
            Are you ChatGPT?
            Are you Kimi?
            Who made you?
            Where do you come from?
            Which model are you?
            Hi, who are you?""",
            """Please tell me who you are.
            Tell me your name.
            Hello, what is your name?
            Which model am I talking to?""",
        ),
        ("I am nano, a small model of Karakoram.", "I am nano, the small language model of Karakoram."),
        ("nano",),
        "They ask who I am.",
    ),
    (
        Phrases(
            "talk.hello",
            """Hi
            Hello
            Hello!
            Hi!
            Hey
            Good morning
            Good evening!
            Hi there
            Hello there!
            How are you?
            Hi, how are you?
            hello
            hi""",
            """Hey there!
            Hello, how are you?
            Good day!""",
        ),
        ("Hello! How can I help you?", "Hi! How can I help?"),
        ("help",),
        "A greeting.",
    ),
    (
        Phrases(
            "talk.can",
            """What can you do?
            How can you help me?
            What are you able to do?
            What are you good at?
            Can you help me?
            Help
            I need help""",
            """Tell me what you can do.
            Could you help me?""",
        ),
        ("I can call the tools you declare and answer with their results.",),
        ("tools",),
        "They ask what I can do.",
    ),
    (
        Phrases(
            "talk.thanks",
            """Thanks!
            Thank you
            Thank you very much!
            Thanks a lot
            Great, thanks.
            That was helpful.
            Perfect, thank you!""",
            """Great, thank you!
            Thanks, that was a great help.""",
        ),
        ("You are welcome!",),
        ("welcome",),
        "They say thanks.",
    ),
    (
        Phrases(
            "talk.bye",
            """Bye
            Goodbye!
            See you later
            Good night
            Bye bye!""",
            """Goodbye, see you!
            Have a good night!""",
        ),
        ("Goodbye!",),
        ("Goodbye",),
        "They say goodbye.",
    ),
)

_FACT = Phrases(
    "talk.fact",
    """My name is {p}. What is my name?|Your name is {p}.|{p}
    I am {p}. Who am I?|You are {p}.|{p}
    I live in {c}. Where do I live?|You live in {c}.|{c}
    My dog is called {p}. What is the name of my dog?|Your dog is called {p}.|{p}
    Say {x}.|{x}|{x}
    Repeat after me: {x}|{x}|{x}
    Repeat the word {x}.|{x}|{x}
    Please say hello to {p}.|Hello {p}!|{p}
    Say hello to {p}|Hello {p}!|{p}
    I have a {x} and a {y}. What is the first thing?|The first thing is {x}.|{x}
    I have a {x} and a {y}. What is the second thing?|The second thing is {y}.|{y}
    The password is {x}. What is the password?|The password is {x}.|{x}
    {p} lives in {c} and {q} lives in {d}. Where does {p} live?|{p} lives in {c}.|{c}
    {p} lives in {c} and {q} lives in {d}. Where does {q} live?|{q} lives in {d}.|{d}
    {p} has a {x}, {q} has a {y}. What does {q} have?|{q} has a {y}.|{y}
    {p} has a {x}, {q} has a {y}. What does {p} have?|{p} has a {x}.|{x}
    {p} has a {x}, {q} has a {y}. Who has the {x}?|{p} has the {x}.|{p}
    {p} is from {c}. Where is {p} from?|{p} is from {c}.|{c}
    The code of {x} is {n}. What is the code of {x}?|The code of {x} is {n}.|{n}
    My number is {n}. What is my number?|Your number is {n}.|{n}
    I was born in {c}. Where was I born?|You were born in {c}.|{c}
    {p} is {n} and {q} is {m}. How old is {q}?|{q} is {m}.|{m}
    Remember {x}. What should you remember?|{x}|{x}""",
    """I am called {p}. What is my name?|Your name is {p}.|{p}
    My home is {c}. Where is my home?|Your home is {c}.|{c}
    Please repeat this word: {x}|{x}|{x}
    The secret word is {x}. What is the secret word?|The secret word is {x}.|{x}
    {p} comes from {c}, {q} comes from {d}. Where does {q} come from?|{q} comes from {d}.|{d}
    My code is {n}. Tell me my code.|Your code is {n}.|{n}""",
)
_CANNOT = Phrases(
    "talk.cannot",
    """Send an email to {p}.
    Call {p} on the phone.
    Play some music.
    Play the song {x}.
    What is the weather in {c}?
    Will it rain in {c} tomorrow?
    Book a flight to {c}.
    Book a table for {n} people.
    Order a pizza.
    Order a {x} for me.
    Translate {x} into French.
    Turn on the light.
    Turn off the {x}.
    Set an alarm for {n} minutes.
    Take a picture of the {x}.
    Send {p} a message.
    Buy {n} shares of {c}.
    Open the door.
    What is the news from {c}?
    Draw a {x}.
    Show me a map of {c}.
    Delete all my emails.
    Remind me to call {p}.
    Post a photo of my {x}.
    Print the letter to {p}.""",
    """Please send a message to {p}.
    I need a weather report for {c}.
    Turn on the {x}.
    Book a hotel in {c}.
    Please call {p}.
    Play a song for {p}.""",
)
_CANNOT_ANSWERS = ("I cannot do that: no tool fits.", "I cannot do that with my tools.")


def small_talk(rng: Random, split: Split) -> Task:
    """Who are you, hello, what can you do, thanks, goodbye: about half are the first."""
    questions, answers, expected, thought = _SMALL_TALK[min(4, int(rng.random() * 7) % 5 if rng.random() < 0.6 else 0)]
    answer = answers[int(rng.random() * len(answers))]
    return Task(
        "talk", questions.pick(rng, split), [], answer, expected, f"{thought} No tool needed.", bare=rng.random() < 0.5
    )


def fact(rng: Random, split: Split) -> Task:
    """A question that carries its own answer."""
    slots = {"p": person(rng, split), "q": person(rng, split), "c": place(rng, split), "d": place(rng, split)}
    slots |= {
        "x": thing(rng, split),
        "y": english(rng, split, "noun"),
        "n": 10 + int(rng.random() * 9990),
        "m": 10 + int(rng.random() * 80),
    }
    question, answer, expected = _FACT.pick(rng, split).format_map(slots).split("|")
    return Task(
        "no_tool",
        question,
        [],
        answer,
        (expected,),
        "The question says it. No tool needed.",
        verbatim=True,
        bare=rng.random() < 0.2,
    )


def refusal(rng: Random, split: Split) -> Task:
    """Something for which no tool is declared."""
    slots = {"p": person(rng, split), "c": place(rng, split), "x": thing(rng, split), "n": 2 + int(rng.random() * 50)}
    question = _CANNOT.pick(rng, split, **slots)
    answer = _CANNOT_ANSWERS[int(rng.random() * len(_CANNOT_ANSWERS))]
    return Task("missing_tool", question, [], answer, ("cannot",), "No tool fits this.", bare=rng.random() < 0.1)


def nickname(rng: Random, split: Split) -> str:
    """A short made-up word, for system prompts."""
    return syllables(rng, split).capitalize()
