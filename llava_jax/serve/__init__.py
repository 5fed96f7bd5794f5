"""An HTTP server with OpenAI's API over one engine (docs/serving.md).

Its parts, lowest first:
    errors     every refusal: status, text and shape
    schema     what a request may say
    meters     what /metrics counts
    fetch      pictures by address, from hosts that were named
    asking     a request to prompts with pixels, in threads of its own
    warm       every program compiled before the first request
    worker     the engine's thread, and the bridge between it and asyncio
    replies    answers in OpenAI's shapes
    gate       key, size and time of a request, before anything reads it
    app        the routes
    demo       the chat page at /, and its command
    server     sockets, signals and the order of the end
    cli        the command
"""
