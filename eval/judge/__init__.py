"""Judge models: they review or grade answers, over an OpenAI-compatible endpoint."""
