"""`k2 chat`: talk to a model.

Three ways in: at a terminal, line by line; with PROMPT, one answer; from a pipe, one answer to what came through it.
Ctrl-C stops the answer; at the prompt, Ctrl-C once more or Ctrl-D leaves.
"""

import re
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from karakoram.cli import options
from karakoram.errors import InputError, KarakoramError

_MAX_PIPE_BYTES = 16_000_000  # 4 million tokens or so: no context is as long

HELP = """\
/help           this list
/reset          forget the conversation, keep the system message
/system [TEXT]  show the system message, or take a new one and start over
/tools          the declared tools
/exit           leave (also Ctrl-D)
//...           say a line that starts with /
Ctrl-C stops an answer; arrow keys bring back earlier lines"""


def chat_command(
    ctx: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL", help="'nano' (bundled, the default), a checkpoint directory, or a Hugging Face id."
        ),
    ] = None,
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="Answer this and leave; - reads standard input.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    tools: options.ToolsFile = None,
    demo_tools: Annotated[
        bool, typer.Option("--demo-tools", help="Declare calculator, dates and units, and run them in this process.")
    ] = False,
    url: Annotated[
        str | None, typer.Option("--url", help="Talk to a server instead; MODEL is then a name it knows.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option("--api-key", envvar="K2_API_KEY", show_envvar=True, help="For --url.")
    ] = None,
    dialect: options.Dialect = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    seed: options.Seed = None,
    max_tokens: options.MaxTokens = None,
    no_thinking: options.NoThinking = False,
    device: options.Device = "auto",
    dtype: options.DtypeOption = options.Dtype.bfloat16,
    ram: options.Ram = None,
    expert_ram: options.ExpertRam = None,
    vram: options.Vram = None,
    expert_policy: options.ExpertPolicy = None,
    no_prefetch: options.NoPrefetch = False,
    shadow: options.ShadowMs = None,
    trace: options.TraceFile = None,
    allow_config_key: options.AllowConfigKey = None,
) -> None:
    """Talk to a model; without arguments, to the bundled one.

    A lone argument that is neither a known name, a path nor an id is the PROMPT.

    \b
    Examples:
      k2 chat
      k2 chat "What is 17 * 23?" --demo-tools
      k2 chat ./my-checkpoint --system "Answer in French."
      echo "Say hello." | k2 chat nano
      k2 chat --url http://127.0.0.1:8000
    """
    from karakoram.cli import opening
    from karakoram.cli.terminal.conversation import Conversation, as_json
    from karakoram.cli.terminal.view import AnswerView

    if url is None:
        model, prompt = model_and_prompt(model, prompt)
    elif model is not None and prompt is None and (" " in model or model == "-"):
        model, prompt = None, model  # a lone argument with a space in it is no server's name for a model
    interactive = prompt is None and sys.stdin.isatty()
    if not interactive:
        prompt = given_prompt(prompt)
    declared = _declarations(tools, demo_tools)
    view, more = AnswerView(), str
    if url is not None:
        from karakoram.cli.terminal.remote import open_remote

        session, sampling, where = open_remote(url, model, api_key, temperature, top_p)
    else:
        assert model is not None
        experts = options.store_options(ram, expert_ram, vram, trace, expert_policy, no_prefetch, shadow)
        opened = opening.open_for_chat(model, dialect, device, dtype.value, allow_config_key or [], experts)
        ctx.call_on_close(opened.close)
        more = opened.approximated
        sampling = opening.sampling_for(opened.directory, opened.fmt, temperature, top_p, not no_thinking)
        session, where = opened.session(), f"{model} · {opened.fmt.dialect} · {opened.where} · {sampling}"
    lines = _line_input() if interactive else None
    conversation = Conversation(
        session=session,
        view=view,
        sampling=sampling,
        tools=declared,
        answer_call=_answerer(demo_tools, view, lines),
        system=system,
        thinking=not no_thinking,
        max_new_tokens=max_tokens,
        seed=seed,
        more=more,
    )
    view.note(where)
    if lines is None:
        assert prompt is not None
        if calls := conversation.answer(prompt):
            print(as_json(calls), flush=True)
        return
    view.note("/help for commands, Ctrl-D to leave")
    _talk(conversation, lines)


