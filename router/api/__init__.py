"""The HTTP edge: plain ASGI on the data plane, FastAPI on the admin plane."""
