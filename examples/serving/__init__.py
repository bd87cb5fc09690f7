"""Continuous batching over a paged cache: what `examples/serve.py` is made of.

- `engine.py`: the device's side: the model's step on a paged cache, compiled once per bucket.
- `scheduler.py`: which requests compute what next, and who has to wait for pages.
- `prefixes.py`: full pages that later requests may begin with.
- `endpoint.py`: requests over HTTP, their bytes streamed.
- `telemetry.py`: tokens per second, time to first token and page use, printed and plotted.
- `load.py`: random requests that share prefixes, to try all this with.
"""
