"""The sentences of chains of calls (`steps.py`), training and held out; a few have `|expression` behind the words."""

from karakoram.train.data.dialogs.phrases import Phrases

TOTALS = {
    "sum": Phrases(
        "steps.totals.sum",
        """What is the total {k} of {l}?
        Add up the {k} of {l}.
        What is the sum of the {k} of {l}?
        [Find|Look up|Get] the {k} of {l} and add [them|them up|all of them].
        How much is the {k} of {l} [together|in total|all in all]?
        [I need|We need|Give me] the [total|sum] of the {k} of {l}.""",
        """Please add the {k} of {l} together.
        Tell me the total {k} for {l}.""",
    ),
    "average": Phrases(
        "steps.totals.average",
        """What is the average {k} of {l}?
        [Find|Compute|Get] the [mean|average] {k} of {l}.
        [Look up|Read] the {k} of {l} and take the [average|mean].""",
        """Tell me the average of the {k} of {l}.
        Which {k} do {l} have on average?""",
    ),
    "largest": Phrases(
        "steps.totals.largest",
        """What is the largest {k} of {l}?
        [Find|Get|Say] the [highest|largest|biggest] {k} [among|of] {l}.
        [Look up|Read] the {k} of {l}. [Which|What] is the [largest|highest|biggest]?""",
        """Tell me the largest {k} among {l}.
        Compare the {k} of {l} and give me the highest.""",
    ),
    "smallest": Phrases(
        "steps.totals.smallest",
        """What is the smallest {k} of {l}?
        [Find|Get|Say] the [lowest|smallest|least] {k} [among|of] {l}.
        [Look up|Read] the {k} of {l}. [Which|What] is the [smallest|lowest|least]?""",
        """Tell me the smallest {k} among {l}.
        Compare the {k} of {l} and give me the lowest.""",
    ),
}
BASKET = Phrases(
    "steps.basket",
    """What do {l} cost together?
    How much are {l} [together|in total|in all]?
    [I want|We need|I buy|Please give me] {l}. [How much is it|What is the price|What is the total|What must I pay]?
    [Find|Look up|Get] the prices and [compute|work out|tell me] what {l} cost.
    The price of {l} [in total|together|all in all]?""",
    """Tell me the price of {l} all together.
    I would like to buy {l}. What is that in total?""",
)
BUY = Phrases(
    "steps.buy",
    """I buy {n} {x}.
    {p} [wants|orders|gets|needs] {n} {x}.
    [We order|We need|We buy|I need|I take] {n} {x}.
    [Look up|Find|Get] the price of {x} and [take it times {n}|multiply it by {n}].
    {n} {x} [are bought|are ordered|are needed].""",
    """{p} takes {n} of the {x}.
    We would like {n} {x}.""",
)
PRICE_CHANGES = Phrases(
    "steps.price.changes",
    """[Shipping|The post|A box] costs {s} dollars [more|extra].|{v}+{s}
    [Add|Then add|Put] {s} dollars for [shipping|the delivery|wrapping|a bag].|{v}+{s}
    [Delivery|Wrapping|The parcel] is {s} dollars [on top|more].|{v}+{s}
    [I have|We have|There is] a coupon [for|of|over] {s} dollars.|{v}-{s}
    [Take|Then take|Take away] {s} dollars [off|from it].|{v}-{s}
    The shop [gives|pays] {s} dollars back.|{v}-{s}
    {m} [friends|people|of us] [share|split] the [cost|price|bill].|{v}/{m}
    [Divide|Share|Split] it [among|by|between] {m} [people|friends].|{v}/{m}
    [Do|Buy|Order] [that|it|all of it] {m} times.|{v}*{m}
    [This happens|I need this|We do this] {m} times.|{v}*{m}
    {t}% tax [is added|comes on top].|{v}+{v}*{t}/100
    [Then take|There is|We get] {t}% off.|{v}-{v}*{t}/100""",
    """The delivery adds {s} dollars.|{v}+{s}
    With a coupon it is {s} dollars less.|{v}-{s}
    The bill is shared by {m} friends.|{v}/{m}
    We buy all of it {m} times.|{v}*{m}
    Then {t}% tax is added to it.|{v}+{v}*{t}/100""",
)
PRICE_ASK = Phrases(
    "steps.price.ask",
    """How much is [it|that] [in the end|at last|then]?
    What is [the price|the cost|to pay] [in the end|then|now]?
    [How many dollars is that|What does it cost] [in the end|at the end]?
    What is the total?""",
    """How much do we pay in the end?
    What is the final price?""",
)
WEIGHTS = Phrases(
    "steps.weights",
    """[I pack|We pack|We load|I carry] {n} {x}.
    [Look up|Find|Get] the weight of {x} in kg and multiply it by {n}.
    {n} {x} [go into a box|are packed|are loaded|lie on a scale].
    {p} carries {n} {x}.""",
    """{p} puts {n} {x} into a box.
    We have to carry {n} {x}.""",
)
WEIGHT_CHANGES = Phrases(
    "steps.weight.changes",
    """The [box|bag|basket] [weighs|has] {s} kg [itself|too|more].|{v}+{s}
    [Add|Then add|Put] {s} kg for [the box|the bag|paper].|{v}+{s}
    [Take|Take away|Then take] {s} kg [out|off|from it].|{v}-{s}
    {m} [people|friends|cars] [carry|share] it [equally|in equal parts].|{v}/{m}
    There are {m} of [these boxes|such boxes|these loads].|{v}*{m}""",
    """The bag adds {s} kg to it.|{v}+{s}
    Then {s} kg are taken out.|{v}-{s}
    We need {m} such boxes.|{v}*{m}""",
)
WEIGHT_ASK = Phrases(
    "steps.weight.ask",
    """[How heavy is|What weighs] [it|that] [in the end|at last|then]?
    What is the weight [in the end|then|now|in kg]?
    How many kg is that [in the end|then|in all]?""",
    """How many kg do we have in the end?
    What is the final weight?""",
)
CONVERTED = Phrases(
    "steps.converted",
    """How much is [it|that] in {t}?
    [Say|Give|Convert|Tell me] [it|the weight|the result] in {t}.
    How many {t} [are that|is that|is it]?
    [Convert|Change|Turn] [it|the result|the weight] [to|into] {t}.""",
    """I want the weight in {t}.
    Tell me how many {t} that makes.""",
)
START = Phrases(
    "steps.start",
    """Start with {a}.
    Take {a}.
    [Begin|Start] [with|at|from] [the number|] {a}.
    [My|The] number is {a}.
    [I have|We have|There is] the number {a}.""",
    """Let us start from {a}.
    The first number is {a}.""",
)
RUNNING = {
    "add": Phrases(
        "steps.running.add",
        """Add {b}.
        Then add {b}.
        [Next|Now|Then|After that] [add|put on|count on] {b}.
        [Make it|It becomes|It grows by] {b} more.
        [Increase|Raise] [it|the result|that] by {b}.
        Add {b} to [it|the result|that].""",
        """Please add {b} to it.
        After this step add {b}.""",
    ),
    "subtract": Phrases(
        "steps.running.subtract",
        """Subtract {b}.
        Then subtract {b}.
        [Next|Now|Then|After that] [subtract|take away|take off] {b}.
        [Make it|It becomes] {b} less.
        Take {b} away from [it|the result|that].
        [Reduce|Lower] [it|the result] by {b}.""",
        """Please subtract {b} from it.
        After this step subtract {b}.""",
    ),
    "multiply": Phrases(
        "steps.running.multiply",
        """Multiply by {b}.
        Then multiply by {b}.
        [Next|Now|Then|After that] [multiply by|take it times] {b}.
        Multiply [it|the result|that] by {b}.
        Take [it|the result|that] {b} times.
        [Make|Have] {b} times as much.""",
        """Please multiply it by {b}.
        After this step multiply by {b}.""",
    ),
    "divide": Phrases(
        "steps.running.divide",
        """Divide by {b}.
        Then divide by {b}.
        [Next|Now|Then|After that] [divide by|split by|divide it by] {b}.
        Divide [the result|that] by {b}.
        [Share|Split] [it|the result] by {b}.""",
        """Please divide it by {b}.
        After this step divide by {b}.""",
    ),
}
RUNNING_ASK = Phrases(
    "steps.running.ask",
    """What is the result?
    What do [you|I|we] get?
    [What|Which number] is it [in the end|then|now|at last]?
    How much is it [in the end|then|now]?
    [Tell me|Give me|Say] the result.""",
    """What number do I have in the end?
    Please tell me the result.""",
)
ONE_BY_ONE = Phrases(
    "steps.one_by_one",
    """Step by step.
    One step [at a time|after the other].
    [Work|Go|Do it] [in steps|step by step].
    [One|A] call for [each|every] step.
    [Compute|Do] each step [alone|by itself|one by one].""",
    """Please go step by step.
    Do it with one call for each step.""",
)
GIVEN_DAY = Phrases(
    "steps.given_day",
    """[It is|Today is|We begin on|I start on|The trip starts on] {d}.
    [Start|Begin] [on|at|with] {d}.
    [Take|The date is|The day is] {d}.""",
    """We start at the date {d}.
    The first day is {d}.""",
)
LOOKED_UP_DAY = Phrases(
    "steps.looked_up_day",
    """[Look up|Find|Take|Get] the {k} of {x}.
    [Begin|Start] [with|at|on] the {k} of {x}.
    [I know|We have|There is] the {k} of {x} in the list.""",
    """Start from the {k} that {x} has.
    Please begin at the {k} of {x}.""",
)
DAYS_LATER = Phrases(
    "steps.days_later",
    """Add {n} days.
    [Then|After that|Next|Now] [add|come|pass|wait] {n} [days|more days].
    [Wait|Go on|Go forward] {n} days.
    [It lasts|We stay|It takes|A break of] {n} days.""",
    """Then it takes another {n} days.
    Add another {n} days to it.""",
)
WHICH_DATE = Phrases(
    "steps.which_date",
    """[Which|What] date is it [then|in the end|at last]?
    What is the date [then|in the end]?
    [Tell me|Say|Give] the [last date|date then].""",
    """Which date do we reach?
    Please tell me the date in the end.""",
)
WHICH_WEEKDAY = Phrases(
    "steps.which_weekday",
    """[Which|What] weekday is it [then|in the end|at last]?
    What day of the week is it [then|in the end]?
    [Tell me|Say|Give] the [weekday|day of the week] then.""",
    """Which day of the week do we reach?
    Please tell me the weekday in the end.""",
)
THEN = Phrases(
    "steps.then",
    """then {e}
    and then {e}
    after that {e}
    also {e}
    next {e}""",
    """then also {e}
    and after it {e}""",
)
SUMS = Phrases(
    "steps.sums",
    """What are {l}?
    [Compute|Calculate|Solve|Work out] {l}[.|].
    [Please|Now|First] [compute|work out|do] {l}.
    [I need|Give me|Tell me] [the results of|the values of|] {l}.
    How much are {l}?""",
    """Find out how much {l} are.
    Let me know {l}.""",
)
WEEKDAYS = Phrases(
    "steps.weekdays",
    """Which weekdays are {l}?
    [Tell me|Say|Name|Give me] the weekdays of {l}.
    [On which weekdays|On what days of the week] [fall|were] {l}?
    What days of the week are {l}?""",
    """Find the weekdays for {l}.
    Please name the days of the week of {l}.""",
)
CONVERSIONS = Phrases(
    "steps.conversions",
    """Convert {l} to {t}.
    [What|How much] are {l} in {t}?
    [Change|Turn|Convert] [each of|all of|] {l} into {t}.
    How many {t} are {l}[, each|]?
    [I need|Give me|Tell me] {l} in {t}.""",
    """Please convert each of {l} to {t}.
    Express each of {l} in {t}.""",
)
PROPERTIES = Phrases(
    "steps.properties",
    """What are the {k}s of {l}?
    [Tell me|Find|Look up|Say|Give me] the {k} of {l}.
    [What|Which] {k} do {l} have?
    What is the {k} of {l}[, each|]?
    [I need|We need|Compare] the {k} of {l}.""",
    """Please look up the {k} for each of {l}.
    I want to know the {k} for {l}.""",
)
ONE_NUMBER = Phrases(
    "steps.one_number",
    """[Read|Open|Find] the file in the folder {f}. [Add|Then add] {n} to the number in it.
    [The folder {f} has|In {f} is] one file with a number. [What is it plus {n}|Add {n} to it]?
    [Look|See] what number [stands|is] in the file of {f}, and add {n}.""",
    """The only file of the folder {f} has a number. Please add {n} to that number.
    Add {n} to the number that the file in {f} holds.""",
)
NUMBERS = Phrases(
    "steps.numbers",
    """[Add up|Sum|Add] the numbers in the files of {f}.
    [Each|Every] file in [the folder|] {f} [has|holds] a number. [What is their sum|What is the total|Add them]?
    [Read|Open] [all|the] files in {f} and [add up|sum] [their numbers|the numbers|what they say].
    What is the sum of [all|the] numbers in the folder {f}?""",
    """Please add the numbers of all files in the folder {f}.
    The files in {f} hold numbers. How much are they together?""",
)
OF_THE_CITY = Phrases(
    "steps.of_the_city",
    """What is the {k} of the city [where|in which] {p} lives?
    [Find|Look up|Get] the city of {p}, then [its {k}|the {k} of that city].
    {p} [lives|stays] in a city. What is [its {k}|the {k} of it]?
    [Tell me|Say|Give me] the {k} of the city of {p}.""",
    """Which {k} does the city of {p} have?
    Find out in which city {p} lives and tell me the {k} of it.""",
)
OF_THE_MAYOR = Phrases(
    "steps.of_the_mayor",
    """What is the {k} of the mayor of the city [where|in which] {p} lives?
    [Find|Look up|Get] the city of {p}, then its mayor, then the {k} of [the mayor|that person].
    [Tell me|Say|Give me] the {k} of the mayor of the city of {p}.
    {p} lives in a city. [What is|Find|Look up] the {k} of its mayor.""",
    """Which {k} does the mayor of the city of {p} have?
    Find out in which city {p} lives, who is its mayor, and which {k} the mayor has.""",
)
REPORT = Phrases(
    "steps.report",
    """[Send|Then send|Write|Text] [the result|it|that] to {p}.
    [Tell|Then tell] {p} [the result|it].
    [Let {p} know|Message {p} with] the result.
    {p} [wants to know it|needs the result]: send [it|a message].""",
    """Please send {p} the result.
    Write a message with the result to {p}.""",
)
