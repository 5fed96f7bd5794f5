"""`llava-jax chat`: talk with a model about images, in a terminal, in a pipe, or over a folder.

Nothing heavy is imported before the model is loaded.

    files     names as they are typed, schemas, conversations that are saved
    terminal  line editing with Tab, and pictures where a terminal can show them
    session   the conversation and its commands
    folder    every picture of a folder, to JSON lines
    cli       the command
"""
