"""Serve a bundle through `transformers serve`, an OpenAI-compatible server, with a model name for each task.

Usage: python examples/serve_tasks.py BUNDLE [--port 8000]     (pip install 'transformers[serving]')

    curl localhost:8000/v1/completions -H 'content-type: application/json' \\
         -d '{"model": "code", "prompt": "def add(", "max_tokens": 20}'

One model is in memory. Requests run one after another, each through the neurons of the task that it names. The name
`whole` stands for the unpruned model.
"""

from __future__ import annotations

import argparse
import threading
from pathlib import Path
from typing import Any

from fastapi import HTTPException
from transformers import AutoTokenizer
from transformers.cli import serve
from transformers.cli.serving import model_manager

from fbn_prune.serving import Bundle, Served

WHOLE = "whole"


class TaskModel:
    """Stands for a model in the server; its `generate` runs through the neurons of one task."""

    def __init__(self, served: Served, task: str, turn: threading.Lock) -> None:
        self._served, self._task, self._turn = served, task, turn

    def generate(self, *arguments: Any, **more: Any) -> Any:
        """Wait for the running request to end, then generate."""
        with self._turn:
            if self._task == WHOLE:
                return self._served.model.generate(*arguments, **more)
            with self._served.networks(self._task):
                return self._served.model.generate(*arguments, **more)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._served.model, name)


def manager_of(bundle: Bundle) -> type[model_manager.ModelManager]:
    """Return a model manager for the server that offers only the bundle's tasks."""
    served, turn = bundle.serve(), threading.Lock()
    tokenizer = AutoTokenizer.from_pretrained(bundle.base.path)
    models = {name: TaskModel(served, name, turn) for name in (*served.names, WHOLE)}

    class TaskManager(model_manager.ModelManager):
        def load_model_and_processor(self, model: str, *_: Any, **__: Any) -> Any:
            name = model.partition("@")[0]
            if name not in models:
                raise HTTPException(
                    404, f"there is no task {name!r}; the tasks are {', '.join(models)}"
                )
            return models[name], tokenizer

        def get_model_modality(self, *_: Any, **__: Any) -> Any:
            return model_manager.Modality.LLM

        @staticmethod
        def get_gen_models(*_: Any, **__: Any) -> list[dict[str, Any]]:
            return [{"id": name, "object": "model", "owned_by": "bundle"} for name in models]

    return TaskManager


def main() -> None:
    """Start the server and run it until it is interrupted."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle")
    parser.add_argument("--host", default="localhost")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    # transformers creates its own manager, so replacing the class is the only way to pass a loaded model.
    model_manager.ModelManager = manager_of(Bundle.open(Path(options.bundle)))  # type: ignore[misc]
    serve.Serve(host=options.host, port=options.port)


if __name__ == "__main__":
    main()
