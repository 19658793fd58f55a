"""More phrasings for the second part of training, by the name of their `Phrases`; same slots, same `[a|b]` choices."""

from typing import Final

_TEXT: Final[dict[str, str]] = {
    "convert.value": """[The|A|Some] [number|amount|quantity|value|measure] [you have|it is about|of the first unit|in the old unit|before converting|from the question]
How much [there is|it is|of it|is given]
[Number|Amount|Quantity|Value] [that is converted|to turn into another unit|of units]
The [quantity|amount] to [convert|change]
[What|Which] [number|amount|quantity] to [convert|change|turn]""",
    "convert.source": """[The unit|Unit|The measure] [in which it is given|of the quantity|of this value|of what we have|you have|it comes in|at the start|on the left]
[Convert|Change|Turn|Move] [from|out of] [the|which|that|the old|the first] unit
[The|A] [old|given|first|present|starting|original] unit
[What|Which] unit [the value has|the value is in|it has|to convert from|to leave]
[Convert|Change|Turn|Converts] [the value|it|the amount] from [this|the first|its] unit
[Convert|Turn] from, [e.g. km|such as kg|a unit]
From""",
    "convert.target": """[The unit|Unit|The measure] [in which we want it|of the answer|you want|it becomes|at the end|on the right|asked for|that is wanted]
[Convert|Change|Turn|Move] [to|into] [the|which|that|the new|the second|another] unit
[The|A] [new|wanted|second|final|other|resulting] unit
[What|Which] unit [is wanted|the result has|to convert to|to get]
[Convert|Change|Turn|Converts] [the value|it|the amount] [to|into] [this|the second|its new] unit
[Convert|Turn] to, [e.g. km|such as kg|a unit]
[Unit|A unit] [to convert it to|it is converted to|that it should be converted to]
To""",
    "dates.date": """[The|This|A|Some|One] day [, written YYYY-MM-DD|in ISO form|in the form YYYY-MM-DD]
[Date|The date] [written YYYY-MM-DD|to start with|that is moved|to count from|given as YYYY-MM-DD]
[From which|On which|Which] [date|day]""",
    "date_add.days": """[The|A|Some] [number|count|amount] of days
[How many|So many|The] days [are added|come on top|to go|to add to it|negative for the past]
Days [forward|on top|plus or minus|to be added|, minus to go back]""",
    "date_difference.start": """A [first|start|earlier|early|beginning] [day|date]
The [first|earlier|early|beginning] date
The start day
[From|Since|Starting at] [which|what|this|the first] [day|date]
[Date|Day] [of the start|it begins on|to count from|on the left|that comes first]""",
    "date_difference.end": """A [last|end|later|second|final] [day|date]
The [last|later|second|final] date
The end day
[To|Until|Ending at] [which|what|this|the last] [day|date]
[Date|Day] [of the end|it ends on|to count to|on the right|that comes last]""",
    "weekday.date": """[The|This|One|A|Some] [day|date] [in question|to name|as YYYY-MM-DD|, written YYYY-MM-DD]
[For|Of] [which|what|this] [day|date]""",
    "calculate.expression": """[The|An|Any|Some|A] [sum|formula|calculation|expression|term] [to compute|to evaluate|to calculate|to work out|, e.g. 4+5*2|, such as 9/3|with + - * /]
[What|The thing] to [compute|evaluate]
[Arithmetic|Math|Numbers and signs] [to compute|to evaluate|, e.g. 6*7]""",
    "operate.first": """[The|A] [first|left] [operand|value|one|side]
[Number|Value|What stands] [on the left side|to the left|that comes first|before the operation]
[The|A] number [at the left|that comes first|to begin with|number one]
Left""",
    "operate.second": """[The|A] [second|right] [operand|value|one|side]
[Number|Value|What stands] [on the right side|to the right|that comes second|after the operation]
[The|A] number [at the right|that comes second|to end with|number two]
Right""",
    "operate.operation": """[Which|What] operation
[The|An] operation [to use|wanted|to apply]
[How|What] to [combine them|do with them]
[The|A] sign [in words|between them]""",
    "records.name": """[The|A|One] {w} to [look up|find|ask about]
[Name|The name|A name] [to look up|to find|of one {w}|of which {w}|of a {w}]
{w} [to look up|wanted|in question]
[Full|Exact|Whole] name
Who or what""",
    "lists.numbers": """[A|The|Some|One] list [with numbers|to use|of values|of all numbers]
[All|Many|The given|Those] [values|numbers to use]
[Which|What] numbers""",
    "lists.words": """[A|The|Some|One] list [with words|to use|of all words]
[Many|The given|Those] words
[Which|What] words""",
    "files.folder": """[A|The|Some|One] [path|place] [of the directory|of the folder|to list]
[Where|Which folder|What directory] to [look|list]
Name of the [folder|directory]""",
    "files.file": """[A|The|Some|One] [path|place|name] [of one file|to read|of the file to read]
[Which|What] [file|path] to [read|open]""",
    "actions.weather.c": """[The|A|Some|One] [town|city|place] [in question|to ask about|whose weather is wanted]
[For|In] [which|what] [city|place|town]
[Name of the|Which] [town|place]""",
    "actions.message.p": """[The|A] [receiver|person] [of the message|to write|who gets the text|it goes to]
[For|To] [whom|which person|what person]
[Name|Person] [of the receiver|who will read it|it is for]""",
    "actions.message.m": """[The|A|What] [words|text] [that are sent|to be sent|of it|to send]
[Contents|Content|Body] of the [message|text]
[What|All] [the person should read|to tell the person]""",
    "actions.reminder.m": """[The|A|What] [text|thing|words] [to remember|of the note|to be told|it says]
[Content|Subject] of the [reminder|note]
[What|About what] [to be reminded of|it should say]""",
    "actions.reminder.t": """[The|A|What|Which] time [of day|to remind|it rings|, written HH:MM|wanted]
[At|For] [which|what] [time|hour]
[Hour|Clock time|Moment] [in the form HH:MM|of the reminder|it is for]""",
    "actions.song.x": """[The|A|Which|What] [title|name|piece] [of the song|to be played|of the music]
[Which|What] [one|piece] to [play|put on]
[Song|Music] [wanted|title|that is played]""",
    "actions.flight.c": """[The|A|Which|What] [city|town|place] [where it begins|of departure|you are in|to start at|it leaves from]
[From|Out of] [what|this|the first] [city|place|town]
From which [place|town]
[First|Leaving] [place|town|city]
Start [place|town]""",
    "actions.flight.d": """[The|A|Which|What] [city|town|place] [where it ends|you go to|to land in|to arrive at|wanted]
[To|Into] [what|this|the second] [city|place|town]
To which [place|town]
[End|Last|Second|Target] [place|town|city]""",
    "actions.translate.x": """[The|A|What|Which] [words|text|word] [to be translated|it is about|given|to put in another language]
[Words|Text] [you have|to turn|in your language]
[What|All] to [say|put]""",
    "actions.translate.l": """[The|A] [new|other|target|wanted] language
[To|Into|In] [which|what|the] language
[Name of the|Which] language [to get|wanted]""",
    "actions.order.x": """[The|A|What|Which] [thing|article|goods|product] [to be ordered|you want|to get|that is bought]
[What|Name of what] [is ordered|to buy|you want]
[Product|Thing] [wanted|name]""",
    "actions.order.n": """[The|A] [number|count|amount] of [pieces|things|them|items]
[How many] [are ordered|are wanted|to buy|things]
[Count|Number|Pieces] [wanted|to order]""",
    "actions.light.x": """[The|A|What|Which] [light|lamp|room] [to switch|it is about|to turn|you mean]
[Name|Place] of the [light|room]
[Where|In which room] [the light is|it is]""",
    "actions.light.on": """[True|Yes] [means on|for on, false for off|if the light should be on]
[Turn it|Switch it] on or off
[If|Whether] [the light goes on|it should burn|it is turned on]""",
    "actions.timer.n": """[The|A|What] [number|count|time] [of minutes|in minutes]
[How many|So many] minutes [to wait|it runs|until it rings]
[Minutes|Time] [to run|until the alarm|of the timer]""",
    "actions.search.x": """[The|A|What|Which] [words|query|subject|thing] [to search|to find|to look up|of the search]
[What|Words] [you look for|to type]
Search [text|query|for what]""",
    "calculate.about": """[Use this to|It can|I] [calculate|compute|evaluate] [a sum|arithmetic|an expression|with numbers]
[A|The|Some] calculator [for numbers|for sums|to evaluate expressions|that computes expressions]
[Return|Returns|Gives|Computes] the [value|result] of [a math expression|some arithmetic|a calculation with numbers|a formula]
[Evaluate|Evaluates] [arithmetic|calculations|math]""",
    "operate.about": """[One|An|A single] [operation|arithmetic step] [on|with|for] [a pair of numbers|two numbers|numbers]
[Arithmetic|Calculates|Calculator] [for a pair of numbers|with two numbers]: add, subtract, multiply, divide
[Can|Will] [add|divide], [multiply|subtract] and so on, [a pair of numbers|two numbers]""",
    "convert.about": """[Unit|Units|A unit] [converter|conversion|calculator] [for quantities|for values|for measures|]
[Convert|Converts|Changes] [between|among] [units of measure|different units|units like miles and km]
[Converts|Changes|Turns] [quantities|values|a quantity|amounts] [from one unit to the other|between two units|into other units]
[How much|What] a [value|quantity] is in [another|a different] unit""",
    "date_add.about": """[Gives|Computes|Tells] [a|the] [date|day] [plus|and] [some|N|a number of] days
Returns the [date|day] plus [some|N] days
[Compute|Find|Get] [the|a] [date|day] [some|a number of|many] days [after|before] [another|a given day|this one]
[Adds|Add|Sums] [a date and days|days and a date|N days to a date]""",
    "date_difference.about": """[Computes|Gives|Finds|Returns] the [number|count|difference] [of days|in days] [from one day to another|between days|between a first and a last date]
[Count|Counts] [the|all] days [from a date to a date|between two days|from start to end]""",
    "weekday.about": """[Returns|Gives|Says|The|A] [weekday|day of the week] [of|for] [the given date|any date|one date|a given day]
[What|Which] day of the week [it is|a date falls on|a date has]""",
    "records.about": """[Look up|Looks up|Search|Asks for] [a|one|some|any] {w} and [read|tell|give|get|show] [its|the] {k}
[The|A|Its] {k} of [one|any|some|the] {w}
[Returns|Knows|Has] [the|each] {k} of [every|each|any] {w}
{k} by {w}""",
    "records.all": """[Returns|Gives|Knows] [all|every] [fields|facts|details] of [a|one|any] {w}
[The|A|Whole] [data|entry|record] of [a|any|the named] {w}
[Everything|All] about [one|any|the] {w}""",
    "lists.sum.about": """[Add|Adds|Sum|Sums] [all|the|up all] numbers in [a|the|one] list
[Return|The|A] [sum|total] of [all numbers|several numbers|numbers in a list]""",
    "lists.largest.about": """[Return|The|A] [largest|highest|greatest|biggest] [number|value] [in the list|of all|of several]
[Maximum|Highest value|Largest] [of numbers|of all numbers|in a list]""",
    "lists.smallest.about": """[Return|The|A] [smallest|lowest|least] [number|value] [in the list|of all|of several]
[Minimum|Lowest value|Smallest] [of numbers|of all numbers|in a list]""",
    "lists.average.about": """[Return|The|An|Returns the] [average|mean] [of all|of the list|of several|of given numbers]
[Mean|Average] [value|number] [of a list|of numbers]""",
    "lists.sort.about": """[Sort|Sorts|Order|Orders] [all|the|these] numbers [of a list|by size|]
[Return|Gives|The] [sorted|ordered] [numbers|values|list]""",
    "lists.count.about": """[Count|Counts] [all|the|given] words[| of the list| there are]
[How many|The number of] words [a list has|are given|in the list]""",
    "lists.order.about": """[Sort|Sorts|Order] [all|the|given] words [from A to Z|by letter|alphabetically]
[The|Given] words in [alphabetical order|order of the alphabet]""",
    "files.list.about": """[List|Shows] [all|the|every] [files|file] [in|of] a [directory|folder|given folder]
Lists every file in a folder
Names of all files of a directory
[What|Which] files [a folder has|are in a directory|there are in a folder]""",
    "files.read.about": """[Gives|Reads] [the|all] [content|text|words] [of|in] [a|one|the named] file
Returns the [text|words] in a file
[Read|Opens|Show] [one|a given|a text] file""",
    "actions.weather.about": """[The|Some|A] weather [in a city|at a place|for a town|report for a place]
[Returns|Gives|Reports|Find] the weather [for|of|at|in] [one city|a given place|any town]""",
    "actions.message.about": """[Sends|Send|Gives] [someone|somebody|a person] [a text|some words|the message]
[A|Text] [message|messenger] [to a person|for someone]""",
    "actions.reminder.about": """[Sets|Makes|Creates|A] [a reminder|reminders] [for later|for a given time|with a text]
[Reminds|Tells] [you|the user|someone] [later|at a time of day]""",
    "actions.song.about": """[Plays|Starts|Play] [music|songs|a song] [by its title|by name|]
[Start|Put on] [music|a title|some song]""",
    "actions.flight.about": """[Books|Reserves|Book|Gets] [a|some] [plane ticket|flight|seat on a flight] [from a city to another|from here to there|between towns]
[Plane|Flight] [tickets|booking|reservation]""",
    "actions.translate.about": """[Translates|Translate|Puts] [some|the] [text|words] [to|into] [a language|a given language|another tongue]
Translates a text to a given language
[Translation|Translator] [of a text|into a language|of words]""",
    "actions.order.about": """[Places|Makes|Sends] [an order|orders] [in the shop|for goods|for some pieces]
[Order|Orders|Buy] [from a shop|goods|things for the user|articles]""",
    "actions.light.about": """[Switch|Switches|Turns|Turn] [a|the|one] [light|lamp] [in a room|on|off|on and off]
[Light|Lamp] [control|switch] [of a room|on or off]""",
    "actions.timer.about": """[Starts|Sets|Runs|A] [a timer|an alarm|timer] [for a number of minutes|that rings after minutes|in minutes]
[Alarm|Timer|Bell] [in some minutes|for minutes|after a time]""",
    "actions.search.about": """[Searches|Search|Look on] the web [for pages|for something|with words]
[Looks|Finds|Find] [for|up] [pages|sites|something on the web]
Look for [sites|something on the web]""",
    "convert.ask": """[Say|Find out|Work out|I wonder|I must know|Could you say] how many {t} {v} {s} [are|make|is]
[{p} needs|{p} bought|{p} found|There are|Here are|We got|I measured] {v} {s}. [How many|How much in|What is that in] {t}[ is that?| are these?|?]
[Please|Now|Kindly|] [turn|express|give|write|convert] {v} {s} [in|as|into|to] {t}[| for me]
[What|How much] [would|will|does] {v} {s} [be in|come to in|equal in] {t}?
[I want|I would like|Give me|I need|We want] {v} {s} [as|to be|converted to|turned into] {t}
[The value|The amount|The quantity] of {v} {s} [in|as] {t}?
{v} {s}: [how many|how much in] {t}?
[How many|Number of] {t} [in|for|from] {v} {s}""",
    "date_add.ask": """[On|It is|From|Starting on] {d} [I start|today|we begin|something begins] [and it takes|and it lasts|; it lasts|, and I stay] {n} days. [Which|What] date [is it then|comes out|is the last|is that]?
[Say|Name|Find|Work out|Give] the [date|day] [that comes|that is|lying|] {n} days [after|past|behind|later than] {d}
[Now|Please|Kindly|] [add|put|count] {n} days [to|on|onto] [the day|that date:|] {d}
[What|Which] [date|day] [will it be|do we have|is it|comes] {n} days [after|from|past] {d}?
It [is|was] {d}. [What|Which] date [follows|comes|is it|was it] {n} days [later|after that|on]?""",
    "date_add.ask_back": """[Say|Name|Find|Work out|Give] the [date|day] [that was|that came|lying|that is] {n} days [before|ahead of|earlier than] {d}
[Now|Please|Kindly|] [subtract|take|take away] {n} days [from|off] [the day|that date:|] {d}
[What|Which] [date|day] [did we have|was it|came|is] {n} days [before|earlier than] {d}?
It [is|was] {d} [now|here|]. [What|Which] date [was|is] {n} days [ago|back|earlier|before that]?""",
    "date_difference.ask": """[Say|Find out|Work out|I wonder|Could you say] how many days [lie|there are|pass|it is] [from|between] {d} [to|and] {e}
[A trip|The course|My work|The sale|Our stay] [goes|runs|lasts|is] from {d} [to|until] {e}. [How many|How long in] days [is it|is this|are these]?
[Now|Kindly|] [count|give|find] the [days|number of days] [from|between] {d} [to|and|until] {e}
Please give the number of days from {d} to {e}
It [is|was] {d} [now|here|]. How many days [are left to|remain until|is it until|are there to] {e}?
[Number|Count] of days from {d} to {e}?""",
    "weekday.ask": """[Say|Find out|Work out|I wonder|Could you say|Please name] [which|what] [weekday|day of the week] {d} [is|was|will be]
[The party|The game|The exam|The show|A trip] [is|starts|will be] on {d}. [Which|What] [weekday|day of the week] is [it|this]?
[Name|Give|Look up] the [weekday|day of the week] [of|for] {d}
Find the weekday [of|for] {d}
[What|Which] [weekday|day of the week] [do we have|is it|was it|comes] on {d}?
On [which|what] [weekday|day] [is|was|falls] {d}?""",
    "arithmetic.ask": """[Now|Kindly|Quickly|] [tell|say|work out|find|solve|compute|calculate] {e}[| for me| now]
Please [tell|say|work out|find|calculate] {e}[| for me| now]
[I want|I would like|I have|We need|I need] to [know|find out|compute] [what {e} is|how much {e} makes|{e}]
[Can|Could|Would|Will] you [say|tell me|find|solve|calculate|evaluate] {e}?
[What|How much] [does {e} make|is the value of {e}|would {e} be|comes out of {e}]?
[The|Give the|Say the|Find the] [result|value|answer] of {e}
{e}[, thanks| now| then]""",
    "arithmetic.add": """[the total|the sum] of the [two numbers|values] {a} and {b}
[the number|a number,] {a} plus [the number|] {b}
{a} [increased by|with|and then] {b} [added|more|on top]
the sum that {a} + {b} makes""",
    "arithmetic.subtract": """the [result|value] of {a} minus {b}
the number {a} less [the number|] {b}
{a} [decreased by|reduced by|without] {b}
the difference that {a} - {b} makes
{a} minus [the value|a number,] {b}""",
    "arithmetic.multiply": """the [result|value] of {a} times {b}
the number {a} multiplied by [the number|] {b}
{a} [groups of|lots of] {b}
the product that {a} * {b} makes
{a} times [the value|a number,] {b}""",
    "arithmetic.divide": """the [result|value] of {a} divided by {b}
the number {a} over [the number|] {b}
{a} [split by|shared by] {b}
the quotient that {a} / {b} makes
{a} divided by [the value|the number|a number,] {b}""",
    "records.ask": """[I want|I would like|I need|We want] to [find out|learn|see|hear] [the|which] {k} of {x}
[Now|Kindly|] [find|look up|tell me|say|read] [which|what] {k} {x} [has|got]
Please [find|say|read] [which|what] {k} {x} [has|got]
[Could|Can|Would] you [look up|say|find|read] the {k} [of|for] {x}?
[Find|Say|Read|See] the {k} [for|that belongs to] {x}
{x}: [which|what] {k}?
[The|Which is the|What is the right] {k} [of|for] {x}?""",
    "parallel.sums": """[First|Now|] [compute|do|calculate] {e}[,|] [then|and then|after that] {f}
[I need|Give me|We need] [both|] {e} and [then|also|] {f}
[Find|Say|Solve] {e}[, then|; then| and then] {f}[.|, please.]
{e}[, then|; then|, and then] {f}[.|?|]
[Two sums|Two questions]: {e} and {f}""",
    "parallel.weekdays": """[First|Now|] [find|say|name] the [weekday|day of the week] of {d}[, then| and then] [that|the one] of {e}
[Which|What] [weekday|day of the week] is {d}, and [which|what] is {e}?
{d} and {e}: [which|what] weekdays?""",
    "parallel.lookups": """[First|Now|] [find|look up|say|get] the {k} of {x}[, then| and then|, and also] [the {k}|that] of {y}
[I need|We need|Give me] the {k} [for|of] [both|] {x} and {y}
[Which|What] {k} do {x} and {y} have?
{x} and {y}: [which|what] {k} [have they|do they have]?""",
    "lists.sum.ask": """[Please|Now|Kindly|] [sum|add|total] [the numbers|these|up] {l}
[I have|Here are|We got|Take] the [values|numbers] {l}. [What|How much] is [the total|the sum|that together]?
[Tell|Say|Find|Give] [me|] the sum of {l}""",
    "lists.largest.ask": """[Please|Now|] [tell|say|find|pick|give] the [largest|biggest|highest] of {l}
[I have|Here are|We got|Take] the [values|numbers] {l}. [What|Which] is the [largest|highest|greatest]?""",
    "lists.smallest.ask": """[Please|Now|] [tell|say|find|pick|give] the [smallest|lowest|least] of {l}
[I have|Here are|We got|Take] the [values|numbers] {l}. [What|Which] is the [smallest|least]?""",
    "lists.average.ask": """[Please|Now|] [tell|say|find|give] the [average|mean] of {l}
[I have|Here are|We got|Take] the [values|numbers] {l}. What is [the average|the mean|their mean]?""",
    "lists.sort.ask": """[Now|] [order|arrange|sort] [these|the numbers|all of] {l}
Please [order|arrange] [these|the numbers|all of] {l}
[I have|Here are|We got|Take] the [values|numbers] {l}. [Sort|Order|Arrange] them[| by size].""",
    "lists.count.ask": """[Please|Now|] [say|tell|find] how many words [there are|these are|we have]: {l}
[I have|Here are|We got|Take] the words {l}. How many [are there|are these|is that]?""",
    "lists.order.ask": """[Please|Now|] [order|arrange|sort] the words {l} [alphabetically|by letter|from A to Z]
[Here are|We got|Take] the words {l}. [Sort|Order|Arrange] them [alphabetically|by the alphabet].""",
    "files.list.ask": """[Please|Now|] [show|say|tell me] [which|what] files [there are|we have] in {f}
[Say|Find|Look] what [the folder|the directory] {f} [has|holds|contains]
[List|Open] the [directory|folder] {f} [for me|now|, please]""",
    "files.read.ask": """[Please|Now|] [open|show|read out] the file {f}
[Say|Find|Look] what [is written|stands] in {f}
[Read|Open] [the file|] {f} [for me|now|, please]""",
    "files.only.ask": """[Please|Now|] [find|open|read] the [one|single] file [in|of] {f}
In {f} [there is|lies] [one|a single] file. [What does it say|Read it|Show it]""",
    "actions.weather.ask": """[Please|Now|] [say|find|report] [the weather|how the weather is] in {c}
How [warm|cold|nice] [will it be|is it today|is it now] in {c}?
[Could|Can] you tell me [the weather|how warm it is] in {c}?""",
    "actions.message.ask": """[Please|Now|] [write|text|tell] {p} this: {m}
[Please|Kindly] [let {p} know|send {p} the words]: {m}
[Give|Pass] {p} the message: {m}
[Write|Send] [a message|a text|this] to {p}: {m}""",
    "actions.reminder.ask": """[Please|Kindly] [set|make] a reminder [for|at] {t}: {m}
[Make|Write|Take|Leave] a [reminder|note] [for|at] {t} that says: {m}
[Please|] at {t} [tell|remind] me: {m}
Note [for|at] {t}: {m}""",
    "actions.song.ask": """[Please|Now|] [start|put on|play me] [the song|the music|] {x}
[Could|Can] you play {x}?
I [want|would like] to [listen to|hear the song] {x}""",
    "actions.flight.ask": """[Please|Now|] [reserve|find|get] [me|us] a flight from {c} to {d}
[I must|We must|I would like to|We have to] [fly|go by plane] [from {c} to {d}|to {d} from {c}]
[Could|Can] you book a [flight|plane] from {c} to {d}?""",
    "actions.translate.ask": """[Please|Now|] [put|turn|say] {x} [into|in] {l}
[Could|Can] you [translate|say] {x} [into|in] {l}?
[Tell|Show] me {x} in {l}""",
    "actions.order.ask": """[Please|Now|] [buy|get|order me] {n} [pieces|units] of {x}
[I need|We need|We would like|I want] {n} [pieces|units] of {x}
[Could|Can] you order {n} [of the|pieces of] {x}?""",
    "actions.light.ask": """[Now|] [switch|turn] [{switch} the {x} light|the {x} light {switch}]
Please switch [{switch} the {x} light|the {x} light {switch}]
[I would like|We want|I need] the {x} light [to be|turned|switched] {switch}
[Could|Can] you turn the {x} light {switch}?""",
    "actions.timer.ask": """[Please|Now|] [set|run|make] [a timer|an alarm] [of|for|in] {n} minutes
[I want|We need|I would like] [a timer|an alarm] [for|of|after] {n} minutes
[Could|Can] you [ring|wake me|tell me] in {n} minutes?""",
    "actions.search.ask": """[Please|Now|] [look|search] the web for {x}
[Find|Show|Get] me [web pages|something] [about|on] {x}
[Could|Can] you search for {x}?""",
    "records.table": """[I know|We have|Look at|There is] this: {t}. {q}
[The list|The table|My data]: {t}. {q}
{q} [This is the table|These are the records|Look here|My data]: {t}""",
    "records.system": """[Answer|Reply|Work] [from|with|by] [this|the following] [data|table|list]: {t}
[The|All|Your] [facts|records|data]: {t}""",
    "talk.who": """[Please say|Say|Can you say|I wonder] [who you are|what you are called|your name]
[Hello|Hey|Good day], [who are you?|what are you called?|who is this?]
[Who|What model] [do I talk to?|is this?|is speaking?]""",
    "talk.hello": """[Hey|Hi|Hello] [you|again|friend][!|]
[Hey|Hello] nano[!|]
[Good|A good] [day|afternoon|evening] [to you|nano]
[Hi|Hey], how [is it going?|do you do?]""",
    "talk.can": """[Say|Show me|I wonder] what you [can do|are able to do|can help with]
[Could|Would] you [assist|support] me?
What [tools|things] [can you use?|do you know?]""",
    "talk.thanks": """[Many|A thousand] thanks[!|]
[Super|Nice|Wonderful], [thanks|thank you][!|.]
[Thanks|Thank you], that [helps|helped a lot|was good].""",
    "talk.bye": """[Goodbye|Bye|See you] [then|nano|tomorrow][!|]
[Have a nice|A good] [day|evening][!|]""",
    "talk.fact": """[I have|We have|There is] a word: {x}. [Repeat|Say] it[.|]|{x}|{x}
[Now|Kindly|Just] [repeat|say] [this|the word]: {x}|{x}|{x}
[The|My] [key word|magic word|code word] is {x}. What is [it|the word]?|The word is {x}.|{x}
[They call me|People call me|You can call me] {p}. [What am I called|What is my name]?|Your name is {p}.|{p}
[My house|My flat|My office] is in {c}. Where is [it|that]?|It is in {c}.|{c}
{p} [works|stays|lives] in {c}, {q} in {d}. Where [does {q} stay|is {q}]?|{q} is in {d}.|{d}
{p} [works|stays|lives] in {c}, {q} in {d}. Where [does {p} stay|is {p}]?|{p} is in {c}.|{c}
My [room|key|bus] has the number {n}. [Which|What] number [is it|has it]?|It is {n}.|{n}""",
}
MORE: Final[dict[str, tuple[str, ...]]] = {name: tuple(text.splitlines()) for name, text in _TEXT.items()}
