"""The engine flags after `--`: vLLM's own parser, and a refusal of every flag that this server would ignore or cannot honour."""

import json
import os
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from vllm.config import ModelConfig  # noqa: F401 — resolves the platform before the parser asks for it
from vllm.entrypoints.launchers.cli_args import FrontendArgs, make_arg_parser, validate_parsed_serve_args
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser

from trimtab.server.errors import Unsupported

__all__ = ["parse"]

# fmt: off
_HONOURED = frozenset({
    "chat_template", "chat_template_content_format", "default_chat_template_kwargs", "enable_auto_tool_choice",
    "enable_force_include_usage", "enable_log_deltas", "enable_log_outputs", "enable_per_request_metrics",
    "enable_prompt_tokens_details", "exclude_tools_when_tool_choice_none", "fingerprint_mode", "fingerprint_value",
    "log_error_stack", "lora_modules", "max_log_len", "response_role", "return_tokens_as_token_ids",
    "sse_keep_alive_interval", "tool_call_parser", "tool_parser_plugin", "tool_strict_level",
    "trust_request_chat_template", "trust_request_mm_kwargs",
})
# fmt: on
"""Flags of vLLM's front end that its serving code reads in our app too."""

_REFUSED = {
    "model_tag": "MODEL is the first argument of `trimtab serve`",
    "model": "MODEL is the first argument of `trimtab serve`",
    "served_model_name": "give it before `--`, to `trimtab serve`",
    "host": "give it before `--`, to `trimtab serve`",
    "port": "give it before `--`, to `trimtab serve`",
    "api_key": "give it before `--`, to `trimtab serve`, or in TRIMTAB_API_KEY",
    "headless": "there would be no server",
    "grpc": "there would be no HTTP server",
    "api_server_count": "bundles and proofs live in one front end; add replicas of the server instead",
    "enable_dbo": "a batch run in two slices loses the rows of its edits",
    "prefill_context_parallel_size": "it splits a prompt's rows over ranks, which loses their edits",
    "kv_transfer_config": "cache blocks from elsewhere carry no word of the edits in them",
    "ec_transfer_config": "it carries no word of the edits",
    "enable_elastic_ep": "workers that join later hold no bundles",
    "data_parallel_external_lb": "bundles are loaded through one front end",
    "data_parallel_hybrid_lb": "bundles are loaded through one front end",
    "tokenizer": "a bundle is made for one tokenizer, the model's own",
    "skip_tokenizer_init": "the OpenAI routes need the tokenizer",
    "load_format": "random weights are not the model that a bundle was made for",
}
"""Destination → why; `load_format` only for `dummy`."""

KVCACHE_SPACE = "VLLM_CPU_KVCACHE_SPACE"
DRAIN_SECONDS = 30


def parse(flags: Sequence[str], *, model: Path, served: str) -> tuple[Namespace, list[str]]:
    """vLLM's arguments for the model in folder `model`, and what was chosen for the caller, for people.

    Raises:
        Unsupported: a flag that vLLM does not know, or that would be ignored, or would break steering; all of them at once.
    """
    args = _parser().parse_args(list(flags))
    _refuse(args)
    args.model = str(model)
    args.served_model_name = [served]
    args.api_server_count = 1
    try:
        validate_parsed_serve_args(args)
    except (TypeError, ValueError) as e:
        raise Unsupported(f"engine flags: {e}") from e
    return args, _defaults(args, flags)


def _parser() -> FlexibleArgumentParser:
    class Parser(FlexibleArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise Unsupported(f"engine flags: {message}; `vllm serve --help=all` lists them")

    return make_arg_parser(Parser(prog="trimtab serve MODEL --", add_help=False))  # type: ignore[no-untyped-call]


def _refuse(args: Namespace) -> None:
    plain = vars(_parser().parse_args([]))
    front_end = FrontendArgs.__dataclass_fields__.keys() - _HONOURED
    refusals = []
    for name, value in vars(args).items():
        if value == plain.get(name) or (name == "load_format" and value != "dummy") or _harmless(name, value):
            continue
        flag = "--" + name.replace("_", "-")
        if name in _REFUSED:
            refusals.append(f"{flag} is refused: {_REFUSED[name]}")
        elif name in front_end:
            refusals.append(f"{flag} is refused: it is of vLLM's own web server, which is not served here")
    if refusals:
        raise Unsupported("engine flags: " + "; ".join(refusals))


def _harmless(name: str, value: Any) -> bool:
    return name in ("api_server_count", "prefill_context_parallel_size") and value == 1


def _defaults(args: Namespace, flags: Sequence[str]) -> list[str]:
    """Choices made where the caller made none."""
    chosen = []
    if not args.shutdown_timeout:
        args.shutdown_timeout = DRAIN_SECONDS
    if current_platform.is_cpu():
        if not os.environ.get(KVCACHE_SPACE) and args.kv_cache_memory_bytes is None:
            os.environ[KVCACHE_SPACE] = "2"
            chosen.append(f"{KVCACHE_SPACE}=2 (GiB)")
        if not any(flag.lstrip("-").replace("_", "-").endswith("enforce-eager") for flag in flags):
            args.enforce_eager = True
            chosen.append("--enforce-eager (compiling takes minutes on a CPU; --no-enforce-eager does it)")
        if args.dtype == "auto" and _is_float32(Path(args.model)):
            args.dtype = "float32"
            chosen.append("--dtype float32 (that of the weights, and of attribution; vLLM would make it bfloat16)")
    return chosen


def _is_float32(folder: Path) -> bool:
    config = json.loads((folder / "config.json").read_text())
    return bool(config.get("dtype", config.get("torch_dtype")) == "float32")
