"""The command line and what it shows."""

import sys

# what the extras bring; anything else that is missing is a bug, and shown as one
OPTIONAL = (
    "accelerate", "diffusers", "filelock", "huggingface_hub", "jinja2", "PIL", "rich", "torchmetrics", "tqdm",
    "transformers", "typer",
)  # fmt: skip


def main() -> None:
    """The console script. Where a library of an extra is missing: one sentence and exit status 2."""
    try:
        from lrqdit.app.cli import app

        app()
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL:
            raise
        print(
            f'error: {error.name} is not installed; pip install ".[all]" in a checkout brings it',
            file=sys.stderr,
        )
        sys.exit(2)
