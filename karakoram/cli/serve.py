"""`k2 serve`: a model behind OpenAI's and Anthropic's APIs.

The port is bound first and the model loads in a thread, so that a taken port is an error at once and `/health` can say
"loading". What is wrong with the model ends the server, with the same line and code as in any other command.

Keys are better given by K2_API_KEY than by --api-key, which other users of the machine can read in the process list.
"""

import gc
import os
import sys
import threading
from pathlib import Path
from typing import Annotated, Any

import typer

import karakoram
from karakoram.cli import options
from karakoram.errors import InputError

STORE_CONTEXT = 16_384  # tokens of context and cache, where experts take the memory and nobody says how many


def serve_command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="'nano' (bundled, the default), a checkpoint directory, or a Hugging Face id."
        ),
    ] = "nano",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option("--api-key", metavar="KEY", help="Needed by clients; repeatable. Better: K2_API_KEY."),
    ] = None,
    allow_public: Annotated[
        bool, typer.Option("--allow-public", help="Listen on a public address although there is no key.")
    ] = False,
    name: Annotated[
        list[str] | None, typer.Option("--name", metavar="NAME", help="What clients call the model; repeatable.")
    ] = None,
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens of prompt and answer; default: the model's.")
    ] = None,
    max_concurrency: Annotated[int, typer.Option(min=1, help="So many requests in one batch.")] = 64,
    cache_tokens: Annotated[
        int | None, typer.Option("--cache-tokens", min=1, help="Tokens in the cache; default: what memory allows.")
    ] = None,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="A seeded request is bit-equal whatever runs beside it; slower.")
    ] = False,
    no_speculate: Annotated[
        bool, typer.Option("--no-speculate", help="Do not guess tokens from what was said before.")
    ] = False,
    dialect: options.Dialect = None,
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
    """Serve a model through OpenAI's and Anthropic's APIs.

    OpenAI's are /v1/chat/completions, /v1/responses and /v1/completions, Anthropic's is /v1/messages.

    \b
    Examples:
      k2 serve
      K2_API_KEY=secret k2 serve ./my-checkpoint --host 0.0.0.0 --name my-model
      curl localhost:8000/v1/chat/completions -d '{"messages": [{"role": "user", "content": "Hi"}]}'
    """
    from karakoram.cli import opening
    from karakoram.serve.app import create_app
    from karakoram.serve.listen import Server, bind, is_public, url_of
    from karakoram.serve.service import Service

    keys = keys_of(api_key, os.environ.get("K2_API_KEY"))
    if is_public(host) and not keys and not allow_public:
        raise InputError(
            f"{host} can be reached from other machines, and there is no key.",
            "Set K2_API_KEY, or say --allow-public if everybody may use this model.",
        )
    experts = options.store_options(ram, expert_ram, vram, trace, expert_policy, no_prefetch, shadow)
    located = opening.locate(model)
    service = Service(name or names_of(model), keys, version=karakoram.__version__)
    bound = bind(host, port, service.limits.stalled_s)
    server = Server(create_app(service))

    loaded: list[Any] = []

    def load() -> Any:
        held = max(cache_tokens or STORE_CONTEXT, context or 0)
        opened = opening.open_for_chat(located, dialect, device, dtype.value, allow_config_key or [], experts, held)
        loaded.append(opened)
        engine = {"context": context, "cache_tokens": cache_tokens} | cache_beside(opened, held, context)
        engine |= {"most_running": max_concurrency, "deterministic": deterministic, "speculate": not no_speculate}
        return open_service(opened, engine)

    print(f"loading {model} …", file=sys.stderr)
    loading = Loading(load, service, server, f"{service.names[0]} is ready at {url_of(bound)} (Ctrl-C ends it)")
    loading.thread.start()
    try:
        server.run(sockets=[bound])
    except KeyboardInterrupt:
        pass  # how one ends a server: code 0
    finally:
        loading.close()
        for opened in loaded:
            opened.close()
    if loading.error is not None:
        raise loading.error


def cache_beside(opened: Any, held: int, context: int | None) -> dict[str, int]:
    """The cache where a store feeds the model: the experts have all memory that was not set aside for it."""
    if opened.store is None:
        return {}
    print(opened.where, file=sys.stderr)
    return {"context": context or min(held, opened.model.config.max_position_embeddings), "cache_tokens": held}


def keys_of(given: list[str] | None, environment: str | None) -> list[str]:
    """All keys: the options', and the words of K2_API_KEY. An empty one is an error, not an open door."""
    keys = [key.strip() for key in given or ()] + (environment or "").split()
    if "" in keys:
        raise InputError("An API key is empty.", "Give some text, or leave --api-key out.")
    return keys


def names_of(model: str) -> list[str]:
    """What clients may call a model: its id, and the id without its owner (some clients allow no "/")."""
    path = Path(model).expanduser()
    if path.is_dir():
        return [path.resolve().name]
    return [model, model.split("/")[1]] if "/" in model else [model]


class Loading:
    """Opens the model in a thread. Ready, it says so; failed, it ends the server and keeps the error."""

    def __init__(self, load: Any, service: Any, server: Any, ready: str) -> None:
        self.error: BaseException | None = None
        self._load, self._service, self._server, self._ready = load, service, server, ready
        self._opened: Any = None
        self.thread = threading.Thread(target=self._run, name="karakoram-load", daemon=True)

    def _run(self) -> None:
        try:
            self._opened = self._load()
        except BaseException as error:  # noqa: BLE001  carried to the main thread, whatever it is
            self.error = error
            self._server.should_exit = True
            return
        self._service.ready(self._opened)
        print(self._ready, flush=True)

    def close(self) -> None:
        """Close the engine, if there is one by now."""
        if self._opened is not None:
            self._opened.source.close()


def open_service(opened: Any, engine_options: dict[str, Any]) -> Any:
    """A loaded model with an engine and a session over it."""
    from karakoram.cli import opening
    from karakoram.engine.engine import Engine
    from karakoram.serve.service import Opened
    from karakoram.session.chat import ChatSession

    gc.collect()
    gc.freeze()  # a full collection over a model's millions of objects would stop every stream for tens of milliseconds
    engine = Engine(opened.model, experts=opened.store, **engine_options)
    sampling = opening.sampling_for(opened.directory, opened.fmt)
    # The dialects' defaults depend on whether the model thinks: those are left to the service.
    given = None if sampling.source.startswith("default of") else sampling
    defaults = given and {"temperature": given.temperature, "top_p": given.top_p}
    return Opened(engine, ChatSession(engine, opened.fmt), opened.fmt, defaults)
