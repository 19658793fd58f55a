"""`k2 generate`: continue a text, for people and for programs.

Raw by default: the prompt's tokens go in as they are, with no chat frame. With --chat it becomes a user message.
stdout holds the new text alone, or with --json one object; notes go to stderr.
"""

import json
import sys
import time
from codecs import getincrementaldecoder
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from karakoram.cli import options
from karakoram.errors import InputError

DEFAULT_MAX_TOKENS = 128  # raw text has no natural end


def generate_command(
    ctx: typer.Context,
    model: options.ModelArgument,
    prompt: Annotated[str, typer.Option("--prompt", "-p", metavar="TEXT", help="The text; - reads standard input.")],
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, help="At most so many new tokens.")
    ] = DEFAULT_MAX_TOKENS,
    chat: Annotated[bool, typer.Option("--chat", help="Take the prompt as a user message.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print text, token_ids (new ones only), prompt_tokens and tok_per_s.")
    ] = False,
    tools: options.ToolsFile = None,
    system: Annotated[str | None, typer.Option(help="System message, with --chat.")] = None,
    dialect: options.Dialect = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", help="Draw from the likeliest tokens that sum up to this.")] = 1.0,
    seed: options.Seed = None,
    no_thinking: options.NoThinking = False,
    allow_special: Annotated[
        bool, typer.Option("--allow-special", help="Let special tokens written in the prompt become control tokens.")
    ] = False,
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
    """Continue a text, greedily unless told otherwise.

    \b
    Examples:
      k2 generate nano --prompt "The mountain" --max-tokens 20
      k2 generate nano --prompt "What is 17 * 23?" --chat --json
      cat story.txt | k2 generate ./my-checkpoint --prompt -
    """
    from karakoram.cli import opening
    from karakoram.cli.chat import given_prompt
    from karakoram.session import check_sampling

    check_sampling(temperature, top_p)
    if not chat and (tools or system or no_thinking or dialect):
        raise InputError("--tools, --system, --dialect and --no-thinking belong to a chat.", "Add --chat.")
    if chat and allow_special:
        raise InputError("--allow-special is for raw text; a message never becomes control tokens.", "Leave it out.")
    text = given_prompt(prompt)
    declared = opening.read_tools(tools) if tools else None
    directory = opening.open_directory(model)
    sampling = {"temperature": temperature, "top_p": top_p, "seed": seed}
    experts = options.store_options(ram, expert_ram, vram, trace, expert_policy, no_prefetch, shadow)
    if chat:
        opened = opening.open_for_chat(str(directory), dialect, device, dtype.value, allow_config_key or [], experts)
        ctx.call_on_close(opened.close)
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": text})
        _chat(opened, messages, declared, not no_thinking, max_tokens, sampling, as_json)
        if said := opened.approximated():
            print(said, file=sys.stderr)
    else:
        model_, store = opening.load_fed(directory, device, dtype.value, allow_config_key or [], experts)
        if store is not None:
            ctx.call_on_close(store.close)
            print(store, file=sys.stderr)
        _raw(model_, directory, text, allow_special, max_tokens, sampling, as_json)
        if store is not None and (touched := store.approximated()) is not None:
            print(f"{touched} tokens touched approximate experts", file=sys.stderr)


def _chat(
    opened: Any,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    thinking: bool,
    max_tokens: int,
    sampling: dict[str, Any],
    as_json: bool,
) -> None:
    from karakoram.cli.terminal.conversation import as_json as calls_as_json
    from karakoram.cli.terminal.conversation import counts
    from karakoram.cli.terminal.view import AnswerView

    session, view = opened.session(), AnswerView()
    for delta in session.stream(messages, tools, thinking=thinking, max_new_tokens=max_tokens, **sampling):
        if not as_json:
            view.delta(delta)
    turn = session.last
    if as_json:
        ids = list(turn.token_ids)
        spoken = ids[:-1] if ids and ids[-1] in opened.fmt.stop_ids else ids
        record = _record(opened.fmt.tokenizer.decode(spoken), ids, turn.prompt_tokens, turn.tok_per_s)
        print(json.dumps({**record, "message": turn.message, "finish_reason": turn.finish_reason}, ensure_ascii=False))
        return
    view.end_line()
    if calls := turn.message.get("tool_calls"):
        print(calls_as_json(calls))
    view.note(counts([turn]))


def _raw(
    model: Any,
    directory: Path,
    text: str,
    allow_special: bool,
    max_tokens: int,
    sampling: dict[str, Any],
    as_json: bool,
) -> None:
    from karakoram.chat import Tokenizer
    from karakoram.model.generate import generate
    from karakoram.session import check_context, check_vocabulary

    tokenizer = Tokenizer.from_dir(directory)
    prompt = tokenizer.encode(text, allow_special=allow_special)
    check_vocabulary(tokenizer, model.config)
    check_context(len(prompt), max_tokens, model.config)
    stop_ids = _ends(tokenizer, model.config)
    ids: list[int] = []
    times = [time.perf_counter()]
    pieces: list[str] = []
    tokens = generate(model, prompt, max_tokens, stop_ids=stop_ids, **sampling)
    for piece in text_of(tokenizer, _counted(tokens, ids, times), stop_ids):
        pieces.append(piece)
        if not as_json:
            print(piece, end="", flush=True)
    speed = (len(ids) - 1) / (times[-1] - times[1]) if len(ids) > 1 else 0.0
    if as_json:
        print(json.dumps(_record("".join(pieces), ids, len(prompt), speed), ensure_ascii=False))
        return
    print(flush=True)
    print(f"{len(prompt)} tokens in, {len(ids)} out · {speed:.1f} tok/s", file=sys.stderr)


def _record(text: str, token_ids: list[int], prompt_tokens: int, tok_per_s: float) -> dict[str, Any]:
    return {"text": text, "token_ids": token_ids, "prompt_tokens": prompt_tokens, "tok_per_s": round(tok_per_s, 2)}


def _counted(tokens: Iterator[int], ids: list[int], times: list[float]) -> Iterator[int]:
    for token in tokens:
        times.append(time.perf_counter())
        ids.append(token)
        yield token


def text_of(tokenizer: Any, tokens: Iterator[int], stop_ids: frozenset[int]) -> Iterator[str]:
    """The text of a stream of tokens, in pieces that never end inside a character; a stop token is left out."""
    decoder = getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        if token in stop_ids:
            break
        if piece := decoder.decode(tokenizer.token_bytes(token)):
            yield piece
    if rest := decoder.decode(b"", final=True):
        yield rest


def _ends(tokenizer: Any, config: Any) -> frozenset[int]:
    """Both ends that K2 models use (config.json names one or the other, by release), and the checkpoint's own."""
    from karakoram.chat.dialects import STOP_MARKERS
    from karakoram.model.generate import end_ids

    named = {tokenizer.special_ids[name] for name in STOP_MARKERS if name in tokenizer.special_ids}
    return end_ids(config) | named
