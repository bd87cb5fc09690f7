"""Serve a trained byte-level model: continuous batching over a paged cache, bytes streamed by HTTP.

    python examples/train_byte_lm.py --save demo_output/model.safetensors
    python examples/serve.py                        # http://127.0.0.1:8000, until Ctrl-C
    curl -N -d '{"prompt": "def main(", "max_tokens": 100}' http://127.0.0.1:8000/generate
    python examples/serve.py --load 64 --check      # 64 random requests, then figures and the end

Requests of different lengths join and leave a running batch; prompts are read in chunks between
decode steps; equal beginnings are computed once and their pages shared.  At the end it prints
tokens per second, time to first token and page use, and draws them into `serving.png`.  `--check`
compares every output of the load with greedy generation that has no cache.  `serving/` has the
parts.
"""

import argparse
import json
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from byte_decoder import ByteDecoder, generate_greedily, load_model
from serving.endpoint import Server, Worker, make_server
from serving.engine import Engine
from serving.load import Trial, draw_trials, send
from serving.scheduler import Scheduler


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path("demo_output/model.safetensors"))
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    parser.add_argument(
        "--implementation", choices=["cute", "xla"], help="of paged_attention; default: what serves"
    )
    parser.add_argument("--max-tokens", type=int, default=384, help="of a prompt and its output")
    parser.add_argument("--max-batch", type=int, default=16, help="requests that run at once")
    parser.add_argument("--page-size", type=int, default=16, help="tokens a page")
    parser.add_argument("--pages", type=int, default=256)
    parser.add_argument(
        "--chunks", type=int, nargs="+", default=[16, 64], help="tokens of a prompt a step"
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    parser.add_argument("--load", type=int, metavar="N", help="send N random requests, then end")
    parser.add_argument("--rate", type=float, default=20.0, help="of the load, requests a second")
    parser.add_argument("--check", action="store_true", help="of the load: outputs as uncached")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("demo_output"))
    args = parser.parse_args()
    if args.check and args.load is None:
        parser.error("--check needs --load")
    if args.load is not None and args.load < 1:
        parser.error("--load must be at least 1")
    if args.load is not None and (args.rate <= 0 or args.max_tokens < 12):
        parser.error("--load needs a --rate above 0 and --max-tokens of 12 or more")
    return args


def run_until_interrupted(server: Server) -> None:
    print(f"http://{server.server_address[0]}:{server.server_port}/generate   Ctrl-C ends")
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print()


def run_load(server: Server, args: argparse.Namespace) -> list[Trial]:
    """Send the random requests to the server, over HTTP."""
    # Python, as the model has learned it, and in every copy of the repository.
    text = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.rglob("*.py")))
    trials = draw_trials(
        text,
        args.load,
        max_tokens=args.max_tokens,
        requests_per_second=args.rate,
        seed=args.seed,
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    send(trials, args.host, server.server_port)
    server.shutdown()
    return trials


def count_differences(model: ByteDecoder, trials: list[Trial], max_tokens: int) -> int:
    """How many outputs are not those of greedy generation without a cache, near ties aside.

    Of logits nearer than two spacings of the dtype (from 8 to 16), rounding decides which leads.
    """
    near = max(1e-3, 16 * float(jnp.finfo(model.logits.dtype).eps))
    different = near_ties = 0
    for trial in trials:
        want, leads = generate_greedily(
            model, trial.prompt, trial.max_new_tokens, padded_to=max_tokens
        )
        if trial.output != want:
            pairs = zip(trial.output, want, strict=False)
            first = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
            is_near_tie = first is not None and leads[first] < near
            near_ties += is_near_tie
            different += not is_near_tie
    print(
        f"Greedy without a cache: {len(trials) - different - near_ties} of {len(trials)} outputs "
        f"equal, {near_ties} part where two logits are closer than {near:.3g}, {different} differ"
    )
    return different


def main() -> int:
    args = parse_arguments()
    if not args.model.exists():
        sys.exit(f"{args.model} is missing: python examples/train_byte_lm.py --save {args.model}")
    device = jax.devices()[0]
    dtype = args.dtype or ("bfloat16" if device.platform == "gpu" else "float32")
    model = load_model(args.model, dtype, "xla")
    engine = Engine(
        model,
        num_pages=args.pages,
        page_size=args.page_size,
        max_tokens=args.max_tokens,
        max_batch=args.max_batch,
        chunk_sizes=args.chunks,
        implementation=args.implementation,
    )
    start = time.perf_counter()
    programs = engine.warm_up()
    seconds = time.perf_counter() - start
    print(
        f"{device.device_kind} · {args.model} in {dtype} · {programs} programs compiled in "
        f"{seconds:.1f} s"
    )

    worker = Worker(Scheduler(engine))
    worker.start()
    server = make_server(worker, args.host, args.port)
    trials = []
    if args.load:
        trials = run_load(server, args)
    else:
        run_until_interrupted(server)
    server.server_close()
    worker.stop()
    if worker.error is not None:
        print(f"The worker has failed: {worker.error!r}", file=sys.stderr)
        return 1

    telemetry = worker.scheduler.telemetry
    print(telemetry.describe())
    if telemetry.requests:
        args.out.mkdir(parents=True, exist_ok=True)
        telemetry.plot(args.out / "serving.png")
        (args.out / "serving.json").write_text(json.dumps(telemetry.summary()) + "\n")
        print(f"Wrote {args.out / 'serving.png'} and {args.out / 'serving.json'}")
    if late := len(engine.programs) - programs:
        print(f"{late} programs were compiled while serving.", file=sys.stderr)
        return 1
    if args.check and count_differences(model, trials, args.max_tokens):
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
