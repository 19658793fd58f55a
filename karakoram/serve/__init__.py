"""The door for programs: an HTTP server that speaks OpenAI's and Anthropic's APIs.

    bytes ─app─▶ surface ─▶ session ─▶ engine ─▶ stream ─▶ surface ─▶ bytes

`app` has the routes, `surface` says what an API is, `stream` carries news from the engine's thread to the connections.
"""
