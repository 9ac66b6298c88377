"""llama.cpp's own HTTP server with one model on one port; one process for each server.

    python serve_model.py tiny.gguf [--port 9310] [--parallel 4] [--api-key KEY] [--embeddings | --rerank] ...

Prints `READY http://127.0.0.1:PORT` as soon as the model is loaded. To end it use SIGTERM or SIGKILL: on SIGINT it
first waits for the requests under way.
"""

import argparse
import os
import sys
import threading
from pathlib import Path

import xllamacpp


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Serve one model with llama.cpp.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--port", type=int, default=0, help="0: any free one")
    parser.add_argument("--alias", default="tiny", help="the model's name in /v1/models and in answers")
    parser.add_argument("--api-key", action="append", default=[], help="may be given several times")
    parser.add_argument("--parallel", type=int, default=4, help="slots")
    parser.add_argument("--ctx", type=int, default=4096, help="context for each slot, in tokens")
    parser.add_argument(
        "--unified", action="store_true", help="one pool of --ctx for all slots: may run out mid-stream"
    )
    parser.add_argument("--threads", type=int, default=1, help="more is slower on a busy machine")
    parser.add_argument("--http-threads", type=int)
    parser.add_argument("--embeddings", action="store_true")
    parser.add_argument("--rerank", action="store_true", help="needs a model made for it")
    parser.add_argument("--think", action="store_true", help="needs a model made for it")
    parser.add_argument("--draft", type=Path, help="a draft model for speculative decoding; the model itself will do")
    parser.add_argument("--ping", type=int, help="seconds of silence in a stream after which a comment is sent")
    parser.add_argument("--cache-ram", type=int, help="MiB of memory for the prompts of slots given away; 0: off")
    parser.add_argument("--slot-dir", default="", help="folder for saved slots")
    parser.add_argument("--sleep-idle", type=int, help="seconds without requests after which the model is unloaded")
    parser.add_argument("--verbosity", type=int, default=3)
    parser.add_argument("--until-eof", action="store_true", help="end with stdin, so that no starter leaves it behind")
    return parser.parse_args()


def parameters(options: argparse.Namespace) -> xllamacpp.CommonParams:
    params = xllamacpp.CommonParams()
    params.model.path = str(options.model)
    params.model_alias = {options.alias}
    params.hostnames, params.port = ["127.0.0.1"], options.port
    params.api_keys = options.api_key
    params.n_parallel = options.parallel
    params.kv_unified = options.unified
    params.n_ctx = options.ctx if options.unified else options.ctx * options.parallel
    params.n_gpu_layers = 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options.threads
    params.fit_params = params.ui = False
    params.endpoint_metrics = params.endpoint_props = params.endpoint_slots = True
    params.enable_reasoning = int(options.think)
    params.slot_save_path = options.slot_dir
    params.verbosity = options.verbosity
    for name, value in (
        ("sse_ping_interval", options.ping),
        ("cache_ram_mib", options.cache_ram),
        ("n_threads_http", options.http_threads),
        ("sleep_idle_seconds", options.sleep_idle),
    ):
        if value is not None:  # else llama.cpp's own default
            setattr(params, name, value)
    _set_task(params, options)
    return params


def _set_task(params: xllamacpp.CommonParams, options: argparse.Namespace) -> None:
    if options.embeddings or options.rerank:
        pooling = xllamacpp.llama_pooling_type
        params.embedding = True
        params.pooling_type = pooling.LLAMA_POOLING_TYPE_RANK if options.rerank else pooling.LLAMA_POOLING_TYPE_MEAN
    if options.draft:
        params.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE]
        params.speculative.draft.mparams.path = str(options.draft)
        params.speculative.draft.n_max = 8  # guessed tokens for each step; few, so that a stream keeps its pace


def main() -> None:
    options = arguments()
    server = xllamacpp.Server(parameters(options))
    print("READY", server.listening_address, flush=True)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # nobody reads stdout from here on: a full pipe would block
    if options.until_eof:
        sys.stdin.buffer.read()
        os._exit(0)  # at once: an orderly end waits for the requests under way
    threading.Event().wait()


if __name__ == "__main__":
    main()
