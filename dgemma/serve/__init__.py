"""An HTTP server of OpenAI's shape over the engine: one model, many clients. It needs the extra `serve`."""
