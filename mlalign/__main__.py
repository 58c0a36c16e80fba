"""The command line: `mlalign VERB ...` or `python -m mlalign VERB ...`; a verb imports what it needs when it runs."""

import os
import sys
import time
from typing import Annotated

import typer

from mlalign.errors import UserError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)

ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, see mlalign/recipes.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Such as optimizer.lr=1e-4.")]


@app.callback()
def _root(local_rank: Annotated[int, typer.Option(hidden=True)] = 0) -> None:
    """Fine-tune an LLM on a task and align its middle layer across languages, in one run."""
    # The deepspeed launcher appends --local_rank to what it starts; LOCAL_RANK says the same.


@app.command()
def train(config: ConfigPath, overrides: Overrides = None) -> None:
    """Fine-tune and align; run the same command again to resume."""
    from mlalign.commands.train import train
    from mlalign.config import load

    train(load(config, overrides or []))


@app.command()
def inspect(config: ConfigPath, overrides: Overrides = None) -> None:
    """Print the first batches, decoded: what is masked, learned, padding, and pooled."""
    from mlalign.commands.inspect import inspect
    from mlalign.config import load

    inspect(load(config, overrides or []))


def main() -> None:
    """Run a verb. A user's mistake is one sentence on stderr and exit code 2."""
    try:
        app(standalone_mode=True)
    except UserError as error:
        rank = int(os.environ.get("RANK", 0))
        if rank:
            time.sleep(3)  # most mistakes are every rank's: let rank 0 say it, and its launcher end the others
        print(f"mlalign: error: {f'rank {rank}: ' if rank else ''}{error}", file=sys.stderr, flush=True)
        os._exit(2)  # not sys.exit: leaving a process group that others still use can hang


if __name__ == "__main__":
    main()
