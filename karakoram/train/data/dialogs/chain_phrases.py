"""Further phrasings of what needs several calls, of word problems and of small things; slots and choices as there.

Whatever a step may be said with should have been read in other sentences: `brings`, `fewer`, `goes on for`, `takes from`.
"""

from typing import Final

_TEXT: Final[dict[str, str]] = {
    "stories.things.openings": """{p} [owns|keeps|stores|holds] {a} [crates|cartons|bowls|cases|sacks], and [each one|every one of them] holds {b} {x}.|{a}*{b}|{x} in all
[In|Inside] each of {a} [boxes|drawers|cupboards|bags|rooms] [are|lie|there are] {b} {x}.|{a}*{b}|{x} in all
[Each|Every one] of {a} [pupils|guests|friends|workers|families] [gives|has|makes|sends|draws|gets|carries] {b} {x}.|{a}*{b}|{x} in all
{a} [children|teams|people|farmers|players] [bring|make|have|collect|draw] {b} {x} each.|{a}*{b}|{x} in all
{p} [buys|orders|opens|takes] {a} [boxes|bags|cartons|sets] of {b} {x}.|{a}*{b}|{x} in all
{p} [buys|opens|gets] {a} [packs|bundles], [every|each] pack [has|holds] {b} {x}.|{a}*{b}|{x} in all
A [pack|bag|box|set] [holds|has] {b} {x} and {p} [buys|takes|opens] {a} of them.|{a}*{b}|{x} in all
[For|On] {a} days {p} [finds|sells|sews|draws|plants] {b} {x} [a day|daily|each day].|{a}*{b}|{x} in all
{p} [finds|sees|makes|sells|counts] {a} {x} [today|at home|before noon|on the way] and {b} {x} [tomorrow|at school|after noon|on the way back].|{a}+{b}|{x} together
[In the morning|Before lunch|At first|In spring] {p} [collects|sews|gets|sells] {a} {x}, [in the evening|after lunch|later|in summer] {b} [more|others|{x}].|{a}+{b}|{x} together
{p} [starts|begins] with {a} {x}, and {q} [has|puts in|lends] [another|a further] {b}.|{a}+{b}|{x} together
[There are|We count|The table has] {a} [red|small|old] {x} and {b} [blue|large|new] [ones|{x}].|{a}+{b}|{x} together
{p} has {b} {x}, {q} has {k} times that many, and they [join|mix|count] them all.|{b}+{b}*{k}|{x} together""",
    "stories.things.changes": """[Before|During|By] [dinner|breakfast|school|noon|the evening] {n} {x} [are gone|are used up|have been eaten|have been sold|are missing].|{v}-{n}|what is left
{n} {x} [go away|disappear|get lost|must go|are given back].|{v}-{n}|what is left
[Of these|Of those|From these] {p} [takes|keeps|uses|sells|breaks|throws away|loses] {n}.|{v}-{n}|what is left
[{q}|A dog|A sister|A boy] [takes away|carries off|loses|breaks|eats up] {n} [{x}|of these|of those].|{v}-{n}|what is left
{p} [no longer has|has to give away|sends away] {n} of [these|them|the {x}].|{v}-{n}|what is left
[A friend|An uncle|A teacher|The post|The farmer] [brings|adds|hands over|sends] [another|a further] {c}[ {x}| of them|].|{v}+{c}|the new number
[A neighbor|A cousin|Grandma] [lends|gives|sends|buys] [us|them|{p}] {c} [more|other|extra] [{x}|ones].|{v}+{c}|the new number
[Another|A further] {c} {x} [come|arrive|are found|are made|are put in|come on top].|{v}+{c}|the new number
{c} [more|other|extra|new] {x} [come|arrive|are bought|are added|join them].|{v}+{c}|the new number
{p} [brings home|brings|picks up|orders] {c} [more of them|others|new {x}].|{v}+{c}|the new number
[Then|Now|Later] {a} [bags|packs|sets] of {c} {x} [are added|arrive|come on top].|{v}+{a}*{c}|the new number
They are [split|divided|shared|dealt out] [evenly|equally|fairly] [by|between|among|over] {s} [teams of children|groups|players|tables|families|boys].|{v}/{s}|for each
[{s} groups|{s} players|{s} tables] [get|receive|take] [the same number of them each|equal parts of them].|{v}/{s}|for each
[Now|Then|After this] {s} [people|children|teams|friends] [share|split|divide] the {x} [evenly|equally|fairly].|{v}/{s}|for each
For [the party|a wedding|the market|the big day|a show|the school] [we need|they need|{p} needs|one needs] {k} times [that|this number|as much|the number].|{v}*{k}|so many times
[In fact|For the feast|In the end] [there are|it takes|they want] {k} times as many[ {x}| of them|].|{v}*{k}|so many times
[That|This|It] [is repeated|goes on|is done] [for|on] {k} [days|weeks|mornings][ in the same way| just so|].|{v}*{k}|so many times
[Somebody|{q}] [triples|makes three times] the number.|{v}*3|three times as many
[Half of them|One half of the {x}] [are|is] [sold|lost|given away].|{v}/2|the other half""",
    "stories.things.asks": """How many {x} [do we have|do they have|does one get|are left|do you count] [now|then|at last|in the end]?
[Tell me|Say|Find out|I want to know] how many {x} [that is|this makes|there are][ now| in the end|].
[What|Which] number of {x} [is it|are there|is left|does one get] [in the end|at last|then]?
How many {x} [is it|is this|would that be|are these]?
[Give me|Compute|Find] the number of {x} [now|in the end|then].""",
    "stories.money.openings": """A [store|stall|baker|farmer] [sells|has sold|sold] {a} {x} [for|at] {d} dollars [each|apiece|a piece].|{a}*{d}|the money for the {x}
{p} sells {a} {x}, [each|every one] [for|at] {d} dollars.|{a}*{d}|the money for the {x}
{p} [is given|receives|gets] {b} dollars for [every|each single] hour[ of work|] and [stays|works] {a} [hours|of them].|{b}*{a}|the pay
[For|In] {a} hours of work {p} [is given|gets|receives] {b} dollars [an hour|each|per hour].|{b}*{a}|the pay
[A|One] day [of work|] [brings|pays] {b} dollars, and {p} works {a} days.|{b}*{a}|the pay
{p} [puts aside|keeps|puts away] {b} dollars [every|each] [day|month|Sunday], {a} times.|{b}*{a}|the savings
{p} [takes|chooses|buys] {a} {x}, [every one|each] [costs|is] {d} dollars.|{a}*{d}|the price of the {x}
{p} [chooses|gets|takes] {a} {x} at {d} dollars [each|apiece] and [also|] a [chair|cake|ball|pen] [for|at] {c} dollars.|{a}*{d}+{c}|the whole price
{a} {x} [cost|are] {d} dollars each, and a [mirror|bowl|clock|coat] [costs|is] {c} dollars[: {p} takes all of it|, and {p} buys them|].|{a}*{d}+{c}|the whole price
{p} pays {d} dollars for each of {a} {x} and {c} dollars for a [key|cup|hat|ring].|{a}*{d}+{c}|the whole price
[Entry|Dinner|A seat|The bus] is {b} dollars a person, and {a} people [want it|are there|travel].|{b}*{a}|the money in all""",
    "stories.money.changes": """[From this|From that|From it|Of it] {p} [takes|uses|pays|needs|gives] {n} dollars [for|to buy] [a book|food|a train|shoes|a gift].|{v}-{n}|what is left
{p} [takes|takes out|uses|needs] {n} dollars of [it|this|the money] for [a trip|a meal|a friend|shoes|rent].|{v}-{n}|what is left
[A ticket|A meal|The train|A gift|Rent] [takes|costs|eats up] {n} dollars of [it|this|that].|{v}-{n}|what is left
{n} dollars [are lost|are stolen|are paid|are spent|are needed][ for the bus| on the way| at once|].|{v}-{n}|what is left
[An uncle|A friend|Grandma|The boss|A cousin|{q}] [puts in|adds|gives|sends] [another|a further] {c} dollars.|{v}+{c}|the new sum
[A sister|The bank|Somebody|A neighbor] [adds|puts|lays] {c} dollars [to this|on top of it|to the money|to that].|{v}+{c}|the new sum
[Another|A further] {c} dollars [come in|are found|are added to it|come on top].|{v}+{c}|the new sum
[It|This|That] [goes on|is repeated|stays so|continues] for {k} [weeks|days|years|months][ just so| all the same|].|{v}*{k}|for all weeks
[For|In] {k} months [it goes on|it is the same|this goes on|that is repeated][ like this| like that|].|{v}*{k}|for all weeks
[In the same way|Just so|Likewise] it [goes on|continues] for {k} [days|weeks|years].|{v}*{k}|for all weeks
[After this|Then|Now] {s} [brothers|cousins|workers|players|heirs] [divide|share|split] [it|the money|all of it] [evenly|equally|fairly].|{v}/{s}|for each
The money is [divided|split|shared] evenly [by|between|among|over] {s} [sons|sisters and brothers|workers|groups].|{v}/{s}|for each
{s} [sons|workers|brothers|cousins] [get|receive] equal parts[ of it|].|{v}/{s}|for each
{p} [keeps|takes] [only half|one half].|{v}/2|the other half
[It|The price] [falls|drops|sinks|is reduced] by {t}%.|{v}-{v}*{t}/100|the lower price
[It|The price|The sum] [rises|grows|goes up] by {t}%.|{v}+{v}*{t}/100|with tax""",
    "stories.money.asks": """How [much|many dollars] [do we have|does one get|is left|do they pay][ in the end| now| then| at last|]?
[Tell me|Say|Find out|I want to know] how [much money|many dollars] [that is|it is|there is][ now| in the end|].
What [sum|amount] [is it|of money is that|is left|comes out][ now| then| in the end|]?
How much money [is it|is this|would that be]?""",
    "stories.way.openings": """[For|Through|In] {a} hours {p} [drives|walks|flies|sails|goes] [at|with] {b} km [an hour|each hour|in an hour].|{b}*{a}|the way
{p} [rides|drives|flies] {a} hours at {b} km [an|each] hour.|{b}*{a}|the way
On [each|every] day of {a} days {p} [walks|rides|rows|swims] {d} km.|{d}*{a}|the way
{p} [swims|jogs|hikes|cycles|runs] {d} km [daily|each morning|each time], {a} [days|mornings|times].|{d}*{a}|the way
{p} [jogs|cycles|rows|walks] {d} km [on each of|in each of] {a} [mornings|evenings|weeks|trips].|{d}*{a}|the way
The [first|old] part [of the way|] is {a} km, the [second|new] part {b} km.|{a}+{b}|the way""",
    "stories.way.changes": """[Another|A further|One more] [part|piece|stretch] of {c} km [comes|follows|is added|is built].|{v}+{c}|the longer way
[The last|A new|One more] part [is|has|adds] {c} km[ more|].|{v}+{c}|the longer way
{c} km [are added|come on top|are put on|follow].|{v}+{c}|the longer way
[A new road|A tunnel|A short cut] [takes away|saves] {n} km.|{v}-{n}|the shorter way
{p} [goes|drives|walks|takes] [all of it|the whole of it|this way|the same way] {k} times.|{v}*{k}|all tours
[The whole way|All of it|This] is [done|walked|driven] {k} times[ by {p}|].|{v}*{k}|all tours
[It|The way] takes {s} [days|mornings|stages] [of|with] equal [parts|length].|{v}/{s}|one part
[In|Over] {s} days {p} does [the same part|equal parts] [of it|of the way] each day.|{v}/{s}|one part
{s} [days|runners|drivers] [take|do] an equal part [each|of it].|{v}/{s}|one part""",
    "stories.way.asks": """How many km [do we have|is one part|are left|does {p} do|does one get][ now| then| in the end|]?
[Tell me|Say|Find out|I want to know] how many km [that is|it is|these are][ now| in the end|].
[What|Which] number of km [is it|is that|does one get][ now| then|]?""",
    "stories.work.openings": """[On each|On every one] of {a} days {p} [reads|writes|prints|copies] {b} pages.|{b}*{a}|the pages
[For|Through] {a} days {p} [writes|reads|copies] {b} pages [daily|a day|each day].|{b}*{a}|the pages
{a} [pupils|writers|students|friends] [write|read|print] {b} pages each.|{a}*{b}|the pages
[Every one|Each one] of {a} [writers|students|books|boys] [has|writes|reads|fills] {b} pages.|{a}*{b}|the pages
{p} reads {a} pages [today|at home|on Monday] and {b} [pages|] [tomorrow|at school|on Friday].|{a}+{b}|the pages""",
    "stories.work.changes": """[Of those|Of them|From these] {n} [pages|] are [blank|pictures|torn|missing|without words].|{v}-{n}|what is left
{n} [of these pages|of the pages] [have no text|are without words|fall out|are left out].|{v}-{n}|what is left
[In the|On the] [first|next|second] [week|day|month] {c} pages [are added|come too|are written|follow].|{v}+{c}|the new number
[Another|A further] {c} pages [come on top|are added|follow|come].|{v}+{c}|the new number
{s} [pupils|friends|readers|people] [read|take|get] [an equal part each|equal parts|equally many of them].|{v}/{s}|for each
{s} [pupils|sisters|readers] each [read|copy] the same [number|part] of them.|{v}/{s}|for each
[In|For] {k} [weeks|classes|years] it is [the same|done just so].|{v}*{k}|so many times""",
    "stories.work.asks": """How many pages [do we have|does one get|are left|is it][ now| then| in the end|]?
[Tell me|Say|Find out|I want to know] how many pages [that is|it is|there are][ now| in the end|].
[What|Which] number of pages [is it|is left|are there][ now| then| in the end|]?""",
    "stories.relations": """{q} has {n} fewer {x} than {p}[ has|].|{v}-{n}
{q} [got|found|keeps|holds] {n} fewer {x} than {p}[ did| does|].|{v}-{n}
{q} has {n} less than {p}.|{v}-{n}
{q} [is|has] {n} {x} [short of|behind] {p}.|{v}-{n}
{p} has {n} {x} more than {q}.|{v}-{n}
{q} [keeps|found|has got|holds] {c} more {x} than {p}[ did| has| does|].|{v}+{c}
{q} has {c} more than {p}[ has| does|].|{v}+{c}
{q} [is|has] {c} {x} ahead of {p}.|{v}+{c}
{q} [keeps|found|holds|got] {k} times as many {x} as {p}[ did| does| has|].|{v}*{k}
{q} has {k} times as many as {p}.|{v}*{k}
{q} has {k} times what {p} has.|{v}*{k}
{q} [keeps|found|got] half as many {x} as {p}[ did| does|].|{v}/2
{q} has twice as many {x} as {p}.|{v}*2""",
    "stories.relations.start": """The number of {x} [of {p}|{p} has|with {p}|{p} got|{p} keeps] is {a}.
{p} [keeps|found|has got] {a} {x}.
{a} {x} [belong to|are with] {p}.
There are {a} {x} [with {p}|that {p} has].""",
    "stories.relations.ask": """[Find out|Tell me|Say|I want to know] how many {x} {q} [has|got|keeps].
How many {x} [belong to|are with] {q}?
How many {x} does {q} [own|get|keep|hold]?
How many are {q}'s {x}?
[And|So] how many {x} are [that for|with] {q}?""",
    "stories.relations.together": """[Find out|Tell me|Say|I want to know] how many {x} they [have|got|keep] [together|in all|altogether].
How many {x} do [they all|the people|those people|all together] [have|get|keep]?
How many {x} do they own [together|in all]?
How many {x} [belong to|are with] all of them?""",
    "steps.totals.sum": """[Please|Now] [add|add up|sum up] the {k} of {l}.
[Tell me|Say|I want to know] the [sum|total] of [all {k}s|the {k}] of {l}.
The {k} of {l}: [add them together|how much is it together|what is the total]?
The total {k} of {l}[, please|]?
[Add together|Sum up] the {k} of [all of|] {l}.
What [total|sum] of {k} do {l} have[ together|]?""",
    "steps.totals.average": """[Say|I want to know|Please give me] the [mean|average] of the {k} of {l}[, please|].
What {k} do {l} have [in the mean|in the middle]?
The {k} of {l}: what is it on average?
[Which|What] is the [mean|average] {k} for {l}?""",
    "steps.totals.largest": """[Tell me|I want to know|Please give me] the [highest|biggest] {k} of {l}.
[Compare|Look at] the {k} of {l} and [say|name|find] the [highest|largest|biggest].
[Which|What] {k} is the [largest|highest] among {l}?
What is the most {k} that one of {l} has?""",
    "steps.totals.smallest": """[Tell me|I want to know|Please give me] the [lowest|least] {k} of {l}.
[Compare|Look at] the {k} of {l} and [say|name|find] the [lowest|smallest|least].
[Which|What] {k} is the [smallest|lowest] among {l}?
What is the least {k} that one of {l} has?""",
    "steps.basket": """[I would buy|We would like|I take|I would love to have] {l}. [What is that together|How much is that|What is it in total|What is the sum]?
[Tell me|Say|I want to know] the [price|cost] of {l} [in all|in total].
What is the [total|whole] price of {l}[, please|]?
[We want to|I have to|I will] buy {l}. [How much money is that|What does it cost in total]?
[All together|In total], what do {l} cost?""",
    "steps.buy": """{p} [takes|chooses|picks] {n} {x}.
[We would take|I would like|We would buy|I would take] {n} [of the|of these|] {x}.
{p} [would like|buys|has bought] {n} of [the|these] {x}.
[It is about|Let us buy|Put down] {n} {x}.
The price of {x}, {n} times.""",
    "steps.price.changes": """[The shipping|The parcel|Wrapping|The bag] adds {s} dollars[ more|].|{v}+{s}
[It|That] is {s} dollars more with [delivery|the post|a box].|{v}+{s}
[With|For] [delivery|the post|wrapping] it is {s} dollars [more|extra|on top].|{v}+{s}
[With|By] [a voucher|a card|the sale|a code] it is {s} dollars [less|cheaper|lower].|{v}-{s}
[The coupon|A voucher|The sale] [takes off|takes away|saves] {s} dollars.|{v}-{s}
[The price|The cost|It] is [shared|split|divided] [by|between|among] {m} [people|of us|neighbors|guests].|{v}/{m}
{m} [friends|guests|of us] [pay|share] the [bill|sum|whole] [together|evenly|in equal parts].|{v}/{m}
[I|They|We all] [buy|order|take] [the whole of it|everything|all this] {m} times.|{v}*{m}
[All of it|All this|Everything] is [bought|ordered|needed] {m} times.|{v}*{m}
[Tax|A tax|A fee|A tip] of {t}% is [added|put on|added to it].|{v}+{v}*{t}/100
[After that|Now|Last] {t}% [tax|of tax|more] [comes|is put|goes] on [it|top].|{v}+{v}*{t}/100
[It|The price|The bill] is {t}% [lower|cheaper|less].|{v}-{v}*{t}/100""",
    "steps.price.ask": """What [do we pay|do I pay|must we pay|is the end price] [in the end|at last|then]?
[Tell me|Say|I want to know] [the price|what it costs|how much we pay][ in the end| at last|].
How [much|many dollars] do [I|they] pay [in the end|in total|at last]?
[What|Which] [price|sum] is it [finally|in the end|at last]?""",
    "steps.weights": """{p} [packs|loads|takes|lays] {n} {x}[ into a bag| on a cart| into a basket|].
{p} [puts|lays|loads] {n} {x} [into a bag|on a scale|on a cart].
[We have|We must lift|We want to carry|I have to load] {n} {x}.
[There are|A truck has] {n} {x}[ in a box| on the scale|].""",
    "steps.weight.changes": """The [basket|paper|box|cart] adds {s} kg[ more|].|{v}+{s}
[With|For] the [box|basket] it is {s} kg [more|on top].|{v}+{s}
[After that|Now|Later] {s} kg are [removed|lifted out|lost|used].|{v}-{s}
{s} kg [fall out|are taken away|are removed].|{v}-{s}
[It|The load] is [carried|shared] by {m} [people|cars|friends] in equal parts.|{v}/{m}
[We have|They need|One needs|Load] {m} [of such boxes|such bags|of these|such loads].|{v}*{m}""",
    "steps.weight.ask": """[Tell me|Say|I want to know] the weight[ in the end| then|].
How many kg [is it|are there|does it weigh] [in the end|now|at last]?
[What|Which] weight is it [finally|in the end|at last]?
What does it weigh [in the end|finally]?""",
    "steps.converted": """[I need|We want|Please give me] [it|that|the result] in {t}.
How many {t} [does it make|do we have|would that be]?
[Tell me|Say|I want to know] how many {t} [it is|those are].
And that in {t}[, please|]?""",
    "steps.start": """[Let us begin|We start|We begin|I start|Let me start] [with|at|from] {a}.
[The|A|Our] [start|starting|given] number is {a}.
[You have|Think of|Here is|We take] the number {a}.
{a} is [the number|where we start|our start|the first one].
[First|At first] [there is|we have] {a}.""",
    "steps.running.add": """[Please|After it|At this point|Further|Last] add {b}.
[Please|Now please|Then please] [add|put] {b} to [that|the result].
[Add|Put] {b} on top[ of it|].
{b} is added[ to it|].
[Add another|Count on|Give it] {b}[ more|].""",
    "steps.running.subtract": """[Please|After it|At this point|Further|Last] subtract {b}.
[Please|Now please|Then please] [subtract|take] {b} from [that|the result].
[Subtract|Take] {b} from it.
{b} is subtracted[ from it|].
[Take|Count] {b} off[ it|].""",
    "steps.running.multiply": """[Please|After it|At this point|Further|Last] multiply by {b}.
[Please|Now please|Then please] multiply [that|the result] by {b}.
It is multiplied by {b}.
[Multiply with|Times] {b}.
[Take|Make] it {b} times [as large|bigger|that].""",
    "steps.running.divide": """[Please|After it|At this point|Further|Last] divide by {b}.
[Please|Now please|Then please] divide [that|the result] by {b}.
It is divided by {b}.
[Divide it|Cut it|Part it] [in|into] {b}[ equal parts|].
Divide it by {b}.""",
    "steps.running.ask": """[Tell me|Please say|Please give me|I want to know|Let me know|Please tell me] [what the result is|what comes out|what you get|the number in the end|the last number].
[What|Which] number [do we have|comes out|is left|do you get][ in the end| at last| then|]?
[What|How much] [comes out|is that][ in the end| at last| then|]?
[Please|Now] [give me|say|name] the [result|last result].
And the result[, please|]?
What is [it|the last number] [in the end|at the end]?""",
    "steps.one_by_one": """[Please|] [do|work] [it|] one step at a time.
[Go|Please work|Please do it|Please compute] [one by one|in single steps|in steps].
[Use|Make] [one|a] call [a|per] step.
[Use|With] [a call|one call] [each time|for each of the steps].""",
    "steps.given_day": """[We begin|I begin|It begins|The trip begins|Our start is] [at|on|with] [the day|the date|] {d}.
The [start|starting|given] [day|date] is {d}.
[Let us start on|We start from|Let us begin from|We begin from] {d}.
[At first it is|The calendar says] {d}.""",
    "steps.looked_up_day": """[Please start|Please take|We begin|We start|Let us start] [with|at|from] the {k} of {x}.
[Start|Begin|We start] [from|with] the {k} [that is given for|which the list has for] {x}.
{x} has a {k}: [start there|begin with it|take it].
[Think of|Here it is about] the {k} of {x}.""",
    "steps.days_later": """[Then|Now|Next] another {n} days [pass|go by|follow|come].
[It takes|We wait|There are|We stay] another {n} days.
[Add|Put on|Count on] {n} [more days|days more|further days].
{n} [more days|days] [pass|go by|follow].
[After that|Then] it [takes|lasts] {n} days [more|longer].
[A pause|The next part] [is|takes] {n} days.""",
    "steps.which_date": """[Please say|I want to know|Let me know|Tell me|Please give me] [the date then|which date that is|the date we reach|the last date].
[Which|What] date [is that|do we get|comes out|is reached][ in the end| then| at last|]?
On [which|what] date are we [then|in the end]?""",
    "steps.which_weekday": """[Please say|I want to know|Let me know|Tell me|Please give me] [the weekday then|which weekday that is|the weekday we reach].
[Which|What] [weekday|day of the week] [is that|do we get|is reached][ in the end| then| at last|]?
On [which|what] [weekday|day of the week] are we [then|in the end]?""",
    "steps.then": """[then|next|now] please {e}
[and|] after that {e}
and also {e}
as well as {e}
[last|finally] {e}""",
    "steps.sums": """[Tell me|Say|I want to know|Find out] what {l} are.
[Please|] [calculate|give me] {l}.
{l}: [what are they|how much is each|what do you get]?
What do you get for {l}?
[How much is each of|The results of] {l}[, please|]?""",
    "steps.weekdays": """[Find|Find out|Please find|Please say|I want to know] the weekdays of {l}.
[Name|Tell me|Please give me] the days of the week [for|on] {l}.
{l}: [which weekdays are they|what weekday is each|which days of the week]?
[On what|On which] weekdays do {l} fall?""",
    "steps.conversions": """[Please|] [convert|change] {l} [each|one by one|] [to|into] {t}.
[Express|Write|Say|I want] {l} in {t}.
{l}: [how many {t} is each|what are they in {t}]?
[Please give me|Find|I want] each of {l} [as|in] {t}.
How much is each of {l} in {t}?""",
    "steps.properties": """[Please|Now] [look up|find|get] the {k} of [each of|] {l}.
[Say|Find out|Let me know] the {k} of [each of|all of|] {l}.
{l}: [what {k} does each have|which {k} do they have|the {k} of each, please]?
[Which|What] {k} has each of {l}?
For {l}, [find|look up|tell me] the {k}.""",
    "steps.one_number": """[Add {n} to|Take {n} and] the number [in the file of|from the file in] {f}.
[There is one|One] file [in|is in] the folder {f}; [please add|add] {n} to [its number|what it says].
[What do you get|How much is it] if you add {n} to the number in the file of {f}?
The number in the only file of {f}, plus {n}[, please|]?""",
    "steps.numbers": """[The files in|All files of] {f} [have|contain|hold] numbers. [Add them up|Add them together|What is their sum|What is the total|Sum them up].
[How much are|What is the total of] the numbers [in|of] [the files of|all files in] {f}[ together|]?
[Please add up|Add together|I want the sum of] the numbers in the files [of|in] [the folder|] {f}.
There are numbers in the files of {f}. [How much are they in all|What do they make together|What is the sum]?""",
    "steps.of_the_city": """[Which|What] {k} has the city [where|in which] {p} [lives|is at home]?
[Find out|Look up|See] where {p} lives, and [say|give me|find] the {k} of [that city|that place].
[In which city does {p} live, and what is its {k}|Where does {p} live, and what is the {k} there]?
I want to know the {k} of the city of {p}.""",
    "steps.of_the_mayor": """[Which|What] {k} has the mayor of the city [where|in which] {p} lives?
[Find out|Look up|See] where {p} lives and who is mayor there; [say|give me|find] the {k} of the mayor.
I want to know the {k} of the mayor of {p}'s city.
Who is mayor [where {p} lives|of {p}'s city], and [what|which] {k} does that mayor have?""",
    "steps.report": """[Please write|Please text|Please message] {p} [the result|what you get|what comes out].
[Send|Please send|Write] {p} [a message with it|the number|what comes out].
[Send|Write] a message [with it|that says it] to {p}.
{p} [should get|should have|is waiting for] the result[, so send it|: write to {p}|: send it].
[And|Then] message {p} [about it|the result].""",
    "word_problems": """{p} [owns|keeps|opens|fills] {a} [crates|cartons|bags|bowls], [each one|every one|each] [with|of|holding] {b} {x}. How many {x} [is it|are they|does {p} have|are those] [in total|in all|together]?|{a}*{b}|{x}
[In|Inside] [each|every one] of {a} [boxes|bags|drawers|rooms] [are|lie] {b} {x}. How many {x} [is that|are there][ in total| in all|]?|{a}*{b}|{x}
{p} [keeps|buys|carries] {a} {x} in each of {b} [bags|boxes|rooms]. [What is the number of {x}|How many {x} are they]?|{a}*{b}|{x}
{p} [saw|got|sold|lost|drew] {a} {x} [this morning|on Friday|at home|in May] and {b} {x} [on Sunday|at night|at school|in June]. How many {x} [is it together|were they|in all|is that in all]?|{a}+{b}|{x}
[Today|Yesterday|In the morning] {p} found {a} {x}, [and on Monday|before that|then another] {b}. How many [{x} is that|is it in all]?|{a}+{b}|{x}
{p} put {a} {x} [on the table|into a bag], {q} [put|laid] {b} more there. How many {x} [lie there|are in it|is that]?|{a}+{b}|{x}
[There were|We had|On the table were|A shop had|In a bag were] {m} {x}, [and|then] {p} [took|ate|sold|broke|used|lost] {n}[ of them|]. How many [{x} are there still|are still there|{x} stay|are left over|do we still have]?|{m}-{n}|{x}
[On the shelf|In the box|On a plate] [were|lay] {m} {x}. {p} took [away|] {n}. How many {x} [are there now|lie there still|stay there]?|{m}-{n}|{x}
Of {m} {x} {p} [sells|gives away|loses|eats] {n}. What [is left|number is left]?|{m}-{n}|{x}
[We|They|You and I] [share|divide|split] {m} {x} [among|by] {s} [people|pupils|girls|dogs]. How many {x} [does every one get|is that for each|for each of them]?|{m}/{s}|{x}
{s} [children|boys|girls] [share|divide] {m} {x} [evenly|fairly]. What does each [child|of them] get?|{m}/{s}|{x}
{m} {x} for {s} [children|tables|teams]: how many [{x} each|does every one get|are that for one]?|{m}/{s}|{x}
[I want|I would like|I have to buy|We buy|Let me buy] {a} {x}, [each costs|one costs|at] {d} dollars[ each|]. [How much money is that|What does it cost|What must I pay|How much do I need]?|{a}*{d}|dollars
[Each|One|Every] {o} costs {d} dollars and I [want|need|take|buy] {a}. [How much money do I need|What is that in all|How much do I pay]?|{a}*{d}|dollars
{p} wants to buy {a} {x}. [They cost|One is|The price is] {d} dollars each. How much money does {p} need?|{a}*{d}|dollars
{p} [works|stays|helps] {a} [hours|days] [at|for] {b} dollars [an hour|each|a day]. [How much is the pay|What is {p} paid|What does {p} get|How much money is it]?|{a}*{b}|dollars
For [one|each|every] hour {p} [is paid|gets] {b} dollars. What [does {p} earn in|is the pay for] {a} hours?|{a}*{b}|dollars
{p} [goes|rides|sails|flies] {a} hours at {b} km [per|an|each] hour. [How far is it|How many km is that|What way is that]?|{b}*{a}|km
{p} drives [for|] {a} hours, {b} km [per|in each|an] hour. How far [does {p} get|is the way]?|{b}*{a}|km
[A ship|A train|A plane|{p}] [makes|does] {b} km [per|an] hour for {a} hours. How far [is it|does it go]?|{b}*{a}|km
A [table|field|door|wall|card|carpet|yard] is {a} [cm|meters|m] long and {b} [cm|meters|m] wide. [How large is its area|What is its area|What area does it have|How big is the area]?|{a}*{b}|
A [window|paper|picture|wall] is {a} cm wide and {b} cm [high|long]. What is [the area|its area][ of it|]?|{a}*{b}|square cm
The sides of a [table|garden|room] are {a} and {b} meters. [What is the area|How large is the area]?|{a}*{b}|square meters
{p} [has|had|takes|holds] {k} dollars and [pays|must pay|gave away|uses|gives {q}] {n}[ dollars|]. How much [is left|does {p} keep|money is left|does {p} still have]?|{k}-{n}|dollars
[From|Of|Out of] {k} dollars {p} [pays|takes|spends|paid] {n}[ dollars|]. What is left?|{k}-{n}|dollars
{p} [takes|chooses|got|ordered] {a} {x} at {d} dollars [each|a piece] and a {z} [for|that costs] {e} dollars. [How much is it|What is it in all|What does {p} pay in total]?|{a}*{d}+{e}|dollars
{p} [buys|bought|orders] [one|a] {z} at {e} dollars and {a} {x} [at|for] {d} dollars each. [How much is that in all|What is it together|How much must {p} pay]?|{e}+{a}*{d}|dollars""",
    "arithmetic.commands": """[Please|Now|Can you] [sum|add up] {a} and {b}.|{a}+{b}
[I need|I want|Tell me|Give me|Find] [the sum of {a} and {b}|{a} added to {b}|{a} and {b} together].|{a}+{b}
[I need|I want|Tell me|Please give me] [the sum of|] {a}, {b} and {c} [together|in all|added up].|{a}+{b}+{c}
[Please|] put {a}, {b} and {c} together.|{a}+{b}+{c}
[Please|Now] [take|subtract] {a} [off|away from] {b}.|{b}-{a}
[I need|Tell me|Find] [{b} less {a}|{a} taken from {b}|{b} with {a} subtracted].|{b}-{a}
[I need|I want|Tell me|Please find] [{a} times {b}|the product of {a} and {b}|{a} taken {b} times].|{a}*{b}
[Please|Now] multiply {a} [with|by] {b}[ for me|].|{a}*{b}
[I need|I want|Tell me|Please find] [{a} divided by {b}|{a} over {b}|{a} split by {b}].|{a}/{b}
[Please|Now] [split|share] {a} by {b}[ for me|].|{a}/{b}
[Tell me|Find|I need|Please give me] [the half of|one half of] {a}.|{a}/2
[Tell me|Find|I need|Please give me] [the double of|twice|two times] {a}.|{a}*2
[Tell me|Find|I need|Please give me] [a third of|the third part of] {a}.|{a}/3
[Tell me|Find|I need|Please give me] [a quarter of|the fourth part of] {a}.|{a}/4
[Tell me|Find|I need|Compute|Please find] {p}[%| percent] of {a}.|{a}*{p}/100
[Tell me|Say|Find out] [how much|what] {p} percent of {a} [is|are].|{a}*{p}/100
[I want to know|Find out] what {p}% of {a} [is|makes].|{a}*{p}/100
[Tell me|Find|I need|Please give me] the [mean|average] of {a} and {b}.|({a}+{b})/2
[Tell me|Say|I need|Work out] the [mean|average] of {a}, {b} and {c}.|({a}+{b}+{c})/3
[Tell me|Say|I need|Work out] [{a} squared|the square of {a}|{a} times itself].|{a}*{a}
[Find|Tell me|Say] the square of {a}.|{a}*{a}
[Tell me|Find|I need|Work out] {a} times {b} [plus|and then plus] {c}.|{a}*{b}+{c}
[Tell me|Find|I need|Work out] {a} plus {b} [minus|less] {c}.|{a}+{b}-{c}
[Tell me|Find|I need|Work out|Compute] {a} minus {b} plus {c}.|{a}-{b}+{c}
[Tell me|Find|I need|Work out|Compute] {a} plus {b} plus {c}.|{a}+{b}+{c}
[Tell me|Find|Work out|Compute] {a} times {b} minus {c}.|{a}*{b}-{c}""",
    "chains.cost": """[I take|We take|I order|We need] {n} {x}. [What is it in total|How much is it in total|What is the total|How much in all]?
[Tell me|Say|Find out] [the price|the total|the whole cost] [of|for] {n} {x}.
The [total|whole] [price|cost] of {n} {x}[, please|]?
[I would buy|I want to buy|Let us buy] {n} {x}. [How much is that|What do I pay]?
[Find|I need|Give me] the [total|whole] price of {n} {x}.""",
    "chains.weekday": """[Tell me|Say|Find] [the weekday|which weekday it is] {n} days after {d}.
[It is|Now it is|Today it is] {d}. [What|Which] day of the week [comes in|is it in|is it after] {n} days?
The [weekday|day of the week] {n} days after {d}[, please|]?
{n} days after {d}: [which|what] [weekday|day of the week] is [it|that]?""",
    "chains.convert": """[Please|Now] [work out|calculate|solve] {e} and [turn|change|convert] [it|the result] from {s} [to|into] {t}.
[Work out|Solve|Find] {e}[ in {s}|], [then|and] [change|turn] it from {s} into {t}.
{e} {s}: how many {t} [is that|are these]?
[Tell me|Say] how many {t} [are|make] {e} {s}.""",
    "chains.weeks": """[Tell me|Say|Find out] how many hours [lie|pass|are] between {d} and {e}.
The hours from {d} to {e}[, please|]?
How many hours [pass|go by] from {d} [to|until] {e}?
[Count|Find|Compute] the hours [from {d} to|between {d} and] {e}.""",
    "chains.sum": """[Please|Now] [find|get|read] the {k} of {x} and add {n}[ to it|].
[Look up|Get|Read] the {k} of {x} [and|and then] [add|put on] {n}.
[Tell me|Say] the {k} of {x} plus {n}.
{n} [added to|more than] the {k} of {x}: how much is [it|that]?""",
    "records.quote": """[Please|Now] [repeat|copy|give me|show] what [the data say|is said|stands there] [of|about] {x}.
[All|Everything] [you have|there is|that is known] [about|on|of] {x}[, please|].
[I want|I need|Let me see] [the whole record|all data|the entry] of {x}.
[Please|] quote the [record|entry|data] of {x}.""",
    "talk.cannot": """[Please|Can you|] [write|send] [a letter|an email|a text|a note] to {p}.
[Please|Can you|I want you to] [ring up|phone|call up] {p}.
[Give me|Get me|I want|Show me] [the weather|a forecast|the weather report] [for|of|from] {c}.
[Is it|Will it be] [warm|cold|sunny] in {c} [today|now|tomorrow]?
[Please|] [reserve|find|book] [a room|a seat|a car|a table] [in|for] {c}.
[Please|] [switch on|start|open|switch off] the {x}.
[Please|] turn [up|down] the {x}.
[Please|Can you|] [sing|play] [a song|music|something] [by|from|of] {p}.
[Please|] [paint|draw|film] [a|the] {x}.
[Please|] [call|order|get] [a taxi|a doctor|food] [to|for] {c}.
[Tell|Remind|Invite] {p} [to come|about {c}|to dinner].
[Please|] [buy|sell|order] {n} {x}s[ online|].""",
    "distractors.about": """[Takes|Make|Makes] [a picture|a film|a note|a drawing].
[Phones|Rings] [a person|somebody|a number].
[Prints|Sends|Scans] [a page|a photo|a file].
[Shows|Reads|Gets] [a map|the mail|a page|the paper].
[Writes|Makes] [a poem|a list|a song].
[Opens|Closes|Locks] [a door|the gate|a box|the house].
[Creates|Deletes|Changes] [an account|a user|a password].
[Starts|Stops] [the machine|a car|the heating].
[Books|Orders|Pays] [a room|a taxi|food|a bill].""",
    "distractors.argument": """[This|One|Any] [text|city|name|title|word|place|person]
[What|Where|When|Who|Which] [to search|it is|is meant|to send it]
[Search|Look] for [what|which words]
[A|Some] [title|subject|message|language|note|hour]
[To|For|From] whom
On or off[, please|]
How [much|many|long|often]""",
    "speech.before": """[Hi|Hello|Hey] [you|again|friend][,|!|:]
Good [morning|evening|night][,|!|:]
[I need help|Help me|Please help me|A question|I have one question|Tell me this][:|.]
[Hello|Hi], [I need help|a question|please help me|one thing][:|.]
[Nano|Dear nano|Hello nano][,|:|!]""",
    "speech.after": """[Thank you|Thanks] [a lot|very much|for that|in advance][.|!]
[Be fast|Quickly|Hurry|As quick as you can|Do it fast][, please|].
[Please|] [use|take|call] [your tools|the tool|the tools|tools].
[Answer|Please answer] [soon|now|in short].
[Many thanks|I thank you][.|!]""",
    "system": """You are [a nice|a kind|a good|an honest|a quick] assistant.
[Use|Call|Take] [a tool|tools] [if you need one|where one helps|when it helps].
[Please|] [answer|speak|reply] [briefly|in few words|shortly].
[Be|Stay] [friendly|polite|short|kind].
You [help|serve] [people|the user|customers] [with|by] tools.
If [a tool|one of the tools] [fits|helps], [use|call] it.""",
}  # fmt: skip

CHAINS: Final = {
    name: tuple(line.strip() for line in text.splitlines() if line.strip()) for name, text in _TEXT.items()
}