def model_and_prompt(model: str | None, prompt: str | None) -> tuple[str, str | None]:
    """MODEL first, PROMPT second; a lone argument that cannot be a MODEL is the PROMPT for the bundled model."""
    from karakoram.cli.opening import BUNDLED, names_a_model

    if model is None:
        return BUNDLED, None
    if prompt is None and not names_a_model(model):
        return BUNDLED, model
    return model, prompt


def given_prompt(prompt: str | None) -> str:
    """The prompt of a single answer: as given, or all of standard input for None and "-". Never blank."""
    text = _piped() if prompt is None or prompt == "-" else prompt
    if not text.strip():
        raise InputError("The prompt is empty.", 'Say something: k2 chat nano "Hello".')
    return typed(text)


def _piped() -> str:
    """All of standard input, without the line feed that ends it."""
    raw = sys.stdin.buffer.read(_MAX_PIPE_BYTES + 1)
    if len(raw) > _MAX_PIPE_BYTES:
        raise InputError(f"Standard input has more than {_MAX_PIPE_BYTES} bytes.", "Give a shorter prompt.")
    try:
        return raw.decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"Standard input is not UTF-8 (byte {error.start}).", "Convert it first.") from error


def typed(text: str) -> str:
    """Text from the command line or keyboard; InputError where its bytes were not the terminal's encoding."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise InputError("The prompt is not valid UTF-8.", "Check the terminal's encoding (locale).")
    return text


def _declarations(tools: Any, demo_tools: bool) -> list[dict[str, Any]]:
    from karakoram.cli.opening import read_tools

    declared = read_tools(tools) if tools else []
    if demo_tools:
        from karakoram.tools import BUILTIN

        taken = {tool["function"]["name"] for tool in declared}
        declared += [tool.declaration() for tool in BUILTIN.values() if tool.name not in taken]
    return declared


def _line_input() -> Any:
    from karakoram.cli.terminal.line_input import LineInput

    return LineInput()


def _answerer(demo_tools: bool, view: Any, lines: Any) -> Callable[[Any], str | None]:
    """What answers a tool call: the demo tools where they were asked for, else the person, else nobody."""

    def answer(call: Any) -> str | None:
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        if demo_tools:
            from karakoram.tools import BUILTIN
            from karakoram.tools import call as run_tool

            if name in BUILTIN:
                return run_tool(BUILTIN[name], arguments)
            if lines is None:
                return f"error: there is no tool {name!r}"
        if lines is None:
            return None
        view.end_line()
        try:
            return typed(lines.read(f"result of {name}> ", remember=False))
        except EOFError:
            return None

    return answer


def _talk(conversation: Any, lines: Any) -> None:
    """Read, answer, repeat, until /exit, Ctrl-D, or Ctrl-C at an empty prompt."""
    view = conversation.view
    while True:
        view.err.write("\n")
        try:
            line = lines.read("> ").strip()
        except (EOFError, KeyboardInterrupt):
            view.err.write("\n")
            return
        if not line:
            continue
        if re.fullmatch(r"/[a-z]+(\s.*)?", line):
            if not _slash(conversation, line):
                return
            continue
        try:
            conversation.answer(typed(line.removeprefix("/") if line.startswith("//") else line))
        except KeyboardInterrupt:
            view.end_line()
        except KarakoramError as error:
            view.end_line()
            view.note(f"k2: error: {error}")


def _slash(conversation: Any, line: str) -> bool:
    """Do a slash command; False to leave."""
    view = conversation.view
    command, _, rest = line.partition(" ")
    if command in ("/exit", "/quit"):
        return False
    if command == "/help":
        view.note(HELP)
    elif command == "/reset":
        conversation.reset()
        view.note("forgotten")
    elif command == "/system" and rest.strip():
        conversation.reset(rest.strip())
        view.note("new system message, conversation forgotten")
    elif command == "/system":
        view.note(conversation.system or "no system message; /system TEXT sets one")
    elif command == "/tools":
        for tool in conversation.tools:
            function = tool["function"]
            view.note(f"{function['name']}: {function.get('description', '')}")
        if not conversation.tools:
            view.note("no tools; start with --demo-tools or --tools FILE")
    else:
        view.note(f"no command {command}; /help lists them")
    return True
